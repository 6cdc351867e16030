/*
 * A libFuzzer target: whatever a guest and its input do to the VMM's virtio console, it touches nothing outside of
 * guest memory, comes to an end, and says of itself what is true. The input is a sequence of operations, each a byte and
 * what it needs. Some are whole steps of a driver, so that mutations begin at a device that works.
 *
 *     VIRTIO_FUZZ_SHOW=1 build/fuzz/virtio FILE      what the operations in this file are
 */
#include <assert.h>
#include <linux/virtio_console.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "surroundings.h"

#define MEMORY_SIZE 0x10000u
/* The parts of queue 0 and 1, each with room for the largest; indirect tables; buffers. */
#define QUEUE_GPA(queue) (0x1000u + 0x3000u * (queue))
#define DRIVER_AREA 0x1000u
#define DEVICE_AREA 0x2000u
#define TABLES_GPA 0x7000u
#define BUFFERS_GPA 0x8000u

#define EMERGENCY_WRITE (VIRTIO_MMIO_CONFIG + 8)
#define NEGOTIATED \
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK)
#define LIVE (NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK)

enum { RECEIVE, TRANSMIT };

static bool is_shown;
#define SHOW(...) (is_shown ? (void)fprintf(stderr, __VA_ARGS__) : (void)0)

/* ---- what the device says and does ---- */

static struct {
    size_t bytes;
    uint8_t last[4];
} output;

static void output_take(const void *bytes, size_t size) {
    size_t kept = size < sizeof output.last ? size : sizeof output.last;
    memcpy(output.last, bytes, kept);
    (void)((
        const volatile uint8_t *)bytes)[size - 1]; /* whoever writes it out reads it to its end */
    output.bytes += size;
}

static void event_show(const char *json) { fprintf(stderr, "        %s\n", json); }

struct listeners listeners = {.output = output_take};

static unsigned broken_before; /* breaks up to the last reset */

static uint32_t peek(uint32_t offset) {
    uint64_t value = 0;
    register_access(offset, sizeof(uint32_t), false, &value);
    return (uint32_t)value;
}

/* What must hold after all that anybody does. */
static void invariants_check(bool may_put_out) {
    uint32_t status = peek(VIRTIO_MMIO_STATUS);
    uint32_t causes = peek(VIRTIO_MMIO_INTERRUPT_STATUS);
    if (status == 0)
        broken_before = complaints().broken;
    assert(line_is_high() == (causes != 0));
    assert(!(causes & ~(uint32_t)(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG)));
    assert(!(status & VIRTIO_CONFIG_S_NEEDS_RESET) == (complaints().broken == broken_before));
    assert(!(status & VIRTIO_CONFIG_S_DRIVER_OK) || (status & VIRTIO_CONFIG_S_FEATURES_OK));
    assert(!causes || (status & VIRTIO_CONFIG_S_DRIVER_OK));
    assert(may_put_out || output.bytes == 0);
    output.bytes = 0;
}

static bool is_live(void) {
    uint32_t up = VIRTIO_CONFIG_S_DRIVER_OK, down = VIRTIO_CONFIG_S_NEEDS_RESET;
    return (peek(VIRTIO_MMIO_STATUS) & (up | down)) == up;
}

/* ---- what a driver can do ---- */

static void access_do(uint32_t offset, uint32_t size, bool is_write, uint64_t value) {
    bool is_emergency = offset == EMERGENCY_WRITE && is_write;
    bool may_put_out = is_live() || is_emergency;
    bool is_claimed = register_access(offset, size, is_write, &value);
    SHOW("    %s 0x%03x, %u bytes: 0x%llx%s\n", is_write ? "write" : "read ", offset, size,
         (unsigned long long)value, is_claimed ? "" : " (nobody's)");
    invariants_check(may_put_out);
}

static void write32(uint32_t offset, uint32_t value) { access_do(offset, 4, true, value); }

/* Only what lies in memory, all of it or nothing. */
static void poke(gpa_t gpa, const void *bytes, size_t size) {
    void *hva = memory_at(gpa, size);
    if (hva)
        memcpy(hva, bytes, size);
}

static void poke16(gpa_t gpa, uint16_t value) {
    SHOW("    0x%llx := 0x%04x\n", (unsigned long long)gpa, value);
    poke(gpa, &value, sizeof value);
}

static void describe(gpa_t table_gpa, unsigned index, struct vring_desc descriptor) {
    SHOW("    table 0x%llx[%u] := addr 0x%llx, len 0x%x, flags %u, next %u\n",
         (unsigned long long)table_gpa, index, (unsigned long long)descriptor.addr, descriptor.len,
         descriptor.flags, descriptor.next);
    poke(table_gpa + index * sizeof descriptor, &descriptor, sizeof descriptor);
}

/* ---- a driver that does all as it should ---- */

static struct { uint16_t size, available, next; } rings[2];

static void features_accept(uint32_t low) {
    write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    write32(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    write32(VIRTIO_MMIO_DRIVER_FEATURES, low);
}

static void queue_create(unsigned queue, uint16_t size) {
    rings[queue].size = size;
    rings[queue].available = rings[queue].next = 0;
    memset(memory_at(QUEUE_GPA(queue), 0x3000), 0, 0x3000);
    write32(VIRTIO_MMIO_QUEUE_SEL, queue);
    write32(VIRTIO_MMIO_QUEUE_NUM, size);
    write32(VIRTIO_MMIO_QUEUE_DESC_LOW, QUEUE_GPA(queue));
    write32(VIRTIO_MMIO_QUEUE_AVAIL_LOW, QUEUE_GPA(queue) + DRIVER_AREA);
    write32(VIRTIO_MMIO_QUEUE_USED_LOW, QUEUE_GPA(queue) + DEVICE_AREA);
    write32(VIRTIO_MMIO_QUEUE_READY, 1);
}

static void go_live(uint32_t features, uint16_t size) {
    write32(VIRTIO_MMIO_STATUS, 0);
    write32(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    features_accept(features);
    write32(VIRTIO_MMIO_STATUS, NEGOTIATED);
    queue_create(RECEIVE, size);
    queue_create(TRANSMIT, size);
    write32(VIRTIO_MMIO_STATUS, LIVE);
}

static void chain_offer(unsigned queue, uint16_t head) {
    gpa_t available_gpa = QUEUE_GPA(queue) + DRIVER_AREA;
    poke16(available_gpa + 4 + UINT64_C(2) * (rings[queue].available % rings[queue].size), head);
    poke16(available_gpa + 2, ++rings[queue].available);
}

static uint16_t flags_of(unsigned queue) { return queue == RECEIVE ? VRING_DESC_F_WRITE : 0; }

/* In the main table, with the next descriptors there, or in a table of its own. */
static void chain_make(unsigned queue, unsigned count, uint32_t length, bool is_indirect) {
    gpa_t table_gpa = is_indirect ? TABLES_GPA + 0x800 * queue : QUEUE_GPA(queue);
    uint16_t first = is_indirect ? 0 : rings[queue].next,
             around = is_indirect ? 128 : rings[queue].size;
    for (unsigned i = 0; i < count; i++) {
        bool is_last = i + 1 == count;
        uint16_t flags = flags_of(queue) | (is_last ? 0 : VRING_DESC_F_NEXT);
        describe(table_gpa, (first + i) % around,
                 (struct vring_desc){BUFFERS_GPA + 0x100 * i, length, flags,
                                     (uint16_t)((first + i + 1) % around)});
    }
    if (is_indirect)
        describe(QUEUE_GPA(queue), rings[queue].next,
                 (struct vring_desc){table_gpa, count * 16, VRING_DESC_F_INDIRECT, 0});
    chain_offer(queue, rings[queue].next);
    rings[queue].next =
        (uint16_t)((rings[queue].next + (is_indirect ? 1 : count)) % rings[queue].size);
}

/* Whatever was before: after a reset, a message goes out and one comes in. */
static void works_check(void) {
    SHOW("  and now as it should be:\n");
    memset(memory_at(0, MEMORY_SIZE), 0, MEMORY_SIZE);
    go_live(0, 4);
    const uint16_t *used_in = memory_at(QUEUE_GPA(RECEIVE) + DEVICE_AREA + 2, 2);
    const uint16_t *used_out = memory_at(QUEUE_GPA(TRANSMIT) + DEVICE_AREA + 2, 2);
    do { /* the input that is left from before */
        chain_make(RECEIVE, 1, 0x1000, false);
        write32(VIRTIO_MMIO_QUEUE_NOTIFY, RECEIVE);
    } while (*used_in == rings[RECEIVE].available);
    input_arrives("in", 2);
    assert(*used_in == rings[RECEIVE].available && !memcmp(memory_at(BUFFERS_GPA, 2), "in", 2));
    memcpy(memory_at(BUFFERS_GPA, 3), "out", 3);
    chain_make(TRANSMIT, 1, 3, false);
    uint64_t queue = TRANSMIT;
    register_access(VIRTIO_MMIO_QUEUE_NOTIFY, 4, true, &queue);
    assert(*used_out == 1 && output.bytes == 3 && !memcmp(output.last, "out", 3));
    invariants_check(true);
    assert(is_live());
}

/* ---- operations ---- */

static struct {
    const uint8_t *bytes;
    size_t left;
} code;

static uint64_t take(size_t size) {
    uint64_t value = 0;
    if (size > code.left)
        size = code.left;
    memcpy(&value, code.bytes, size);
    code.bytes += size;
    code.left -= size;
    return value;
}

/* Numbers that decide something here, and any others. */
static uint64_t take_value(void) {
    static const uint32_t telling[] = {0,   1,      2,       3,          4,          8,         11,
                                       15,  16,     64,      79,         128,        255,       256,
                                       257, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff};
    uint8_t kind = (uint8_t)take(1);
    switch (kind & 3) {
    case 0: return kind >> 2;
    case 1: return telling[(kind >> 2) % LENGTH(telling)];
    case 2: return take(2);
    default: return take(4);
    }
}

static uint32_t take_register(void) {
    static const uint16_t registers[] = {VIRTIO_MMIO_DEVICE_FEATURES_SEL,
                                         VIRTIO_MMIO_DEVICE_FEATURES,
                                         VIRTIO_MMIO_DRIVER_FEATURES_SEL,
                                         VIRTIO_MMIO_DRIVER_FEATURES,
                                         VIRTIO_MMIO_QUEUE_SEL,
                                         VIRTIO_MMIO_QUEUE_NUM_MAX,
                                         VIRTIO_MMIO_QUEUE_NUM,
                                         VIRTIO_MMIO_QUEUE_READY,
                                         VIRTIO_MMIO_QUEUE_NOTIFY,
                                         VIRTIO_MMIO_INTERRUPT_STATUS,
                                         VIRTIO_MMIO_INTERRUPT_ACK,
                                         VIRTIO_MMIO_STATUS,
                                         VIRTIO_MMIO_QUEUE_DESC_LOW,
                                         VIRTIO_MMIO_QUEUE_DESC_HIGH,
                                         VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                                         VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
                                         VIRTIO_MMIO_QUEUE_USED_LOW,
                                         VIRTIO_MMIO_QUEUE_USED_HIGH,
                                         VIRTIO_MMIO_SHM_SEL,
                                         VIRTIO_MMIO_SHM_LEN_LOW,
                                         VIRTIO_MMIO_CONFIG_GENERATION,
                                         VIRTIO_MMIO_CONFIG,
                                         VIRTIO_MMIO_CONFIG + 2,
                                         EMERGENCY_WRITE};
    uint8_t which = (uint8_t)take(1);
    return which < 0xe0 ? registers[which % LENGTH(registers)] : (uint32_t)take(2) % 0x1000;
}

/* Seven times in eight the one that registers have. */
static uint32_t take_size(void) {
    uint8_t kind = (uint8_t)take(1);
    return kind & 0x1c ? 4 : 1u << (kind & 3);
}

static gpa_t take_gpa(void) {
    uint8_t kind = (uint8_t)take(1);
    switch (kind & 7) {
    case 0: return MEMORY_SIZE - (kind >> 3);
    case 1: return take(8);
    case 2: return TABLES_GPA + 16u * (kind >> 3);
    case 3: return QUEUE_GPA(kind >> 3 & 1) + DRIVER_AREA * (kind >> 4 & 3);
    case 4: return UINT64_MAX - (kind >> 3);
    default: return BUFFERS_GPA + take(2) % 0x8000;
    }
}

static void read_op(void) {
    uint32_t offset = take_register();
    access_do(offset, take_size(), false, 0);
}

static void write_op(void) {
    uint32_t offset = take_register(), size = take_size();
    access_do(offset, size, true, take_value());
}

static void poke_op(void) {
    gpa_t gpa = take_gpa();
    uint64_t value = take(8);
    SHOW("    0x%llx := 0x%llx\n", (unsigned long long)gpa, (unsigned long long)value);
    poke(gpa, &value, sizeof value);
}

/* A field of the available ring, or of the used ring, which is not the driver's to write. */
static void ring_op(void) {
    uint8_t where = (uint8_t)take(1);
    unsigned queue = where & 1;
    gpa_t gpa = QUEUE_GPA(queue) + (where & 0x80 ? DEVICE_AREA : DRIVER_AREA);
    poke16(gpa + UINT64_C(2) * (where >> 1 & 0x3f), (uint16_t)take_value());
}

/* Any descriptor. Its flags are the right ones, but for some bits. */
static void describe_op(void) {
    uint8_t where = (uint8_t)take(1), flags = (uint8_t)take(1);
    unsigned queue = where & 1;
    gpa_t table_gpa = where & 2 ? TABLES_GPA + 0x800 * queue : QUEUE_GPA(queue);
    struct vring_desc descriptor = {.addr = take_gpa()};
    descriptor.len = flags & 0x80 ? (uint32_t)take_value() : 16u * (flags >> 3 & 15);
    descriptor.flags = flags_of(queue) ^ (flags & 7);
    descriptor.next = where & 0x80 ? (uint16_t)take_value() : (where >> 2 & 15) + 1;
    describe(table_gpa, where >> 2 & 15, descriptor);
}

static void go_live_op(void) {
    uint8_t how = (uint8_t)take(1);
    uint32_t features = (how & 1u) << VIRTIO_RING_F_EVENT_IDX |
                        (how >> 1 & 1u) << VIRTIO_RING_F_INDIRECT_DESC |
                        (how >> 2 & 1u) << VIRTIO_CONSOLE_F_SIZE;
    if (how & 0x80)
        features ^= (uint32_t)take_value();
    go_live(features, (uint16_t)(1u << ((how >> 3 & 15) % 9)));
}

static void chain_op(void) {
    uint8_t how = (uint8_t)take(1);
    unsigned queue = how & 1, count = 1 + (how >> 3 & 7);
    if (rings[queue].size < count)
        return;
    chain_make(queue, count, 1 + (uint32_t)take(1), how & 2);
    if (how & 4)
        write32(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
}

static void offer_op(void) {
    uint8_t how = (uint8_t)take(1);
    if (!rings[how & 1].size)
        return;
    chain_offer(how & 1, how & 4 ? (uint16_t)take_value() : how >> 4);
    if (how & 8)
        write32(VIRTIO_MMIO_QUEUE_NOTIFY, how & 1);
}

static void notify_op(void) {
    uint8_t how = (uint8_t)take(1);
    bool may_put_out = is_live();
    SHOW("    doorbell %u\n", how & 3u);
    if (how & 4)
        doorbell_ring(how & 3);
    else
        write32(VIRTIO_MMIO_QUEUE_NOTIFY, how & 3);
    invariants_check(may_put_out);
}

static void input_op(void) {
    static const uint8_t keys[4096];
    size_t size = (size_t)take(1) * 16;
    bool may_put_out = is_live(); /* a transmission may go on */
    SHOW("    %zu bytes of input\n", size);
    input_arrives(keys, size);
    invariants_check(may_put_out);
}

static void resize_op(void) {
    uint16_t columns = (uint16_t)take(1);
    SHOW("    %u columns\n", columns);
    virtio_console_resize(columns, 25);
    invariants_check(false);
}

/* A queue that is stopped first, so that it may be set up again: as it should be, or in any way. */
static void create_op(void) {
    uint8_t how = (uint8_t)take(1);
    write32(VIRTIO_MMIO_QUEUE_SEL, how & 1);
    write32(VIRTIO_MMIO_QUEUE_READY, 0);
    if (how & 2) {
        queue_create(how & 1, (uint16_t)(1u << ((how >> 2) % 9)));
        return;
    }
    write32(VIRTIO_MMIO_QUEUE_NUM, how & 4 ? (uint32_t)take_value() : 8);
    for (uint32_t part = 0; part < 3; part++) {
        gpa_t gpa = how & (8u << part) ? take_gpa() : QUEUE_GPA(how & 1) + part * DRIVER_AREA;
        write32(VIRTIO_MMIO_QUEUE_DESC_LOW + 0x10 * part, (uint32_t)gpa);
        write32(VIRTIO_MMIO_QUEUE_DESC_HIGH + 0x10 * part, (uint32_t)(gpa >> 32));
    }
    write32(VIRTIO_MMIO_QUEUE_READY, 1);
}

/* Another CPU of the guest writes while the device reads. */
static void change_op(void) {
    gpa_t gpa = take_gpa();
    uint64_t value = take(8);
    unsigned accesses = 1 + (unsigned)take(1) % 16;
    if (!memory_at(gpa, sizeof value))
        return;
    SHOW("    after %u accesses: 0x%llx := 0x%llx\n", accesses, (unsigned long long)gpa,
         (unsigned long long)value);
    memory_change_after(gpa, value, accesses);
}

static void (*const operations[])(void) = {read_op,    write_op,  poke_op,  ring_op,   describe_op,
                                           go_live_op, chain_op,  offer_op, notify_op, input_op,
                                           resize_op,  create_op, change_op};

/* ---- libFuzzer ---- */

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    is_shown = getenv("VIRTIO_FUZZ_SHOW");
    listeners.event = is_shown ? event_show : NULL;
    memory_create(-1, MEMORY_SIZE);
    input_create();
    virtio_console_create();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    code.bytes = bytes;
    code.left = size;
    memset(rings, 0, sizeof rings);
    memset(memory_at(0, MEMORY_SIZE), 0, MEMORY_SIZE);
    write32(VIRTIO_MMIO_STATUS, 0);
    while (code.left > 0) {
        size_t operation = take(1) % LENGTH(operations);
        SHOW("  operation %zu\n", operation);
        operations[operation]();
    }
    memory_change_after(0, 0, 0);
    works_check();
    return 0;
}
