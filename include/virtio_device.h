/*
 * A virtio device behind virtio-mmio: what the transport (vmm/virtio_mmio.c) does for whoever makes the
 * device, the VMM's console or a lesson's host half. VIRTIO 1.2, "Virtio Over MMIO", version 2 only.
 *
 * The transport answers for the registers: it negotiates features, keeps the status, checks what the
 * driver says of its queues, and drives the interrupt line. What is in a queue, and what the device does
 * with it, is its owner's. All functions are called, and call back, by one thread at a time: see host.h.
 */
#pragma once

#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "host.h"

#define VIRTIO_QUEUES_MAX 2
#define VIRTQUEUE_SIZE_MAX 256 /* entries */

/* Where the machine's first virtio device is, and its interrupt line, if its owner has no reason for
 * another place. */
#define VIRTIO_MMIO_GPA UINT64_C(0xd0000000)
#define VIRTIO_MMIO_SIZE UINT64_C(0x1000)
#define VIRTIO_MMIO_IRQ 5

/*
 * A split virtqueue, as the driver has set it up. The areas lie in guest memory, all of them: that was
 * checked when the driver said QueueReady, and a reset takes it back. What is *in* them is the driver's,
 * who may write there at any time: read a field once, then check what was read.
 */
struct virtqueue {
    bool ready;              /* false: there is no ring */
    struct vring ring;       /* num: entries, a power of two; desc, avail, used: hvas */
    uint16_t next_available; /* the owner's: how far it has read the available ring, */
    uint16_t next_used;      /* and how far it has written the used ring. Both run freely */

    /* The transport's: the registers as written. */
    uint32_t size;
    gpa_t descriptor_gpa, driver_gpa, device_gpa;
};

struct virtio_device {
    /* The owner's, set before virtio_mmio_create(). */
    const char *name;     /* for events and messages */
    uint32_t id;          /* VIRTIO_ID_* */
    uint64_t features;    /* offered; the transport adds VIRTIO_F_VERSION_1 */
    unsigned queue_count; /* up to VIRTIO_QUEUES_MAX */
    uint16_t queue_size;  /* QueueNumMax: a power of two up to VIRTQUEUE_SIZE_MAX */
    const void *config;   /* what the driver reads at VIRTIO_MMIO_CONFIG, */
    uint32_t config_size; /* bytes of it */
    /* The driver notifies: there may be new buffers in this queue. Only while the device is live and the
     * queue is ready. */
    void (*notified)(unsigned queue);
    /* The driver writes size bytes of the configuration space, which lie in it; NULL: it must not. */
    void (*config_written)(uint32_t offset, uint32_t size, uint32_t value);
    /* The driver resets the device, at any time, also between the two halves of a request; the
     * transport has forgotten all queues. May be NULL. */
    void (*reset)(void);

    /* The transport's: to be read. */
    uint32_t status;          /* VIRTIO_CONFIG_S_*, as the driver reads it */
    uint64_t driver_features; /* accepted, once VIRTIO_CONFIG_S_FEATURES_OK is set */
    struct virtqueue queue[VIRTIO_QUEUES_MAX];

    /* The transport's: its registers. */
    gpa_t gpa;
    unsigned irq;
    uint32_t features_select, driver_features_select, queue_select;
    uint32_t interrupt_status, config_generation;
};

/*
 * Put the device on the bus, in setup: VIRTIO_MMIO_SIZE bytes from gpa on, with this interrupt line (0 to
 * 15). The guest's command line names it, in Linux's own words: virtio_mmio.device=4K@0xd0000000:5. The
 * device lives as long as the VMM.
 */
void virtio_mmio_create(struct virtio_device *device, gpa_t gpa, unsigned irq);

/* The driver has said DRIVER_OK, and the device needs no reset: only then may queues be looked at. */
bool virtio_is_live(const struct virtio_device *device);

/* Has the driver accepted this feature (its bit number: VIRTIO_RING_F_EVENT_IDX)? */
bool virtio_has_feature(const struct virtio_device *device, unsigned bit);

/* Interrupt the driver: the device has used buffers. Whether the driver wants to know is the owner's to
 * ask: VIRTIO 1.2 "Used Buffer Notification Suppression". The line stays high until all is acknowledged. */
void virtio_interrupt(struct virtio_device *device);

/* The owner has changed the configuration space: a new generation, and an interrupt if the device is live. */
void virtio_config_changed(struct virtio_device *device);

/* The driver has done what it must not, in one line. The first only records it (event virtio_misuse); after the
 * second the device is broken until it is reset: VIRTIO_CONFIG_S_NEEDS_RESET. queue: its number, or
 * VIRTIO_NO_QUEUE. */
#define VIRTIO_NO_QUEUE UINT32_MAX
void virtio_misuse(struct virtio_device *device, unsigned queue, const char *what);
void virtio_break(struct virtio_device *device, unsigned queue, const char *what);
