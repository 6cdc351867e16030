/*
 * What a device that is a process may do that it should not: lesson 11 and the tests choose one by
 * its name, with `--append=device=NAME`.
 */
#pragma once

enum behaviour {
    DEVICE_GOOD,
    DEVICE_DIES,      /* when it is to compute */
    DEVICE_HANGS,     /* the same */
    DEVICE_MUMBLES,   /* what is in its answers is garbage */
    DEVICE_BABBLES,   /* and what it sends is no message at all */
    DEVICE_IS_SILENT, /* and not at all */
    DEVICE_BOASTS,    /* claims registers beyond the end of its file */
    DEVICE_SHRINKS,   /* its file may become smaller, and does */
    DEVICE_STRAYS,    /* wants its doorbell outside of its BAR */
    DEVICE_STORMS,    /* interrupts without end */
    DEVICE_ASKS,      /* asks the VMM to move data for it, outside of its windows */
    DEVICE_SCRIBBLES, /* writes to all of the file that it was given a part of */
    DEVICE_IDLES,     /* takes a second for a transfer */
    BEHAVIOURS,
};

static const char *const behaviour_names[BEHAVIOURS] = {
    [DEVICE_GOOD] = "good",       [DEVICE_DIES] = "dies",       [DEVICE_HANGS] = "hangs",
    [DEVICE_MUMBLES] = "mumbles", [DEVICE_BABBLES] = "babbles", [DEVICE_IS_SILENT] = "silent",
    [DEVICE_BOASTS] = "boasts",   [DEVICE_SHRINKS] = "shrinks", [DEVICE_STRAYS] = "strays",
    [DEVICE_STORMS] = "storms",   [DEVICE_ASKS] = "asks",       [DEVICE_SCRIBBLES] = "scribbles",
    [DEVICE_IDLES] = "idles",
};
