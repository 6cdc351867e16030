/* Lesson 10, host half: the device's side of two virtqueues. */
#include <string.h>

#include "host.h"
#include "lab.h"
#include "ring.h"
#include "virtio_device.h"
#include "window.h"

/* A chain of the driver's, as the device keeps it until it is used: where its bytes are in the memory of this
 * process. */
struct chain {
    uint16_t head;
    unsigned count;
    struct {
        uint8_t *hva;
        uint32_t size;
    } segment[QUEUE_SIZE + 1];
};

/* The chains that the device has taken and not used yet, by queue. */
static struct chain in_flight[QUEUES][QUEUE_SIZE];
static unsigned in_flight_count[QUEUES];

/* One more segment; more than these no chain can have. */
static void chain_append(struct chain *chain, void *hva, uint32_t size) {
    if (chain->count > QUEUE_SIZE)
        return;
    chain->segment[chain->count].hva = hva;
    chain->segment[chain->count++].size = size;
}

/* ---- what you write: with LOAD(), STORE() and the barriers of ring.h, for what is not noted does not count ---- */
/* barrier_stores(), barrier_loads(), barrier_full(). The fields vring_avail_event(&queue->ring) and
 * vring_used_event(&queue->ring), and vring_need_event(event, now, before), are of linux/virtio_ring.h. */

#define NOTHING (-1)    /* there is no chain to take */
#define IMPOSSIBLE (-2) /* the driver says that there are more than a ring can hold */

/* Take the next entry of the available ring: the head of a chain, NOTHING or IMPOSSIBLE. queue->next_available
 * counts, without end, the entries that were taken. */
static int available_take(struct virtqueue *queue) {
    /* BEGIN SOLUTION */
    uint16_t ahead = (uint16_t)(LOAD(queue->ring.avail->idx) - queue->next_available);
    if (ahead == 0)
        return NOTHING;
    if (ahead > queue->ring.num)
        return IMPOSSIBLE;
    barrier_loads();
    unsigned entry = queue->next_available++ % queue->ring.num;
    return (int)LOAD(queue->ring.avail->ring[entry]);
    /* STUB
    (void)queue;
    HOST_TODO("available_take: is there an entry between next_available and the driver's index? Which head?");
    END SOLUTION */
}

/*
 * Follow the chain from chain->head to its end, and chain_append() each of its segments. In the receive queue
 * the device writes into all of them, in the transmit queue into none. Indirect descriptors were not
 * agreed on.
 *
 * The answer is NULL, or in a few words what is wrong. Whatever the driver has written, there is an end, and
 * nothing is looked at that lies outside of the table; host_memory() says what is memory.
 */
static const char *chain_walk(const struct virtqueue *queue, bool is_receive, struct chain *chain) {
    /* BEGIN SOLUTION */
    uint16_t at = chain->head;
    for (unsigned i = 0; i < queue->ring.num; i++) {
        if (at >= queue->ring.num)
            return "a descriptor lies outside of the table";
        const struct vring_desc *descriptor = &queue->ring.desc[at];
        uint16_t flags = (uint16_t)LOAD(descriptor->flags);
        uint32_t size = (uint32_t)LOAD(descriptor->len);
        void *hva = host_memory(LOAD(descriptor->addr), size);
        if (flags & VRING_DESC_F_INDIRECT)
            return "a descriptor is indirect";
        if (!(flags & VRING_DESC_F_WRITE) == is_receive)
            return "a descriptor has the wrong direction";
        if (!hva)
            return "a segment lies outside of memory";
        chain_append(chain, hva, size);
        if (!(flags & VRING_DESC_F_NEXT))
            return NULL;
        at = (uint16_t)LOAD(descriptor->next);
    }
    return "the chain is longer than the table: it is a loop";
    /* STUB
    (void)queue, (void)is_receive, (void)chain, (void)chain_append;
    HOST_TODO("chain_walk: descriptor after descriptor, none of them trusted");
    END SOLUTION */
}

/* The device is done with the chain of this head, and has written that many bytes into it: give it back.
 * queue->next_used counts, without end, the chains that were given back. */
static void used_put(struct virtqueue *queue, uint16_t head, uint32_t written) {
    /* BEGIN SOLUTION */
    struct vring_used_elem *used = &queue->ring.used->ring[queue->next_used % queue->ring.num];
    STORE(used->id, head);
    STORE(used->len, written);
    barrier_stores();
    STORE(queue->ring.used->idx, ++queue->next_used);
    /* STUB
    (void)queue, (void)head, (void)written;
    HOST_TODO("used_put: an element of the used ring, then its index");
    END SOLUTION */
}

/* Does the driver want an interrupt? queue->next_used was `before` when this was last asked. */
static bool interrupt_is_due(const struct virtqueue *queue, uint16_t before, bool has_event_index) {
    /* BEGIN SOLUTION */
    barrier_full();
    if (has_event_index)
        return vring_need_event((uint16_t)LOAD(vring_used_event(&queue->ring)), queue->next_used,
                                before);
    return !(LOAD(queue->ring.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    /* STUB
    (void)queue, (void)before, (void)has_event_index;
    HOST_TODO("interrupt_is_due: used_event, or the driver's flags");
    END SOLUTION */
}

/* The device has taken all that was there, and wants to sleep until it is notified. Ask for the notification: of the
 * next entry of the available ring. True: there is one already, perhaps without a notification. */
static bool kicks_listen(struct virtqueue *queue, bool has_event_index) {
    /* BEGIN SOLUTION */
    if (has_event_index)
        STORE(vring_avail_event(&queue->ring), queue->next_available);
    else
        STORE(queue->ring.used->flags, 0);
    barrier_full();
    return LOAD(queue->ring.avail->idx) != queue->next_available;
    /* STUB
    (void)queue, (void)has_event_index;
    HOST_TODO("kicks_listen: ask for a notification, and look again");
    END SOLUTION */
}

/* The driver resets the device, with chains in flight. All memory is the driver's again. */
static void device_forget(void) {
    /* BEGIN SOLUTION */
    memset(in_flight_count, 0, sizeof in_flight_count);
    /* STUB
    HOST_TODO("device_forget: what of the old queues would the device still touch?");
    END SOLUTION */
}

/* ---- what the device does with the chains: given ---- */

#define TURNS_MOST 64
#define RESCUES_MOST 64
#define DATA_SHOWN 24 /* bytes of a message that the record has */

static void device_notified(unsigned number);
static void device_reset(void);

static struct virtio_device lab_device = {
    .name = "virtio console",
    .id = VIRTIO_ID_CONSOLE,
    .features = UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX,
    .queue_count = QUEUES,
    .queue_size = QUEUE_SIZE,
    .notified = device_notified,
    .reset = device_reset,
};

/* How the device is in each stage. */
static const struct manner {
    const char *name;
    bool holds; /* what it has taken from the transmit queue, until its turn */
    bool
        listens; /* it asks for notifications when it has taken all; else it never says no to them */
    bool interrupts; /* if the driver wants it to */
} manners[STAGES] = {
    [STAGE_LAYOUT] = {.name = "layout"},
    [STAGE_KICKS] = {.name = "kicks"},
    [STAGE_REAP] = {.name = "reap"},
    [STAGE_FULL] = {.name = "full"},
    [STAGE_LISTEN] = {.name = "listen"},
    [STAGE_MESSAGES] = {.name = "messages"},
    [STAGE_ORDER] = {.name = "order", .holds = true},
    [STAGE_RECEIVE] = {.name = "receive", .interrupts = true},
    [STAGE_DOZE] = {.name = "doze"},
    [STAGE_EVENTS] = {.name = "events"},
    [STAGE_COUNTS] = {.name = "counts", .holds = true, .listens = true, .interrupts = true},
    [STAGE_BROKEN] = {.name = "broken"},
    [STAGE_RESET] = {.name = "reset", .holds = true},
    [STAGE_AGAIN] = {.name = "again", .listens = true},
    [STAGE_BULK] = {.name = "bulk", .listens = true, .interrupts = true},
    [STAGE_BYTES] = {.name = "bytes"},
    [STAGE_STRINGS] = {.name = "strings"},
};

static struct {
    unsigned stage;
    unsigned messages, inputs; /* so far */
    unsigned trials, rescues;
    struct random random;
    gpa_t ring_gpa[QUEUES]; /* of the queues before the reset, */
    uint32_t painted;       /* and the digest of their memory when the driver had painted it */
} lab;

static const struct manner *manner(void) { return &manners[lab.stage]; }

static bool has_event_index(void) {
    return virtio_has_feature(&lab_device, VIRTIO_RING_F_EVENT_IDX);
}

static void interrupt_decide(unsigned number, uint16_t before) {
    struct virtqueue *queue = &lab_device.queue[number];
    ring_call("interrupt_is_due", number);
    bool is_due = interrupt_is_due(queue, before, has_event_index());
    event_begin("decided");
    event_number("queue", number);
    event_number("has_event_index", has_event_index());
    event_number("before", before);
    event_number("now", queue->next_used);
    event_number("event", vring_used_event(&queue->ring));
    event_number("flags", queue->ring.avail->flags);
    event_number("answer", is_due);
    event_end();
    if (is_due)
        virtio_interrupt(&lab_device);
}

/* Is all of the chain where guest memory is? The lab touches nothing else. */
static bool chain_is_inside(const struct chain *chain) {
    uint64_t bytes = (uint64_t)host_machine()->memory_mib << 20;
    const uint8_t *first = host_memory(0, bytes);
    for (unsigned i = 0; i < chain->count; i++) {
        uint64_t offset = (uint64_t)((uintptr_t)chain->segment[i].hva - (uintptr_t)first);
        if (offset > bytes || chain->segment[i].size > bytes - offset)
            return false;
    }
    return true;
}

static uint32_t chain_size(const struct chain *chain) {
    uint32_t size = 0;
    for (unsigned i = 0; i < chain->count; i++)
        size += chain->segment[i].size;
    return size;
}

static void chain_record(unsigned number, const struct chain *chain, const char *wrong) {
    event_begin("chain");
    event_number("queue", number);
    event_number("head", chain->head);
    event_number("segments", chain->count);
    event_number("size", chain_size(chain));
    event_string("wrong", wrong ? wrong : "");
    event_end();
}

/* The chain's bytes are a message to whoever sits at the console. */
static void message_record(const struct chain *chain) {
    uint8_t shown[DATA_SHOWN];
    uint32_t size = 0, digest = DIGEST_BEGIN;
    for (unsigned i = 0; i < chain->count; i++)
        for (uint32_t j = 0; j < chain->segment[i].size; j++, size++) {
            uint8_t byte = chain->segment[i].hva[j];
            digest = digest_add(digest, byte);
            if (size < DATA_SHOWN)
                shown[size] = byte;
        }
    event_begin("message");
    event_number("number", lab.messages++);
    event_number("head", chain->head);
    event_number("size", size);
    event_hex("digest", digest);
    event_bytes("data", shown, size < DATA_SHOWN ? size : DATA_SHOWN);
    event_end();
}

static void chain_take(unsigned number, uint16_t head) {
    struct chain *chain = &in_flight[number][in_flight_count[number]];
    *chain = (struct chain){.head = head};
    ring_call("chain_walk", number);
    const char *wrong = chain_walk(&lab_device.queue[number], number == RECEIVE, chain);
    if (!wrong && !chain_is_inside(chain))
        wrong = "chain_walk() finds nothing wrong, but a segment lies outside of memory";
    chain_record(number, chain, wrong);
    if (wrong) {
        virtio_break(&lab_device, number, wrong);
        return;
    }
    in_flight_count[number]++;
    if (number == TRANSMIT)
        message_record(chain);
}

/* All that is available; as far as there is room for it, which is as many chains as the ring has entries. */
static void device_take(unsigned number) {
    struct virtqueue *queue = &lab_device.queue[number];
    while (virtio_is_live(&lab_device) && queue->ready && in_flight_count[number] < QUEUE_SIZE) {
        ring_call("available_take", number);
        int head = available_take(queue);
        if (head == NOTHING)
            return;
        if (head == IMPOSSIBLE)
            virtio_break(&lab_device, number, "the available index is impossible");
        else
            chain_take(number, (uint16_t)head);
    }
}

/* Use one of the chains in flight. A device that has none any more has nothing to say. */
static void device_use(unsigned number, unsigned i, uint32_t written) {
    struct virtqueue *queue = &lab_device.queue[number];
    uint16_t head = in_flight[number][i].head;
    uint16_t index = queue->next_used;
    unsigned behind = --in_flight_count[number] - i;
    memmove(&in_flight[number][i], &in_flight[number][i + 1], behind * sizeof(struct chain));
    if (!queue->ready)
        return;
    ring_call("used_put", number);
    used_put(queue, head, written);
    const struct vring_used_elem *element = &queue->ring.used->ring[index % QUEUE_SIZE];
    event_begin("used");
    event_number("queue", number);
    event_number("index", index);
    event_number("head", head);
    event_number("written", written);
    event_number("id", element->id); /* as the driver sees it now */
    event_number("len", element->len);
    event_number("idx", queue->ring.used->idx);
    event_end();
}

static unsigned draw(unsigned bound) { return (unsigned)random_below(&lab.random, bound); }

/* Of some chains in flight one that has not waited longest, if there is another. */
static unsigned any_of(unsigned count) { return count > 1 ? 1 + draw(count - 1) : 0; }

static void transmit_use_all(void) {
    uint16_t before = lab_device.queue[TRANSMIT].next_used;
    while (in_flight_count[TRANSMIT] > 0)
        device_use(TRANSMIT, 0, 0);
    if (manner()->interrupts && lab_device.queue[TRANSMIT].next_used != before)
        interrupt_decide(TRANSMIT, before);
}

/* Some messages are done, in any order. */
static void transmit_use_some(unsigned most) {
    uint16_t before = lab_device.queue[TRANSMIT].next_used;
    for (unsigned i = 1 + draw(most); i > 0 && in_flight_count[TRANSMIT] > 0; i--)
        device_use(TRANSMIT, any_of(in_flight_count[TRANSMIT]), 0);
    if (manner()->interrupts && lab_device.queue[TRANSMIT].next_used != before)
        interrupt_decide(TRANSMIT, before);
}

/* Bytes have come in: as many as the seed says, for the chain that has waited longest. A chain may have room for none:
 * a driver that is broken made it so, or device_forget() has cleared it and left it in the count. */
static void input_give(void) {
    struct chain *chain = &in_flight[RECEIVE][0];
    if (chain_size(chain) == 0) {
        device_use(RECEIVE, 0, 0);
        return;
    }
    struct bytes bytes = bytes_of(host_seed(), 1024 + lab.inputs);
    uint32_t size = 1 + draw(chain_size(chain)), left = size, digest = DIGEST_BEGIN;
    for (unsigned i = 0; i < chain->count; i++)
        for (uint32_t j = 0; j < chain->segment[i].size && left > 0; j++, left--) {
            uint8_t byte = bytes_next(&bytes);
            chain->segment[i].hva[j] = byte;
            digest = digest_add(digest, byte);
        }
    event_begin("input");
    event_number("number", lab.inputs++);
    event_number("head", chain->head);
    event_number("size", size);
    event_hex("digest", digest);
    event_end();
    device_use(RECEIVE, 0, size);
}

static void receive_turn(void) {
    uint16_t before = lab_device.queue[RECEIVE].next_used;
    for (unsigned i = 1 + draw(2); i > 0 && in_flight_count[RECEIVE] > 0 && lab.inputs < INPUTS;
         i--)
        input_give();
    if (lab_device.queue[RECEIVE].next_used != before)
        interrupt_decide(RECEIVE, before);
}

/* ---- when the device is awake ---- */

static bool device_listen(unsigned number) {
    ring_call("kicks_listen", number);
    return kicks_listen(&lab_device.queue[number], has_event_index());
}

static void doze_record(void) {
    const struct virtqueue *queue = &lab_device.queue[TRANSMIT];
    event_begin("doze");
    event_number("has_event_index", has_event_index());
    event_number("taken", queue->next_available);
    event_number("available", queue->ring.avail->idx);
    event_number("avail_event", vring_avail_event(&queue->ring));
    event_number("flags", queue->ring.used->flags);
    event_end();
}

/* Nothing to do for some time: the device goes to sleep, unless there is something after all. */
static void device_doze(void) {
    for (unsigned i = 0; i < TURNS_MOST && device_listen(TRANSMIT); i++) {
        device_take(TRANSMIT);
        transmit_use_all();
    }
    doze_record();
}

/* The device is awake, and looks at the queue by itself: the driver need not notify it. (By event index that is
 * said already. Once the event has passed, there is none until another is asked for.) */
static void device_wake(void) {
    struct virtqueue *queue = &lab_device.queue[TRANSMIT];
    if (!has_event_index())
        STORE(queue->ring.used->flags, VRING_USED_F_NO_NOTIFY);
}

/* The device has been reset. Its hardware may still have been at work on what it knew. */
static void device_work_late(void) {
    while (in_flight_count[RECEIVE] > 0)
        input_give();
    transmit_use_all();
}

static void device_turn(void) {
    if (!virtio_is_live(&lab_device)) {
        device_work_late();
        return;
    }
    bool dozes = lab.stage == STAGE_DOZE || lab.stage == STAGE_EVENTS;
    for (unsigned number = 0; number < QUEUES && !dozes; number++)
        device_take(number);
    if (dozes)
        device_doze();
    else if (lab.stage == STAGE_RECEIVE)
        receive_turn();
    else if (lab.stage == STAGE_ORDER)
        transmit_use_some(3);
    else if (lab.stage == STAGE_COUNTS)
        transmit_use_some(2);
    else if (lab.stage != STAGE_RESET)
        transmit_use_all();
}

static void device_notified(unsigned number) {
    if (lab.stage == STAGE_DOZE || lab.stage == STAGE_EVENTS)
        device_wake();
    for (unsigned i = 0; i < TURNS_MOST; i++) {
        device_take(number);
        if (!manner()->holds)
            transmit_use_all();
        if (!manner()->listens || !virtio_is_live(&lab_device) || !device_listen(number))
            return;
    }
}

static void device_reset(void) {
    unsigned count = in_flight_count[TRANSMIT] + in_flight_count[RECEIVE];
    if (count == 0)
        return;
    device_forget();
    event_begin("forget");
    event_number("in_flight", count);
    event_number("left", in_flight_count[TRANSMIT] + in_flight_count[RECEIVE]);
    event_end();
}

/* ---- the lab's ports ---- */

static uint32_t memory_digest(uint32_t digest, gpa_t gpa, uint64_t size) {
    const uint8_t *hva = host_memory(gpa, size);
    for (uint64_t i = 0; hva && i < size; i++)
        digest = digest_add(digest, hva[i]);
    return digest;
}

/* Of all that the device knew before it was reset: the rings, and the buffers in them. */
static uint32_t old_memory_digest(void) {
    uint32_t digest = DIGEST_BEGIN;
    for (unsigned number = 0; number < QUEUES; number++)
        digest = memory_digest(digest, lab.ring_gpa[number], PAGE_SIZE);
    for (unsigned i = 0; i < RESET_SENT + RESET_RECEIVED; i++) {
        struct message message = message_make(host_seed(), MESSAGE(STAGE_RESET, i));
        for (unsigned j = 0; j < message.count; j++)
            digest = memory_digest(digest, message.segment[j].gpa, message.segment[j].size);
    }
    return digest;
}

static void reset_look(const char *when) {
    event_begin("old_memory");
    event_string("when", when);
    event_number("is_unchanged", old_memory_digest() == lab.painted);
    event_end();
}

static void trial_record(const char *of, unsigned number, const struct trial *trial, bool answer) {
    event_begin("trial");
    event_string("of", of);
    event_number("number", number);
    event_number("has_event_index", trial->has_event_index);
    event_number("before", trial->before);
    event_number("now", trial->now);
    event_number("event", trial->event);
    event_number("flags", trial->flags);
    event_number("answer", answer);
    event_end();
}

/* Ask the host half what it would do, on a ring that no driver sees. */
static void interrupt_trials(void) {
    static uint64_t memory[3][256];
    struct virtqueue queue = {.ready = true,
                              .ring = {.num = QUEUE_SIZE,
                                       .desc = (void *)memory[0],
                                       .avail = (void *)memory[1],
                                       .used = (void *)memory[2]}};
    ring_watch.scratch = &queue.ring;
    for (unsigned i = 0; i < TRIALS; i++) {
        struct trial trial = trial_make(host_seed(), INTERRUPT_TRIALS, i);
        queue.next_used = queue.ring.used->idx = trial.now;
        vring_used_event(&queue.ring) = trial.event;
        queue.ring.avail->flags = trial.flags;
        ring_call("interrupt_is_due", 0);
        bool is_due = interrupt_is_due(&queue, trial.before, trial.has_event_index);
        trial_record("interrupt", i, &trial, is_due);
    }
    ring_watch.scratch = NULL;
}

static void stage_record(const char *kind, unsigned stage) {
    event_begin(kind);
    event_string("of", stage < STAGES ? manners[stage].name : "?");
    event_end();
}

static void stage_begin(unsigned stage) {
    if (stage >= STAGES)
        return;
    lab.stage = stage;
    stage_record("stage", stage);
    if (stage == STAGE_RECEIVE)
        interrupt_trials();
}

static void stage_over(unsigned stage) {
    if (stage == STAGE_RESET)
        reset_look("stage over");
    stage_record("over", stage);
}

/* What the driver goes by when it decides whether to notify. */
static void ask_record(unsigned number) {
    const struct virtqueue *queue = &lab_device.queue[number];
    event_begin("ask");
    event_number("queue", number);
    if (queue->ready) {
        event_number("now", queue->ring.avail->idx);
        event_number("event", vring_avail_event(&queue->ring));
        event_number("flags", queue->ring.used->flags);
    }
    event_end();
}

static void number_record(const char *kind, const char *name, uint32_t value) {
    event_begin(kind);
    event_number(name, value);
    event_end();
}

static void pair_record(const char *kind, const char *low, const char *high, uint32_t value) {
    event_begin(kind);
    event_number(low, value & 0xffff);
    event_number(high, value >> 16);
    event_end();
}

static void received_record(uint32_t digest) {
    event_begin("received");
    event_hex("digest", digest);
    event_end();
}

static void trial_answer(bool answer) {
    struct trial trial = trial_make(host_seed(), KICK_TRIALS, lab.trials);
    trial_record("kick", lab.trials++, &trial, answer);
}

static void listen_begin(unsigned number) {
    if (number / 2 == USED_BEFORE)
        window_complete(RECEIVE, 1);
    window.is_armed = number / 2 == USED_MEANWHILE;
    number_record("listen", "case", number);
}

static void case_begin(uint32_t kind) {
    ring_watch.is_meddled_with = kind == BROKEN_LONG;
    number_record("case", "number", kind);
}

static void turn_take(void) {
    number_record("turn", "in_flight", in_flight_count[TRANSMIT] + in_flight_count[RECEIVE]);
    for (unsigned number = 0; number < QUEUES && lab_device.queue[number].ready; number++)
        lab.ring_gpa[number] = lab_device.queue[number].descriptor_gpa;
    device_turn();
}

static void lab_write(uint64_t port, uint32_t value) {
    switch (port) {
    case LAB_STAGE: stage_begin(value); break;
    case LAB_OVER: stage_over(value); break;
    case LAB_TRIAL: trial_answer(value); break;
    case LAB_COMPLETE: window_complete(RECEIVE, value % (QUEUE_SIZE + 1)); break;
    case LAB_LISTEN: listen_begin(value); break;
    case LAB_HEARD: number_record("heard", "answer", value); break;
    case LAB_TURN: turn_take(); break;
    case LAB_ASK: ask_record(value % QUEUES); break;
    case LAB_CASE: case_begin(value); break;
    case LAB_PAINTED: lab.painted = old_memory_digest(); break;
    case LAB_ADDED: pair_record("added", "message", "head", value); break;
    case LAB_REAPED: pair_record("reaped", "head", "length", value); break;
    case LAB_RECEIVED: received_record(value); break;
    }
}

static void lab_access(struct access *access) {
    uint32_t value = 0;
    if (!access->is_write || access->count != 1) {
        memset(access->data, 0xff, (size_t)access->size * access->count);
        return;
    }
    memcpy(&value, access->data, access->size);
    lab_write(access->address, value);
}

/* ---- while the guest sleeps ---- */

/*
 * The guest has halted, and no interrupt is there to wake it: what it waits for must come from the device, which gets
 * on with its work. If that leads to nothing, a real machine would sleep for ever; here the guest is woken by
 * an interrupt that nobody asked for, some times, so that the run gets to its checks.
 */
static void sleep_serve(void) {
    for (unsigned i = 0; i < TURNS_MOST && !lab_device.interrupt_status; i++)
        device_turn();
    if (lab_device.interrupt_status || ++lab.rescues > RESCUES_MOST)
        return;
    event_begin("rescue");
    event_string("during", manner()->name);
    event_end();
    virtio_interrupt(&lab_device);
}

static void lab_before_entry(void) {
    const struct kvm_run *run = host_run();
    if (run->exit_reason == KVM_EXIT_HLT && run->if_flag && !lab_device.interrupt_status)
        sleep_serve();
}

static void lab_setup(void) {
    ring_watch.device = &lab_device;
    lab.random = random_stream(host_seed(), 3);
    virtio_mmio_create(&lab_device, VIRTIO_MMIO_GPA, VIRTIO_MMIO_IRQ);
    window_create(host_seed());
    host_claim_pio(LAB_STAGE, LAB_PORTS, "lab", lab_access);
}

const struct host_half host_half = {.setup = lab_setup, .before_entry = lab_before_entry};
