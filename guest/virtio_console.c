/* A console driver for any device that keeps to VIRTIO 1.2; citations are of its sections. */
#include "virtio_console.h"
#include "pic.h"

#define RECEIVE_QUEUE 0
#define TRANSMIT_QUEUE 1
#define BUFFER_SIZE PAGE_SIZE
#define FAR_AWAY (1 << 15) /* from a 16-bit index */

/* The indices and flags of a ring, which the other side reads, or writes, at any time: one access each. */
static uint16_t shared_read(const uint16_t *at) { return *(const volatile uint16_t *)at; }
static void shared_write(uint16_t *at, uint16_t value) { *(volatile uint16_t *)at = value; }

static uint32_t at_most(uint64_t size, uint32_t limit) {
    return size < limit ? (uint32_t)size : limit;
}

/* ---- queues ---- */

static bool has_event_index(const struct virtio_console_queue *queue) {
    return virtio_has_feature(queue->device, VIRTIO_RING_F_EVENT_IDX);
}

/* Put a buffer, of which the device may use size bytes, into the available ring. */
static void buffer_offer(struct virtio_console_queue *queue, unsigned buffer, uint32_t size) {
    /* BEGIN SOLUTION */
    queue->ring.desc[buffer].len = size;
    queue->ring.avail->ring[queue->next_available++ % queue->ring.num] = (uint16_t)buffer;
    /* STUB
    (void)queue, (void)buffer, (void)size;
    PANIC("virtio_console.c, buffer_offer: lesson 10");
    END SOLUTION */
}

/*
 * Does the device want to hear of the buffers from this index on? What it says of that must be read after it
 * can see the new index: "Notifying The Device". If it decides just now that it wants to, it looks at the
 * index once more; between the two, one sees what the other has done.
 */
static bool device_wants_notification(const struct virtio_console_queue *queue, uint16_t from) {
    /* BEGIN SOLUTION */
    const struct vring *ring = &queue->ring;
    barrier_full();
    if (has_event_index(queue))
        return vring_need_event(shared_read(&vring_avail_event(ring)), queue->published, from);
    return !(shared_read(&ring->used->flags) & VRING_USED_F_NO_NOTIFY);
    /* STUB
    (void)queue, (void)from, (void)has_event_index, (void)shared_read;
    PANIC("virtio_console.c, device_wants_notification: lesson 10");
    END SOLUTION */
}

/* Let the device see all that has been offered, descriptors and entries before the index: "Updating idx". */
static void queue_publish(struct virtio_console_queue *queue) {
    /* BEGIN SOLUTION */
    uint16_t from = queue->published;
    if (from == queue->next_available)
        return;
    barrier_stores();
    queue->published = queue->next_available;
    shared_write(&queue->ring.avail->idx, queue->published);
    if (device_wants_notification(queue, from))
        virtio_notify(queue->device, queue->number);
    /* STUB
    (void)queue, (void)shared_write, (void)device_wants_notification;
    PANIC("virtio_console.c, queue_publish: lesson 10");
    END SOLUTION */
}

/*
 * No interrupts for used buffers: "Used Buffer Notification Suppression". With event indices there is no flag
 * for that, but an index as far from the device's as can be. (One just behind it would not do: a device
 * may look when it has used a whole batch, and the index may be that of the batch's first.)
 */
static void queue_silence(struct virtio_console_queue *queue) {
    /* BEGIN SOLUTION */
    if (has_event_index(queue))
        shared_write(&vring_used_event(&queue->ring), (uint16_t)(queue->next_used + FAR_AWAY));
    else
        shared_write(&queue->ring.avail->flags, VRING_AVAIL_F_NO_INTERRUPT);
    /* STUB
    (void)queue;
    PANIC("virtio_console.c, queue_silence: lesson 10");
    END SOLUTION */
}

/*
 * An interrupt for the next used buffer, please; and is one there already? A buffer that was used just
 * before the device could see the wish gives no interrupt, so the look must come after:
 * "Receiving Used Buffers From The Device".
 */
static bool queue_await(struct virtio_console_queue *queue) {
    /* BEGIN SOLUTION */
    if (has_event_index(queue))
        shared_write(&vring_used_event(&queue->ring), queue->next_used);
    else
        shared_write(&queue->ring.avail->flags, 0);
    barrier_full();
    return shared_read(&queue->ring.used->idx) != queue->next_used;
    /* STUB
    (void)queue;
    PANIC("virtio_console.c, queue_await: lesson 10");
    END SOLUTION */
}

/* The next buffer that the device is done with, and how much it says it has written there; false if there is
 * none. Index, entry and buffer are read in this order: the device writes them in the other. */
static bool buffer_reap(struct virtio_console_queue *queue, unsigned *buffer, uint32_t *written) {
    /* BEGIN SOLUTION */
    const struct vring *ring = &queue->ring;
    if (shared_read(&ring->used->idx) == queue->next_used)
        return false;
    barrier_loads();
    struct vring_used_elem used = ring->used->ring[queue->next_used++ % ring->num];
    if (used.id >= ring->num || used.len > ring->desc[used.id].len)
        PANIC("virtio console: the device has used what it was not offered");
    queue_silence(queue);
    *buffer = used.id;
    *written = used.len;
    return true;
    /* STUB
    (void)queue, (void)buffer, (void)written, (void)queue_silence;
    PANIC("virtio_console.c, buffer_reap: lesson 10");
    END SOLUTION */
}

/* As many entries as the device takes. flags: who writes to the buffers. */
static bool queue_begin(struct virtio_console_queue *queue, unsigned number, uint16_t flags) {
    uint16_t size = VIRTIO_CONSOLE_BUFFERS;
    while (size && !virtio_ring_create(queue->device, number, size, &queue->ring))
        size /= 2;
    queue->number = number;
    queue->fresh = 0;
    queue->next_available = queue->published = queue->next_used = 0;
    for (unsigned i = 0; i < size; i++) {
        if (!queue->buffer_gpa[i])
            queue->buffer_gpa[i] = page_alloc();
        queue->ring.desc[i].addr = queue->buffer_gpa[i];
        queue->ring.desc[i].flags = flags;
    }
    return size > 0;
}

/* ---- open and close ---- */

static bool queues_begin(struct virtio_console *console) {
    console->receive.device = console->transmit.device = &console->device;
    return queue_begin(&console->receive, RECEIVE_QUEUE, VRING_DESC_F_WRITE) &&
           queue_begin(&console->transmit, TRANSMIT_QUEUE, 0);
}

static void receive_begin(struct virtio_console_queue *queue) {
    queue_silence(queue);
    while (queue->fresh < queue->ring.num)
        buffer_offer(queue, queue->fresh++, BUFFER_SIZE);
    queue_publish(queue);
}

bool virtio_console_open(struct virtio_console *console, uint64_t wanted) {
    struct virtio_device found;
    if (!virtio_find(VIRTIO_ID_CONSOLE, &found))
        return false;
    console->device = found;
    if (!virtio_begin(&console->device, wanted))
        return false;
    if (!queues_begin(console)) {
        virtio_give_up(&console->device);
        return false;
    }
    console->input.left = 0;
    console->is_resized = false;
    queue_silence(&console->transmit);
    virtio_driver_ok(&console->device);
    receive_begin(&console->receive); /* not before: it notifies */
    return true;
}

void virtio_console_close(struct virtio_console *console) {
    virtio_console_flush(console);
    virtio_reset(&console->device);
}

/* ---- out ---- */

/* A buffer to fill. If the device has all of them, wait for one; no interrupt announces it. */
static unsigned buffer_take(struct virtio_console_queue *queue) {
    unsigned buffer;
    uint32_t unused;
    if (queue->fresh < queue->ring.num)
        return queue->fresh++;
    while (!buffer_reap(queue, &buffer, &unused)) {
        queue_publish(queue);
        pause();
    }
    return buffer;
}

/* Buffers are published together, at the end or when all are full: one notification for up to 64 KiB. */
void virtio_console_write(struct virtio_console *console, const void *bytes, size_t size) {
    struct virtio_console_queue *queue = &console->transmit;
    const uint8_t *from = bytes;
    while (size > 0) {
        uint32_t part = at_most(size, BUFFER_SIZE);
        unsigned buffer = buffer_take(queue);
        memcpy((void *)queue->buffer_gpa[buffer], from, part);
        buffer_offer(queue, buffer, part);
        from += part;
        size -= part;
    }
    queue_publish(queue);
}

void virtio_console_flush(const struct virtio_console *console) {
    const struct virtio_console_queue *queue = &console->transmit;
    while (shared_read(&queue->ring.used->idx) != queue->published)
        pause();
}

/* ---- in ---- */

static void input_return(struct virtio_console *console) {
    buffer_offer(&console->receive, console->input.buffer, BUFFER_SIZE);
    queue_publish(&console->receive);
}

/* Is there anything to read? A buffer that comes back empty says nothing. */
static bool input_next(struct virtio_console *console) {
    while (console->input.left == 0) {
        if (!buffer_reap(&console->receive, &console->input.buffer, &console->input.left))
            return false;
        console->input.at = 0;
        if (console->input.left == 0)
            input_return(console);
    }
    return true;
}

size_t virtio_console_read(struct virtio_console *console, void *bytes, size_t size) {
    uint8_t *to = bytes;
    size_t room = size;
    while (room > 0 && input_next(console)) {
        uint32_t part = at_most(room, console->input.left);
        uint64_t buffer_gpa = console->receive.buffer_gpa[console->input.buffer];
        memcpy(to, (const void *)(buffer_gpa + console->input.at), part);
        to += part;
        room -= part;
        console->input.at += part;
        console->input.left -= part;
        if (console->input.left == 0)
            input_return(console);
    }
    return size - room;
}

/* ---- interrupts ---- */

static struct virtio_console *interrupting;

/* It leaves the rings to who waits, so that the two cannot get into each other's way. The device's line falls with
 * the acknowledgement; a level-triggered one that is ended while it is high would interrupt again. */
static bool interrupt(struct trap_frame *frame) {
    (void)frame;
    const struct virtio_device *device = &interrupting->device;
    uint32_t causes = virtio_interrupt_take(device);
    if (causes & VIRTIO_MMIO_INT_CONFIG) {
        if (virtio_read(device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET)
            PANIC("virtio console: the device needs a reset");
        interrupting->is_resized = true;
    }
    pic_eoi(device->irq);
    return true;
}

bool virtio_console_interrupts_begin(struct virtio_console *console, uint8_t vector_base) {
    if (console->device.irq >= PIC_LINES)
        return false;
    interrupting = console;
    trap_handle((uint8_t)(vector_base + console->device.irq), interrupt);
    pic_unmask(console->device.irq);
    return true;
}

/* From the look to the HLT no interrupt may be taken: it would be over, and the HLT would wait for the next. */
void virtio_console_wait(struct virtio_console *console) {
    cli();
    while (!console->input.left && !console->is_resized && !queue_await(&console->receive)) {
        sti_halt();
        cli();
    }
    sti();
}

/* ---- the configuration space ---- */

/* Two fields are two reads, and the device may change both in between: "Device Configuration Space". */
bool virtio_console_size(struct virtio_console *console, uint16_t *columns, uint16_t *rows) {
    const struct virtio_device *device = &console->device;
    if (!virtio_has_feature(device, VIRTIO_CONSOLE_F_SIZE))
        return false;
    console->is_resized = false;
    uint32_t generation;
    do {
        generation = virtio_read(device, VIRTIO_MMIO_CONFIG_GENERATION);
        *columns = virtio_config_read16(device, offsetof(struct virtio_console_config, cols));
        *rows = virtio_config_read16(device, offsetof(struct virtio_console_config, rows));
    } while (virtio_read(device, VIRTIO_MMIO_CONFIG_GENERATION) != generation);
    return true;
}

bool virtio_console_emergency_write(const void *bytes, size_t size) {
    struct virtio_device device;
    const uint8_t *from = bytes;
    if (!virtio_find(VIRTIO_ID_CONSOLE, &device) ||
        !(virtio_features_offered(&device) >> VIRTIO_CONSOLE_F_EMERG_WRITE & 1))
        return false;
    while (size-- > 0)
        virtio_write(&device, VIRTIO_MMIO_CONFIG + offsetof(struct virtio_console_config, emerg_wr),
                     *from++);
    return true;
}
