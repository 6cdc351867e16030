/* Notify the virtio console count= times: case=data with a chain of 4 KiB each time, case=bare with none. */
#include "../../../guests/cases.h"
#include "virtio.h"

MACHINE(.memory_mib = 64, .irqchip = MACHINE_IRQCHIP_NONE,
        .devices = MACHINE_DEVICE_VIRTIO_CONSOLE);

enum { RECEIVE, TRANSMIT };
#define ENTRIES 16

static struct virtio_device device;
static struct vring ring;

/* Each entry of the ring is the same chain: a page of letters, without the end of a line. */
static void queue_begin(void) {
    uint64_t page_gpa = page_alloc();
    if (!virtio_find(VIRTIO_ID_CONSOLE, &device) || !virtio_begin(&device, 0) ||
        !virtio_ring_create(&device, TRANSMIT, ENTRIES, &ring))
        PANIC("there is no virtio console");
    memset((void *)page_gpa, 'k', PAGE_SIZE);
    ring.desc[0] = (struct vring_desc){.addr = page_gpa, .len = PAGE_SIZE};
    ring.avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
    virtio_driver_ok(&device);
}

static void chain_publish(void) {
    barrier_stores();
    __atomic_store_n(&ring.avail->idx, (uint16_t)(ring.avail->idx + 1), __ATOMIC_RELAXED);
}

static void kick(bool has_data) {
    uint64_t count = case_number("count");
    queue_begin();
    for (uint64_t i = 0; i < count; i++) {
        if (has_data)
            chain_publish();
        virtio_notify(&device, TRANSMIT);
    }
    if (ring.used->idx != ring.avail->idx)
        PANIC("a chain has not been used");
}

static void data(void) { kick(true); }
static void bare(void) { kick(false); }

void guest_main(void) {
    static const struct guest_case cases[] = {{"data", data}, {"bare", bare}};
    CASE_RUN(cases);
}
