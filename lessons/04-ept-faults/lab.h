/*
 * What the two halves of lesson 4 agree on: which gpas there are, and what the guest reads and writes
 * there. Both compute it from the seed. The guest plays it stage by stage, in ring 3; around each stage
 * it tells the host half, through two ports.
 */
#pragma once

#include <stdbool.h>

#include "random.h"
#include "x86.h"

#define LAB_SCRIPT \
    0x600 /* 32 bits: the gpa of the script, the page where the guest keeps its steps */
#define LAB_BEGIN 0x604 /* one byte: this stage begins, enum stage */
#define LAB_END 0x605   /* one byte: the guest has made all accesses of this stage */

enum stage {
    STAGE_TOUCH,   /* a slot over memory that nobody has used yet */
    STAGE_DEVICE,  /* a gpa that is no memory and never will be */
    STAGE_ABSENT,  /* gpas that become memory when the guest waits for them */
    STAGE_PAGE,    /* memory whose pages arrive on demand, one by one */
    STAGE_BLOCK,   /* and 64 KiB at a time */
    STAGE_COW,     /* read-only slots that share one frame */
    STAGE_SETTLE,  /* every page of a slot is written to */
    STAGE_DIRTY,   /* who has written where? */
    STAGE_DIRTY_2, /* and since then? */
    STAGE_DIRTY_3,
    STAGE_PLACED,  /* a slot, */
    STAGE_MOVED,   /* moved, */
    STAGE_REMOVED, /* and removed */
    STAGE_GIVEN,   /* memory that the guest has used */
    STAGE_TAKEN,   /* and from which the host has taken pages away */
    STAGES,
};

static const char *const stage_names[STAGES] = {
    [STAGE_TOUCH] = "touch",     [STAGE_DEVICE] = "device", [STAGE_ABSENT] = "absent",
    [STAGE_PAGE] = "page",       [STAGE_BLOCK] = "block",   [STAGE_COW] = "copy on write",
    [STAGE_SETTLE] = "settle",   [STAGE_DIRTY] = "dirty",   [STAGE_DIRTY_2] = "dirty 2",
    [STAGE_DIRTY_3] = "dirty 3", [STAGE_PLACED] = "placed", [STAGE_MOVED] = "moved",
    [STAGE_REMOVED] = "removed", [STAGE_GIVEN] = "given",   [STAGE_TAKEN] = "taken",
};

#define ABSENT_REGIONS 3
#define COW_REGIONS 6
#define COW_WRITTEN 3

enum region_name {
    REGION_TOUCH,
    REGION_DEVICE,
    REGION_ABSENT,
    REGION_PAGE = REGION_ABSENT + ABSENT_REGIONS,
    REGION_BLOCK,
    REGION_COW,
    REGION_DIRTY = REGION_COW + COW_REGIONS,
    REGION_MOVING,
    REGION_TAKEN,
    REGION_MOVED, /* not a region of its own: where REGION_MOVING moves to */
    REGIONS,
};

/* All of them lie in one GiB of gpas, each in 32 MiB of its own. RAM ends far below. */
#define REGIONS_GPA (UINT64_C(1) << 30)
#define REGIONS_SIZE (UINT64_C(1) << 30)

#define BLOCK_PAGES UINT64_C(16) /* 64 KiB */
#define BLOCK_SIZE (BLOCK_PAGES * PAGE_SIZE)
#define BLOCKS 5 /* of REGION_BLOCK; the first and the last lie in it with a part */
#define STEPS_MAX 128
#define TAKEN_PAGES 5

/* One access of eight bytes. */
struct step {
    uint64_t gpa;
    uint64_t is_write;
    uint64_t value; /* what is written; or, in the guest's script, what was read */
};

struct plan {
    struct {
        uint64_t gpa, pages;
    } regions[REGIONS];
    uint64_t early[2]; /* pages of REGION_BLOCK that are there from the start, as a bitmap */
    uint64_t taken;    /* pages of REGION_TAKEN that the host takes away */
    unsigned steps[STAGES];
    struct step step[STAGES][STEPS_MAX];
};

/* What is in the memory of a page before the guest writes there: a word for each gpa. */
static inline uint64_t content_word(uint64_t seed, uint64_t gpa) {
    struct random words = random_stream(seed ^ gpa, 2);
    return random_next(&words);
}

static inline void plan_step(struct plan *plan, struct random *random, enum stage stage,
                             uint64_t gpa, bool is_write) {
    if (plan->steps[stage] < STEPS_MAX)
        plan->step[stage][plan->steps[stage]++] =
            (struct step){gpa, is_write, is_write ? random_next(random) : 0};
}

/* A word somewhere in this page of a region. */
static inline uint64_t plan_word(const struct plan *plan, struct random *random,
                                 enum region_name region, uint64_t page) {
    return plan->regions[region].gpa + page * PAGE_SIZE + 8 * random_below(random, PAGE_SIZE / 8);
}

static inline uint64_t plan_any_word(const struct plan *plan, struct random *random,
                                     enum region_name region) {
    return plan_word(plan, random, region, random_below(random, plan->regions[region].pages));
}

static inline void plan_regions(struct plan *plan, struct random *random) {
    for (unsigned i = 0; i < REGIONS; i++) {
        uint64_t offset = (UINT64_C(32) << 20) * i + PAGE_SIZE * random_below(random, 4096);
        plan->regions[i].gpa = REGIONS_GPA + offset;
        plan->regions[i].pages = 1;
    }
    plan->regions[REGION_TOUCH].pages = 8;
    for (unsigned i = 0; i < ABSENT_REGIONS; i++)
        plan->regions[REGION_ABSENT + i].pages = 2 + random_below(random, 3);
    plan->regions[REGION_PAGE].pages = 48 + random_below(random, 32);
    uint64_t head = 4 + random_below(random, 9); /* pages before and behind the whole blocks */
    uint64_t tail = 4 + random_below(random, 9);
    plan->regions[REGION_BLOCK].gpa =
        (plan->regions[REGION_BLOCK].gpa & ~(BLOCK_SIZE - 1)) + (BLOCK_PAGES - head) * PAGE_SIZE;
    plan->regions[REGION_BLOCK].pages = head + (BLOCKS - 2) * BLOCK_PAGES + tail;
    plan->regions[REGION_DIRTY].pages = 70 + random_below(random, 50);
    plan->regions[REGION_MOVING].pages = 3 + random_below(random, 4);
    plan->regions[REGION_MOVED].pages = plan->regions[REGION_MOVING].pages;
    plan->regions[REGION_TAKEN].pages = 16;
}

static inline void plan_touch(struct plan *plan, struct random *random) {
    for (unsigned i = 0; i < 6; i++) {
        uint64_t gpa = plan_any_word(plan, random, REGION_TOUCH);
        for (unsigned access = 0; access < 3; access++) /* read, write, read */
            plan_step(plan, random, STAGE_TOUCH, gpa, access == 1);
    }
    uint64_t device_gpa = plan_any_word(plan, random, REGION_DEVICE);
    uint64_t times = 4 + random_below(random, 4);
    for (unsigned i = 0; i < times; i++)
        plan_step(plan, random, STAGE_DEVICE, device_gpa, i == 1 || random_below(random, 2));
}

/* In each region the first access decides what the VMM must do: the first is a write, the second a
 * read, the third what the seed says. Then the same word, and the last page. */
static inline void plan_absent(struct plan *plan, struct random *random) {
    uint64_t first_gpa[ABSENT_REGIONS];
    for (unsigned i = 0; i < ABSENT_REGIONS; i++) {
        bool is_write = i == 0 || (i == 2 && random_below(random, 2));
        first_gpa[i] = plan_word(plan, random, REGION_ABSENT + i, 0);
        plan_step(plan, random, STAGE_ABSENT, first_gpa[i], is_write);
    }
    for (unsigned i = 0; i < ABSENT_REGIONS; i++) {
        uint64_t last = plan->regions[REGION_ABSENT + i].pages - 1;
        uint64_t gpa = plan_word(plan, random, REGION_ABSENT + i, last);
        plan_step(plan, random, STAGE_ABSENT, first_gpa[i], false);
        plan_step(plan, random, STAGE_ABSENT, gpa, false);
        plan_step(plan, random, STAGE_ABSENT, gpa, true);
        plan_step(plan, random, STAGE_ABSENT, gpa, false);
        plan_step(plan, random, STAGE_ABSENT, gpa ^ 8, false);
    }
}

/* Every third access goes to a page that has been touched before. */
static inline void plan_page(struct plan *plan, struct random *random) {
    uint64_t touched[8];
    for (unsigned i = 0; i < 24; i++) {
        uint64_t page = random_below(random, plan->regions[REGION_PAGE].pages);
        if (i % 3 == 2)
            page = touched[random_below(random, i / 3 + 1)];
        else if (i % 3 == 0)
            touched[i / 3] = page;
        uint64_t gpa = plan_word(plan, random, REGION_PAGE, page);
        bool is_write = i == 1 || (i > 1 && random_below(random, 2));
        plan_step(plan, random, STAGE_PAGE, gpa, is_write);
    }
}

/* The pages of a block that lie in REGION_BLOCK: the first one's number in the region, and how many. */
static inline uint64_t plan_block(const struct plan *plan, unsigned block, uint64_t *pages) {
    uint64_t gpa = plan->regions[REGION_BLOCK].gpa;
    uint64_t head = BLOCK_PAGES - (gpa / PAGE_SIZE) % BLOCK_PAGES;
    uint64_t tail = plan->regions[REGION_BLOCK].pages - head - (BLOCKS - 2) * BLOCK_PAGES;
    *pages = block == 0 ? head : block == BLOCKS - 1 ? tail : BLOCK_PAGES;
    return block == 0 ? 0 : head + (block - 1) * BLOCK_PAGES;
}

/* In each block one page is there early. One block in the middle is not touched but for this page. */
static inline void plan_blocks(struct plan *plan, struct random *random) {
    unsigned order[BLOCKS] = {0, 1, 2, 3, 4};
    uint64_t spared = 1 + random_below(random, BLOCKS - 2);
    for (unsigned i = BLOCKS; i > 1; i--) {
        unsigned j = (unsigned)random_below(random, i);
        unsigned other = order[j];
        order[j] = order[i - 1];
        order[i - 1] = other;
    }
    for (unsigned i = 0; i < BLOCKS; i++) {
        uint64_t pages;
        uint64_t first = plan_block(plan, order[i], &pages);
        uint64_t early = random_below(random, pages);
        plan->early[(first + early) / 64] |= UINT64_C(1) << (first + early) % 64;
        for (unsigned access = 0; order[i] != spared && access < 4; access++) {
            uint64_t page = (early + 1 + random_below(random, pages - 1)) % pages;
            uint64_t gpa = plan_word(plan, random, REGION_BLOCK, first + page);
            plan_step(plan, random, STAGE_BLOCK, gpa, random_below(random, 2));
        }
        plan_step(plan, random, STAGE_BLOCK, plan_word(plan, random, REGION_BLOCK, first + early),
                  false);
    }
}

static inline void plan_cow(struct plan *plan, struct random *random) {
    uint64_t start = random_below(random, COW_REGIONS);
    uint64_t stride = random_below(random, 2) ? 1 : COW_REGIONS - 1;
    uint64_t offset = 8 * random_below(random, PAGE_SIZE / 8);
    for (unsigned i = 0; i < COW_REGIONS; i++)
        plan_step(plan, random, STAGE_COW, plan->regions[REGION_COW + i].gpa + offset, false);
    for (unsigned i = 0; i < COW_WRITTEN; i++) {
        enum region_name region = REGION_COW + (unsigned)((start + i * stride) % COW_REGIONS);
        uint64_t gpa = plan->regions[region].gpa + offset;
        plan_step(plan, random, STAGE_COW, gpa, true);
        plan_step(plan, random, STAGE_COW, gpa, false);
        plan_step(plan, random, STAGE_COW, gpa ^ 8, false);
        plan_step(plan, random, STAGE_COW, gpa ^ 16, true);
    }
    for (unsigned i = 0; i < COW_REGIONS; i++) {
        plan_step(plan, random, STAGE_COW, plan->regions[REGION_COW + i].gpa + offset, false);
        plan_step(plan, random, STAGE_COW, (plan->regions[REGION_COW + i].gpa + offset) ^ 16,
                  false);
    }
}

/* Later rounds write to some of the pages that earlier ones have written to. And before all, each page is
 * written to, since a page that KVM maps for a read may be in the log, too: KVM maps it writable. */
static inline void plan_dirty(struct plan *plan, struct random *random) {
    uint64_t gpa[10] = {0};
    for (unsigned round = 0; round < 3; round++)
        for (unsigned i = 0; i < 10; i++) {
            bool is_again = round > 0 && i % 3 == 0;
            gpa[i] = is_again ? gpa[i] ^ 8 : plan_any_word(plan, random, REGION_DIRTY);
            plan_step(plan, random, STAGE_DIRTY + round, gpa[i], true);
            plan_step(plan, random, STAGE_DIRTY + round, plan_any_word(plan, random, REGION_DIRTY),
                      false);
        }
    for (uint64_t page = 0; page < plan->regions[REGION_DIRTY].pages; page++)
        plan_step(plan, random, STAGE_SETTLE, plan_word(plan, random, REGION_DIRTY, page), true);
}

static inline void plan_move(struct plan *plan, struct random *random) {
    uint64_t distance = plan->regions[REGION_MOVED].gpa - plan->regions[REGION_MOVING].gpa;
    uint64_t gpa[4];
    for (unsigned i = 0; i < 4; i++) {
        gpa[i] = plan_any_word(plan, random, REGION_MOVING);
        plan_step(plan, random, STAGE_PLACED, gpa[i], i % 2);
        plan_step(plan, random, STAGE_PLACED, gpa[i], false);
    }
    for (unsigned i = 0; i < 4; i++) {
        plan_step(plan, random, STAGE_MOVED, gpa[i] + distance, false);
        plan_step(plan, random, STAGE_MOVED, gpa[i], i % 2); /* where it was */
        plan_step(plan, random, STAGE_MOVED, gpa[i] + distance, false);
    }
    for (unsigned i = 0; i < 3; i++)
        plan_step(plan, random, STAGE_REMOVED, gpa[i] + distance, i % 2);
}

/* Neighbours are taken away. The guest misses the middle one first, and one beside it never: who gives
 * back more than is missed is seen. */
static inline void plan_taken(struct plan *plan, struct random *random) {
    static const uint8_t orders[2][TAKEN_PAGES] = {{2, 0, 4, 1, 3}, {2, 4, 0, 3, 1}};
    const uint8_t *order = orders[random_below(random, 2)];
    uint64_t pages = plan->regions[REGION_TAKEN].pages;
    uint64_t start = random_below(random, pages - TAKEN_PAGES + 1);
    uint64_t gpa[16];
    for (unsigned i = 0; i < 16; i++) {
        uint64_t page = i < TAKEN_PAGES ? order[i] : i;
        gpa[i] = plan_word(plan, random, REGION_TAKEN, (start + page) % pages);
        plan_step(plan, random, STAGE_GIVEN, gpa[i], true);
        if (i < TAKEN_PAGES)
            plan->taken |= UINT64_C(1) << (start + page);
    }
    for (unsigned i = 0; i < TAKEN_PAGES - 1; i++) {
        plan_step(plan, random, STAGE_TAKEN, gpa[TAKEN_PAGES + i], false); /* was not taken */
        plan_step(plan, random, STAGE_TAKEN, gpa[i], i == 1 || (i > 1 && random_below(random, 2)));
        plan_step(plan, random, STAGE_TAKEN, gpa[i], false);
        plan_step(plan, random, STAGE_TAKEN, gpa[i] ^ 8, false);
    }
}

/* Into a plan that is all zeros. */
static inline void plan_make(struct plan *plan, uint64_t seed) {
    struct random random = random_stream(seed, 1);
    plan_regions(plan, &random);
    plan_touch(plan, &random);
    plan_absent(plan, &random);
    plan_page(plan, &random);
    plan_blocks(plan, &random);
    plan_cow(plan, &random);
    plan_dirty(plan, &random);
    plan_move(plan, &random);
    plan_taken(plan, &random);
}
