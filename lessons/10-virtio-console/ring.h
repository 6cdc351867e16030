/*
 * Lesson 10: how the device gets at the rings. Its accesses are noted in the record, one by one: what a bus analyser
 * would show of a real device.
 */
#pragma once

#include <stddef.h>
#include <stdio.h>

#include "lab.h"
#include "virtio_device.h"

/*
 * One access to one field of a ring, of its own width, as in
 *
 *     uint16_t index = LOAD(queue->ring.avail->idx);
 *     STORE(queue->ring.used->flags, flags);
 *
 * The driver may change the field at any time: what two LOADs of it give may differ.
 */
#define LOAD(field) ring_load(&(field), sizeof(field)) /* a uint64_t, whatever the field is */
#define STORE(field, value) ring_store(&(field), sizeof(field), (value))

/* What the driver's CPU sees of this one's memory accesses. Stores before, then stores after; loads before,
 * then loads after; all before, then all after. (The first two cost nothing on x86.) */
static inline void ring_barrier(const char *of);
#define barrier_stores() (__atomic_thread_fence(__ATOMIC_RELEASE), ring_barrier("stores"))
#define barrier_loads() (__atomic_thread_fence(__ATOMIC_ACQUIRE), ring_barrier("loads"))
#define barrier_full() (__atomic_thread_fence(__ATOMIC_SEQ_CST), ring_barrier("full"))

/* ---- the rest is the lab's ---- */

#define LOADS_MOST 2000 /* in one call of a function */

static struct {
    struct virtio_device *device;
    const struct vring *scratch; /* one more ring, whose accesses are not noted */
    const char *function;        /* what runs now, */
    unsigned loads, flags_loads; /* and how often it has looked; at flags of a descriptor */
    bool is_meddled_with;        /* the driver writes while the device reads */
} ring_watch;

static bool range_holds(const void *first, size_t bytes, const void *field, size_t size,
                        size_t *offset) {
    *offset = (size_t)((uintptr_t)field - (uintptr_t)first);
    return first && *offset < bytes && size <= bytes - *offset;
}

static void descriptor_name(size_t offset, char *name, size_t length) {
    static const char *const members[] = {[0] = "addr", [8] = "len", [12] = "flags", [14] = "next"};
    size_t member = offset % sizeof(struct vring_desc);
    snprintf(name, length, "desc[%zu].%s", offset / sizeof(struct vring_desc),
             member < 15 && members[member] ? members[member] : "?");
}

static void index_ring_name(const char *area, size_t offset, size_t entries_end, size_t entry,
                            const char *end, char *name, size_t length) {
    if (offset < 4)
        snprintf(name, length, "%s.%s", area, offset < 2 ? "flags" : "idx");
    else if (offset >= entries_end)
        snprintf(name, length, "%s", end);
    else
        snprintf(name, length, "%s.ring[%zu]%s", area, (offset - 4) / entry,
                 entry == 2                 ? ""
                 : (offset - 4) % entry < 4 ? ".id"
                                            : ".len");
}

/* The field's name; false if it lies in none of the ring's areas. */
static bool field_name(const struct vring *ring, const void *field, size_t size, char *name,
                       size_t length) {
    size_t offset, available_end = 4 + ring->num * sizeof(__virtio16);
    size_t used_end = 4 + ring->num * sizeof(struct vring_used_elem);
    if (range_holds(ring->desc, ring->num * sizeof(struct vring_desc), field, size, &offset))
        descriptor_name(offset, name, length);
    else if (range_holds(ring->avail, available_end + 2, field, size, &offset))
        index_ring_name("avail", offset, available_end, 2, "used_event", name, length);
    else if (range_holds(ring->used, used_end + 2, field, size, &offset))
        index_ring_name("used", offset, used_end, 8, "avail_event", name, length);
    else
        return false;
    return true;
}

/* May the field be accessed? */
static bool ring_note(const char *kind, const void *field, size_t size, uint64_t value) {
    char name[32] = "";
    unsigned queue = 0;
    if (ring_watch.scratch && field_name(ring_watch.scratch, field, size, name, sizeof name))
        return true;
    while (queue < ring_watch.device->queue_count &&
           !field_name(&ring_watch.device->queue[queue].ring, field, size, name, sizeof name))
        queue++;
    event_begin(kind);
    if (name[0])
        event_number("queue", queue);
    event_string("field", name[0] ? name : "outside of all rings");
    if (name[0])
        event_hex("value", value);
    event_end();
    return name[0];
}

static uint64_t ring_peek(const void *field, size_t size) {
    switch (size) {
    case 1: return __atomic_load_n((const uint8_t *)field, __ATOMIC_RELAXED);
    case 2: return __atomic_load_n((const uint16_t *)field, __ATOMIC_RELAXED);
    case 4: return __atomic_load_n((const uint32_t *)field, __ATOMIC_RELAXED);
    default: return __atomic_load_n((const uint64_t *)field, __ATOMIC_RELAXED);
    }
}

static bool ring_is_inside(const void *field, size_t size) {
    char name[32];
    bool is_inside =
        ring_watch.scratch && field_name(ring_watch.scratch, field, size, name, sizeof name);
    for (unsigned i = 0; i < ring_watch.device->queue_count; i++)
        is_inside |= field_name(&ring_watch.device->queue[i].ring, field, size, name, sizeof name);
    return is_inside;
}

/* A driver that ends a loop of its own, in time for a device that follows it one descriptor too far. */
static void ring_meddle(const void *field, size_t size) {
    const struct vring *ring = &ring_watch.device->queue[TRANSMIT].ring;
    size_t offset;
    if (!ring_watch.is_meddled_with ||
        !range_holds(ring->desc, ring->num * sizeof(struct vring_desc), field, size, &offset) ||
        offset % sizeof(struct vring_desc) != offsetof(struct vring_desc, flags))
        return;
    if (++ring_watch.flags_loads > ring->num)
        ring->desc[offset / sizeof(struct vring_desc)].flags = 0;
}

static inline uint64_t ring_load(const void *field, size_t size) {
    char what[80];
    if (++ring_watch.loads > LOADS_MOST) {
        snprintf(what, sizeof what, "%s() in host.c goes round and round", ring_watch.function);
        host_stuck(what);
    }
    ring_meddle(field, size);
    uint64_t value = ring_is_inside(field, size) ? ring_peek(field, size) : 0;
    ring_note("load", field, size, value);
    return value;
}

static inline void ring_store(void *field, size_t size, uint64_t value) {
    if (!ring_note("store", field, size, value))
        return;
    switch (size) {
    case 1: __atomic_store_n((uint8_t *)field, (uint8_t)value, __ATOMIC_RELAXED); break;
    case 2: __atomic_store_n((uint16_t *)field, (uint16_t)value, __ATOMIC_RELAXED); break;
    case 4: __atomic_store_n((uint32_t *)field, (uint32_t)value, __ATOMIC_RELAXED); break;
    default: __atomic_store_n((uint64_t *)field, value, __ATOMIC_RELAXED); break;
    }
}

static inline void ring_barrier(const char *of) {
    if (ring_watch.scratch)
        return;
    event_begin("barrier");
    event_string("of", of);
    event_end();
}

/* A function of the student's is called: what follows in the record is its doing. */
static void ring_call(const char *function, unsigned queue) {
    ring_watch.function = function;
    ring_watch.loads = ring_watch.flags_loads = 0;
    if (ring_watch.scratch)
        return;
    event_begin("call");
    event_string("function", function);
    event_number("queue", queue);
    event_end();
}
