/*
 * Lesson 5, both halves: what a seed asks for, step by step, and how the guest notes what it does. The
 * host half computes the same plan and writes it into the record, so that the checks know it too.
 */
#pragma once

#include "random.h"
#include "x86.h"

/* ---- ports between the halves ---- */

#define LAB_LOG 0x600     /* 32-bit write: the gva (= gpa) of struct log */
#define LAB_STAGE 0x604   /* 8-bit write: the end of a stage. The host half reads the log. */
#define LAB_VERDICT 0x605 /* 8-bit read, after write of a trial's number: is its entry dropped? */
#define LAB_PORTS 6

/* ---- what the guest notes in its own memory, without an exit ---- */

enum note_kind {
    NOTE_STEP,    /* detail: the number of the step that begins */
    NOTE_SPACE,   /* detail: the number of a space; root */
    NOTE_ENTRY,   /* root, gva; value: what its entry is now */
    NOTE_LOOK,    /* gva; value: the word that was read there */
    NOTE_INVLPG,  /* gva */
    NOTE_INVPCID, /* detail: type; gva; value: the PCID */
    NOTE_CR3,     /* value */
    NOTE_CR4,     /* value */
    NOTE_TRIAL,   /* detail: the number of the trial that begins */
    NOTE_TRY,     /* of a trial: value: the word that was read when it was over */
    NOTE_KINDS,
};

struct note {
    uint32_t kind, detail;
    uint64_t root, gva, value;
};

#define LOG_NOTES 4096
struct log {
    uint64_t count;
    struct note notes[LOG_NOTES];
};

/* ---- the plan ---- */

#define MEMORY_MIB 32
#define FRAMES_GPA (UINT64_C(16) << 20) /* above: frames for data, filled by the host half */
#define FRAMES 1024
#define SPACES 6
#define PCIDS 3        /* fewer than spaces */
#define PAGES 3        /* of each space, at the same gvas in all of them */
#define KERNEL_PAGES 4 /* the same in all spaces */

enum stage {
    STAGE_ENABLE = 1, /* PCIDs and global pages are switched on */
    STAGE_SWITCH,     /* from space to space */
    STAGE_REMAP,      /* one page of a space gets another frame */
    STAGE_FORGET,     /* all pages of a space do */
    STAGE_KERNEL,     /* one page of the kernel does, in all spaces */
    STAGE_KERNEL_ALL, /* all pages of the kernel do */
    STAGE_MIXED,      /* everything, in an order of the seed's */
    STAGE_TRIALS,     /* changes that are followed by too little, or by just enough */
};

enum step_kind {
    STEP_SWITCH, /* to the space */
    STEP_LOOK,   /* at all pages of the current space, the kernel's among them */
    STEP_REMAP,  /* page, of the space, gets this frame */
    STEP_FORGET, /* all pages of the space get frames, from this one on */
    STEP_KERNEL, /* page, of the kernel, gets this frame */
    STEP_KERNEL_ALL,
    STEP_END, /* of the stage */
};

struct step {
    enum step_kind kind;
    enum stage stage;
    unsigned space, page;
    uint64_t frame_gpa;
};

#define STEPS_MAX 200

struct plan {
    uint64_t cr3_caching; /* PWT, PCD or both: what the loader has left in CR3 */
    uint16_t pcid[PCIDS], trial_pcid[2];
    uint64_t page_gva[PAGES], kernel_gva, trial_gva, global_gva;
    uint64_t first_gpa[SPACES]; /* the frames that a space begins with, one for each page */
    uint64_t kernel_first_gpa;
    uint64_t trial_gpa[2];
    unsigned steps;
    struct step step[STEPS_MAX];
    uint64_t next_gpa;
    struct random random;
};

static inline uint64_t kernel_page_gva(const struct plan *plan, unsigned page) {
    return plan->kernel_gva + page * PAGE_SIZE;
}

/* A page somewhere in one of the 16 top-level slots of this group. */
static inline uint64_t plan_gva(struct plan *plan, unsigned group) {
    uint64_t slot = 1 + 16 * group + random_below(&plan->random, 15);
    uint64_t offset = random_below(&plan->random, UINT64_C(1) << 39) & ~(PAGE_SIZE - 1);
    /* Room behind it, so that a region never reaches the next slot; and in one page table. */
    return slot << 39 | (offset & ~(UINT64_C(0xf) << 35) & ~(UINT64_C(0xf) << 12));
}

/* So many frames in a row, used once. */
static inline uint64_t plan_frames(struct plan *plan, unsigned count) {
    uint64_t gpa = plan->next_gpa;
    plan->next_gpa += count * PAGE_SIZE;
    return gpa;
}

static inline void plan_pcids(struct plan *plan) {
    /* Far from each other, and from 0, which is the boot space's. */
    uint16_t pcid = (uint16_t)(1 + random_below(&plan->random, 700));
    for (unsigned i = 0; i < PCIDS; i++, pcid += (uint16_t)(1 + random_below(&plan->random, 600)))
        plan->pcid[i] = pcid;
    for (unsigned i = 0; i < 2; i++, pcid += (uint16_t)(1 + random_below(&plan->random, 600)))
        plan->trial_pcid[i] = pcid;
}

static inline void plan_step(struct plan *plan, enum stage stage, enum step_kind kind,
                             unsigned space, unsigned page) {
    static const unsigned frames[] = {[STEP_REMAP] = 1,
                                      [STEP_FORGET] = PAGES,
                                      [STEP_KERNEL] = 1,
                                      [STEP_KERNEL_ALL] = KERNEL_PAGES};
    unsigned count = kind <= STEP_KERNEL_ALL ? frames[kind] : 0;
    if (plan->steps < STEPS_MAX)
        plan->step[plan->steps++] =
            (struct step){kind, stage, space, page, count ? plan_frames(plan, count) : 0};
}

/* Go to the space, and look at its pages: now the TLB may hold all of them. */
static inline void plan_visit(struct plan *plan, enum stage stage, unsigned space) {
    plan_step(plan, stage, STEP_SWITCH, space, 0);
    plan_step(plan, stage, STEP_LOOK, space, 0);
}

static inline unsigned plan_page(struct plan *plan) {
    return (unsigned)random_below(&plan->random, PAGES);
}

static inline unsigned plan_kernel_page(struct plan *plan) {
    return (unsigned)random_below(&plan->random, KERNEL_PAGES);
}

/* The spaces in an order of no pattern. */
static inline void plan_shuffle(struct plan *plan, unsigned order[SPACES]) {
    for (unsigned i = 0; i < SPACES; i++)
        order[i] = i;
    for (unsigned i = SPACES - 1; i > 0; i--) {
        unsigned j = (unsigned)random_below(&plan->random, i + 1);
        unsigned last = order[i];
        order[i] = order[j];
        order[j] = last;
    }
}

/* To and fro between two, then through all, and back to one that may still have its PCID. */
static inline void plan_switch(struct plan *plan) {
    unsigned order[SPACES];
    plan_shuffle(plan, order);
    for (unsigned i = 0; i < 4; i++)
        plan_visit(plan, STAGE_SWITCH, order[i % 2]);
    for (unsigned i = 2; i < SPACES; i++) {
        plan_visit(plan, STAGE_SWITCH, order[i]);
        plan_visit(plan, STAGE_SWITCH, order[i - 1]);
    }
    plan_visit(plan, STAGE_SWITCH, order[0]);
    plan_step(plan, STAGE_SWITCH, STEP_END, 0, 0);
}

/* What is changed, a page (STEP_REMAP) or all of them (STEP_FORGET), belongs to the current space; to
 * another one that the TLB knows; and to one that has lost its PCID, since so many others ran. */
static inline void plan_changes(struct plan *plan, enum stage stage, enum step_kind kind) {
    unsigned order[SPACES];
    plan_shuffle(plan, order);
    plan_visit(plan, stage, order[0]);
    plan_step(plan, stage, kind, order[0], plan_page(plan));
    plan_step(plan, stage, STEP_LOOK, order[0], 0);
    plan_visit(plan, stage, order[1]);
    plan_step(plan, stage, kind, order[0], plan_page(plan));
    plan_step(plan, stage, STEP_LOOK, order[1], 0);
    plan_visit(plan, stage, order[0]);
    for (unsigned i = 2; i < 2 + PCIDS; i++)
        plan_visit(plan, stage, order[i]);
    plan_step(plan, stage, kind, order[0], plan_page(plan));
    plan_visit(plan, stage, order[0]);
    plan_step(plan, stage, STEP_END, 0, 0);
}

/* The kernel's pages come into being; then one changes, or all, while several PCIDs know them. */
static inline void plan_kernel(struct plan *plan, enum stage stage, enum step_kind kind) {
    unsigned order[SPACES];
    plan_shuffle(plan, order);
    plan_visit(plan, stage, order[0]);
    for (unsigned page = 0; kind == STEP_KERNEL && page < KERNEL_PAGES; page++)
        plan_step(plan, stage, STEP_KERNEL, order[0], page);
    plan_step(plan, stage, STEP_LOOK, order[0], 0);
    plan_visit(plan, stage, order[1]);
    plan_step(plan, stage, kind, order[1], plan_kernel_page(plan));
    plan_step(plan, stage, STEP_LOOK, order[1], 0);
    plan_visit(plan, stage, order[0]);
    plan_visit(plan, stage, order[2]);
    plan_step(plan, stage, STEP_END, 0, 0);
}

/* Mostly back to where it came from, as between a program and its server. */
static inline unsigned plan_next_space(struct plan *plan, unsigned current, unsigned before) {
    if (before != current && random_below(&plan->random, 2))
        return before;
    return (unsigned)(current + 1 + random_below(&plan->random, SPACES - 1)) % SPACES;
}

static inline void plan_mixed(struct plan *plan) {
    unsigned current = 0;
    unsigned before = 0;
    plan_visit(plan, STAGE_MIXED, current);
    for (unsigned i = 0; i < 24; i++) {
        unsigned other = (unsigned)random_below(&plan->random, SPACES);
        switch (random_below(&plan->random, 6)) {
        case 0: plan_step(plan, STAGE_MIXED, STEP_FORGET, other, 0); break;
        case 1: plan_step(plan, STAGE_MIXED, STEP_KERNEL, current, plan_kernel_page(plan)); break;
        case 2: plan_step(plan, STAGE_MIXED, STEP_KERNEL_ALL, current, 0); break;
        default: plan_step(plan, STAGE_MIXED, STEP_REMAP, other, plan_page(plan));
        }
        unsigned next = plan_next_space(plan, current, before);
        before = current;
        current = next;
        plan_visit(plan, STAGE_MIXED, current);
    }
    plan_step(plan, STAGE_MIXED, STEP_END, 0, 0);
}

static inline void plan_places(struct plan *plan) {
    plan->cr3_caching = (1 + random_below(&plan->random, 3)) << 3;
    plan_pcids(plan);
    for (unsigned i = 0; i < PAGES; i++)
        plan->page_gva[i] = plan_gva(plan, i);
    plan->kernel_gva = plan_gva(plan, PAGES);
    plan->global_gva = kernel_page_gva(plan, KERNEL_PAGES + 1);
    plan->trial_gva = plan_gva(plan, PAGES + 1);
    plan->next_gpa = FRAMES_GPA + PAGE_SIZE * random_below(&plan->random, FRAMES / 2);
    for (unsigned i = 0; i < SPACES; i++)
        plan->first_gpa[i] = plan_frames(plan, PAGES);
    plan->kernel_first_gpa = plan_frames(plan, KERNEL_PAGES);
    plan->trial_gpa[0] = plan_frames(plan, 1);
    plan->trial_gpa[1] = plan_frames(plan, 1);
}

/* Too large for a stack: into the caller's own. */
static inline void plan_make(struct plan *plan, uint64_t seed) {
    *plan = (struct plan){.random = random_stream(seed, 1)};
    plan_places(plan);
    plan_step(plan, STAGE_ENABLE, STEP_END, 0, 0);
    plan_switch(plan);
    plan_changes(plan, STAGE_REMAP, STEP_REMAP);
    plan_changes(plan, STAGE_FORGET, STEP_FORGET);
    plan_kernel(plan, STAGE_KERNEL, STEP_KERNEL);
    plan_kernel(plan, STAGE_KERNEL_ALL, STEP_KERNEL_ALL);
    plan_mixed(plan);
}
