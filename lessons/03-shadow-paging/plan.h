/*
 * What the two halves of lesson 3 agree on: the inner machine, where its memory really lies, and what
 * its program is told to do. The seed decides it all.
 *
 * The inner machine runs inside the guest, in ring 3: the guest is its hypervisor. Addresses of three
 * kinds meet here. An inner gva is what its program uses, an inner gpa is where its memory begins at
 * 0 and has no holes, and a gpa is the guest's own. Its page tables, 4 levels with pages of 4 KiB,
 * lead from the first to the second. A table of the guest's, frame_gpa below, leads to the third.
 */
#pragma once

#include "random.h"
#include "x86.h"

/* Ports between the halves. */
#define LAB_POLICY 0x600 /* one byte, enum policy: the inner machine is to be as new */
#define LAB_TRAP 0x604   /* 32 bits, the gpa of a struct trap: one of its traps has been served */
#define LAB_OVER 0x608   /* one byte: its program has come to the end of the script */

/* What becomes of a shadow when the inner program writes to its tables and when it loads CR3. */
enum policy {
    POLICY_DROP,   /* each write to a table is emulated; a CR3 load drops all shadows */
    POLICY_CACHE,  /* the same, but a CR3 load keeps them for when the root returns */
    POLICY_RESYNC, /* as before, but a table of level 1 may be out of sync until INVLPG or CR3 */
    POLICIES
};

/* What has been done about a trap. */
enum served {
    SERVED_MISS,
    SERVED_REFLECTED,
    SERVED_WRITE,
    SERVED_UNSYNC,
    SERVED_INVLPG,
    SERVED_CR3
};

struct trap {
    uint64_t vector, error_code, cr2;
    uint64_t served; /* enum served */
};

/* ---- the program: it reads operations and writes results, one for each ---- */

enum op_kind { OP_READ, OP_WRITE, OP_EXECUTE, OP_LOAD_CR3, OP_INVLPG, OP_END };

struct op {
    uint64_t kind, gva; /* inner; of OP_LOAD_CR3 the root, an inner gpa */
    uint64_t value;     /* what is to be written */
};

struct result {
    uint64_t value; /* what was read */
    uint64_t error; /* the error code of the page fault that the inner CPU took; 0: it took none */
    uint64_t cr2;   /* the address that it gave, if it took one */
};

#define OPS_MAX 160
struct script {
    uint64_t results_gva;
    struct op op[OPS_MAX];
};
struct results {
    uint64_t done; /* operations so far */
    struct result of[OPS_MAX];
};
_Static_assert(sizeof(struct script) <= PAGE_SIZE && sizeof(struct results) <= PAGE_SIZE,
               "each is one page of the inner machine");

/* ---- its memory ---- */

#define INNER_PAGES 64
#define SPACES 3      /* inner address spaces */
#define DATA_PAGES 10 /* a place for each in every space, see enum place */
#define EXTRA_PAGES 8 /* mapped nowhere at the start */

/* What an inner page is for. The tables come first. */
enum role {
    ROLE_ROOT = 0, /* the PML4 of each space, then the tables of its data region */
    ROLE_PDPT = ROLE_ROOT + SPACES,
    ROLE_PD = ROLE_PDPT + SPACES,
    ROLE_PT = ROLE_PD + SPACES,
    ROLE_SHARED_PDPT = ROLE_PT + SPACES, /* the tables of the region that all spaces share */
    ROLE_SHARED_PD,
    ROLE_SHARED_PT,
    ROLE_SPARE_PT, /* no table yet */
    TABLES,
    ROLE_CODE = TABLES,
    ROLE_STACK,
    ROLE_SCRIPT,
    ROLE_RESULTS,
    ROLE_DATA,
    ROLE_EXTRA = ROLE_DATA + SPACES * DATA_PAGES,
    ROLES = ROLE_EXTRA + EXTRA_PAGES
};
_Static_assert(ROLES <= INNER_PAGES, "there is memory for all of them");

/* The pages of the data region, in the order of their inner gva. */
enum place {
    PLACE_A, /* four that ring 3 may read and write */
    PLACE_B,
    PLACE_C,
    PLACE_D,
    PLACE_READ_ONLY,
    PLACE_SUPERVISOR, /* not for ring 3 */
    PLACE_NO_EXECUTE,
    PLACE_CODE,    /* has a function */
    PLACE_BEYOND,  /* its entry points beyond the inner machine's memory */
    PLACE_MISSING, /* not present */
};

struct plan {
    uint64_t inner_gpa[ROLES];       /* where the page of each role is, */
    uint64_t frame_gpa[INNER_PAGES]; /* and where the inner page of each number really is */
    uint64_t shared_gva;             /* code, stack, script, results; then all the tables */
    uint64_t data_gva;               /* the same in all spaces, with other pages behind it */
};

#define MEMORY_MIB 32
#define FRAMES_GPA (UINT64_C(16) << 20) /* above: the inner machine's memory, in no order */
#define FRAMES 128

/* The numbers from 0 to count - 1, shuffled. */
static inline void numbers_shuffle(struct random *random, uint64_t *numbers, unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        uint64_t other = random_below(random, i + 1);
        numbers[i] = numbers[other];
        numbers[other] = i;
    }
}

static inline void plan_memory(struct random *random, struct plan *plan) {
    uint64_t number[INNER_PAGES];
    uint64_t frame[FRAMES];
    numbers_shuffle(random, number, INNER_PAGES);
    numbers_shuffle(random, frame, FRAMES);
    for (unsigned role = 0; role < ROLES; role++)
        plan->inner_gpa[role] = number[role] * PAGE_SIZE;
    for (unsigned i = 0; i < INNER_PAGES; i++)
        plan->frame_gpa[i] = FRAMES_GPA + frame[i] * PAGE_SIZE;
}

/* A place for up to 32 pages of one page table, in a slot of the PML4 that is not the guest's own. */
static inline uint64_t plan_gva(struct random *random, uint64_t slot) {
    return slot << 39 | random_below(random, 512) << 30 | random_below(random, 500) << 21 |
           random_below(random, 480) << 12;
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan;
    plan_memory(&random, &plan);
    plan.shared_gva = plan_gva(&random, 1 + random_below(&random, 120));
    plan.data_gva = plan_gva(&random, 128 + random_below(&random, 120));
    return plan;
}

/* Where the inner program sees its own pages and its tables. */
static inline uint64_t shared_gva(const struct plan *plan, enum role role) {
    unsigned at = role < TABLES ? 4 + role : role - ROLE_CODE;
    return plan->shared_gva + at * PAGE_SIZE;
}
