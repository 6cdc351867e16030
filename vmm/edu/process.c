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
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "edu_device.h"
#include "x86.h"

#define IDLE_MS 1000 /* edu takes 100 for a transfer, this one takes what it needs */
/* A driver that takes an answer for granted is to find out, and not once in a while. */
#define LIVENESS_MS 5
#define ACKNOWLEDGE_MS 2
#define SCRIBBLE_BYTE 0x5a

static struct {
    struct edu edu;
    struct process_home home;
    int socket, file;
    int doorbell[EDU_ACTING];
    /* Eventfds, from DEVICE_SET_IRQS; -1: none. There is a message, or a line, or neither. */
    int message, line, line_unmask;
    bool line_is_masked;
    int dma_file; /* the first one that it was given a part of; kept to misuse it */
    uint64_t transfer_due_ms;
} process = {.message = -1, .line = -1, .line_unmask = -1, .dma_file = -1};

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
 * it unmasks it: as vfio-pci has it for a line of a PCI device.
 */
static void line_signal(void) {
    uint32_t status;
    memcpy(&status, process.edu.registers + EDU_INTERRUPT_STATUS, sizeof status);
    if (process.line < 0 || process.line_is_masked || status == 0)
        return;
    process.line_is_masked = true;
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

/* A message or a line: the other one must have been taken away before. */
static int interrupt_set(uint32_t index, int fd) {
    bool is_message = index == VFIO_PCI_MSI_IRQ_INDEX;
    if (fd >= 0 && (is_message ? process.line : process.message) >= 0)
        return EINVAL;
    fd_replace(is_message ? &process.message : &process.line, fd);
    process.line_is_masked = false;
    line_signal();
    return 0;
}

/* The line is the only interrupt that can be masked. */
static int line_set(uint32_t flags, int fd) {
    if (process.line < 0)
        return EINVAL;
    if (flags & VFIO_IRQ_SET_DATA_EVENTFD)
        fd_replace(&process.line_unmask, fd);
    else
        line_mask(flags & VFIO_IRQ_SET_ACTION_MASK);
    return 0;
}

/* As VFIO_DEVICE_SET_IRQS: "Without an eventfd" and a count of 0 take the interrupt away. */
static int answer_set_irqs(struct message *command) {
    struct vfio_irq_set set;
    memcpy(&set, command->payload, sizeof set);
    uint32_t data = set.flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
    uint32_t action = set.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
    bool has_fd = data == VFIO_IRQ_SET_DATA_EVENTFD;
    bool is_line = set.index == VFIO_PCI_INTX_IRQ_INDEX;
    if (data & VFIO_IRQ_SET_DATA_BOOL || set.start != 0 || set.count > 1 ||
        command->fds != has_fd || (!is_line && set.index != VFIO_PCI_MSI_IRQ_INDEX))
        return EINVAL;
    int fd = has_fd ? command->fd[0] : -1, error = EINVAL;
    if (action == VFIO_IRQ_SET_ACTION_TRIGGER && set.count == has_fd)
        error = interrupt_set(set.index, fd);
    else if (is_line && set.count == 1 && !(has_fd && action == VFIO_IRQ_SET_ACTION_MASK))
        error = line_set(set.flags, fd);
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
    close_range(STDERR_FILENO + 1, ~0u, 0);
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

static void process_serve(void) {
    enum { SOCKET = EDU_ACTING, UNMASK, SOURCES };
    struct pollfd source[SOURCES] = {[SOCKET] = {.fd = process.socket, .events = POLLIN}};
    for (unsigned i = 0; i < EDU_ACTING; i++)
        source[i] = (struct pollfd){.fd = process.doorbell[i], .events = POLLIN};
    for (;;) {
        source[UNMASK] = (struct pollfd){.fd = process.line_unmask, .events = POLLIN};
        poll(source, SOURCES, transfer_wait_ms());
        for (unsigned i = 0; i < EDU_ACTING; i++)
            if (source[i].revents)
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
