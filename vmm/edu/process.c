/*
 * The device in a process of its own: it answers the VMM's messages, and acts when a doorbell
 * rings. It has no more of the machine than what it is given: its registers, which it makes itself,
 * and the files that come with messages; behind an IOMMU, the memory to which that leads it.
 *
 * What it may do wrong (enum behaviour) is here, too, for the tests.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "edu_device.h"
#include "x86.h"

#define IDLE_MS 1000 /* edu takes 100 for a transfer, this one takes what it needs */
/* A driver that takes an answer for granted is to find out, and not once in a while. */
#define LIVENESS_MS 5
#define ACKNOWLEDGE_MS 2
#define SCRIBBLE_BYTE 0x5a
#define NO_INTERRUPT VFIO_PCI_NUM_IRQS

static struct {
    struct edu edu;
    struct process_home home;
    int socket, file;
    int doorbell[EDU_ACTING];
    uint32_t interrupt; /* which it has: the index of a message, or of a line; NO_INTERRUPT */
    /* Eventfds, from DEVICE_SET_IRQS; -1: none. */
    int message, line, line_unmask;
    bool line_is_masked;
    int dma_file; /* the first one that it was given a part of; kept to misuse it */
    uint64_t transfer_due_ms;
} process = {
    .interrupt = NO_INTERRUPT, .message = -1, .line = -1, .line_unmask = -1, .dma_file = -1};

uint64_t file_size(int fd) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) ? (uint64_t)status.st_size : 0;
}

static bool process_is(enum behaviour behaviour) {
    return process.edu.trace->behaviour == behaviour;
}

static uint64_t process_clock_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* ---- interrupts ---- */

/*
 * A line is asserted as long as there is something in the interrupt status, but an eventfd has no
 * level. So it is signalled once, and the line masked, until somebody who has done something about
 * it unmasks it: as vfio-pci has it for a line of a PCI device. It is masked, too, if there is nobody to
 * signal.
 */
static void line_signal(void) {
    uint32_t status;
    memcpy(&status, process.edu.registers + EDU_INTERRUPT_STATUS, sizeof status);
    if (process.interrupt != VFIO_PCI_INTX_IRQ_INDEX || process.line_is_masked || status == 0)
        return;
    process.line_is_masked = true;
    if (process.line >= 0)
        eventfd_write(process.line, 1);
}

static void line_mask(bool is_masked) {
    process.line_is_masked = is_masked;
    line_signal();
}

static void line_unmask_answer(void) {
    eventfd_t signals;
    if (eventfd_read(process.line_unmask, &signals) == 0)
        line_mask(false);
}

static void process_interrupt(void) {
    line_signal();
    if (process.message >= 0)
        eventfd_write(process.message, 1);
    while (process_is(DEVICE_STORMS) && process.message >= 0)
        eventfd_write(process.message, 1);
}

/* ---- doorbells ---- */

/* Who has a file has all of it, not only the part that a message speaks of. */
static void process_scribble(void) {
    static uint8_t page[PAGE_SIZE];
    memset(page, SCRIBBLE_BYTE, sizeof page);
    for (uint64_t at = 0; at < file_size(process.dma_file); at += PAGE_SIZE)
        (void)!pwrite(process.dma_file, page, PAGE_SIZE, (off_t)at);
}

/* It is to compute: what goes wrong then. */
static void process_misbehave(void) {
    if (process_is(DEVICE_DIES))
        raise(SIGKILL);
    while (process_is(DEVICE_HANGS))
        pause();
    if (process_is(DEVICE_SHRINKS))
        (void)!ftruncate(process.file, 0);
}

static void process_delay(unsigned offset) {
    if (offset == EDU_LIVENESS)
        poll(NULL, 0, LIVENESS_MS);
    else if (offset == EDU_INTERRUPT_ACKNOWLEDGE)
        poll(NULL, 0, ACKNOWLEDGE_MS);
}

static void doorbell_answer(unsigned number) {
    eventfd_t rings;
    if (eventfd_read(process.doorbell[number], &rings) < 0)
        return;
    if (edu_acting[number] == EDU_FACTORIAL)
        process_misbehave();
    if (edu_acting[number] == EDU_DMA_COMMAND && process_is(DEVICE_SCRIBBLES))
        process_scribble();
    bool was_running = process.edu.transfer.is_running;
    edu_act(&process.edu, edu_acting[number]);
    if (!was_running && process.edu.transfer.is_running)
        process.transfer_due_ms = process_clock_ms() + (process_is(DEVICE_IDLES) ? IDLE_MS : 0);
}

/* ---- messages: each function makes the payload of the reply, and returns 0 or an errno ---- */

static void reply_payload(struct message *reply, const void *payload, size_t size) {
    memcpy(reply->payload, payload, size);
    reply->payload_size = (uint32_t)size;
}

static int answer_version(struct message *reply) {
    struct vfio_user_version version = {0, 1, VFIO_USER_CAPABILITIES};
    reply_payload(reply, &version, sizeof version);
    return 0;
}

static int answer_info(struct message *reply) {
    struct vfio_device_info info = {.argsz = 16,
                                    .flags = VFIO_DEVICE_FLAGS_PCI,
                                    .num_regions = VFIO_PCI_NUM_REGIONS,
                                    .num_irqs = VFIO_PCI_NUM_IRQS};
    reply_payload(reply, &info, info.argsz);
    return 0;
}

/* The BAR: of its 1 MiB, the page with the registers can be mapped. The file ends with that page,
 * and, sealed, can never end earlier. */
static int answer_region(struct message *reply) {
    struct vfio_user_region region = {
        .info = {.argsz = sizeof region,
                 .flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE |
                          VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS,
                 .index = VFIO_PCI_BAR0_REGION_INDEX,
                 .cap_offset = offsetof(struct vfio_user_region, header),
                 .size = EDU_BAR_SIZE,
                 .offset = process.home.file_offset},
        .header = {.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP, .version = 1},
        .nr_areas = 1,
        .area = {.offset = 0, .size = process_is(DEVICE_BOASTS) ? 16 * PAGE_SIZE : PAGE_SIZE},
    };
    reply_payload(reply, &region, sizeof region);
    if (!process_is(DEVICE_SHRINKS))
        fcntl(process.file, F_ADD_SEALS, F_SEAL_SHRINK);
    reply->fd[reply->fds++] = process.file;
    if (process_is(DEVICE_MUMBLES))
        memset(reply->payload, 0xee, reply->payload_size);
    return 0;
}

static int answer_io_fds(struct message *reply) {
    struct vfio_user_io_fds io = {.argsz = sizeof io, .count = EDU_ACTING};
    for (unsigned i = 0; i < EDU_ACTING; i++) {
        io.doorbell[i] = (struct doorbell){.offset = EDU_DOORBELL,
                                           .size = 4,
                                           .fd_index = i,
                                           .flags = DOORBELL_FLAGS,
                                           .datamatch = edu_acting[i]};
        if (process_is(DEVICE_STRAYS))
            io.doorbell[i].offset = EDU_BAR_SIZE + PAGE_SIZE * i;
        reply->fd[reply->fds++] = process.doorbell[i];
    }
    reply_payload(reply, &io, sizeof io);
    return 0;
}

static void fd_replace(int *fd, int with) {
    if (*fd >= 0)
        close(*fd);
    *fd = with;
}

/* By what proc(5) calls it; where there is no /proc, it is believed. */
static bool is_eventfd(int fd) {
    char path[32], link[32] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return readlink(path, link, sizeof link - 1) < 0 || !strcmp(link, "anon_inode:[eventfd]");
}

static void interrupt_take_away(void) {
    fd_replace(&process.message, -1);
    fd_replace(&process.line, -1);
    fd_replace(&process.line_unmask, -1);
    process.interrupt = NO_INTERRUPT;
}

/* What is to be done about an interrupt, as DEVICE_SET_IRQS says it. */
struct irq_order {
    struct vfio_irq_set set;
    uint32_t data, action; /* of set.flags */
    bool is_line;
    bool is_meant; /* unless the data, a truth value, says otherwise */
    int fd;        /* the data; -1: none */
};

/* Whom to signal. What is no eventfd leaves the line as it is, and the message without one. */
static int trigger_replace(const struct irq_order *order) {
    bool is_bad = order->fd >= 0 && !is_eventfd(order->fd);
    if (is_bad && process.interrupt == NO_INTERRUPT)
        return EBADF;
    if (!is_bad || !order->is_line)
        fd_replace(order->is_line ? &process.line : &process.message, is_bad ? -1 : order->fd);
    if (is_bad)
        return EBADF;
    if (process.interrupt == NO_INTERRUPT)
        process.line_is_masked = false;
    process.interrupt = order->set.index;
    line_signal();
    return 0;
}

/* A message or a line: the other one must have been taken away before. Without an eventfd, it is
 * signalled by hand, or, if the count is 0, taken away. */
static int trigger_order(const struct irq_order *order) {
    bool has_it = process.interrupt == order->set.index;
    int fd = order->is_line ? process.line : process.message;
    if (has_it && order->data == VFIO_IRQ_SET_DATA_NONE && order->set.count == 0) {
        interrupt_take_away();
        return 0;
    }
    if ((!has_it && process.interrupt != NO_INTERRUPT) || (order->is_line && !order->set.count))
        return EINVAL;
    if (order->set.count == 0)
        return has_it ? 0 : order->data == VFIO_IRQ_SET_DATA_EVENTFD ? ERANGE : EINVAL;
    if (order->data == VFIO_IRQ_SET_DATA_EVENTFD)
        return trigger_replace(order);
    if (has_it && order->is_meant && fd >= 0)
        eventfd_write(fd, 1);
    return has_it ? 0 : EINVAL;
}

/* The line is the only interrupt that can be masked. */
static int mask_order(const struct irq_order *order) {
    bool is_mask = order->action == VFIO_IRQ_SET_ACTION_MASK;
    if (process.interrupt != VFIO_PCI_INTX_IRQ_INDEX || order->set.count != 1)
        return EINVAL;
    if (order->data != VFIO_IRQ_SET_DATA_EVENTFD) {
        if (order->is_meant)
            line_mask(is_mask);
        return 0;
    }
    if (is_mask)
        return ENOTTY;
    if (order->fd >= 0 && !is_eventfd(order->fd))
        return EBADF;
    if (order->fd >= 0 && process.line_unmask >= 0)
        return EBUSY;
    fd_replace(&process.line_unmask, order->fd);
    return 0;
}

/* Is it an order about an interrupt that there is? There are one message and one line. */
static bool order_is_sound(const struct irq_order *order) {
    uint32_t known = VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK;
    bool is_one_type = order->data == VFIO_IRQ_SET_DATA_NONE ||
                       order->data == VFIO_IRQ_SET_DATA_BOOL ||
                       order->data == VFIO_IRQ_SET_DATA_EVENTFD;
    return (order->is_line || order->set.index == VFIO_PCI_MSI_IRQ_INDEX) &&
           !(order->set.flags & ~known) && is_one_type && order->set.start == 0 &&
           order->set.count <= 1;
}

/* As VFIO_DEVICE_SET_IRQS, but for EBADF, which is said of all that is no eventfd. */
static int answer_set_irqs(struct message *command) {
    struct irq_order order = {.fd = -1};
    memcpy(&order.set, command->payload, sizeof order.set);
    order.data = order.set.flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
    order.action = order.set.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
    order.is_line = order.set.index == VFIO_PCI_INTX_IRQ_INDEX;
    order.is_meant =
        order.data != VFIO_IRQ_SET_DATA_BOOL || command->payload[sizeof order.set] != 0;
    bool has_fd = order.data == VFIO_IRQ_SET_DATA_EVENTFD && command->fds == 1;
    if (!order_is_sound(&order) || command->fds != has_fd)
        return EINVAL;
    if (has_fd)
        order.fd = command->fd[0];
    int error = ENOTTY;
    if (order.action == VFIO_IRQ_SET_ACTION_TRIGGER)
        error = trigger_order(&order);
    else if (order.is_line && (order.action == VFIO_IRQ_SET_ACTION_MASK ||
                               order.action == VFIO_IRQ_SET_ACTION_UNMASK))
        error = mask_order(&order);
    if (!error)
        command->fds = 0; /* it stays open */
    return error;
}

static int answer_map(const struct message *command) {
    struct vfio_user_dma_map map;
    memcpy(&map, command->payload, sizeof map);
    struct mapping *place = edu_mapping_place(&process.edu, map.addr, map.size);
    if (command->fds != 1 || map.argsz != sizeof map ||
        map.flags != (VFIO_USER_DMA_READABLE | VFIO_USER_DMA_WRITEABLE) || map.addr % PAGE_SIZE ||
        map.size % PAGE_SIZE || map.offset % PAGE_SIZE)
        return EINVAL;
    if (!place)
        return EEXIST;
    uint64_t end = file_size(command->fd[0]);
    if (map.size > end || map.offset > end - map.size)
        return EINVAL;
    uint8_t *memory =
        mmap(NULL, map.size, PROT_READ | PROT_WRITE, MAP_SHARED, command->fd[0], (off_t)map.offset);
    if (memory == MAP_FAILED)
        return errno;
    *place = (struct mapping){map.addr, map.size, memory};
    if (process.dma_file < 0)
        process.dma_file = dup(command->fd[0]);
    return 0;
}

static int answer_unmap(const struct message *command) {
    struct vfio_user_dma_unmap unmap;
    memcpy(&unmap, command->payload, sizeof unmap);
    if (process.home.unmap) {
        process.home.unmap(unmap.addr, unmap.size);
        return 0;
    }
    struct mapping *mapping = edu_mapping_find(&process.edu, unmap.addr, unmap.size);
    if (unmap.argsz != sizeof unmap || unmap.flags)
        return EINVAL;
    if (!mapping)
        return ENOENT;
    munmap(mapping->memory, mapping->size);
    edu_unmap(&process.edu, mapping);
    return 0;
}

static void trace_mapping(const struct message *command, int error) {
    bool is_map = command->header.command == VFIO_USER_DMA_MAP;
    struct vfio_user_dma_map map;
    struct vfio_user_dma_unmap unmap;
    memcpy(&map, command->payload, sizeof map);
    memcpy(&unmap, command->payload, sizeof unmap);
    trace_add(process.edu.trace, (struct trace_entry){
                                     .kind = is_map ? TRACE_MAP : TRACE_UNMAP,
                                     .result = error ? RESULT_REFUSED : RESULT_DONE,
                                     .address = is_map ? map.addr : unmap.addr,
                                     .size = is_map ? map.size : unmap.size,
                                     .offset = is_map ? map.offset : 0,
                                 });
}

static int answer_make(struct message *command, struct message *reply) {
    int error;
    switch (command->header.command) {
    case VFIO_USER_VERSION: return answer_version(reply);
    case VFIO_USER_DEVICE_GET_INFO: return answer_info(reply);
    case VFIO_USER_DEVICE_GET_REGION_INFO: return answer_region(reply);
    case VFIO_USER_DEVICE_GET_REGION_IO_FDS: return answer_io_fds(reply);
    case VFIO_USER_DEVICE_SET_IRQS: return answer_set_irqs(command);
    case VFIO_USER_DMA_MAP:
    case VFIO_USER_DMA_UNMAP:
        error = command->header.command == VFIO_USER_DMA_MAP ? answer_map(command)
                                                             : answer_unmap(command);
        trace_mapping(command, error);
        return error;
    default: return EOPNOTSUPP;
    }
}

/* Before it answers, it wants the VMM to write for it: behind the window that it has just been
 * given. */
static void process_ask(const struct message *command) {
    struct vfio_user_dma_map map;
    struct message message = {.header = {.id = 99, .command = VFIO_USER_DMA_WRITE}};
    memcpy(&map, command->payload, sizeof map);
    struct vfio_user_dma_access access = {.addr = map.addr + map.size, .count = 8};
    reply_payload(&message, &access, sizeof access);
    message_send(process.socket, &message);
}

/* The VMM is gone when there are no messages any more. */
static void message_answer(void) {
    static struct message command, reply;
    if (!message_receive(process.socket, &command))
        _exit(0);
    memset(&reply, 0, sizeof reply);
    if ((command.header.flags & VFIO_USER_REPLY) || process_is(DEVICE_IS_SILENT)) {
        message_fds_close(&command);
        return;
    }
    if (process_is(DEVICE_BABBLES))
        (void)!write(process.socket, "bla bla", 8);
    if (process_is(DEVICE_ASKS) && command.header.command == VFIO_USER_DMA_MAP)
        process_ask(&command);
    int error = answer_make(&command, &reply);
    message_fds_close(&command);
    reply.header = (struct vfio_user_header){
        .id = command.header.id,
        .command = command.header.command,
        .flags = VFIO_USER_REPLY | (error ? VFIO_USER_ERROR : 0),
        .error = (uint32_t)error,
    };
    message_send(process.socket, &reply);
}

/* ---- its life ---- */

/* No signal handlers of the VMM, none of its files but the socket, and it ends when the VMM
 * does. */
static void process_leave_home(int socket, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* too late for that */
        _exit(0);
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    signal(SIGINT, SIG_IGN); /* the terminal sends it to both; the VMM decides */
    dup2(socket, STDIN_FILENO);
    close(STDOUT_FILENO);
    syscall(SYS_close_range, STDERR_FILENO + 1, ~0u, 0);
    process.socket = STDIN_FILENO;
}

/* The file ends with the page of the registers. */
static bool process_registers_make(void) {
    process.file = memfd_create("edu", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (process.file < 0 ||
        ftruncate(process.file, (off_t)(process.home.file_offset + PAGE_SIZE)) < 0)
        return false;
    process.edu.registers = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, process.file,
                                 (off_t)process.home.file_offset);
    if (process.edu.registers == MAP_FAILED)
        return false;
    edu_reset(&process.edu);
    return true;
}

/* How long until the transfer that is under way is due; -1: there is none. */
static int transfer_wait_ms(void) {
    uint64_t now = process_clock_ms();
    if (!process.edu.transfer.is_running)
        return -1;
    return now >= process.transfer_due_ms ? 0 : (int)(process.transfer_due_ms - now);
}

/* Who rings a doorbell and then sends a message, or unmasks, must find that the doorbell was heard
 * first. So all of them are looked at, whatever has ended the wait. */
static void process_serve(void) {
    enum { SOCKET = EDU_ACTING, UNMASK, SOURCES };
    struct pollfd source[SOURCES] = {[SOCKET] = {.fd = process.socket, .events = POLLIN}};
    for (unsigned i = 0; i < EDU_ACTING; i++)
        source[i] = (struct pollfd){.fd = process.doorbell[i], .events = POLLIN};
    for (;;) {
        source[UNMASK] = (struct pollfd){.fd = process.line_unmask, .events = POLLIN};
        poll(source, SOURCES, transfer_wait_ms());
        for (unsigned i = 0; i < EDU_ACTING; i++)
            doorbell_answer(i);
        if (source[UNMASK].revents)
            line_unmask_answer();
        if (source[SOCKET].revents)
            message_answer();
        if (transfer_wait_ms() == 0)
            edu_transfer(&process.edu);
    }
}

_Noreturn void process_run(int socket, int32_t parent, const struct process_home *home) {
    process_leave_home(socket, parent);
    process.home = *home;
    process.edu.trace = home->trace;
    process.edu.reach = home->reach;
    process.edu.interrupt = process_interrupt;
    process.edu.delay = process_delay;
    for (unsigned i = 0; i < EDU_ACTING; i++)
        process.doorbell[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!process_registers_make())
        _exit(1);
    process_serve();
    _exit(0);
}
