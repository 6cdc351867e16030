/*
 * What the two halves of lesson 7 agree on: the interrupt controller, the lab that makes its lines
 * rise, and the plan: what a seed asks for. Both halves compute the same plan.
 */
#pragma once

#include <stdint.h>

#include "random.h"

/*
 * The controller has 16 lines, line 0 first in priority. Its registers are called as the 8259A's:
 *
 *   IRR  interrupt requests: lines that have risen and are not acknowledged yet
 *   ISR  in service: lines that are acknowledged and whose handler has not said EOI yet
 *   IMR  interrupt mask: lines that may rise, but are held back
 *
 * The lines are edge-triggered: one that has risen stays in IRR until it is acknowledged. The mode is
 * the 8259A's "fully nested mode": a line in service holds back itself and all below it.
 */
#define LINES 16
#define PIC_EOI 0x500 /* any 8-bit write: end of interrupt, of the first of the lines in service */
#define PIC_IMR 0x502 /* a 16-bit write sets IMR, bit i for line i */

/* The lab. With an 8-bit write to one of its ports the guest says where it is, and the lines that the
 * plan has for that moment rise. */
#define LAB_ROUND 0x510   /* a round begins: its number */
#define LAB_STEP 0x511    /* a step of the main code: its number in this round (a read: the next) */
#define LAB_HANDLER 0x512 /* a handler begins: its line */
#define LAB_WORK 0x513    /* a handler is at work: its line */
#define LAB_LOOK 0x514    /* the main code has looked whether a line is due: 1 or 0 */
#define LAB_PORTS 5

enum round_kind {
    ROUND_CALM,   /* IF = 1, and one line at a time */
    ROUND_OFF,    /* IF = 0 while lines rise; one rises in the shadow of STI, one with the window */
    ROUND_MASKED, /* lines are masked, one of them when it already waits */
    ROUND_NESTED, /* lines rise while a handler works */
    ROUND_IDLE,   /* the guest has nothing to do but wait */
    ROUND_KINDS
};
#define ROUNDS_OF_A_KIND 5
#define ROUNDS (ROUND_KINDS * ROUNDS_OF_A_KIND)
#define STEPS 4

/* Sets of lines: bit i for line i. */
#define LINE(line) (UINT32_C(1) << (line))
#define LINES_ABOVE(line) (LINE(line) - 1) /* those of higher priority */
#define ALL_LINES (LINE(LINES) - 1)

/* What rises when. No line rises again before its last request has been acknowledged. */
struct round {
    uint32_t kind;         /* enum round_kind */
    uint32_t step[STEPS];  /* what rises at each step, */
    uint32_t window;       /* with the first interrupt window of the round, */
    uint32_t work[LINES];  /* and the first time that the handler of a line works */
    uint32_t masked;       /* masked from the start */
    uint32_t masked_later; /* masked when it waits */
};

struct plan {
    uint8_t base; /* the vector of line 0; those of the others follow */
    struct round round[ROUNDS];
};

#define DRAWN 6

/* Six different lines, by falling priority. */
static inline void lines_draw(struct random *random, unsigned drawn[DRAWN]) {
    uint32_t lines = 0;
    for (unsigned count = 0; count < DRAWN;) {
        uint32_t line = LINE(random_below(random, LINES));
        count += !(lines & line);
        lines |= line;
    }
    for (unsigned line = 0, count = 0; count < DRAWN; line++)
        if (lines & LINE(line))
            drawn[count++] = line;
}

/* A round of this kind, of six lines that the seed chooses: a comes first in priority, f last. */
static inline struct round round_make(struct random *random, uint32_t kind) {
    unsigned line[DRAWN];
    lines_draw(random, line);
    uint32_t a = LINE(line[0]), b = LINE(line[1]), c = LINE(line[2]);
    uint32_t d = LINE(line[3]), e = LINE(line[4]), f = LINE(line[5]);
    const struct round kinds[ROUND_KINDS] = {
        [ROUND_CALM] = {.step = {d, b, f, c}},
        [ROUND_OFF] = {.step = {e, c | f, b, d}, .window = a},
        [ROUND_MASKED] = {.step = {a | c, b, d | e}, .masked = a | d, .masked_later = b},
        [ROUND_NESTED] = {.step = {c | f}},
        [ROUND_IDLE] = {.step = {d, b, f, c}},
    };
    struct round round = kinds[kind];
    round.kind = kind;
    if (kind == ROUND_NESTED) {
        round.work[line[2]] = b | e; /* one that interrupts the handler, one that must wait */
        round.work[line[1]] = a;
        round.work[line[0]] = a; /* rises again while it is in service */
    }
    return round;
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan = {.base = (uint8_t)(32 + 16 * random_below(&random, 14))};
    for (unsigned i = 0; i < ROUNDS; i++)
        plan.round[i] = round_make(&random, i / ROUNDS_OF_A_KIND);
    return plan;
}
