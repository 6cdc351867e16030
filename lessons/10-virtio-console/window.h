/*
 * Lesson 10: the window (lab.h). Rings that are no memory: each access of the driver is an exit. The device behind it is
 * the lab, which knows from the plan what to do, and does it at a moment that the plan decides.
 */
#pragma once

#include <string.h>

#include "host.h"
#include "lab.h"

/* Where things are in the areas: VIRTIO 1.2 "The Virtqueue Available Ring", "The Virtqueue Used Ring". */
#define RING_FLAGS 0
#define RING_INDEX 2
#define RING_ENTRIES 4
#define AVAILABLE_EVENT_END (RING_ENTRIES + QUEUE_SIZE * 2) /* used_event */

static struct {
    uint8_t bytes[WINDOW_SIZE];
    struct {
        uint16_t head[QUEUE_SIZE]; /* published, and not used yet */
        unsigned count;
        uint16_t seen, used; /* how far the two rings have come */
    } queue[QUEUES];
    struct random random; /* which buffer is used next, and how much of it */
    bool is_armed;        /* a buffer is to be used when the driver listens */
} window;

static uint8_t *window_at(gpa_t gpa) { return &window.bytes[gpa - WINDOW_GPA]; }

static uint16_t window_get(gpa_t gpa) {
    uint16_t value;
    memcpy(&value, window_at(gpa), sizeof value);
    return value;
}

static void window_put(gpa_t gpa, uint64_t value, size_t size) {
    memcpy(window_at(gpa), &value, size);
}

/* One buffer is used: not the one that has waited longest, if there is another. */
static void window_use(unsigned number) {
    gpa_t used_gpa = WINDOW_USED(number);
    unsigned count = window.queue[number].count;
    if (count == 0)
        return;
    unsigned i = count > 1 ? (unsigned)(1 + random_below(&window.random, count - 1)) : 0;
    uint16_t head = window.queue[number].head[i];
    uint16_t length = (uint16_t)(1 + random_below(&window.random, 4000));
    gpa_t entry_gpa =
        used_gpa + RING_ENTRIES + window.queue[number].used % QUEUE_SIZE * UINT64_C(8);
    memmove(&window.queue[number].head[i], &window.queue[number].head[i + 1],
            (count - i - 1) * sizeof head);
    window.queue[number].count--;
    window_put(entry_gpa, head, 4);
    window_put(entry_gpa + 4, length, 4);
    window_put(used_gpa + RING_INDEX, ++window.queue[number].used, 2);
    event_begin("window_used");
    event_number("queue", number);
    event_number("head", head);
    event_number("length", length);
    event_end();
}

static void window_complete(unsigned number, unsigned count) {
    while (count--)
        window_use(number);
}

/* The driver has written into the available ring: has the index moved? */
static void window_follow(unsigned number) {
    gpa_t available_gpa = WINDOW_AVAILABLE(number);
    uint16_t index = window_get(available_gpa + RING_INDEX);
    while (window.queue[number].seen != index && window.queue[number].count < QUEUE_SIZE) {
        unsigned entry = window.queue[number].seen++ % QUEUE_SIZE;
        uint16_t head = window_get(available_gpa + RING_ENTRIES + entry * UINT64_C(2));
        if (head < QUEUE_SIZE)
            window.queue[number].head[window.queue[number].count++] = head;
    }
}

static bool is_listening(gpa_t available_gpa, gpa_t gpa) {
    return gpa == available_gpa + RING_FLAGS || gpa == available_gpa + AVAILABLE_EVENT_END;
}

static void window_access(struct access *access) {
    unsigned number = (unsigned)((access->address - WINDOW_GPA) / WINDOW_QUEUE_SIZE);
    gpa_t available_gpa = WINDOW_AVAILABLE(number);
    if (!access->is_write) {
        memcpy(access->data, window_at(access->address), access->size);
        return;
    }
    if (window.is_armed && is_listening(available_gpa, access->address)) {
        window.is_armed = false;
        window_complete(number, 1);
    }
    memcpy(window_at(access->address), access->data, access->size);
    window_follow(number);
}

static void window_create(uint64_t seed) {
    static const char *const names[QUEUES][3] = {
        [RECEIVE] = {"receive descriptors", "receive available ring", "receive used ring"},
        [TRANSMIT] = {"transmit descriptors", "transmit available ring", "transmit used ring"},
    };
    window.random = random_stream(seed, 2);
    for (unsigned number = 0; number < QUEUES; number++)
        for (unsigned area = 0; area < 3; area++)
            host_claim_mmio(WINDOW_DESCRIPTORS(number) + area * UINT64_C(0x1000), 0x1000,
                            names[number][area], window_access);
}
