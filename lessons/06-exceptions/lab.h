/*
 * What a seed asks for in lesson 6: the exceptions of each round. Guest half and host half compute the
 * same plan; the host half also writes it into the record, so the checks know it too.
 */
#pragma once

#include <stdbool.h>

#include "random.h"
#include "x86.h"

/* Ports from the guest to the host half, 32 bits wide. */
#define LAB_ROUND 0x600  /* round n begins: at the next HLT, inject what its order says */
#define LAB_CAUGHT 0x604 /* an exception has arrived: here (gpa = gva) is its struct trap_frame */
#define LAB_DONE 0x608   /* round n is over */
#define LAB_NMI 0x60c    /* inject an NMI */

/* Beside those of x86.h: SDM 3A "Exception and Interrupt Reference". */
#define VECTOR_OF 4
#define VECTOR_BR 5
#define VECTOR_NM 7
#define VECTOR_TS 10
#define VECTOR_NP 11
#define VECTOR_SS 12
#define VECTOR_MF 16
#define VECTOR_AC 17
#define VECTOR_XM 19

/* What to inject. Members that say nothing about this vector hold stray numbers. */
struct order {
    uint8_t vector;
    uint32_t error_code; /* of a vector that pushes one */
    uint64_t payload;    /* #PF: the address, for CR2. #DB: the bits to set in DR6 */
};

/* What a second exception makes of a first one that the CPU is still delivering. */
enum outcome {
    OUTCOME_SECOND,       /* the second is delivered; the first comes back by itself, if at all */
    OUTCOME_DOUBLE_FAULT, /* #DF is delivered in place of both */
    OUTCOME_TRIPLE_FAULT, /* the CPU gives up: shutdown */
};

/* Who does the work of the instruction that was interrupted by a fault. */
enum remedy {
    REMEDY_RETRY,   /* the handler has removed the cause: the CPU, when it executes it again */
    REMEDY_EMULATE, /* the handler, in software */
};

enum stage {
    STAGE_SINGLE, /* one exception */
    STAGE_IN_NMI, /* one exception, while the guest handles an NMI */
    STAGE_PAIR,   /* the VMM has two exceptions to inject at once */
    STAGE_BROKEN, /* one exception, and its delivery meets another: gate absent, or no stack */
    STAGE_LAST,   /* one exception, and the IDT is empty */
};

enum obstacle {
    OBSTACLE_GATE = VECTOR_NP,  /* the gate is not present: #NP */
    OBSTACLE_STACK = VECTOR_PF, /* the gate's IST entry points to where no memory is: #PF */
};

struct round {
    enum stage stage;
    struct order order;
    struct order second; /* STAGE_PAIR; STAGE_BROKEN: its vector, which is the obstacle's */
    enum remedy remedy;
    uint64_t addend;    /* what the instruction adds ... */
    uint64_t cell_gpa;  /* ... to this number in memory */
    uint64_t stack_gpa; /* a page for the stack: the CPU pushes the frame at its end */
};

#define MEMORY_MIB 16
#define SINGLES 10
#define PAIRS 5
#define BROKEN 6
#define ROUNDS (SINGLES + 1 + PAIRS + BROKEN + 1)
#define STACKS_GPA (UINT64_C(9) << 20) /* above the runtime's page pool */
#define CELLS_GPA (UINT64_C(14) << 20)

/* SDM 3A "Debug Status Register (DR6)": a single step. */
#define DR6_SINGLE_STEP (UINT64_C(1) << 14)
/* As it is after a reset, and after a handler has cleared it. */
#define DR6_CLEAR UINT64_C(0xffff0ff0)

struct plan {
    struct round rounds[ROUNDS];
};

enum kind { KIND_BENIGN, KIND_CONTRIBUTORY, KIND_PAGE_FAULT, KIND_DEBUG, KIND_DOUBLE_FAULT };

/* Kinds of exceptions that a VMM can inject; #BP and #OF are not among the benign ones: README.md. */
static inline uint8_t plan_vector(struct random *random, enum kind kind) {
    static const uint8_t benign[] = {VECTOR_BR, VECTOR_UD, VECTOR_NM, VECTOR_MF, VECTOR_XM};
    static const uint8_t contributory[] = {VECTOR_DE, VECTOR_TS, VECTOR_SS, VECTOR_GP};
    switch (kind) {
    case KIND_BENIGN: return benign[random_below(random, sizeof benign)];
    case KIND_CONTRIBUTORY: return contributory[random_below(random, sizeof contributory)];
    case KIND_PAGE_FAULT: return VECTOR_PF;
    case KIND_DOUBLE_FAULT: return VECTOR_DF;
    default: return VECTOR_DB;
    }
}

/* Error codes as the CPU makes them: of a page fault bits, of the others a selector. */
static inline struct order plan_order(struct random *random, uint8_t vector) {
    struct order order = {.vector = vector};
    uint64_t number = random_next(random);
    order.error_code = (uint32_t)(vector == VECTOR_PF ? number & 7 : (number & 0xfff) << 3);
    order.payload = vector == VECTOR_DB ? DR6_SINGLE_STEP : (number >> 17) | 1;
    if (vector == VECTOR_DF)
        order.error_code = 0;
    return order;
}

static inline void plan_shuffle(struct random *random, struct round *rounds, unsigned count) {
    for (unsigned i = count - 1; i > 0; i--) {
        uint64_t other = random_below(random, i + 1);
        struct round round = rounds[i];
        rounds[i] = rounds[other];
        rounds[other] = round;
    }
}

/* Each kind of exception in each role; one #GP and one #PF whose error code is 0. */
static inline void plan_singles(struct random *random, struct round *rounds) {
    static const enum kind kinds[SINGLES] = {KIND_PAGE_FAULT, KIND_PAGE_FAULT,   KIND_PAGE_FAULT,
                                             KIND_DEBUG,      KIND_DEBUG,        KIND_BENIGN,
                                             KIND_BENIGN,     KIND_CONTRIBUTORY, KIND_CONTRIBUTORY};
    for (unsigned i = 0; i < SINGLES; i++) {
        bool is_last = i == SINGLES - 1;
        uint8_t vector = is_last ? VECTOR_GP : plan_vector(random, kinds[i]);
        rounds[i] = (struct round){.stage = STAGE_SINGLE,
                                   .order = plan_order(random, vector),
                                   .remedy = i % 2 ? REMEDY_EMULATE : REMEDY_RETRY};
        if (is_last || i == 0)
            rounds[i].order.error_code = 0;
    }
    plan_shuffle(random, rounds, SINGLES);
}

static inline void plan_pairs(struct random *random, struct round *rounds) {
    static const enum kind kinds[PAIRS][2] = {{KIND_BENIGN, KIND_CONTRIBUTORY},
                                              {KIND_CONTRIBUTORY, KIND_CONTRIBUTORY},
                                              {KIND_CONTRIBUTORY, KIND_PAGE_FAULT},
                                              {KIND_PAGE_FAULT, KIND_CONTRIBUTORY},
                                              {KIND_PAGE_FAULT, KIND_PAGE_FAULT}};
    for (unsigned i = 0; i < PAIRS; i++) {
        uint8_t first = plan_vector(random, kinds[i][0]);
        uint8_t second = plan_vector(random, kinds[i][1]);
        rounds[i] = (struct round){.stage = STAGE_PAIR,
                                   .order = plan_order(random, first),
                                   .second = plan_order(random, second)};
    }
    plan_shuffle(random, rounds, PAIRS);
}

static inline void plan_broken(struct random *random, struct round *rounds) {
    static const enum kind kinds[BROKEN / 2] = {KIND_BENIGN, KIND_CONTRIBUTORY, KIND_PAGE_FAULT};
    for (unsigned i = 0; i < BROKEN; i++) {
        uint8_t vector = plan_vector(random, kinds[i / 2]);
        rounds[i] = (struct round){.stage = STAGE_BROKEN,
                                   .order = plan_order(random, vector),
                                   .second.vector = i % 2 ? OBSTACLE_STACK : OBSTACLE_GATE};
    }
    plan_shuffle(random, rounds, BROKEN);
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan = {0};
    struct round *next = plan.rounds;
    plan_singles(&random, next);
    next += SINGLES;
    *next++ = (struct round){.stage = STAGE_IN_NMI,
                             .order = plan_order(&random, plan_vector(&random, KIND_BENIGN))};
    plan_pairs(&random, next);
    next += PAIRS;
    plan_broken(&random, next);
    next += BROKEN;
    *next = (struct round){
        .stage = STAGE_LAST,
        .order = plan_order(&random, random_below(&random, 2) ? VECTOR_GP : VECTOR_PF)};
    for (uint64_t i = 0; i < ROUNDS; i++) {
        struct round *round = &plan.rounds[i];
        round->addend = 1 + random_below(&random, 0xffffff);
        round->cell_gpa = CELLS_GPA + 64 * i + 8 * random_below(&random, 8);
        round->stack_gpa = STACKS_GPA + PAGE_SIZE * (40 * i + random_below(&random, 40));
    }
    return plan;
}
