/*
 * What the two halves of lesson 10 agree on: the device, the lab that watches, and the plan: what a seed asks
 * for. Both halves compute the same plan.
 */
#pragma once

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "random.h"

#define MEMORY_MIB 16
#define QUEUE_SIZE 16

/* VIRTIO 1.2 "Console Device", "Virtqueues": the device writes into the buffers of queue 0, and reads those of
 * queue 1. */
enum { RECEIVE, TRANSMIT, QUEUES };

/*
 * The window. Rings that the driver finds here are no memory: each of its accesses is an exit, so the lab sees
 * them one by one, in their order, and plays the device. In the first stages the rings of both queues
 * are here.
 */
#define WINDOW_GPA UINT64_C(0xd0100000)
#define WINDOW_QUEUE_SIZE UINT64_C(0x3000) /* bytes: a page for each of the three areas */
#define WINDOW_DESCRIPTORS(queue) (WINDOW_GPA + (queue)*WINDOW_QUEUE_SIZE)
#define WINDOW_AVAILABLE(queue) (WINDOW_DESCRIPTORS(queue) + 0x1000)
#define WINDOW_USED(queue) (WINDOW_DESCRIPTORS(queue) + 0x2000)
#define WINDOW_SIZE (QUEUES * WINDOW_QUEUE_SIZE)

/* Through these ports the guest says where it is. Only 8-, 16- and 32-bit writes as named. */
#define LAB_STAGE 0x510    /* 8: a stage begins */
#define LAB_OVER 0x511     /* 8: it is over */
#define LAB_TRIAL 0x512    /* 8: what queue_kick_is_due() has answered in the next trial */
#define LAB_COMPLETE 0x513 /* 8: in the window, that many buffers are used now */
#define LAB_LISTEN 0x514 /* 8: in the window, queue_listen() is called, for this case of the plan */
#define LAB_HEARD 0x515  /* 8: and what it has answered */
#define LAB_TURN 0x516   /* 8: the device, whose work takes time, gets on with it (any value) */
#define LAB_ASK 0x517    /* 8: the driver asks whether to kick: of this queue */
#define LAB_CASE 0x518   /* 8: a chain of this enum broken follows */
#define LAB_PAINTED \
    0x519 /* 8: the memory of a queue that was reset is the driver's again (any value) */
#define LAB_PUBLISHED 0x51a /* 8: queue_publish() has come back (any value) */
#define LAB_ADDED 0x520 /* 32: queue_add(): the number of the message, and from bit 16 its answer */
#define LAB_REAPED 0x524   /* 32: queue_reap(): the head, and from bit 16 the length */
#define LAB_RECEIVED 0x528 /* 32: the digest of the bytes that have come in */
#define LAB_PORTS 0x20

enum stage {
    /* in the window */
    STAGE_LAYOUT, /* buffers go into the ring */
    STAGE_KICKS,  /* when is a notification due? */
    STAGE_REAP,   /* used buffers come back, in any order */
    STAGE_FULL,   /* more messages than descriptors */
    STAGE_LISTEN, /* interrupts are enabled while the device uses a buffer */
    /* on the device */
    STAGE_MESSAGES, /* scattered messages, one at a time */
    STAGE_ORDER,    /* more than fit in, used in any order */
    STAGE_RECEIVE,  /* and interrupts */
    STAGE_DOZE,     /* the device sleeps, by flags, */
    STAGE_EVENTS,   /* by event index, */
    STAGE_COUNTS,   /* and how much that saves */
    STAGE_BROKEN,   /* chains of a driver that is broken, or an enemy */
    STAGE_RESET,    /* in the middle, */
    STAGE_AGAIN,    /* and what comes then */
    STAGE_BULK,     /* 64 KiB, one kick for 4 KiB */
    STAGE_BYTES,    /* the first of them by COM1, */
    STAGE_STRINGS,  /* and by string instructions */
    STAGES
};

/* ---- messages ---- */

#define SEGMENTS_MAX 5
#define SEGMENT_BYTES_MAX 48
#define MESSAGES_GPA UINT64_C(0x800000) /* above what page_alloc() gives */
#define MESSAGE_PAGES UINT64_C(8)
#define MESSAGE(stage, i) ((stage)*16 + (i)) /* the number of message i of a stage */

/* A piece of memory, as one descriptor has it. */
struct segment {
    uint64_t gpa;
    uint32_t size;
};

/* A message is scattered over memory: its bytes lie in segments, one after the other. */
struct message {
    unsigned count;
    struct segment segment[SEGMENTS_MAX];
};

enum {
    LAYOUT_SENT = 2,     /* messages for the transmit queue, */
    LAYOUT_RECEIVED = 3, /* and for the receive queue */
    REAP_MESSAGES = 3,
    FULL_MESSAGES = 12,
    SENT_MESSAGES = 6,
    ORDER_MESSAGES = 14,
    RECEIVE_BUFFERS = 3,
    INPUTS = 8,
    DOZE_MESSAGES = 3,
    COUNT_ROUNDS = 5, /* of 2 or 3 messages */
    RESET_SENT = 3,
    RESET_RECEIVED = 2,
    AFTER_RESET = 2,
};

/* Message number i of this seed. Its segments lie in pages of their own, in no order. */
static inline struct message message_make(uint64_t seed, unsigned number) {
    struct random random = random_stream(seed, 16 + number);
    struct message message = {.count = (unsigned)(1 + random_below(&random, SEGMENTS_MAX))};
    uint64_t first = random_below(&random, MESSAGE_PAGES);
    for (unsigned i = 0; i < message.count; i++) {
        uint64_t page = number * MESSAGE_PAGES + (first + i * UINT64_C(3)) % MESSAGE_PAGES;
        message.segment[i].gpa = MESSAGES_GPA + page * 4096 + random_below(&random, 4000);
        message.segment[i].size = (uint32_t)(1 + random_below(&random, SEGMENT_BYTES_MAX));
    }
    return message;
}

static inline uint32_t message_size(const struct message *message) {
    uint32_t size = 0;
    for (unsigned i = 0; i < message->count; i++)
        size += message->segment[i].size;
    return size;
}

/* What a message says: bytes from a sequence of its own. */
struct bytes {
    struct random random;
    uint64_t word;
    unsigned left; /* in it */
};

static inline struct bytes bytes_of(uint64_t seed, unsigned number) {
    return (struct bytes){.random = random_stream(seed, 4096 + number)};
}

static inline uint8_t bytes_next(struct bytes *bytes) {
    if (bytes->left == 0) {
        bytes->word = random_next(&bytes->random);
        bytes->left = 8;
    }
    uint8_t byte = (uint8_t)bytes->word;
    bytes->word >>= 8;
    bytes->left--;
    return byte;
}

/* FNV-1a: Fowler, Noll, Vo, "The FNV Non-Cryptographic Hash Algorithm". */
#define DIGEST_BEGIN UINT32_C(0x811c9dc5)
static inline uint32_t digest_add(uint32_t digest, uint8_t byte) {
    return (digest ^ byte) * UINT32_C(0x01000193);
}

/* ---- 64 KiB ---- */

/* Block i begins 8 * i bytes behind BULK_GPA, so that all of them differ, and a page and a bit is enough
 * memory for all. */
#define BULK_GPA UINT64_C(0xf00000)
#define BLOCKS 16
#define BLOCK_SIZE 4096
#define BLOCK_STEP UINT64_C(8)
#define SERIAL_BYTES 1024 /* as many of them go through COM1, too, if asked for: make compare */

/* ---- when is a notification due? ---- */

#define EVENT_TRIALS 24
#define FLAG_TRIALS 4
#define TRIALS (EVENT_TRIALS + FLAG_TRIALS)

/* One side has counted its index up from `before` to `now`. What the other has asked for: event, an index, or
 * a flag that says no. Only one of the two counts. */
struct trial {
    bool has_event_index;
    uint16_t before, now, event, flags;
};

static inline struct trial trial_make(uint64_t seed, uint64_t stream, unsigned number) {
    struct random random = random_stream(seed, stream + number);
    struct trial trial = {.has_event_index = number < EVENT_TRIALS};
    uint16_t steps = (uint16_t)(1 + number % 4);
    trial.before = number % 2 ? (uint16_t)random_next(&random) : (uint16_t)(0 - steps / 2);
    trial.now = (uint16_t)(trial.before + steps);
    trial.event = (uint16_t)(trial.before + number / 4 - 1);
    trial.flags = number < EVENT_TRIALS ? random_next(&random) & 1 : number & 1;
    return trial;
}
#define KICK_TRIALS 1024      /* stream of the driver's trials, */
#define INTERRUPT_TRIALS 2048 /* and of the device's */

/* ---- interrupts are enabled ---- */

enum listen_when {
    USED_NOTHING,   /* the device does nothing meanwhile, */
    USED_BEFORE,    /* has used a buffer before the call, */
    USED_MEANWHILE, /* or uses one just before the driver's write reaches the ring */
    LISTEN_WHENS
};
/* Case i: i / 2 is when, and i % 2 is 1 with VIRTIO_RING_F_EVENT_IDX. */
#define LISTEN_CASES (2 * LISTEN_WHENS)

/* ---- chains that are broken ---- */

/* What lies right behind the table is the available ring, which may look like a descriptor. */
#define HEAD_FAR (QUEUE_SIZE << 10)

enum broken {
    BROKEN_LOOP,
    BROKEN_NEXT,      /* a next outside the table */
    BROKEN_HEAD,      /* a head far outside the table, where no ring lies */
    BROKEN_OUTSIDE,   /* an address behind the end of memory */
    BROKEN_STRADDLE,  /* the last bytes lie behind the end of memory */
    BROKEN_WRAP,      /* address + length is 2^64 + something */
    BROKEN_HUGE,      /* a length of 2^32 - 1 */
    BROKEN_DIRECTION, /* a buffer in the transmit queue that the device is to write into, */
    BROKEN_RECEIVE,   /* and one in the receive queue that it is to read */
    BROKEN_INDIRECT,  /* a table of descriptors, which was not agreed on */
    BROKEN_INDEX,     /* the available index has moved on by more than there are entries */
    BROKEN_LONG,      /* a loop that the driver ends when the device comes to descriptor 17 */
    LEGAL_LONG,       /* not broken: all descriptors of the table in one chain, */
    LEGAL_END,        /* the last byte of memory, */
    LEGAL_FULL,       /* and as many chains as there are entries */
    BROKEN_KINDS
};
