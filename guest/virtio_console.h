/*
 * A driver for the console device: VIRTIO 1.2, "Console Device". It knows port 0, whose two queues every
 * console has, and works with or without the features below.
 *
 * A queue has up to VIRTIO_CONSOLE_BUFFERS buffers of a page each, and descriptor i describes buffer i for good: the
 * rings carry numbers of buffers, and nothing is ever chained. The used ring is also the list of free buffers,
 * in the order in which the device is done with them.
 */
#pragma once

#include <linux/virtio_console.h>

#include "virtio.h"

#define VIRTIO_CONSOLE_BUFFERS 16
#define VIRTIO_CONSOLE_FEATURES \
    (UINT64_C(1) << VIRTIO_CONSOLE_F_SIZE | UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX)

/* All of it is the driver's; zeroed at first, so a static one. */
struct virtio_console {
    struct virtio_device device;
    struct virtio_console_queue {
        const struct virtio_device *device;
        unsigned number;
        struct vring ring;
        uint64_t buffer_gpa[VIRTIO_CONSOLE_BUFFERS];
        unsigned fresh;          /* buffers from this one on were never offered */
        uint16_t next_available; /* entries written to the available ring, */
        uint16_t published;      /* and those that the device knows of */
        uint16_t next_used;      /* entries read of the used ring */
    } receive, transmit;
    struct {
        unsigned buffer; /* received, and not all of it has been read: */
        uint32_t at, left;
    } input;
    volatile bool is_resized; /* an interrupt has said so */
};

/*
 * Find the first console on the command line and begin to use it, with those of the wanted features
 * (VIRTIO_CONSOLE_FEATURES, or fewer) that it offers. False: there is none, or it refuses. An open console
 * may be opened again: the device is reset, and what was under way is lost.
 */
bool virtio_console_open(struct virtio_console *console, uint64_t wanted);

/* Send these bytes. When this returns the device has been told of all of them; they have left when
 * virtio_console_flush() returns, and until then the end of the run may come first. */
void virtio_console_write(struct virtio_console *console, const void *bytes, size_t size);
void virtio_console_flush(const struct virtio_console *console);

/* What has come in, up to size bytes; 0 if there is nothing now. */
size_t virtio_console_read(struct virtio_console *console, void *bytes, size_t size);

/*
 * Have the device interrupt through the 8259As, which pic_begin(vector_base) has begun. False: its line is not one
 * of theirs. One console at a time can. Then sleep until there is something to read, or the size has
 * changed; called with interrupts on or off, it leaves them on.
 */
bool virtio_console_interrupts_begin(struct virtio_console *console, uint8_t vector_base);
void virtio_console_wait(struct virtio_console *console);

/* The size of the terminal in characters; false if the device does not say. */
bool virtio_console_size(struct virtio_console *console, uint16_t *columns, uint16_t *rows);

/* Stop: what was written leaves, and the device touches no memory any more. */
void virtio_console_close(struct virtio_console *console);

/* Send bytes one by one, at any time, also on a device that nobody has opened: an exit for each. False: there is no
 * console, or it has no VIRTIO_CONSOLE_F_EMERG_WRITE. */
bool virtio_console_emergency_write(const void *bytes, size_t size);
