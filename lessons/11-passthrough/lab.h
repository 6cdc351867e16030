/*
 * What the two halves of lesson 11 agree on: where the two devices are, the ports between the
 * halves, and what a seed asks for. The host half writes the plan into the record, so the checks
 * know it too.
 */
#pragma once

#include <stdint.h>

#include "edu_behaviour.h"
#include "edu_registers.h"
#include "random.h"
#include "x86.h"

/* The two forms of the device. To the driver they are two devices of one kind. */
enum form {
    FORM_EMULATED,       /* in the VMM: each access to a register is an exit */
    FORM_PASSED_THROUGH, /* in a process of its own, whose memory is the guest's BAR */
    FORMS,
};

/* Ports. Bytes, but where it says 32 bits. */
#define LAB_DEVICE \
    0x600 /* OUT: enum behaviour (edu_behaviour.h) of the device process; before LAB_ATTACH */
#define LAB_ATTACH 0x601   /* OUT: enum form: there is to be such a device. IN: is there one? */
#define LAB_STAGE 0x602    /* OUT: "look at me now", enum stage */
#define LAB_MAP 0x603      /* OUT: the number of a window: the device may reach it */
#define LAB_UNMAP 0x604    /* OUT: and may not any more */
#define LAB_DETACH 0x605   /* OUT: the device is of no use: take it away */
#define LAB_CONNECT 0x606  /* OUT: enum connection: from now on there is to be one */
#define LAB_IMPOSTOR 0x607 /* OUT: is the emulated device to be something else, by its id? */
#define LAB_RESULT 0x608   /* OUT, 32 bits: a factorial that the driver has fetched */
#define LAB_SUM 0x60c      /* OUT, 32 bits: the sum of the bytes that a transfer has brought */
#define LAB_ID 0x610       /* OUT, 32 bits: what the id register is for the guest */
#define LAB_PART 0x614     /* OUT, 32 bits: the first and the last word of struct part */
#define LAB_ANSWER 0x618   /* OUT: does edu_probe() take that something else for an edu device? */
#define LAB_PORTS 32

enum connection {
    CONNECT_DOORBELLS, /* from the guest to the device */
    CONNECT_INTERRUPT, /* and back */
};

enum stage {
    STAGE_ATTACHED,  /* the device is there */
    STAGE_READ,      /* the driver has read a register READS times, */
    STAGE_IMPOSTOR,  /* has met a device that is another one, */
    STAGE_PROBED,    /* has found that the device lives, */
    STAGE_RAISED,    /* has had interrupts raised by way of a test, */
    STAGE_FACTORIAL, /* has had factorials computed, */
    STAGE_DMA,       /* and data moved from one window to the other */
    STAGE_OUTSIDE,   /* it has asked for DMA where it must not */
    STAGE_UNMAPPED,  /* and to a window that is not mapped any more */
    STAGE_HOSTILE,   /* (of a guest of the tests: it has asked for anything at all) */
    STAGES,
};

#define READS 100u
#define FACTORIALS 4u
#define RAISES 2u
#define TRANSFERS 3u
#define EARLY 2u /* looks at the liveness register that are too early, if the device is emulated */

/* Two causes that come at once, in the first of the RAISES; the second of them only there. */
#define RAISE_ONE 0x2u
#define RAISE_OTHER 0x4u

/* Memory that a device may be given: pieces of one file, each a memory slot above RAM. */
#define WINDOWS 2
#define SHARED_PAGES 16 /* of the file; what no window has belongs to nobody here */
#define SHARED_SIZE (SHARED_PAGES * PAGE_SIZE)
#define CONTENT_STREAM 2 /* of random numbers: what is in it at the beginning */

/* RAM of the guest that no device is given. A driver with a bug may name it all the same. */
#define VICTIM_GPA (UINT64_C(12) << 20)
#define VICTIM_SIZE 512
#define VICTIM_BYTE 0xc5

struct window {
    uint64_t gpa, size; /* its address for DMA, too; below 256 MiB */
    uint64_t offset;    /* in the file */
};

/* A part of the BAR of a device that might be: to see that any part can be mapped. The 32-bit words of
 * its file are their own offsets there. */
struct part {
    uint64_t area_offset, area_size; /* in the BAR; behind the doorbell */
    uint64_t file_offset;            /* of the BAR, in the file, which ends with the part */
};

/* From the first window into the device's buffer, and from there to the second. */
struct transfer {
    uint32_t from, to; /* in the windows */
    uint32_t count;    /* bytes */
    uint32_t buffer;   /* in the device's buffer */
};

struct plan {
    uint64_t bar_gpa[FORMS];
    uint8_t vector[FORMS];
    uint8_t tick_vector;
    uint32_t gsi;         /* of the device that is passed through */
    uint64_t file_offset; /* of its registers in its file */
    struct window window[WINDOWS];
    uint32_t liveness[FORMS];
    uint32_t factorial[FORMS][FACTORIALS];
    uint32_t raise[FORMS][RAISES];
    uint32_t impostor;     /* the id of a device that is another one */
    uint32_t early[EARLY]; /* bits of the liveness register that change last */
    struct part part;
    struct transfer transfer[FORMS][TRANSFERS];
};

static inline void plan_windows(struct plan *plan, struct random *random) {
    uint64_t page = 1 + random_below(random, 2);
    for (unsigned i = 0; i < WINDOWS; i++) {
        struct window *window = &plan->window[i];
        window->gpa = (UINT64_C(64) << 20) * (1 + i) + PAGE_SIZE * (1 + random_below(random, 8192));
        window->size = PAGE_SIZE * (2 + random_below(random, 3));
        window->offset = PAGE_SIZE * page;
        page += window->size / PAGE_SIZE + 1 + random_below(random, 3);
    }
}

/* Each goes to another place: what one leaves is still there at the end. */
static inline void plan_transfers(struct plan *plan, struct random *random, enum form form) {
    for (unsigned i = 0; i < TRANSFERS; i++) {
        struct transfer *transfer = &plan->transfer[form][i];
        uint32_t slice = (uint32_t)(form * TRANSFERS + i);
        transfer->count = (uint32_t)(17 + random_below(random, 200));
        transfer->from = 1024 * slice + (uint32_t)random_below(random, 700);
        transfer->to = 1024 * slice + (uint32_t)random_below(random, 700);
        transfer->buffer = 1024 * i + (uint32_t)random_below(random, 700);
    }
}

/* A driver may name the BAR as an address of DMA: what EDU_DMA_MASK leaves of it is below the windows
 * or above them. 13 is the first whose factorial does not fit 32 bits, and from 34 on all that is
 * left of it is 0. */
static inline void plan_form(struct plan *plan, struct random *random, enum form form) {
    plan->bar_gpa[form] =
        UINT64_C(0xd0000000) + EDU_BAR_SIZE * (UINT64_C(192) * form + random_below(random, 64));
    plan->liveness[form] = (uint32_t)random_next(random);
    for (unsigned i = 0; i < FACTORIALS; i++)
        plan->factorial[form][i] = (uint32_t)(3 + 5 * i + random_below(random, 5));
    for (unsigned i = 0; i < RAISES; i++)
        plan->raise[form][i] = ((uint32_t)random_next(random) | RAISE_ONE) & ~RAISE_OTHER &
                               ~EDU_INTERRUPT_DMA & ~EDU_INTERRUPT_FACTORIAL;
    plan->raise[form][0] |= RAISE_OTHER;
    plan_transfers(plan, random, form);
}

/* To compare less than all of an id or of a complement is to be taken in. */
static inline void plan_deceits(struct plan *plan, struct random *random) {
    plan->impostor = 0x01000000u | EDU_ID_VALUE | 1u << (8 + random_below(random, 8));
    for (unsigned i = 0; i < EARLY; i++)
        plan->early[i] = 1u << (UINT64_C(16) * i + random_below(random, 16));
}

static inline void plan_part(struct plan *plan, struct random *random) {
    plan->part.area_offset = PAGE_SIZE * (16 + random_below(random, 8));
    plan->part.area_size = PAGE_SIZE * (2 + random_below(random, 2));
    plan->part.file_offset = PAGE_SIZE * (1 + random_below(random, 3));
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan = {0};
    uint8_t base = (uint8_t)(0x30 + random_below(&random, 0xa0));
    plan.tick_vector = 0xf0;
    plan.gsi = (uint32_t)(24 + random_below(&random, 200));
    plan.file_offset = PAGE_SIZE * (1 + random_below(&random, 3));
    plan_windows(&plan, &random);
    for (enum form form = 0; form < FORMS; form++) {
        plan.vector[form] = (uint8_t)(base + 16 * form);
        plan_form(&plan, &random, form);
    }
    plan_part(&plan, &random);
    plan_deceits(&plan, &random);
    return plan;
}
