/*
 * The transport of virtio devices: registers in memory. VIRTIO 1.2, "Virtio Over MMIO", version 2.
 *
 * The driver chooses every number that arrives here. What it must not do ends in one of two ways: the
 * access is ignored, as if it had not been, or the device needs a reset from then on. Both leave an event
 * virtio_misuse. Not offered: legacy devices, packed virtqueues, shared memory, VIRTIO_F_RING_RESET.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "virtio_device.h"
#include "vmm.h"

#define MAGIC 0x74726976 /* "virt" */
#define VERSION 2
#define VENDOR 0x6d766b /* "kvm" */

/* The bits of the status register that are the driver's to set. */
#define DRIVER_STATUS                                                                     \
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | \
     VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED)
#define INTERRUPT_CAUSES (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG)

/* What no register holds reads like this. */
#define NOTHING 0u

static struct {
    struct virtio_device *device[4];
    unsigned count;
} bus;

/* ---- what the device's owner may ask for ---- */

bool virtio_is_live(const struct virtio_device *device) {
    return (device->status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET)) ==
           VIRTIO_CONFIG_S_DRIVER_OK;
}

bool virtio_has_feature(const struct virtio_device *device, unsigned bit) {
    return (device->status & VIRTIO_CONFIG_S_FEATURES_OK) && (device->driver_features >> bit & 1);
}

/* The line is high as long as there is something that the driver has not acknowledged. */
static void line_update(const struct virtio_device *device) {
    line_set(device->irq, device->interrupt_status != 0);
}

static void interrupt_raise(struct virtio_device *device, uint32_t cause) {
    event_begin("virtio_interrupt");
    event_string("device", device->name);
    event_string("cause", cause == VIRTIO_MMIO_INT_VRING ? "used" : "config");
    event_end();
    device->interrupt_status |= cause;
    line_update(device);
}

/* Also of a device that has broken since: what it had used before that is the driver's to know. */
void virtio_interrupt(struct virtio_device *device) {
    if (device->status & VIRTIO_CONFIG_S_DRIVER_OK)
        interrupt_raise(device, VIRTIO_MMIO_INT_VRING);
}

void virtio_config_changed(struct virtio_device *device) {
    device->config_generation++;
    if (device->status & VIRTIO_CONFIG_S_DRIVER_OK)
        interrupt_raise(device, VIRTIO_MMIO_INT_CONFIG);
}

static void misuse_record(const struct virtio_device *device, unsigned queue, const char *what,
                          bool is_broken) {
    event_begin("virtio_misuse");
    event_string("device", device->name);
    if (queue != VIRTIO_NO_QUEUE)
        event_number("queue", queue);
    event_string("what", what);
    event_number("is_broken", is_broken);
    event_end();
}

void virtio_misuse(struct virtio_device *device, unsigned queue, const char *what) {
    misuse_record(device, queue, what, false);
}

/* VIRTIO 1.2 "Device Status Field": a driver that has got as far as DRIVER_OK is told. */
void virtio_break(struct virtio_device *device, unsigned queue, const char *what) {
    misuse_record(device, queue, what, true);
    if (device->status & VIRTIO_CONFIG_S_NEEDS_RESET)
        return;
    device->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    if (device->status & VIRTIO_CONFIG_S_DRIVER_OK)
        interrupt_raise(device, VIRTIO_MMIO_INT_CONFIG);
}

/* Misuse of the transport itself: the access has no other effect. */
static void ignore(const struct virtio_device *device, const char *what) {
    misuse_record(device, VIRTIO_NO_QUEUE, what, false);
}

/* ---- features and status ---- */

static uint64_t features_offered(const struct virtio_device *device) {
    return device->features | UINT64_C(1) << VIRTIO_F_VERSION_1;
}

static uint32_t features_read(const struct virtio_device *device) {
    uint32_t half = device->features_select;
    return half < 2 ? (uint32_t)(features_offered(device) >> (32 * half)) : NOTHING;
}

static void features_accept(struct virtio_device *device, uint32_t value) {
    uint32_t half = device->driver_features_select;
    if (device->status & VIRTIO_CONFIG_S_FEATURES_OK) {
        ignore(device, "features are accepted after FEATURES_OK");
    } else if (half < 2) {
        device->driver_features &= ~(UINT64_C(0xffffffff) << (32 * half));
        device->driver_features |= (uint64_t)value << (32 * half);
    } else if (value) {
        ignore(device, "features beyond bit 63 are accepted");
    }
}

static void device_reset(struct virtio_device *device) {
    device->status = 0;
    device->driver_features = 0;
    device->features_select = device->driver_features_select = device->queue_select = 0;
    device->interrupt_status = 0;
    memset(device->queue, 0, sizeof device->queue);
    line_update(device);
    if (device->reset)
        device->reset();
}

/* Of the bits that the driver writes, those that it may have. VIRTIO 1.2 "Device Initialization": if the
 * device does not like the features, FEATURES_OK reads as 0 again. */
static uint32_t status_permit(const struct virtio_device *device, uint32_t status) {
    uint32_t news = status & ~device->status;
    if (news & VIRTIO_CONFIG_S_FEATURES_OK) {
        if (device->driver_features & ~features_offered(device)) {
            ignore(device, "a feature is accepted that is not offered");
            status &= ~(uint32_t)VIRTIO_CONFIG_S_FEATURES_OK;
        } else if (!(device->driver_features >> VIRTIO_F_VERSION_1 & 1)) {
            ignore(device, "VIRTIO_F_VERSION_1 is not accepted: this is no legacy device");
            status &= ~(uint32_t)VIRTIO_CONFIG_S_FEATURES_OK;
        }
    }
    if ((news & VIRTIO_CONFIG_S_DRIVER_OK) && !(status & VIRTIO_CONFIG_S_FEATURES_OK)) {
        ignore(device, "DRIVER_OK without FEATURES_OK");
        status &= ~(uint32_t)VIRTIO_CONFIG_S_DRIVER_OK;
    }
    return status;
}

static void status_write(struct virtio_device *device, uint32_t value) {
    uint32_t kept = device->status & VIRTIO_CONFIG_S_NEEDS_RESET;
    if (value == 0)
        device_reset(device);
    else if (device->status & DRIVER_STATUS & ~value)
        ignore(device, "a status bit is cleared, which only a reset does");
    else
        device->status = kept | status_permit(device, value & DRIVER_STATUS);
    event_begin("virtio_status");
    event_string("device", device->name);
    event_hex("status", device->status);
    event_end();
}

/* ---- queues ---- */

static struct virtqueue *queue_selected(struct virtio_device *device) {
    bool exists = device->queue_select < device->queue_count;
    return exists ? &device->queue[device->queue_select] : NULL;
}

/* VIRTIO 1.2 "Split Virtqueues": what the three areas take, and how they are aligned. Both end with an event
 * index, negotiated or not. NULL: all is well, and the ring is set. */
static const char *queue_map(struct virtqueue *queue) {
    uint64_t size = queue->size;
    if ((queue->descriptor_gpa & (VRING_DESC_ALIGN_SIZE - 1)) ||
        (queue->driver_gpa & (VRING_AVAIL_ALIGN_SIZE - 1)) ||
        (queue->device_gpa & (VRING_USED_ALIGN_SIZE - 1)))
        return "an area of the queue is not aligned";
    queue->ring = (struct vring){
        .num = queue->size,
        .desc = memory_at(queue->descriptor_gpa, size * sizeof(struct vring_desc)),
        .avail = memory_at(queue->driver_gpa, sizeof(struct vring_avail) + (size + 1) * 2),
        .used = memory_at(queue->device_gpa,
                          sizeof(struct vring_used) + size * sizeof(struct vring_used_elem) + 2),
    };
    if (!queue->ring.desc || !queue->ring.avail || !queue->ring.used)
        return "an area of the queue is not in memory";
    return NULL;
}

static void queue_record(const struct virtio_device *device, const struct virtqueue *queue) {
    event_begin("virtio_queue");
    event_string("device", device->name);
    event_number("queue", device->queue_select);
    event_number("size", queue->size);
    event_hex("descriptor_gpa", queue->descriptor_gpa);
    event_hex("driver_gpa", queue->driver_gpa);
    event_hex("device_gpa", queue->device_gpa);
    event_end();
}

static void queue_start(struct virtio_device *device, struct virtqueue *queue) {
    const char *wrong = NULL;
    if (!(device->status & VIRTIO_CONFIG_S_FEATURES_OK))
        wrong = "a queue is made ready before FEATURES_OK";
    else if (queue->size == 0 || queue->size > device->queue_size)
        wrong = "the queue's size is 0 or more than QueueNumMax";
    else if (queue->size & (queue->size - 1))
        wrong = "the queue's size is no power of two";
    else
        wrong = queue_map(queue);
    if (wrong) {
        virtio_break(device, device->queue_select, wrong);
        return;
    }
    queue->next_available = queue->next_used = 0;
    queue->ready = true;
    queue_record(device, queue);
}

static void queue_ready_write(struct virtio_device *device, struct virtqueue *queue,
                              uint32_t value) {
    if (value == 0)
        queue->ready = false;
    else if (value != 1)
        virtio_misuse(device, device->queue_select, "QueueReady is neither 0 nor 1");
    else if (queue->ready)
        virtio_misuse(device, device->queue_select, "a queue is made ready that is ready");
    else
        queue_start(device, queue);
}

static void half_write(gpa_t *gpa, bool is_high, uint32_t value) {
    unsigned shift = is_high ? 32 : 0;
    *gpa = (*gpa & ~(UINT64_C(0xffffffff) << shift)) | (uint64_t)value << shift;
}

/* A register of the selected queue. */
static void queue_write(struct virtio_device *device, uint64_t offset, uint32_t value) {
    struct virtqueue *queue = queue_selected(device);
    if (!queue) {
        virtio_misuse(device, device->queue_select, "a queue is set up that does not exist");
        return;
    }
    if (queue->ready && offset != VIRTIO_MMIO_QUEUE_READY) {
        virtio_misuse(device, device->queue_select, "a queue is changed while it is ready");
        return;
    }
    switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM: queue->size = value; break;
    case VIRTIO_MMIO_QUEUE_READY: queue_ready_write(device, queue, value); break;
    case VIRTIO_MMIO_QUEUE_DESC_LOW: half_write(&queue->descriptor_gpa, false, value); break;
    case VIRTIO_MMIO_QUEUE_DESC_HIGH: half_write(&queue->descriptor_gpa, true, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW: half_write(&queue->driver_gpa, false, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH: half_write(&queue->driver_gpa, true, value); break;
    case VIRTIO_MMIO_QUEUE_USED_LOW: half_write(&queue->device_gpa, false, value); break;
    case VIRTIO_MMIO_QUEUE_USED_HIGH: half_write(&queue->device_gpa, true, value); break;
    }
}

/* ---- notification ---- */

static void notify(struct virtio_device *device, uint32_t queue, const char *by) {
    if (queue >= device->queue_count) {
        virtio_misuse(device, queue, "a queue is notified that does not exist");
        return;
    }
    event_begin("virtio_notify");
    event_string("device", device->name);
    event_number("queue", queue);
    event_string("by", by);
    event_end();
    if (!(device->status & VIRTIO_CONFIG_S_DRIVER_OK))
        virtio_misuse(device, queue, "a queue is notified before DRIVER_OK");
    else if (!virtio_is_live(device))
        virtio_misuse(device, queue, "a queue is notified while the device needs a reset");
    else if (!device->queue[queue].ready)
        virtio_misuse(device, queue, "a queue is notified that is not ready");
    else
        device->notified(queue);
}

struct doorbell {
    struct virtio_device *device;
    unsigned queue;
};

static void doorbell_rings(void *context) {
    const struct doorbell *doorbell = context;
    notify(doorbell->device, doorbell->queue, "ioeventfd");
}

static void doorbells_create(struct virtio_device *device) {
    static struct doorbell doorbells[LENGTH(bus.device) * VIRTIO_QUEUES_MAX];
    static unsigned count;
    for (unsigned queue = 0; queue < device->queue_count; queue++) {
        doorbells[count] = (struct doorbell){device, queue};
        io_doorbell(device->gpa + VIRTIO_MMIO_QUEUE_NOTIFY, queue, doorbell_rings,
                    &doorbells[count++]);
    }
}

/* ---- registers ---- */

static uint32_t register_read(struct virtio_device *device, uint64_t offset) {
    struct virtqueue *queue = queue_selected(device);
    switch (offset) {
    case VIRTIO_MMIO_MAGIC_VALUE: return MAGIC;
    case VIRTIO_MMIO_VERSION: return VERSION;
    case VIRTIO_MMIO_DEVICE_ID: return device->id;
    case VIRTIO_MMIO_VENDOR_ID: return VENDOR;
    case VIRTIO_MMIO_DEVICE_FEATURES: return features_read(device);
    case VIRTIO_MMIO_QUEUE_NUM_MAX: return queue ? device->queue_size : 0;
    case VIRTIO_MMIO_QUEUE_READY: return queue && queue->ready;
    case VIRTIO_MMIO_INTERRUPT_STATUS: return device->interrupt_status;
    case VIRTIO_MMIO_STATUS: return device->status;
    case VIRTIO_MMIO_CONFIG_GENERATION: return device->config_generation;
    /* There is no shared memory: its regions have the length and the address of one that does not exist. */
    case VIRTIO_MMIO_SHM_LEN_LOW:
    case VIRTIO_MMIO_SHM_LEN_HIGH:
    case VIRTIO_MMIO_SHM_BASE_LOW:
    case VIRTIO_MMIO_SHM_BASE_HIGH: return UINT32_MAX;
    default: ignore(device, "a register is read that cannot be"); return NOTHING;
    }
}

static void interrupt_acknowledge(struct virtio_device *device, uint32_t value) {
    if (value & ~(uint32_t)INTERRUPT_CAUSES)
        ignore(device, "an interrupt cause is acknowledged that does not exist");
    device->interrupt_status &= ~value;
    line_update(device);
}

static void register_write(struct virtio_device *device, uint64_t offset, uint32_t value) {
    switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES_SEL: device->features_select = value; break;
    case VIRTIO_MMIO_DRIVER_FEATURES_SEL: device->driver_features_select = value; break;
    case VIRTIO_MMIO_DRIVER_FEATURES: features_accept(device, value); break;
    case VIRTIO_MMIO_QUEUE_SEL: device->queue_select = value; break;
    case VIRTIO_MMIO_QUEUE_NUM:
    case VIRTIO_MMIO_QUEUE_READY:
    case VIRTIO_MMIO_QUEUE_DESC_LOW:
    case VIRTIO_MMIO_QUEUE_DESC_HIGH:
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
    case VIRTIO_MMIO_QUEUE_USED_LOW:
    case VIRTIO_MMIO_QUEUE_USED_HIGH: queue_write(device, offset, value); break;
    case VIRTIO_MMIO_QUEUE_NOTIFY: notify(device, value, "exit"); break;
    case VIRTIO_MMIO_INTERRUPT_ACK: interrupt_acknowledge(device, value); break;
    case VIRTIO_MMIO_STATUS: status_write(device, value); break;
    case VIRTIO_MMIO_SHM_SEL: break; /* whichever it is, it does not exist */
    default: ignore(device, "a register is written that cannot be"); break;
    }
}

/* ---- configuration space ---- */

static void config_access(struct virtio_device *device, uint64_t offset, struct access *access) {
    bool is_inside = offset + access->size <= device->config_size;
    bool is_aligned = access->size <= 4 && offset % access->size == 0;
    uint32_t value = 0;
    if (!is_inside || !is_aligned) {
        ignore(device, is_inside ? "the configuration space is accessed with a wrong width"
                                 : "the configuration space is accessed beyond its end");
    } else if (!access->is_write) {
        memcpy(access->data, (const uint8_t *)device->config + offset, access->size);
    } else if (device->config_written) {
        memcpy(&value, access->data, access->size);
        device->config_written((uint32_t)offset, access->size, value);
    } else {
        ignore(device, "the configuration space is written, which it cannot be");
    }
}

/* ---- the bus ---- */

/* The bus hands over nothing that is not one device's. */
static struct virtio_device *device_at(gpa_t gpa) {
    unsigned i = 0;
    while (gpa - bus.device[i]->gpa >= VIRTIO_MMIO_SIZE)
        i++;
    return bus.device[i];
}

/* VIRTIO 1.2 "MMIO Device Register Layout": registers are read and written in 32 bits, aligned. */
static void transport_access(struct access *access) {
    struct virtio_device *device = device_at(access->address);
    uint64_t offset = access->address - device->gpa;
    uint32_t value = NOTHING;
    if (!access->is_write)
        memset(access->data, 0, access->size);
    if (offset >= VIRTIO_MMIO_CONFIG) {
        config_access(device, offset - VIRTIO_MMIO_CONFIG, access);
    } else if (access->size != sizeof value || offset % sizeof value) {
        ignore(device, "a register is accessed other than by 32 bits, aligned");
    } else if (!access->is_write) {
        value = register_read(device, offset);
        memcpy(access->data, &value, sizeof value);
    } else {
        memcpy(&value, access->data, sizeof value);
        register_write(device, offset, value);
    }
}

void virtio_mmio_create(struct virtio_device *device, gpa_t gpa, unsigned irq) {
    char word[64];
    if (bus.count == LENGTH(bus.device))
        die(STATUS_HOST, "%s is one virtio device too many: there are %u", device->name, bus.count);
    device->gpa = gpa;
    device->irq = irq;
    bus.device[bus.count++] = device;
    host_claim_mmio(gpa, VIRTIO_MMIO_SIZE, device->name, transport_access);
    line_create(irq);
    snprintf(word, sizeof word, "virtio_mmio.device=%" PRIu64 "K@0x%" PRIx64 ":%u",
             VIRTIO_MMIO_SIZE / 1024, gpa, irq);
    command_line_add(word);
    if (notifications_use_ioeventfd())
        doorbells_create(device);
}
