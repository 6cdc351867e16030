/*
 * The virtio console: VIRTIO 1.2 "Console Device", one port, on standard input and output. What is
 * transmitted is written at once; what comes in waits here until the driver has buffers for it.
 */
#include <errno.h>
#include <linux/virtio_console.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

#include "vmm.h"

enum { RECEIVE, TRANSMIT, QUEUES }; /* VIRTIO 1.2 "Console Device", "Virtqueues" */

static struct virtio_console_config config = {.max_nr_ports = 1};

static void queue_notified(unsigned queue);
static void config_written(uint32_t offset, uint32_t size, uint32_t value);
static void device_reset(void);

static struct virtio_device console = {
    .name = "virtio console",
    .id = VIRTIO_ID_CONSOLE,
    .features = UINT64_C(1) << VIRTIO_CONSOLE_F_SIZE | UINT64_C(1) << VIRTIO_CONSOLE_F_EMERG_WRITE |
                UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC | UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX,
    .queue_count = QUEUES,
    .queue_size = VIRTQUEUE_SIZE_MAX,
    .config = &config,
    .config_size = sizeof config,
    .notified = queue_notified,
    .config_written = config_written,
    .reset = device_reset,
};

/* ---- transmit ---- */

static struct io_source *transmit_more; /* can always be read */

/* As many chains as fit the queue, and no more at a time: the guest may add to it all the while, and the vCPU
 * wants the lock. */
static bool transmit_some(void) {
    static struct chain chain;
    unsigned most = console.queue[TRANSMIT].ring.num;
    uint16_t used_before = console.queue[TRANSMIT].next_used;
    while (most > 0 && virtqueue_take(&console, TRANSMIT, &chain)) {
        if (chain.writable) {
            virtio_break(&console, TRANSMIT, "a buffer to transmit is writable");
            break;
        }
        for (unsigned i = 0; i < chain.count; i++)
            console_write(chain.buffer[i].hva, chain.buffer[i].size);
        virtqueue_put(&console, TRANSMIT, &chain, 0);
        most--;
    }
    virtqueue_interrupt(&console, TRANSMIT, used_before);
    return most == 0;
}

static void transmit(void *unused) {
    bool is_full, has_more;
    (void)unused;
    do {
        virtqueue_notify_not(&console, TRANSMIT);
        is_full = transmit_some();
        has_more = virtqueue_notify_me(&console, TRANSMIT);
    } while (has_more && !is_full);
    io_enable(transmit_more, has_more); /* go on when others have had their turn */
}

/* ---- receive ---- */

static struct {
    struct io_source *source;
    bool at_end;
    uint8_t bytes[4096]; /* read, and not received yet: [first, end) */
    size_t first, end;
} input;

static uint32_t chain_fill(const struct chain *chain, const uint8_t *bytes, size_t size) {
    uint32_t filled = 0;
    for (unsigned i = 0; i < chain->count && filled < size; i++) {
        size_t part = size - filled < chain->buffer[i].size ? size - filled : chain->buffer[i].size;
        memcpy(chain->buffer[i].hva, bytes + filled, part);
        filled += (uint32_t)part;
    }
    return filled;
}

static size_t receive_some(const uint8_t *bytes, size_t size) {
    static struct chain chain;
    size_t received = 0;
    uint16_t used_before = console.queue[RECEIVE].next_used;
    while (received < size && virtqueue_take(&console, RECEIVE, &chain)) {
        if (chain.readable) {
            virtio_break(&console, RECEIVE, "a buffer to receive into is readable");
            break;
        }
        uint32_t filled = chain_fill(&chain, bytes + received, size - received);
        virtqueue_put(&console, RECEIVE, &chain, filled);
        received += filled;
    }
    virtqueue_interrupt(&console, RECEIVE, used_before);
    return received;
}

size_t virtio_console_receive(const void *bytes, size_t size) {
    size_t received = 0;
    virtqueue_notify_not(&console, RECEIVE);
    do
        received += receive_some((const uint8_t *)bytes + received, size - received);
    while (received < size && virtqueue_notify_me(&console, RECEIVE));
    return received;
}

/* The driver may have room: give it what is there, and look for more only if it took all. */
static void input_deliver(void) {
    input.first += virtio_console_receive(input.bytes + input.first, input.end - input.first);
    bool is_empty = input.first == input.end;
    if (is_empty)
        input.first = input.end = 0;
    io_enable(input.source, is_empty && !input.at_end && virtio_is_live(&console));
}

static void input_ready(void *unused) {
    (void)unused;
    if (input.first == input.end) {
        ssize_t size = read(STDIN_FILENO, input.bytes, sizeof input.bytes);
        input.at_end = size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR);
        input.end = size > 0 ? (size_t)size : 0;
    }
    input_deliver();
}

/* ---- the device ---- */

static void queue_notified(unsigned queue) {
    if (queue == TRANSMIT)
        transmit(NULL);
    else
        input_deliver();
}

static void config_written(uint32_t offset, uint32_t size, uint32_t value) {
    uint8_t byte = (uint8_t)value;
    if (offset == offsetof(struct virtio_console_config, emerg_wr) &&
        size == sizeof config.emerg_wr)
        console_write(&byte,
                      1); /* VIRTIO_CONSOLE_F_EMERG_WRITE: at any time, also before all else */
    else
        virtio_misuse(&console, VIRTIO_NO_QUEUE,
                      "the configuration space is written beside emerg_wr");
}

/* What has been read and not received is still to come. */
static void device_reset(void) {
    io_enable(input.source, false);
    io_enable(transmit_more, false);
}

void virtio_console_resize(uint16_t columns, uint16_t rows) {
    config.cols = columns;
    config.rows = rows;
    virtio_config_changed(&console);
}

/* ---- the terminal ---- */

static struct termios terminal_before;
static volatile sig_atomic_t terminal_is_raw;

void terminal_restore(void) {
    if (terminal_is_raw)
        tcsetattr(STDIN_FILENO, TCSANOW, &terminal_before);
    terminal_is_raw = false;
}

/* Each key at once and without echo: that is the guest's business. Ctrl-C still ends the VMM, which puts the
 * terminal back; what would stop it or end it without that (Ctrl-Z, Ctrl-\) goes to the guest. */
static void terminal_make_raw(void) {
    if (tcgetattr(STDIN_FILENO, &terminal_before) < 0)
        return;
    struct termios raw = terminal_before;
    raw.c_iflag &= ~(tcflag_t)(ICRNL | IXON);
    raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    raw.c_cc[VSUSP] = raw.c_cc[VQUIT] = _POSIX_VDISABLE;
    atexit(terminal_restore);
    terminal_is_raw = true;
    tcsetattr(STDIN_FILENO, TCSANOW, &raw);
}

/* 80 by 25, if standard output is no terminal. */
static struct winsize terminal_size(void) {
    struct winsize size;
    bool is_known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col && size.ws_row;
    return is_known ? size : (struct winsize){.ws_col = 80, .ws_row = 25};
}

static void size_changed(void *context) {
    struct signalfd_siginfo signal;
    if (read((int)(intptr_t)context, &signal, sizeof signal) != sizeof signal)
        return;
    struct winsize size = terminal_size();
    virtio_console_resize(size.ws_col, size.ws_row);
}

static void size_watch(void) {
    sigset_t resize;
    sigemptyset(&resize);
    sigaddset(&resize, SIGWINCH);
    sigprocmask(SIG_BLOCK, &resize, NULL);
    int fd = signalfd(-1, &resize, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd >= 0)
        io_watch(fd, false, size_changed, (void *)(intptr_t)fd);
}

void virtio_console_create(void) {
    int always = eventfd(1, EFD_CLOEXEC);
    if (always < 0)
        die(STATUS_HOST, "no eventfd for the virtio console: %s", strerror(errno));
    transmit_more = io_watch(always, false, transmit, NULL);
    input.source = io_watch(STDIN_FILENO, true, input_ready, NULL);
    device_reset();
    terminal_make_raw();
    struct winsize size = terminal_size();
    config.cols = size.ws_col;
    config.rows = size.ws_row;
    size_watch();
    virtio_mmio_create(&console, VIRTIO_MMIO_GPA, VIRTIO_MMIO_IRQ);
}
