/* Lesson 10, guest half: the driver's side of two virtqueues. */
#include <linux/serial_reg.h>

#include "guest.h"
#include "lab.h"
#include "pic.h"
#include "virtio.h"

MACHINE(.memory_mib = MEMORY_MIB, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

#define NO_CHAIN UINT16_MAX /* not a head */

/* A virtqueue, as its driver sees it. */
struct queue {
    struct vring ring;    /* num: descriptors; desc, avail, used: the three areas */
    unsigned number;      /* RECEIVE or TRANSMIT */
    bool has_event_index; /* VIRTIO_RING_F_EVENT_IDX was agreed on: flags do not count */
    /* The driver's own. The indices count without end, as those in the rings do. */
    uint16_t published; /* entries of the available ring */
    uint16_t reaped;    /* elements of the used ring */
    uint16_t asked;     /* published, when the device was last thought of: queue_kick() */
    uint16_t free_head; /* the free descriptors are a list, */
    uint16_t free_count;
    uint16_t next[QUEUE_SIZE];   /* and this follows on each; so are those of a chain */
    uint16_t length[QUEUE_SIZE]; /* of the chain that begins here: its descriptors */
};

/* One access to a field of a ring, which the device may change at any time: neither left out by the compiler nor
 * made twice. As in LOAD(queue->ring.used->idx), and STORE(queue->ring.avail->flags, flags). What LOAD gives
 * is a uint64_t, whatever the field is. */
#define LOAD(field) ring_load(&(field), sizeof(field))
#define STORE(field, value) ring_store(&(field), sizeof(field), (value))

typedef uint16_t __attribute__((may_alias)) any16;
typedef uint32_t __attribute__((may_alias)) any32;
typedef uint64_t __attribute__((may_alias)) any64;

static inline uint64_t ring_load(const void *field, size_t size) {
    if (size == sizeof(any16))
        return *(const volatile any16 *)field;
    return size == sizeof(any32) ? *(const volatile any32 *)field : *(const volatile any64 *)field;
}

static inline void ring_store(void *field, size_t size, uint64_t value) {
    if (size == sizeof(any16))
        *(volatile any16 *)field = (uint16_t)value;
    else if (size == sizeof(any32))
        *(volatile any32 *)field = (uint32_t)value;
    else
        *(volatile any64 *)field = value;
}

/*
 * ---- what you write ----
 *
 * With barrier_stores(), barrier_loads() and barrier_full() of virtio.h, and of linux/virtio_ring.h
 * vring_avail_event(&queue->ring), vring_used_event(&queue->ring), which are fields to LOAD() and STORE(), and
 * vring_need_event(event, now, before).
 */

/* The ring has just been made, and is empty: all descriptors are free. */
static void queue_begin(struct queue *queue) {
    /* BEGIN SOLUTION */
    for (unsigned i = 0; i < queue->ring.num; i++)
        queue->next[i] = (uint16_t)(i + 1);
    queue->free_head = 0;
    queue->free_count = (uint16_t)queue->ring.num;
    queue->published = queue->reaped = queue->asked = 0;
    /* STUB
    (void)queue;
    TODO("queue_begin: a list of all descriptors; all indices are 0");
    END SOLUTION */
}

/*
 * Describe a buffer of count segments by a chain of free descriptors. The device writes into the buffers of
 * the receive queue (VRING_DESC_F_WRITE), and reads those of the transmit queue. The answer is the chain's head; or
 * NO_CHAIN, and nothing has changed, if there are not so many free descriptors.
 */
static uint16_t queue_add(struct queue *queue, const struct segment *segment, unsigned count) {
    /* BEGIN SOLUTION */
    uint16_t head = queue->free_head;
    uint16_t direction = queue->number == RECEIVE ? VRING_DESC_F_WRITE : 0;
    if (count > queue->free_count)
        return NO_CHAIN;
    for (unsigned left = count; left > 0; left--, segment++) {
        struct vring_desc *descriptor = &queue->ring.desc[queue->free_head];
        bool is_last = left == 1;
        descriptor->addr = segment->gpa;
        descriptor->len = segment->size;
        descriptor->flags = is_last ? direction : direction | VRING_DESC_F_NEXT;
        queue->free_head = queue->next[queue->free_head];
        descriptor->next = is_last ? 0 : queue->free_head;
    }
    queue->free_count -= count;
    queue->length[head] = (uint16_t)count;
    return head;
    /* STUB
    (void)queue, (void)segment, (void)count;
    TODO("queue_add: a descriptor for each segment, chained by VRING_DESC_F_NEXT");
    END SOLUTION */
}

/* Make the chain of this head available to the device, which may read all of it from then on. */
static void queue_publish(struct queue *queue, uint16_t head) {
    /* BEGIN SOLUTION */
    STORE(queue->ring.avail->ring[queue->published % queue->ring.num], head);
    barrier_stores();
    STORE(queue->ring.avail->idx, ++queue->published);
    /* STUB
    (void)queue, (void)head;
    TODO("queue_publish: an entry of the available ring, then its index");
    END SOLUTION */
}

/* Must the device be notified? queue->published was `before` when this was last asked. */
static bool queue_kick_is_due(const struct queue *queue, uint16_t before) {
    /* BEGIN SOLUTION */
    barrier_full();
    if (queue->has_event_index)
        return vring_need_event((uint16_t)LOAD(vring_avail_event(&queue->ring)), queue->published,
                                before);
    return !(LOAD(queue->ring.used->flags) & VRING_USED_F_NO_NOTIFY);
    /* STUB
    (void)queue, (void)before;
    TODO("queue_kick_is_due: avail_event, or the device's flags");
    END SOLUTION */
}

/* Take back the next chain that the device has used: its descriptors are free again. The answer is its head, and
 * *written is how many bytes the device has written; NO_CHAIN: there is none. */
static uint16_t queue_reap(struct queue *queue, uint32_t *written) {
    /* BEGIN SOLUTION */
    if (LOAD(queue->ring.used->idx) == queue->reaped)
        return NO_CHAIN;
    barrier_loads();
    struct vring_used_elem *used = &queue->ring.used->ring[queue->reaped++ % queue->ring.num];
    uint16_t head = (uint16_t)LOAD(used->id);
    *written = (uint32_t)LOAD(used->len);
    uint16_t last = head;
    for (unsigned i = 1; i < queue->length[head]; i++)
        last = queue->next[last];
    queue->next[last] = queue->free_head;
    queue->free_head = head;
    queue->free_count += queue->length[head];
    return head;
    /* STUB
    (void)queue, (void)written;
    TODO("queue_reap: the next element of the used ring; its chain goes back to the free list");
    END SOLUTION */
}

/* The driver has reaped all that was there, and wants to sleep until it is interrupted. Ask for the
 * interrupt: with the next chain that the device uses. True: there is one already, perhaps without an interrupt. */
static bool queue_listen(struct queue *queue) {
    /* BEGIN SOLUTION */
    if (queue->has_event_index)
        STORE(vring_used_event(&queue->ring), queue->reaped);
    else
        STORE(queue->ring.avail->flags, 0);
    barrier_full();
    return LOAD(queue->ring.used->idx) != queue->reaped;
    /* STUB
    (void)queue;
    TODO("queue_listen: ask for an interrupt, and look again");
    END SOLUTION */
}

/* ---- a console driver that uses it: given ---- */

#define SLEEPS_MOST 40
#define VECTOR_BASE 0x30
#define COM1 0x3f8
#define COM1_FIFO 16 /* bytes */

static struct virtio_device device;
static struct queue queues[QUEUES];
static uint64_t seed;
static uint16_t message_at[QUEUES][QUEUE_SIZE]; /* which message the chain of this head holds */
static volatile unsigned interrupts;
static unsigned sleeps;

/* End the run: what should have come did not. */
static _Noreturn void give_up(const char *why) {
    cli(); /* each character is an exit, at which an interrupt could come */
    printf("gave up: %s\n", why);
    guest_exit(1);
}

static bool interrupt(struct trap_frame *frame) {
    (void)frame;
    uint32_t causes = virtio_interrupt_take(&device);
    if (!causes)
        give_up("an interrupt, and the device knows of none");
    if (causes & VIRTIO_MMIO_INT_CONFIG)
        give_up("the device says that it needs a reset");
    pic_eoi(device.irq);
    interrupts++;
    return true;
}

/*
 * How often to look for what should come soon. A device that is notified by an exit has done its work when the
 * guest goes on. By ioeventfd another thread does it meanwhile, and the command line says so.
 */
static unsigned patience = 100;

/* An exit now and then lets that thread have the CPU, where there is one for both. */
static bool look_again(unsigned looks) {
    if (looks % 8192 == 0)
        (void)in8(LAB_TURN);
    return looks < patience;
}

/* No interrupts, please: a driver that looks by itself. (By event index it is enough not to ask again.) */
static void queue_quiet(struct queue *queue) {
    if (!queue->has_event_index)
        queue->ring.avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
}

/* Sleep until something is used. The look and the HLT belong together: lesson 7. */
static void queue_wait(struct queue *queue) {
    cli();
    while (!queue_listen(queue)) {
        if (++sleeps > SLEEPS_MOST)
            give_up("the guest sleeps and sleeps, but nothing comes as long as it is awake");
        sti_halt();
        cli();
    }
    sti();
    queue_quiet(queue);
}

/* Notify the device, if it wants to know. */
static void queue_kick(struct queue *queue) {
    uint16_t before = queue->asked;
    queue->asked = queue->published;
    if (queue_kick_is_due(queue, before))
        virtio_notify(&device, queue->number);
}

static uint16_t add(struct queue *queue, unsigned number) {
    struct message message = message_make(seed, number);
    uint16_t head = queue_add(queue, message.segment, message.count);
    if (head < QUEUE_SIZE)
        message_at[queue->number][head] = (uint16_t)number;
    else if (head != NO_CHAIN)
        give_up("queue_add() answers with no descriptor of the table");
    out32(LAB_ADDED, number | (uint32_t)head << 16);
    return head;
}

static void fill(unsigned number) {
    struct message message = message_make(seed, number);
    struct bytes bytes = bytes_of(seed, number);
    for (unsigned i = 0; i < message.count; i++)
        for (uint32_t j = 0; j < message.segment[i].size; j++)
            ((uint8_t *)message.segment[i].gpa)[j] = bytes_next(&bytes);
}

static uint16_t reap(struct queue *queue, uint32_t *written) {
    uint16_t head = queue_reap(queue, written);
    if (head != NO_CHAIN)
        out32(LAB_REAPED, head | *written << 16);
    return head;
}

static void reap_all(struct queue *queue) {
    uint32_t written;
    while (reap(queue, &written) != NO_CHAIN)
        ;
}

/* One message, and wait until it is sent. */
static void send(unsigned number) {
    struct queue *queue = &queues[TRANSMIT];
    uint32_t written;
    fill(number);
    uint16_t head = add(queue, number);
    if (head == NO_CHAIN)
        give_up("queue_add() finds no room in an empty ring");
    queue_publish(queue, head);
    queue_kick(queue);
    for (unsigned i = 1; reap(queue, &written) == NO_CHAIN; i++)
        if (!look_again(i))
            give_up("a message was sent, and does not come back");
}

/* ---- in the window ---- */

static void window_begin(unsigned number) {
    queues[number] = (struct queue){.number = number,
                                    .ring = {.num = QUEUE_SIZE,
                                             .desc = (void *)WINDOW_DESCRIPTORS(number),
                                             .avail = (void *)WINDOW_AVAILABLE(number),
                                             .used = (void *)WINDOW_USED(number)}};
    queue_begin(&queues[number]);
}

static void window_publish(unsigned number, unsigned message) {
    uint16_t head = add(&queues[number], message);
    if (head == NO_CHAIN)
        give_up("queue_add() finds no room, and most descriptors are free");
    queue_publish(&queues[number], head);
    out8(LAB_PUBLISHED, 0);
}

static void stage_layout(void) {
    for (unsigned number = 0; number < QUEUES; number++)
        window_begin(number);
    for (unsigned i = 0; i < LAYOUT_SENT; i++)
        window_publish(TRANSMIT, MESSAGE(STAGE_LAYOUT, i));
    for (unsigned i = 0; i < LAYOUT_RECEIVED; i++)
        window_publish(RECEIVE, MESSAGE(STAGE_LAYOUT, LAYOUT_SENT + i));
}

/* On a ring of the guest's own. */
static void stage_kicks(void) {
    static uint64_t memory[3][64];
    struct queue queue = {.ring = {.num = QUEUE_SIZE,
                                   .desc = (void *)memory[0],
                                   .avail = (void *)memory[1],
                                   .used = (void *)memory[2]}};
    for (unsigned i = 0; i < TRIALS; i++) {
        struct trial trial = trial_make(seed, KICK_TRIALS, i);
        queue.has_event_index = trial.has_event_index;
        queue.published = queue.ring.avail->idx = trial.now;
        STORE(vring_avail_event(&queue.ring), trial.event);
        queue.ring.used->flags = trial.flags;
        out8(LAB_TRIAL, queue_kick_is_due(&queue, trial.before));
    }
}

/* The window's device uses some buffers, and they are reaped. */
static void window_reap(unsigned count) {
    out8(LAB_COMPLETE, (uint8_t)count);
    reap_all(&queues[RECEIVE]);
}

static void stage_reap(void) {
    window_reap(LAYOUT_RECEIVED);
    for (unsigned i = 0; i < REAP_MESSAGES; i++)
        window_publish(RECEIVE, MESSAGE(STAGE_REAP, i));
    window_reap(1);
    window_reap(REAP_MESSAGES - 1);
}

static void stage_full(void) {
    struct queue *queue = &queues[RECEIVE];
    for (unsigned i = 0; i < FULL_MESSAGES; i++) {
        uint16_t head;
        while ((head = add(queue, MESSAGE(STAGE_FULL, i))) == NO_CHAIN) {
            uint16_t reaped = queue->reaped;
            window_reap(1);
            if (queue->reaped == reaped)
                give_up("queue_add() finds no room, and nothing is left to be reaped");
        }
        queue_publish(queue, head);
        out8(LAB_PUBLISHED, 0);
    }
    window_reap(QUEUE_SIZE);
}

/* Two chains are outstanding, so that the next one to come is not the last one published. */
static void stage_listen(void) {
    struct queue *queue = &queues[RECEIVE];
    for (unsigned i = 0; i < LISTEN_CASES; i++) {
        window_publish(RECEIVE, MESSAGE(STAGE_LISTEN, 2 * i));
        window_publish(RECEIVE, MESSAGE(STAGE_LISTEN, 2 * i + 1));
        queue->has_event_index = i % 2;
        queue_quiet(queue);
        out8(LAB_LISTEN, (uint8_t)i);
        out8(LAB_HEARD, queue_listen(queue));
        window_reap(QUEUE_SIZE);
    }
}

/* ---- on the device ---- */

/* A new beginning with these queues, with or without VIRTIO_RING_F_EVENT_IDX. */
#define ONLY(number) (1u << (number))
#define BOTH (ONLY(RECEIVE) | ONLY(TRANSMIT))
static void device_begin(bool has_event_index, unsigned set) {
    if (!virtio_begin(&device, (uint64_t)has_event_index << VIRTIO_RING_F_EVENT_IDX))
        give_up("the device refuses the features it has offered");
    for (unsigned number = 0; number < QUEUES; number++) {
        struct queue *queue = &queues[number];
        if (!(set & ONLY(number)))
            continue;
        memset(queue, 0xff, sizeof *queue); /* queue_begin() sets what is set */
        queue->number = number;
        queue->has_event_index = has_event_index;
        if (!virtio_ring_create(&device, number, QUEUE_SIZE, &queue->ring))
            give_up("the device has no such queue");
        queue_begin(queue);
        queue_quiet(queue);
    }
    virtio_driver_ok(&device);
}

static void stage_messages(void) {
    device_begin(false, BOTH);
    for (unsigned i = 0; i < SENT_MESSAGES; i++)
        send(MESSAGE(STAGE_MESSAGES, i));
}

/* Let the device get on until nothing is left to do. */
static void use_all(struct queue *queue) {
    for (unsigned i = 0; i < QUEUE_SIZE && queue->reaped != queue->published; i++) {
        out8(LAB_TURN, 0);
        reap_all(queue);
    }
}

/* More messages than the ring has room for, and the device uses them in any order. */
static void stage_order(void) {
    struct queue *queue = &queues[TRANSMIT];
    for (unsigned i = 0; i < ORDER_MESSAGES; i++) {
        uint16_t head;
        fill(MESSAGE(STAGE_ORDER, i));
        for (unsigned j = 0; (head = add(queue, MESSAGE(STAGE_ORDER, i))) == NO_CHAIN; j++) {
            if (j == QUEUE_SIZE)
                give_up("the ring stays full");
            out8(LAB_TURN, 0);
            reap_all(queue);
        }
        queue_publish(queue, head);
        queue_kick(queue);
    }
    use_all(queue);
}

static uint32_t received_digest(unsigned number, uint32_t size) {
    struct message message = message_make(seed, number);
    uint32_t digest = DIGEST_BEGIN;
    for (unsigned i = 0; i < message.count; i++)
        for (uint32_t j = 0; j < message.segment[i].size && size > 0; j++, size--)
            digest = digest_add(digest, ((const uint8_t *)message.segment[i].gpa)[j]);
    return digest;
}

static void receive_buffer_give(unsigned number) {
    struct queue *queue = &queues[RECEIVE];
    uint16_t head = add(queue, number);
    if (head == NO_CHAIN)
        give_up("there is no room for a receive buffer");
    queue_publish(queue, head);
    queue_kick(queue);
}

/* As many buffers as there are inputs, a few at a time. */
static void stage_receive(void) {
    struct queue *queue = &queues[RECEIVE];
    for (unsigned i = 0; i < RECEIVE_BUFFERS; i++)
        receive_buffer_give(MESSAGE(STAGE_RECEIVE, i));
    for (unsigned received = 0; received < INPUTS;) {
        uint32_t size;
        uint16_t head = reap(queue, &size);
        if (head == NO_CHAIN) {
            queue_wait(queue);
            continue;
        }
        unsigned number = message_at[RECEIVE][head % QUEUE_SIZE];
        out32(LAB_RECEIVED, received_digest(number, size));
        if (++received <= INPUTS - RECEIVE_BUFFERS)
            receive_buffer_give(number);
    }
}

/* The device is notified of the first message, and stays awake. It would find the second by itself, but just
 * then it goes to sleep. Then comes the third. */
static void stage_doze(enum stage stage) {
    struct queue *queue = &queues[TRANSMIT];
    uint32_t written;
    send(MESSAGE(stage, 0));
    fill(MESSAGE(stage, 1));
    queue_publish(queue, add(queue, MESSAGE(stage, 1)));
    out8(LAB_ASK, TRANSMIT);
    queue_kick(queue);
    out8(LAB_TURN, 0);
    if (reap(queue, &written) == NO_CHAIN)
        give_up("the device sleeps, and a message lies in the ring");
    out8(LAB_ASK, TRANSMIT);
    send(MESSAGE(stage, 2));
}

static void stage_doze_flags(void) { stage_doze(STAGE_DOZE); }

static void stage_doze_events(void) {
    device_begin(true, ONLY(TRANSMIT));
    stage_doze(STAGE_EVENTS);
}

/* Sleep until so many are used, which is fewer than were published. */
static void counts_wait(struct queue *queue, unsigned count) {
    unsigned before = interrupts;
    cli();
    vring_used_event(&queue->ring) = (uint16_t)(queue->reaped + count - 1);
    while (interrupts == before) {
        if (++sleeps > SLEEPS_MOST)
            give_up("the guest sleeps and sleeps, but nothing comes as long as it is awake");
        sti_halt();
        cli();
    }
    sti();
}

static void stage_counts(void) {
    struct queue *queue = &queues[TRANSMIT];
    struct random random = random_stream(seed, 4);
    device_begin(true, ONLY(TRANSMIT));
    for (unsigned round = 0, i = 0; round < COUNT_ROUNDS; round++) {
        for (uint64_t batch = 2 + random_below(&random, 2); batch > 0; batch--, i++) {
            struct message message = message_make(seed, MESSAGE(STAGE_COUNTS, i));
            fill(MESSAGE(STAGE_COUNTS, i));
            queue_publish(queue, queue_add(queue, message.segment, 1));
        }
        out8(LAB_ASK, TRANSMIT);
        queue_kick(queue);
        unsigned outstanding = (uint16_t)(queue->published - queue->reaped);
        counts_wait(queue, (unsigned)(1 + random_below(&random, outstanding)));
        reap_all(queue);
    }
    use_all(queue);
}

/* ---- a driver that is broken ---- */

static struct vring_desc descriptor_of(uint64_t gpa, uint32_t size, uint16_t flags, uint16_t next) {
    return (struct vring_desc){.addr = gpa, .len = size, .flags = flags, .next = next};
}

/* One descriptor that is wrong, or only looks so. */
static struct vring_desc broken_descriptor(enum broken kind) {
    uint64_t end = guest_memory_size();
    switch (kind) {
    case BROKEN_LOOP:
    case BROKEN_LONG: return descriptor_of(BULK_GPA, 8, VRING_DESC_F_NEXT, 0);
    case BROKEN_NEXT: return descriptor_of(BULK_GPA, 8, VRING_DESC_F_NEXT, QUEUE_SIZE);
    case BROKEN_OUTSIDE: return descriptor_of(end + PAGE_SIZE, 8, 0, 0);
    case BROKEN_STRADDLE: return descriptor_of(end - 8, 9, 0, 0);
    case BROKEN_WRAP: return descriptor_of(0 - UINT64_C(8), 16, 0, 0);
    case BROKEN_HUGE: return descriptor_of(BULK_GPA, UINT32_MAX, 0, 0);
    case BROKEN_DIRECTION: return descriptor_of(BULK_GPA, 8, VRING_DESC_F_WRITE, 0);
    case BROKEN_INDIRECT: return descriptor_of(BULK_GPA, 64, VRING_DESC_F_INDIRECT, 0);
    case LEGAL_END: return descriptor_of(end - 8, 8, 0, 0);
    default: return descriptor_of(BULK_GPA, 8, 0, 0);
    }
}

static uint16_t broken_index(enum broken kind) {
    if (kind == BROKEN_INDEX)
        return QUEUE_SIZE + 1;
    return kind == LEGAL_FULL ? QUEUE_SIZE : 1;
}

static void broken_publish(enum broken kind, struct vring *ring) {
    ring->desc[1] = broken_descriptor(kind);
    ring->desc[0] = descriptor_of(BULK_GPA, 8, VRING_DESC_F_NEXT, 1);
    if (kind == BROKEN_DIRECTION || kind == BROKEN_RECEIVE)
        ring->desc[0] = ring->desc[1];
    for (uint16_t i = 0; kind == LEGAL_LONG && i < QUEUE_SIZE; i++)
        ring->desc[i] =
            descriptor_of(BULK_GPA + i, 1, i < QUEUE_SIZE - 1 ? VRING_DESC_F_NEXT : 0, i + 1);
    ring->avail->ring[0] = kind == BROKEN_HEAD ? HEAD_FAR : 0;
    for (uint16_t i = 0; kind == LEGAL_FULL && i < QUEUE_SIZE; i++) {
        ring->desc[i] = descriptor_of(BULK_GPA + i, 1, 0, 0);
        ring->avail->ring[i] = i;
    }
    barrier_stores();
    ring->avail->idx = broken_index(kind);
}

/* Until the device says that it is broken, or has used what was no more than unusual. */
static void broken_wait(const struct vring *ring) {
    for (unsigned i = 1; look_again(i); i++)
        if (LOAD(ring->used->idx) ||
            (virtio_read(&device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET))
            return;
    give_up("the device has neither used the chain nor said that it is broken");
}

/* Each in a session of its own, in which nothing else is wrong; and after each the device works again. */
static void stage_broken(void) {
    for (unsigned kind = 0; kind < BROKEN_KINDS; kind++) {
        struct queue *queue = &queues[kind == BROKEN_RECEIVE ? RECEIVE : TRANSMIT];
        device_begin(false, ONLY(queue->number));
        out8(LAB_CASE, (uint8_t)kind);
        broken_publish(kind, &queue->ring);
        virtio_notify(&device, queue->number);
        broken_wait(&queue->ring);
    }
    device_begin(false, ONLY(TRANSMIT));
    send(MESSAGE(STAGE_BROKEN, 0));
}

/* ---- a reset in the middle ---- */

/* The memory is the driver's again, and it does something else with it. */
static void paint(const struct vring *ring, uint8_t byte) {
    memset((void *)ring->desc, byte, vring_size(QUEUE_SIZE, VRING_USED_ALIGN_SIZE));
}

static void stage_reset(void) {
    device_begin(true, BOTH);
    for (unsigned i = 0; i < RESET_SENT; i++) {
        fill(MESSAGE(STAGE_RESET, i));
        queue_publish(&queues[TRANSMIT], add(&queues[TRANSMIT], MESSAGE(STAGE_RESET, i)));
    }
    queue_kick(&queues[TRANSMIT]);
    for (unsigned i = 0; i < RESET_RECEIVED; i++)
        receive_buffer_give(MESSAGE(STAGE_RESET, RESET_SENT + i));
    out8(LAB_TURN, 0);
    virtio_reset(&device);
    for (unsigned i = 0; i < QUEUES; i++)
        paint(&queues[i].ring, (uint8_t)(seed + i));
    for (unsigned i = 0; i < RESET_SENT + RESET_RECEIVED; i++)
        fill(MESSAGE(STAGE_RESET, i));
    out8(LAB_PAINTED, 0);
    out8(LAB_TURN, 0);
}

static void stage_again(void) {
    device_begin(true, ONLY(TRANSMIT));
    for (unsigned i = 0; i < AFTER_RESET; i++)
        send(MESSAGE(STAGE_AGAIN, i));
}

/* ---- 64 KiB ---- */

static const void *block(unsigned i) { return (const void *)(BULK_GPA + i * BLOCK_STEP); }

static void blocks_fill(void) {
    struct random random = random_stream(seed, 5);
    uint64_t *word = (uint64_t *)BULK_GPA;
    for (unsigned i = 0; i < (BLOCK_SIZE + BLOCKS * BLOCK_STEP) / sizeof *word; i++)
        word[i] = random_next(&random);
}

static void blocks_wait(struct queue *queue) {
    uint32_t written;
    for (unsigned i = 1; queue->reaped != queue->published; i++)
        if (queue_reap(queue, &written) == NO_CHAIN && i >= patience)
            give_up("blocks were sent, and do not come back");
}

/* A kick for each block. Interrupts are on, but none is asked for: the driver looks by itself. */
static void stage_bulk(void) {
    struct queue *queue = &queues[TRANSMIT];
    sti();
    for (unsigned i = 0; i < BLOCKS; i++) {
        struct segment segment = {(uint64_t)block(i), BLOCK_SIZE};
        queue_publish(queue, queue_add(queue, &segment, 1));
        queue_kick(queue);
    }
    blocks_wait(queue);
}

/* The first of it through COM1. Its FIFO takes 16 bytes, and then one has to look whether it is empty. */
static void com1_wait(void) {
    while (!(in8(COM1 + UART_LSR) & UART_LSR_THRE))
        ;
}

static void stage_bytes(void) {
    for (unsigned i = 0; i < SERIAL_BYTES; i++) {
        if (i % COM1_FIFO == 0)
            com1_wait();
        out8(COM1 + UART_TX, ((const uint8_t *)BULK_GPA)[i]);
    }
}

static void stage_strings(void) {
    for (unsigned i = 0; i < SERIAL_BYTES; i += COM1_FIFO) {
        com1_wait();
        out8_string(COM1 + UART_TX, (const uint8_t *)BULK_GPA + i, COM1_FIFO);
    }
}

/* ---- all of it ---- */

static void stage_run(enum stage stage, void (*run)(void), const char *text) {
    out8(LAB_STAGE, stage);
    run();
    cli();
    out8(LAB_OVER, stage);
    printf("%s\n", text);
}

static void in_the_window(void) {
    stage_run(STAGE_LAYOUT, stage_layout, "layout: buffers in two rings");
    stage_run(STAGE_KICKS, stage_kicks, "kicks: 28 times notify or not");
    stage_run(STAGE_REAP, stage_reap, "reap: used in any order, and free again");
    stage_run(STAGE_FULL, stage_full, "full: 12 messages through a ring that is too small");
    stage_run(STAGE_LISTEN, stage_listen, "listen: nothing missed when interrupts are enabled");
}

static void on_the_device(void) {
    stage_run(STAGE_MESSAGES, stage_messages, "messages: 6 sent, one at a time");
    stage_run(STAGE_ORDER, stage_order, "order: 14 sent, used in any order");
    stage_run(STAGE_RECEIVE, stage_receive, "receive: 8 inputs, by interrupt");
    stage_run(STAGE_DOZE, stage_doze_flags, "doze: the device sleeps, by flags");
    stage_run(STAGE_EVENTS, stage_doze_events, "events: the device sleeps, by event index");
    stage_run(STAGE_COUNTS, stage_counts, "counts: notifications that were not needed");
    stage_run(STAGE_BROKEN, stage_broken, "broken: 12 cases refused, 3 taken");
    stage_run(STAGE_RESET, stage_reset, "reset: with 5 chains in flight");
    stage_run(STAGE_AGAIN, stage_again, "again: and it works as before");
    device_begin(true, ONLY(TRANSMIT));
    vring_used_event(&queues[TRANSMIT].ring) = UINT16_MAX; /* far away: no interrupt */
    blocks_fill();
    stage_run(STAGE_BULK, stage_bulk, "bulk: 64 KiB");
}

void guest_main(void) {
    char yes[2];
    printf("lesson 10: a virtio console\n");
    seed = guest_seed();
    if (guest_parameter("patient", yes, sizeof yes))
        patience = 20000000;
    in_the_window();
    if (!virtio_find(VIRTIO_ID_CONSOLE, &device))
        give_up("there is no virtio console");
    pic_begin(VECTOR_BASE);
    trap_handle((uint8_t)(VECTOR_BASE + device.irq), interrupt);
    pic_unmask(device.irq);
    on_the_device();
    if (!guest_parameter("serial", yes, sizeof yes))
        return;
    stage_run(STAGE_BYTES, stage_bytes, "\nbytes: 1 KiB through COM1");
    stage_run(STAGE_STRINGS, stage_strings, "\nstrings: the same by rep outs");
}
