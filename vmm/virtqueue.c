/*
 * The device's side of a split virtqueue: VIRTIO 1.2 "Split Virtqueues". The ring and all that it points to
 * is the driver's, which may write there while this code reads: what decides is read once, and
 * checked as it was read.
 */
#include <string.h>

#include "vmm.h"

/* Only then may the device look at the queue, or write to it. */
static bool queue_is_live(const struct virtio_device *device, unsigned queue) {
    return virtio_is_live(device) && device->queue[queue].ready;
}

/* ---- the available ring, and the chains in it ---- */

/* How far the driver has made chains available. What it wrote before the index is visible then: VIRTIO 1.2 "Driver
 * Requirements: Updating idx". */
static uint16_t available_index(const struct virtqueue *queue) {
    return __atomic_load_n(&queue->ring.avail->idx, __ATOMIC_ACQUIRE);
}

/* Into the chain; NULL, or what is wrong with it. A buffer without a byte is nothing that a driver makes, and
 * refused as QEMU refuses it. */
static const char *chain_add(struct chain *chain, const struct vring_desc *descriptor) {
    bool is_writable = descriptor->flags & VRING_DESC_F_WRITE;
    uint32_t *total = is_writable ? &chain->writable : &chain->readable;
    uint8_t *hva = memory_at(descriptor->addr, descriptor->len);
    if (descriptor->len == 0)
        return "a buffer has no bytes";
    if (!hva)
        return "a buffer is not in memory";
    if (!is_writable && chain->writable)
        return "a readable buffer comes after a writable one";
    if (descriptor->len > UINT32_MAX - chain->readable - chain->writable)
        return "a chain has 4 GiB or more";
    *total += descriptor->len;
    chain->buffer[chain->count++] = (struct buffer){hva, descriptor->len};
    return NULL;
}

/* A table of descriptors: the queue's own, or an indirect one. */
struct table {
    const struct vring_desc *descriptors;
    uint32_t size;
    bool is_indirect;
};

/* VIRTIO 1.2 "Indirect Descriptors": only the last descriptor of a chain may lead to a table, and from there none
 * leads to another. Its VRING_DESC_F_WRITE means nothing. The table may be longer than the queue; the chain may not. */
static const char *table_enter(const struct virtio_device *device, struct table *table,
                               const struct vring_desc *descriptor) {
    uint32_t size = descriptor->len / sizeof(struct vring_desc);
    if (!virtio_has_feature(device, VIRTIO_RING_F_INDIRECT_DESC))
        return "an indirect descriptor, without VIRTIO_F_INDIRECT_DESC";
    if (table->is_indirect)
        return "an indirect descriptor in an indirect table";
    if (descriptor->flags & VRING_DESC_F_NEXT)
        return "an indirect descriptor has a next one";
    if (size == 0 || descriptor->len % sizeof(struct vring_desc))
        return "an indirect table is empty, or ends within a descriptor";
    *table = (struct table){memory_at(descriptor->addr, descriptor->len), size, true};
    return table->descriptors ? NULL : "an indirect table is not in memory";
}

/* Follow the chain from its head. It ends: each step adds a buffer, of which there are at most as many as the
 * queue has entries, or enters an indirect table, which happens once. */
static const char *chain_walk(const struct virtio_device *device, const struct virtqueue *queue,
                              struct chain *chain) {
    /* BEGIN SOLUTION */
    struct table table = {queue->ring.desc, queue->ring.num, false};
    uint16_t index = chain->head;
    for (;;) {
        struct vring_desc descriptor;
        const char *wrong;
        if (index >= table.size)
            return "a descriptor lies beyond the end of its table";
        memcpy(&descriptor, &table.descriptors[index], sizeof descriptor);
        if (descriptor.flags & VRING_DESC_F_INDIRECT) {
            wrong = table_enter(device, &table, &descriptor);
            index = 0;
        } else {
            if (chain->count == queue->ring.num)
                return "a chain is longer than the queue, or a loop";
            wrong = chain_add(chain, &descriptor);
            if (!wrong && !(descriptor.flags & VRING_DESC_F_NEXT))
                return NULL;
            index = descriptor.next;
        }
        if (wrong)
            return wrong;
    }
    /* STUB
    (void)device, (void)queue, (void)chain, (void)chain_add, (void)table_enter;
    HOST_TODO("chain_walk: the VMM's own virtio devices work where lesson 10 is not to be written");
    END SOLUTION */
}

bool virtqueue_take(struct virtio_device *device, unsigned number, struct chain *chain) {
    struct virtqueue *queue = &device->queue[number];
    if (!queue_is_live(device, number))
        return false;
    uint16_t waiting = available_index(queue) - queue->next_available;
    if (waiting == 0)
        return false;
    if (waiting > queue->ring.num) {
        virtio_break(device, number, "the available index is ahead by more than the queue's size");
        return false;
    }
    const uint16_t *entry = &queue->ring.avail->ring[queue->next_available % queue->ring.num];
    chain->head = __atomic_load_n(entry, __ATOMIC_RELAXED);
    chain->count = chain->readable = chain->writable = 0;
    const char *wrong = chain_walk(device, queue, chain);
    if (wrong)
        virtio_break(device, number, wrong);
    else
        queue->next_available++;
    return !wrong;
}

/* ---- the used ring ---- */

static void chain_record(const struct virtio_device *device, unsigned queue,
                         const struct chain *chain, uint32_t written) {
    if (!events_are_recorded())
        return;
    event_begin("virtio_chain");
    event_string("device", device->name);
    event_number("queue", queue);
    event_number("head", chain->head);
    event_number("readable", chain->readable);
    event_number("writable", chain->writable);
    event_number("written", written);
    event_end();
}

/* The element first, then the index: VIRTIO 1.2 "Device Requirements: The Virtqueue Used Ring". */
void virtqueue_put(struct virtio_device *device, unsigned number, const struct chain *chain,
                   uint32_t written) {
    struct virtqueue *queue = &device->queue[number];
    chain_record(device, number, chain, written);
    /* BEGIN SOLUTION */
    struct vring_used *used = queue->ring.used;
    used->ring[queue->next_used++ % queue->ring.num] =
        (struct vring_used_elem){.id = chain->head, .len = written};
    __atomic_store_n(&used->idx, queue->next_used, __ATOMIC_RELEASE);
    /* STUB
    (void)queue;
    HOST_TODO("virtqueue_put: the VMM's own virtio devices work where lesson 10 is not to be written");
    END SOLUTION */
}

/* ---- notifications, and how each side says that it wants none ---- */

/* The index is written before what the driver wants is read; the driver does it the other way round. So one of
 * the two sees what the other has done. */
void virtqueue_interrupt(struct virtio_device *device, unsigned number, uint16_t used_before) {
    const struct virtqueue *queue = &device->queue[number];
    if (!queue->ready || queue->next_used == used_before)
        return;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    /* BEGIN SOLUTION */
    const struct vring_avail *available = queue->ring.avail;
    bool is_wanted =
        !(__atomic_load_n(&available->flags, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
    if (virtio_has_feature(device, VIRTIO_RING_F_EVENT_IDX)) {
        uint16_t event = __atomic_load_n(&vring_used_event(&queue->ring), __ATOMIC_RELAXED);
        is_wanted = vring_need_event(event, queue->next_used, used_before);
    }
    if (is_wanted)
        virtio_interrupt(device);
    /* STUB
    HOST_TODO("virtqueue_interrupt: the VMM's own virtio devices work where lesson 10 is not to be written");
    END SOLUTION */
}

void virtqueue_notify_not(struct virtio_device *device, unsigned number) {
    const struct virtqueue *queue = &device->queue[number];
    /* With event indexes there is nothing to do: the one that stands there is behind, and does not ask. */
    if (queue_is_live(device, number) && !virtio_has_feature(device, VIRTIO_RING_F_EVENT_IDX))
        __atomic_store_n(&queue->ring.used->flags, VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
}

bool virtqueue_notify_me(struct virtio_device *device, unsigned number) {
    const struct virtqueue *queue = &device->queue[number];
    if (!queue_is_live(device, number))
        return false;
    if (virtio_has_feature(device, VIRTIO_RING_F_EVENT_IDX))
        __atomic_store_n(&vring_avail_event(&queue->ring), queue->next_available, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&queue->ring.used->flags, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return available_index(queue) != queue->next_available;
}
