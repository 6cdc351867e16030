/* What the two halves of this benchmark agree on. */
#pragma once

#define LAB_SOURCE 0x500 /* one byte, once: enum source */
#define LAB_GPA UINT64_C(0x20000000)
#define LAB_PAGES UINT64_C(16384)

/* Who makes the pages of the slot at LAB_GPA, at the first touch of each. */
enum source {
    SOURCE_ANONYMOUS, /* the kernel */
    SOURCE_PAGE,      /* a thread of the VMM's, by userfaultfd */
    SOURCE_BLOCK,     /* the same, 64 KiB at a time */
};
