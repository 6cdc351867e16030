/*
 * What the two halves of lesson 12 agree on: the ports between them, and what a seed asks for. The
 * host half writes the plan into the record, so the checks know it too.
 */
#pragma once

#include <stdint.h>

#include "edu_registers.h"
#include "random.h"
#include "x86.h"

/* Ports, of a byte each. */
#define LAB_EXERCISE 0x600  /* OUT: let the host half try its I/O page tables and its IOTLB */
#define LAB_ATTACH 0x601    /* OUT: let the guest have the device. IN: has it got it? */
#define LAB_STAGE 0x602     /* OUT: "look at me now", enum stage */
#define LAB_INTERRUPT 0x603 /* OUT: enum interrupt: how the device is to interrupt from now on */
#define LAB_MAP 0x604       /* OUT: the number of a window: the device may reach it */
#define LAB_UNMAP 0x605     /* OUT: and may not any more */
#define LAB_HEARD 0x606     /* OUT: enum interrupt: one has come */
#define LAB_PORTS 8

enum interrupt {
    INTERRUPT_MESSAGE,
    INTERRUPT_LINE,    /* which KVM unmasks when the guest ends the interrupt */
    INTERRUPT_BY_HAND, /* a line, too, but the host half unmasks it, and the guest hears nothing */
};

enum stage {
    STAGE_ATTACHED,     /* the device is there, */
    STAGE_READ,         /* the driver has read a register READS times, and */
    STAGE_PROBED,       /* has found that the device lives, */
    STAGE_MESSAGES,     /* has had messages, */
    STAGE_LINE,         /* interrupts by a line, */
    STAGE_RAISED,       /* one that nobody answers, */
    STAGE_ACKNOWLEDGED, /* has acknowledged that one, */
    STAGE_MOVED,        /* has had data moved from one window to the other, */
    STAGE_READ_ONLY,    /* has asked for DMA to a page that the device may only read, */
    STAGE_OUTSIDE,      /* to RAM that no device was given, */
    STAGE_UNMAPPED,     /* and to a window that is not mapped any more; */
    STAGE_AGAIN,        /* and there is another window in its place */
    STAGES,
};

#define READS 100u
#define RAISES 3u

/* Memory that the device may be given: pieces of one file, each a memory slot above RAM. */
enum window_name {
    WINDOW_SOURCE,      /* for reading only */
    WINDOW_DESTINATION, /* for reading and writing */
    WINDOW_OTHER,       /* the same; mapped later, in the destination's place */
    WINDOWS,
};
#define WINDOW_PAGES 2 /* of each */
#define WINDOW_SIZE (WINDOW_PAGES * PAGE_SIZE)
#define SHARED_PAGES 16u /* of the file; a power of two */
#define SHARED_SIZE (SHARED_PAGES * PAGE_SIZE)
#define CONTENT_STREAM 2 /* of random numbers: what is in it at the beginning */

/* RAM of the guest that no device is given. A driver with a bug may name it all the same. */
#define VICTIM_GPA (UINT64_C(12) << 20)
#define VICTIM_SIZE 512
#define VICTIM_BYTE 0xc5

struct window {
    uint64_t gpa;    /* above 256 MiB: the device cannot name it */
    uint64_t iova;   /* what the device and its driver call it */
    uint64_t offset; /* in the file */
};

struct plan {
    uint64_t bar_gpa;
    uint8_t vector;      /* of the device's message */
    uint8_t line_base;   /* vector of the 8259As' line 0 */
    uint8_t line;        /* of the 8259As */
    uint8_t line_rounds; /* how often the line interrupts until it is acknowledged */
    uint8_t timer_vector;
    uint32_t gsi; /* of the message */
    uint32_t liveness;
    uint32_t
        raise[RAISES]; /* two by messages, one by the line, which another time nobody answers */
    struct window window[WINDOWS];
    uint32_t from; /* in the first page of the source */
    uint32_t to;   /* in the destination, so that the data crosses into its second page */
    uint32_t count;
    uint32_t buffer; /* in the device's buffer */
};

static inline void plan_windows(struct plan *plan, struct random *random) {
    static const uint64_t places[] = {1, 4, 7, 10, 13};
    uint64_t first = random_below(random, 5);
    for (unsigned i = 0; i < WINDOWS; i++) {
        struct window *window = &plan->window[i];
        window->gpa = (UINT64_C(512) << 20) * (1 + i) + PAGE_SIZE * random_below(random, 65536);
        window->iova = (UINT64_C(64) << 20) * (1 + i) + PAGE_SIZE * random_below(random, 16384 - 2);
        window->offset = PAGE_SIZE * places[(first + UINT64_C(2) * i) % 5];
    }
    plan->window[WINDOW_OTHER].iova = plan->window[WINDOW_DESTINATION].iova;
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan = {.timer_vector = 0xf0};
    plan.bar_gpa = UINT64_C(0xd0000000) + EDU_BAR_SIZE * random_below(&random, 64);
    plan.vector = (uint8_t)(0x40 + random_below(&random, 0x40));
    plan.line_base = (uint8_t)(0x90 + 8 * random_below(&random, 6));
    plan.line = (uint8_t)(9 + random_below(&random, 3)); /* a PC has nothing on 9, 10 and 11 */
    plan.line_rounds = (uint8_t)(2 + random_below(&random, 4));
    plan.gsi = (uint32_t)(24 + random_below(&random, 200));
    plan.liveness = (uint32_t)random_next(&random);
    for (unsigned i = 0; i < RAISES; i++)
        plan.raise[i] = (uint32_t)(random_next(&random) | 2) & ~EDU_INTERRUPT_DMA & ~1u;
    plan_windows(&plan, &random);
    plan.count = (uint32_t)(64 + random_below(&random, 200));
    plan.from = (uint32_t)random_below(&random, PAGE_SIZE - 512);
    plan.to = (uint32_t)(PAGE_SIZE - 1 - random_below(&random, plan.count - 1));
    plan.buffer = (uint32_t)random_below(&random, EDU_BUFFER_SIZE - 512);
    return plan;
}
