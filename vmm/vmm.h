/*
 * What the files of the VMM need of each other. Lessons use include/host.h and include/virtio_device.h.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "host.h"
#include "virtio_device.h"

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))
#define MIB (UINT64_C(1) << 20)

/* The exit status of the VMM; README lists them, and `make run` passes them on. */
enum status {
    STATUS_OK = 0,      /* the guest ended the run, as a success */
    STATUS_FAILED = 1,  /* the guest ended the run, reporting failure, or is not written yet */
    STATUS_USAGE = 2,   /* the command line makes no sense */
    STATUS_CRASH = 3,   /* triple fault, unhandled exception, emulation failure, unknown access */
    STATUS_HANG = 4,    /* the time limit, or a halt that nothing can end */
    STATUS_HOST = 5,    /* the host refused something: KVM, a file, memory */
    STATUS_CANNOT = 77, /* this machine lacks what the lesson needs */
    STATUS_SIGNALLED = 128, /* plus the number of the signal */
};

/* ---- vmm.c ---- */

/* Something outside the guest is wrong: say so in one line and leave. */
__attribute__((format(printf, 2, 3))) _Noreturn void die(enum status status, const char *format,
                                                         ...);

/* The one way from a gpa to a pointer: NULL unless all of [gpa, gpa + size) is RAM. */
__attribute__((warn_unused_result)) void *memory_at(gpa_t gpa, uint64_t size);
uint64_t memory_size(void); /* bytes, from gpa 0 */

/* What the guest sends to its console, to standard output. It is there when this returns. */
void console_write(const void *bytes, size_t size);

/* --virtio-notify: do notifications of virtio devices come by ioeventfd, or by an exit? */
bool notifications_use_ioeventfd(void);

/* One word more on the guest's command line; before the run. */
void command_line_add(const char *word);

/* There is something for the vCPU to do before it goes on: have it leave KVM_RUN, or the wait for the end of a
 * halt, if it is there. */
void vcpu_kick(void);

/* Inject an interrupt before this entry: the guest is ready for one. */
void vcpu_interrupt(uint8_t vector);

/* The vCPU's file descriptor, for an ioctl that may fail; the others go through host_vcpu(). */
int vcpu_fd(void);

/* The next KVM_RUN finishes what the last exit has left to be done, and comes back before the next instruction. */
void vcpu_return_at_once(void);

/* End the run as soon as the vCPU's thread has come back from the guest; has a signal asked for that? */
void run_stop(enum status status, const char *how);
bool run_is_stopping(void);

/* From now on the time limit of the run counts, unless gdb is there. */
void run_limit_start(void);

/* What the boot data structures take, from BOOT_DATA_GPA; no segment of an image may lie there. */
#define BOOT_DATA_GPA UINT64_C(0x6000)
#define BOOT_DATA_SIZE UINT64_C(0x2000)

uint64_t clock_ns(void); /* the host's monotonic clock */

/* ---- events.c: the event_*() of host.h, and ---- */

/* Record what happens in this file, times since this moment; false, with errno, if it cannot be written. */
bool events_open(const char *path, uint64_t started_ns);
bool events_are_recorded(void);
/* Text that is part of an event as it stands. */
void event_text(const char *text);
/* Write what is recorded so far; a signal handler may, too: at worst the last line has no end. */
void events_flush(void);
/* The errno of the first write that has failed, or 0. */
int events_close(void);

/* ---- walk.c: host_walk() of host.h, and ---- */

/* Copy out of the guest's current address space; false if not all of it is mapped memory. */
bool guest_read(gva_t gva, void *to, uint64_t size);
/* As much of the NUL-terminated text at gva as fits and can be read. */
void guest_read_text(gva_t gva, char *to, uint64_t size);

/* ---- image.c ---- */

/* Which registers and which data an image expects when it is entered. */
struct entry {
    enum entry_protocol { ENTRY_PVH, ENTRY_MULTIBOOT } protocol;
    gpa_t gpa; /* in memory, and below 4 GiB */
};

/* In this order. What is wrong with the file ends the VMM with one line. */
void image_open(const char *path);
/* What machine does the image ask for? Without a note, defaults hold. */
struct machine_note image_machine(void);
/* Put the image into guest memory and find its entry point. */
struct entry image_load(void);

/* Returned by value, so that one message can hold several. */
struct symbol_text {
    char text[80];
};
/* "name+0x1a" of the last symbol at or before gva; empty if the image has none there. */
struct symbol_text symbol_at(gva_t gva);
/* An address for a person: "0x100a32 (console_write+0x12)". */
struct symbol_text symbol_or_address(gva_t gva);

/* ---- statistics.c ---- */

/* Add the counters that KVM keeps of this VM or vCPU to the event that is open, by KVM's names for
 * them: KVM_GET_STATS_FD. Nothing if this KVM has none. */
void statistics_add(int vm_or_vcpu);

/* ---- io.c: what happens beside the vCPU ---- */

/*
 * Input, and notifications by ioeventfd, come while the vCPU's thread sleeps in KVM_RUN: a second thread waits
 * for them. It exists from the first io_watch() on. All code of the VMM and of host halves runs under one
 * lock, which the vCPU's thread gives away only while it is in KVM_RUN or waits for the end of a halt.
 */
void io_lock(void);
void io_unlock(void);

/* Call ready(context) whenever this file descriptor can be read. It may be called once more although there is
 * nothing to read any more. is_input: what comes here comes from outside, also while the guest sleeps. A new
 * source is enabled; one that is not enabled is not looked at. */
struct io_source;
struct io_source *io_watch(int fd, bool is_input, void (*ready)(void *context), void *context);
void io_enable(struct io_source *source, bool enabled);

/* The guest's 32-bit write of this value to this gpa calls ready(context), and does not exit:
 * KVM_IOEVENTFD. */
void io_doorbell(gpa_t gpa, uint32_t value, void (*ready)(void *context), void *context);

/* The vCPU has halted, until something interrupts it: serve what is there already. False: and nothing more will
 * come. */
bool io_serve(void);

/* ---- gdb.c: --gdb ---- */

/* Wait for gdb at this path, and let it say how the guest is to begin. */
void gdb_start(const char *path);
/* Around each entry. The first says whether the guest goes step by step. */
bool gdb_before_entry(void);
void gdb_after_exit(void);

/* Stop in gdb, if it is there: this signal, as a line why, and the registers of the last exit unless others are
 * given. Returns when the guest is to go on. */
__attribute__((format(printf, 3, 4))) void gdb_stop(int signal_number, const struct kvm_regs *regs,
                                                    const char *format, ...);

/* Through gdb, so that it comes before what gdb says next; only while the guest runs. */
bool gdb_say(const char *line);

bool gdb_is_there(void);
bool gdb_has_interrupted(void);   /* Ctrl-C, and the guest has not stopped yet */
void gdb_end(enum status status); /* the run is over */

/* ---- pic.c: interrupt lines ---- */

/*
 * The lines 0 to 15 of a PC's interrupt controllers. Where KVM has no such controllers (irqchip none and
 * split), there is a pair of 8259As here; where it has, the line is an irqfd. A line is the business of one
 * device, which creates it once.
 */
void line_create(unsigned line);
void line_set(unsigned line, bool is_high);

/* Before each entry: inject what the 8259As have for the CPU, or ask for an interrupt window. Nothing, where
 * they are KVM's. */
void pic_before_entry(void);

/* ---- virtqueue.c: the device's side of a split virtqueue ---- */

/* The buffers of one chain, all of them in guest memory: first those to read, then those to write. */
struct chain {
    uint16_t head;
    unsigned count;
    struct buffer {
        uint8_t *hva;
        uint32_t size; /* bytes; not 0 */
    } buffer[VIRTQUEUE_SIZE_MAX];
    uint32_t readable, writable; /* bytes of both kinds */
};

/* The next chain that the driver has made available. False: there is none, or it is not as the driver must make it, and
 * then the device is broken. */
__attribute__((warn_unused_result)) bool virtqueue_take(struct virtio_device *device,
                                                        unsigned queue, struct chain *chain);

/* Give a chain back: the device has written this many bytes, from its first writable one on. */
void virtqueue_put(struct virtio_device *device, unsigned queue, const struct chain *chain,
                   uint32_t written);

/* Since used_before (next_used then) chains have been given back: interrupt, if the driver wants that. */
void virtqueue_interrupt(struct virtio_device *device, unsigned queue, uint16_t used_before);

/* As long as the device looks at the queue, no notification is needed. When it stops looking, it asks for one, and
 * must look once more if the answer is true: something has come in between. */
void virtqueue_notify_not(struct virtio_device *device, unsigned queue);
__attribute__((warn_unused_result)) bool virtqueue_notify_me(struct virtio_device *device,
                                                             unsigned queue);

/* ---- virtio_console.c ---- */

/* The terminal as it was found; safe in a signal handler. */
void terminal_restore(void);

/* A console on standard input and output: VIRTIO 1.2, "Console Device". */
void virtio_console_create(void);

/* For its tests: bytes that come in, of which it takes as many as the driver has room for; and another size
 * of the terminal. */
size_t virtio_console_receive(const void *bytes, size_t size);
void virtio_console_resize(uint16_t columns, uint16_t rows);
