/*
 * What the two halves of lesson 9 agree on: the devices of this machine, the ports between the
 * halves, and what a seed asks for. The host half writes the plan into the record, so the checks know
 * it too.
 */
#pragma once

#include <stdint.h>

#include "random.h"

/* What can interrupt. Each has a vector of its own, in a priority class (bits 7:4) of its own. */
enum device {
    DEVICE_SELF,  /* the guest itself, by an interprocessor interrupt */
    DEVICE_TIMER, /* the timer of the local APIC */
    DEVICE_LOW,   /* sends messages (MSI); its class is below that of the next */
    DEVICE_HIGH,
    DEVICE_EDGE,  /* drives a line, edge-triggered: one pulse, one interrupt */
    DEVICE_LEVEL, /* drives a line, level-triggered: high as long as it has something to be taken */
    DEVICE_BELL,  /* rings as often as the guest asks it to; its interrupts are only counted */
    DEVICE_NMI,   /* sends a message with delivery mode NMI: not by a vector */
    DEVICES,
};

/* Ports. Each is one byte, but for LAB_HEARD and LAB_TAKE. */
#define LAB_MACHINE 0x600   /* IN: enum machine_irqchip */
#define LAB_STAGE 0x601     /* OUT: "look at me now", enum stage */
#define LAB_CONNECT 0x602   /* OUT: connect the lines and the bell to the interrupt controller */
#define LAB_START 0x603     /* OUT: enum device: let it interrupt */
#define LAB_WAIT 0x604      /* OUT: an occasion for the VMM to look at its eventfds */
#define LAB_EXPIRY 0x605    /* OUT: the VMM waits until the timer has run down */
#define LAB_BELL 0x606      /* OUT: ring; an exit, and the VMM sends the interrupt */
#define LAB_FAST_BELL 0x607 /* OUT: ring; no exit where KVM has it (KVM_IOEVENTFD) */
#define LAB_HEARD 0x608     /* OUT, 4 bytes: how often the guest has heard the bell */
#define LAB_STRAY 0x60c     /* OUT: an interrupt came with this vector, which no device has */
#define LAB_TAKE 0x610      /* IN, at LAB_TAKE + 4 * device: serve it, get what it has */
#define RINGS 100

enum stage {
    STAGE_SELF = 1,  /* the guest has interrupted itself */
    STAGE_TIMER,     /* the timer has run down once */
    STAGE_MESSAGES,  /* the two message devices have interrupted in turn */
    STAGE_HELD_BACK, /* both have sent, and the task priority holds one back */
    STAGE_RELEASED,  /* it no longer does */
    STAGE_NMI,       /* a message was an NMI */
    STAGE_LINES,     /* the redirection entries are written */
    STAGE_EDGE,      /* the edge device has interrupted several times */
    STAGE_LEVEL,     /* the level device has had several requests, and all were taken */
    STAGE_MASKED,    /* both lines are masked; the devices start now */
    STAGE_UNMASKED,  /* and the lines were unmasked */
    STAGE_BELL,      /* the bell is about to ring RINGS times, through the VMM */
    STAGE_FAST_BELL, /* and RINGS times inside KVM */
    STAGE_END,
};

struct plan {
    uint8_t vector[DEVICES];
    uint8_t logical_id;          /* this CPU's logical destination: one bit */
    uint8_t edge_pin, level_pin; /* of the I/O APIC */
    uint8_t edge_gsi, level_gsi; /* what KVM's interrupt routing calls them: not the same numbers */
    uint8_t bell_gsi;            /* a message */
    uint8_t edges, messages;     /* how often the devices interrupt */
    uint8_t requests;            /* of the level device */
    uint32_t timer_count;        /* to run down from */
};

/* A number from first to first + bound - 1, bound at most 64, that *used has not: a bit for each. */
static inline uint8_t plan_other(struct random *random, uint8_t first, uint8_t bound,
                                 uint64_t *used) {
    uint8_t number;
    do
        number = (uint8_t)random_below(random, bound);
    while (*used >> number & 1);
    *used |= UINT64_C(1) << number;
    return (uint8_t)(first + number);
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan = {.logical_id = (uint8_t)(1u << random_below(&random, 8))};
    uint8_t classes[DEVICES] = {0};
    uint64_t used_classes = 0;
    uint64_t used_pins = 0;
    uint64_t used_gsis = 0;
    for (unsigned i = 0; i < DEVICES; i++)
        classes[i] = plan_other(&random, 3, 12, &used_classes);
    if (classes[DEVICE_LOW] > classes[DEVICE_HIGH]) {
        uint8_t higher = classes[DEVICE_LOW];
        classes[DEVICE_LOW] = classes[DEVICE_HIGH];
        classes[DEVICE_HIGH] = higher;
    }
    for (unsigned i = 0; i < DEVICES; i++)
        plan.vector[i] = (uint8_t)(classes[i] << 4 | random_below(&random, 16));
    plan.edge_pin = plan_other(&random, 9, 15, &used_pins);
    plan.level_pin = plan_other(&random, 9, 15, &used_pins);
    plan.edge_gsi = plan_other(&random, 32, 64, &used_gsis);
    plan.level_gsi = plan_other(&random, 32, 64, &used_gsis);
    plan.bell_gsi = plan_other(&random, 32, 64, &used_gsis);
    plan.edges = (uint8_t)(3 + random_below(&random, 4));
    plan.messages = (uint8_t)(2 + random_below(&random, 3));
    plan.requests = (uint8_t)(3 + random_below(&random, 5));
    plan.timer_count = (uint32_t)(100000 + random_below(&random, 100000));
    return plan;
}
