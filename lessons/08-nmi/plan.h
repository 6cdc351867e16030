/*
 * What the two halves of lesson 8 agree on: the scenes that are played, and the ports by which the
 * guest says where it is. A write to one of them is an exit, and so a moment at which the scene may
 * have something raised: an NMI, several, interrupts, or both.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "random.h"
#include "x86.h"

#define LAB_SCENE 0x600   /* one byte: this scene begins */
#define LAB_BEGIN 0x601   /* one byte: the handler of this vector begins to serve */
#define LAB_FAULTED 0x602 /* one byte: the NMI handler is back from an exception of this vector */
#define LAB_END 0x603     /* one byte: the handler of this vector has served */
#define LAB_FRAME 0x604   /* 32 bits: an NMI was taken; its struct trap_frame is at this gva */
#define LAB_OVER 0x608    /* one byte: this scene is over */
#define LAB_PORTS 9

/* When something is raised: each at most once in a scene, the first time it comes. */
enum when {
    AT_SCENE,
    AT_NMI_BEGIN,
    AT_FAULTED,
    AT_NMI_END,
    AT_INTERRUPT_BEGIN,
    AT_WINDOW, /* an exit with KVM_EXIT_IRQ_WINDOW_OPEN */
    AT_HALT,   /* an exit with KVM_EXIT_HLT */
    AT_KICK,   /* KVM_RUN has returned without entering the guest */
    WHENS,
};

#define SOME 0xff /* as many NMIs as the seed says: 2 to 5 */

struct scene {
    const char *name;
    bool interrupts_on; /* from the start; else once early_nmis have been served */
    bool halts, faults, kicked;
    uint8_t early_nmis, nmis; /* how many are served if all is well */
    struct {
        uint8_t nmis, interrupts;
    } raise[WHENS];
};

#define SCENES 14
#define INTERRUPTS_MAX 3 /* of one scene */

static const struct scene scenes[SCENES] = {
    /* NMIs alone */
    {"an NMI", .early_nmis = 1, .nmis = 1, .raise = {[AT_SCENE] = {1, 0}}},
    {"a burst of NMIs", .early_nmis = 1, .nmis = 1, .raise = {[AT_SCENE] = {SOME, 0}}},
    {"NMIs in an NMI handler", .early_nmis = 2, .nmis = 2,
     .raise = {[AT_SCENE] = {1, 0}, [AT_NMI_BEGIN] = {SOME, 0}, [AT_NMI_END] = {SOME, 0}}},
    {"an NMI, a kick, an NMI", .kicked = true, .early_nmis = 1, .nmis = 1,
     .raise = {[AT_SCENE] = {1, 0}, [AT_KICK] = {1, 0}}},
    {"an NMI in a halt", .halts = true, .early_nmis = 1, .nmis = 1, .raise = {[AT_HALT] = {1, 0}}},
    /* interrupts, and both */
    {"two interrupts", .raise = {[AT_SCENE] = {0, 2}}},
    {"both, IF on", .interrupts_on = true, .nmis = 1, .raise = {[AT_SCENE] = {1, 1}}},
    {"both, IF off", .early_nmis = 1, .nmis = 1, .raise = {[AT_SCENE] = {1, 1}}},
    {"an NMI in the window", .nmis = 1, .raise = {[AT_SCENE] = {0, 1}, [AT_WINDOW] = {1, 0}}},
    {"an NMI in an interrupt handler", .interrupts_on = true, .nmis = 1,
     .raise = {[AT_SCENE] = {0, 1}, [AT_INTERRUPT_BEGIN] = {1, 0}}},
    {"an interrupt in an NMI handler", .interrupts_on = true, .nmis = 1,
     .raise = {[AT_SCENE] = {1, 0}, [AT_NMI_BEGIN] = {0, 1}}},
    {"an interrupt, a kick, both", .interrupts_on = true, .kicked = true, .nmis = 1,
     .raise = {[AT_SCENE] = {0, 1}, [AT_KICK] = {1, 1}}},
    /* an exception in an NMI handler */
    {"a fault, an NMI", .faults = true, .early_nmis = 2, .nmis = 2,
     .raise = {[AT_SCENE] = {1, 0}, [AT_FAULTED] = {1, 0}}},
    {"an NMI, a fault", .faults = true, .early_nmis = 2, .nmis = 2,
     .raise = {[AT_SCENE] = {1, 0}, [AT_NMI_BEGIN] = {1, 0}}},
};

/* Where groups begin. They keep their order, since each needs more of what the student writes; the
 * seed shuffles the scenes of a group. */
static const uint8_t scene_groups[] = {0, 1, 4, 5, 6, 12, SCENES};

struct plan {
    uint8_t order[SCENES];
    uint8_t some[SCENES];                    /* what SOME means */
    uint8_t exception[SCENES];               /* what the NMI handler runs into */
    uint8_t vectors[SCENES][INTERRUPTS_MAX]; /* of the interrupts, in the order they are raised */
};

static inline void plan_shuffle(struct random *random, uint8_t *numbers, unsigned count) {
    for (unsigned i = count; i > 1; i--) {
        unsigned j = (unsigned)random_below(random, i);
        uint8_t other = numbers[j];
        numbers[j] = numbers[i - 1];
        numbers[i - 1] = other;
    }
}

static inline struct plan plan_make(uint64_t seed) {
    struct random random = random_stream(seed, 1);
    struct plan plan;
    for (uint8_t i = 0; i < SCENES; i++) {
        plan.order[i] = i;
        plan.some[i] = (uint8_t)(2 + random_below(&random, 4));
        plan.exception[i] = random_below(&random, 2) ? VECTOR_UD : VECTOR_DE;
        for (unsigned j = 0; j < INTERRUPTS_MAX; j++) /* each has a higher priority than the last */
            plan.vectors[i][j] = (uint8_t)(0x30 + 0x40 * j + random_below(&random, 0x40));
    }
    for (unsigned i = 0; i + 1 < sizeof scene_groups; i++)
        plan_shuffle(&random, plan.order + scene_groups[i],
                     (unsigned)(scene_groups[i + 1] - scene_groups[i]));
    return plan;
}
