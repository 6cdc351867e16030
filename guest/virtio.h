/*
 * The driver's side of virtio-mmio: find a device, agree with it, lay out its rings. VIRTIO 1.2, "Virtio Over
 * MMIO", version 2. What is put into the rings is for whoever uses them: the console driver
 * (virtio_console.h), or a lesson.
 */
#pragma once

#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>

#include "guest.h"

/* A device that the command line names: virtio_mmio.device=SIZE@GPA:IRQ. */
struct virtio_device {
    uint64_t gpa;      /* of its registers; the boot page tables map them */
    unsigned irq;      /* its line at the interrupt controllers: pic.h */
    uint64_t features; /* agreed on */
};

/* The first device on the command line with this id (VIRTIO_ID_CONSOLE); false if there is none. Devices
 * that are no virtio-mmio of version 2 are passed over. */
bool virtio_find(uint32_t id, struct virtio_device *device);

static inline uint32_t virtio_read(const struct virtio_device *device, unsigned offset) {
    return mmio_read32(device->gpa + offset);
}
static inline void virtio_write(const struct virtio_device *device, unsigned offset,
                                uint32_t value) {
    mmio_write32(device->gpa + offset, value);
}

/* A 16-bit field of the device's configuration space, which is read by accesses of just its width. */
static inline uint16_t virtio_config_read16(const struct virtio_device *device, unsigned offset) {
    uint16_t value;
    uint64_t gva = device->gpa + VIRTIO_MMIO_CONFIG + offset;
    __asm__ volatile("movw (%1), %0" : "=r"(value) : "r"(gva) : "memory");
    return value;
}

/* What the device offers; that may be asked at any time. */
uint64_t virtio_features_offered(const struct virtio_device *device);

/*
 * VIRTIO 1.2 "Device Initialization", in its order. virtio_begin() resets the device and agrees on those of
 * the wanted features that it offers, and on VIRTIO_F_VERSION_1; false if the device refuses. Then come the
 * queues, then virtio_driver_ok(). A reset (virtio_reset) takes it all back, at any time: when it returns,
 * the device no longer touches the rings.
 */
bool virtio_begin(struct virtio_device *device, uint64_t wanted);
void virtio_driver_ok(const struct virtio_device *device);
void virtio_give_up(const struct virtio_device *device); /* set VIRTIO_CONFIG_S_FAILED */
void virtio_reset(const struct virtio_device *device);
static inline bool virtio_has_feature(const struct virtio_device *device, unsigned bit) {
    return device->features >> bit & 1;
}

/* A ring for this queue, empty, of size entries (a power of two, at most VIRTIO_RING_SIZE_MAX); the device
 * knows of it from now on. A queue that is created again, after a reset, gets the same memory. False: the
 * device has no such queue, or not of this size, or it is in use. */
#define VIRTIO_RING_SIZE_MAX 128
bool virtio_ring_create(const struct virtio_device *device, unsigned queue, uint16_t size,
                        struct vring *ring);

/* Notify the device: there are new buffers in this queue. An exit, or an ioeventfd's. */
static inline void virtio_notify(const struct virtio_device *device, unsigned queue) {
    virtio_write(device, VIRTIO_MMIO_QUEUE_NOTIFY, queue);
}

/* Why the device interrupts (VIRTIO_MMIO_INT_*), acknowledged: its line falls. 0: it does not. */
uint32_t virtio_interrupt_take(const struct virtio_device *device);

/*
 * Memory barriers: the device, on a CPU of its own, sees memory change in an order that the driver decides.
 * VIRTIO 1.2 "Supplying Buffers to The Device" and "Receiving Used Buffers From The Device" say where.
 * x86 keeps stores in their order, and loads in theirs, so that the first two only keep the compiler from
 * changing it. A load that must come after a store needs the CPU's own: SDM 3A "Memory Ordering".
 */
static inline void barrier_stores(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void barrier_loads(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void barrier_full(void) { __asm__ volatile("mfence" : : : "memory"); }
