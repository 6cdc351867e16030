/* Lesson 5, both halves: the trials. A page's entry changes, something is done, and the page is read. */
#pragma once

#include <stdbool.h>

#define TRIES 3 /* of each: an interrupt of the host's may come in between, and empty the TLB */

enum trial_act {
    ACT_NOTHING,
    ACT_INVLPG,
    ACT_INVLPG_BESIDE,
    ACT_INVLPG_AWAY, /* from another space */
    ACT_ADDRESS,     /* INVPCID of the page's own PCID, or of another one */
    ACT_ADDRESS_OTHER,
    ACT_CONTEXT,
    ACT_CONTEXT_OTHER,
    ACT_ALL,
    ACT_ALL_AND_GLOBALS,
    ACT_CR3_KEEP,
    ACT_CR3,
    ACT_AWAY, /* to another space, and back */
    ACT_PGE,  /* CR4.PGE to 0 and back to 1 */
};

static const struct trial {
    const char *name;
    enum trial_act act;
    bool is_global;
} trials[] = {
    {"nothing", ACT_NOTHING, false},
    {"INVLPG of the next page", ACT_INVLPG_BESIDE, false},
    {"INVLPG", ACT_INVLPG, false},
    {"INVPCID 0, another PCID", ACT_ADDRESS_OTHER, false},
    {"INVPCID 0", ACT_ADDRESS, false},
    {"INVPCID 1, another PCID", ACT_CONTEXT_OTHER, false},
    {"INVPCID 1", ACT_CONTEXT, false},
    {"CR3 with bit 63", ACT_CR3_KEEP, false},
    {"CR3 without bit 63", ACT_CR3, false},
    {"CR3 to another PCID and back", ACT_AWAY, false},
    {"INVLPG under another PCID", ACT_INVLPG_AWAY, false},
    {"global page, nothing", ACT_NOTHING, true},
    {"global page, INVLPG", ACT_INVLPG, true},
    {"global page, INVLPG under another PCID", ACT_INVLPG_AWAY, true},
    {"global page, INVPCID 0", ACT_ADDRESS, true},
    {"global page, INVPCID 1", ACT_CONTEXT, true},
    {"global page, INVPCID 3", ACT_ALL, true},
    {"global page, INVPCID 2", ACT_ALL_AND_GLOBALS, true},
    {"global page, CR3 without bit 63", ACT_CR3, true},
    {"global page, CR4.PGE off and on", ACT_PGE, true},
};

#define TRIALS (sizeof trials / sizeof *trials)
