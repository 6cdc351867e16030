/*
 * What a seed asks for in lesson 2: the addresses, frames and accesses of each stage. Guest half
 * and host half compute the same plan; the host half also writes it into the record, so the checks
 * know it too.
 */
#pragma once

#include "random.h"
#include "x86.h"

/* Ports between the halves. */
#define LAB_CHECKPOINT 0x600 /* one byte: "look at me now", enum checkpoint */
#define LAB_REPORT 0x604     /* three 32-bit writes: enum report, value 31:0, value 63:32 */

enum checkpoint {
    CHECKPOINT_SMALL = 1, /* 4 KiB pages are mapped */
    CHECKPOINT_LARGE,     /* a 2 MiB page is mapped */
    CHECKPOINT_SPLIT,     /* it is split */
    CHECKPOINT_REPLACED,  /* one of its 512 pages has another frame */
    CHECKPOINT_PROTECTED, /* pages with permissions of their own */
    CHECKPOINT_LAZY,      /* pages that came on demand */
    CHECKPOINT_CLEAN,     /* accessed and dirty bits are harvested */
    CHECKPOINT_REMAPPED,  /* a page has moved to another frame */
    CHECKPOINT_SPACE_A,   /* the same gva in two address spaces */
    CHECKPOINT_SPACE_B,
};

enum report {
    REPORT_SMALL_WORD = 1, /* what the guest read from each 4 KiB page */
    REPORT_LARGE_WORD,
    REPORT_SPLIT_WORD,    /* and from the replaced page inside */
    REPORT_FAULT_ADDRESS, /* a page fault: CR2, the error code, and what the student made of it */
    REPORT_FAULT_CODE,
    REPORT_FAULT_DECODED,
    REPORT_ATTEMPT,  /* an access of the permissions stage is over: 0 done, 1 faulted */
    REPORT_STRAY,    /* an access that is not lazy_fault's business: 1 if it was caught */
    REPORT_ACCESSED, /* a harvest: pages read or written, then pages written */
    REPORT_DIRTY,
    REPORT_BEFORE_REMAP, /* the first word of a page, before and after */
    REPORT_AFTER_REMAP,
    REPORT_SPACE_A_WORD,
    REPORT_SPACE_B_WORD,
};

/* The decoded error code, as reported. */
#define DECODED_PRESENT 1
#define DECODED_WRITE 2
#define DECODED_USER 4
#define DECODED_FETCH 8

#define MEMORY_MIB 32
#define FRAMES_GPA (UINT64_C(16) << 20) /* above: frames for data, filled by the host half */
#define SMALL_PAGES 6
#define LAZY_PAGES 64
#define LAZY_TOUCHES 12
#define HARVEST_PAGES 16
#define HARVEST_ROUNDS 2

struct plan {
    uint64_t small_gva[SMALL_PAGES], small_gpa[SMALL_PAGES];
    uint64_t large_gva, large_gpa;
    uint64_t replaced_page, replaced_gpa; /* a page number inside the large page, its new frame */
    uint64_t user_code_gva, user_stack_gva;
    uint64_t read_only_gva, no_execute_gva, kernel_gva, user_gva;
    uint64_t read_only_gpa, no_execute_gpa, kernel_gpa, user_gpa;
    uint64_t lazy_gva, lazy_touch[LAZY_TOUCHES]; /* page numbers, some of them repeated */
    uint64_t harvest_gva, harvest_gpa;
    uint64_t read_set[HARVEST_ROUNDS], write_set[HARVEST_ROUNDS]; /* bit i: page i */
    uint64_t remap_gva, remap_gpa[2];
    uint64_t shared_gva, shared_gpa[2];
};

/* A page somewhere in one of the 16 top-level slots of this group. Groups keep stages apart. */
static inline uint64_t plan_gva(struct random *random, unsigned group, uint64_t alignment) {
    uint64_t slot = 1 + 16 * group + random_below(random, 15);
    uint64_t offset = random_below(random, UINT64_C(1) << 39) & ~(alignment - 1);
    /* Room behind it, so that a region never reaches the next slot. */
    return slot << 39 | (offset & ~(UINT64_C(0xf) << 35));
}

/* The next free frame for data; frames are used once, in an order of no pattern. */
static inline uint64_t plan_frame(struct random *random, uint64_t *next_gpa) {
    *next_gpa += PAGE_SIZE * (1 + random_below(random, 4));
    return *next_gpa;
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    uint64_t next_gpa = FRAMES_GPA;
    struct plan plan;
    /* The first four share tables: neighbours in one page table, then in one PD, then in one PDPT. */
    plan.small_gva[0] = plan_gva(&random, 0, PAGE_SIZE) & ~(UINT64_C(0x3) << 12);
    plan.small_gva[1] = plan.small_gva[0] + PAGE_SIZE;
    plan.small_gva[2] = plan.small_gva[0] ^ UINT64_C(1) << 21;
    plan.small_gva[3] = plan.small_gva[0] ^ UINT64_C(1) << 30;
    plan.small_gva[4] = plan_gva(&random, 1, PAGE_SIZE);
    plan.small_gva[5] = plan_gva(&random, 2, PAGE_SIZE);
    for (unsigned i = 0; i < SMALL_PAGES; i++)
        plan.small_gpa[i] = plan_frame(&random, &next_gpa);
    plan.large_gva = plan_gva(&random, 3, LARGE_PAGE_SIZE);
    plan.large_gpa = FRAMES_GPA + LARGE_PAGE_SIZE * (1 + random_below(&random, 6));
    plan.replaced_page = random_below(&random, 512);
    plan.replaced_gpa = plan_frame(&random, &next_gpa);
    plan.user_code_gva = plan_gva(&random, 4, PAGE_SIZE);
    plan.user_stack_gva = plan_gva(&random, 5, PAGE_SIZE);
    plan.read_only_gva = plan_gva(&random, 6, PAGE_SIZE);
    plan.read_only_gpa = plan_frame(&random, &next_gpa);
    plan.no_execute_gva = plan_gva(&random, 7, PAGE_SIZE);
    plan.no_execute_gpa = plan_frame(&random, &next_gpa);
    plan.kernel_gva = plan_gva(&random, 8, PAGE_SIZE);
    plan.kernel_gpa = plan_frame(&random, &next_gpa);
    plan.user_gva = plan_gva(&random, 9, PAGE_SIZE);
    plan.user_gpa = plan_frame(&random, &next_gpa);
    plan.lazy_gva = plan_gva(&random, 10, PAGE_SIZE);
    for (unsigned i = 0; i < LAZY_TOUCHES; i++)
        plan.lazy_touch[i] =
            i % 3 == 2 ? plan.lazy_touch[i - 2] : random_below(&random, LAZY_PAGES);
    plan.harvest_gva = plan_gva(&random, 11, PAGE_SIZE);
    plan.harvest_gpa = next_gpa + PAGE_SIZE;
    next_gpa += PAGE_SIZE * HARVEST_PAGES;
    for (unsigned round = 0; round < HARVEST_ROUNDS; round++) {
        plan.read_set[round] = 1 + random_below(&random, 0xffff);
        plan.write_set[round] = 1 + random_below(&random, 0xffff);
    }
    plan.remap_gva = plan_gva(&random, 12, PAGE_SIZE);
    plan.shared_gva = plan_gva(&random, 13, PAGE_SIZE);
    for (unsigned i = 0; i < 2; i++) {
        plan.remap_gpa[i] = plan_frame(&random, &next_gpa);
        plan.shared_gpa[i] = plan_frame(&random, &next_gpa);
    }
    return plan;
}
