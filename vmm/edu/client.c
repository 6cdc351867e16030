/*
 * The VMM's end of a device that is a process of its own: start it, speak to it, lose it. Nothing
 * that comes from there is believed before it was looked at.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "edu_device.h"
#include "host.h"

#define ANSWER_MS 1000 /* that the VMM waits for the process */

static struct {
    bool is_lost;
    pid_t pid; /* 0: it has ended */
    int socket;
    uint16_t next_id;
    struct message reply; /* the last one */
    void (*lost)(void);
} client;

void device_start(const struct process_home *home, void *hidden, size_t size, void (*lost)(void)) {
    int ends[2];
    uint64_t ram = (uint64_t)host_machine()->memory_mib << 20;
    pid_t parent = getpid();
    madvise(host_memory(0, ram), ram, MADV_DONTFORK);
    madvise(host_run(), 3 * PAGE_SIZE, MADV_DONTFORK); /* KVM_GET_VCPU_MMAP_SIZE, on x86 */
    madvise(hidden, size, MADV_DONTFORK);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
        host_cannot("it has no sockets for the device's process");
    client.pid = fork();
    if (client.pid < 0)
        host_cannot("it cannot start the device's process");
    if (client.pid == 0)
        process_run(ends[1], parent, home);
    close(ends[1]);
    client.socket = ends[0];
    client.lost = lost;
}

void device_end(void) {
    if (client.pid > 0) {
        kill(client.pid, SIGKILL);
        waitpid(client.pid, NULL, 0);
        close(client.socket);
    }
    client.pid = 0;
}

void device_lose(const char *why) {
    if (client.is_lost)
        return;
    client.is_lost = true;
    event_begin("lost");
    event_string("why", why);
    event_end();
    device_end();
    if (client.lost)
        client.lost();
}

bool device_is_lost(void) { return client.is_lost; }

void device_look(void) {
    struct pollfd source = {.fd = client.socket, .events = POLLIN};
    if (client.pid > 0 && poll(&source, 1, 0) > 0 && (source.revents & POLLHUP))
        device_lose("its process has ended");
}

/* ---- messages ---- */

static const char *const command_names[] = {
    [VFIO_USER_VERSION] = "VERSION",
    [VFIO_USER_DMA_MAP] = "DMA_MAP",
    [VFIO_USER_DMA_UNMAP] = "DMA_UNMAP",
    [VFIO_USER_DEVICE_GET_INFO] = "DEVICE_GET_INFO",
    [VFIO_USER_DEVICE_GET_REGION_INFO] = "DEVICE_GET_REGION_INFO",
    [VFIO_USER_DEVICE_GET_REGION_IO_FDS] = "DEVICE_GET_REGION_IO_FDS",
    [VFIO_USER_DEVICE_SET_IRQS] = "DEVICE_SET_IRQS",
    [VFIO_USER_DMA_WRITE] = "DMA_WRITE",
};

static bool has_command_name(uint32_t command) {
    return command < sizeof command_names / sizeof command_names[0] && command_names[command];
}

static void message_record(const char *kind, const struct vfio_user_header *header) {
    event_begin(kind);
    event_string("command",
                 has_command_name(header->command) ? command_names[header->command] : "?");
    event_number("error", header->error);
    event_end();
}

/* The device wants something of the VMM, such as to move data for it. Here a device has its
 * windows, and nothing else. */
static void request_refuse(const struct message *request) {
    struct message answer = {.header = {.id = request->header.id,
                                        .command = request->header.command,
                                        .flags = VFIO_USER_REPLY | VFIO_USER_ERROR,
                                        .error = EOPNOTSUPP}};
    message_record("refused", &answer.header);
    message_send(client.socket, &answer);
}

/* Of all that may come from the device, the reply to the command with this id. What it says
 * first is answered. */
static bool reply_await(uint16_t id, uint16_t command) {
    struct pollfd source = {.fd = client.socket, .events = POLLIN};
    for (unsigned requests = 0; requests < 8; requests++) {
        if (poll(&source, 1, ANSWER_MS) <= 0) {
            device_lose("it does not answer");
            return false;
        }
        if (!message_receive(client.socket, &client.reply)) {
            device_lose(errno == EPROTO ? "what it sends is no message" : "its process has ended");
            return false;
        }
        const struct vfio_user_header *header = &client.reply.header;
        bool is_reply = header->flags & VFIO_USER_REPLY;
        if (is_reply && header->id == id && header->command == command)
            return true;
        if (is_reply) {
            device_lose("it answers what nobody has asked");
            return false;
        }
        request_refuse(&client.reply);
        message_fds_close(&client.reply);
    }
    device_lose("it does not answer, and asks instead");
    return false;
}

int device_ask(enum vfio_user_command command, const void *payload, size_t size, int fd) {
    struct message message = {.header = {.id = ++client.next_id, .command = (uint16_t)command},
                              .payload_size = (uint32_t)size,
                              .fd = {fd},
                              .fds = fd >= 0};
    if (client.is_lost || size > PAYLOAD_MAX)
        return ENODEV;
    message_fds_close(&client.reply);
    memcpy(message.payload, payload, size);
    if (!message_send(client.socket, &message)) {
        device_lose("its process has ended");
        return ENODEV;
    }
    if (!reply_await(message.header.id, message.header.command))
        return ENODEV;
    const struct vfio_user_header *header = &client.reply.header;
    message_record("message", header);
    return header->flags & VFIO_USER_ERROR ? (int)(header->error ? header->error : EIO) : 0;
}

bool device_query(enum vfio_user_command command, void *payload, size_t size, unsigned fds) {
    if (device_ask(command, payload, size, -1) || client.reply.payload_size != size ||
        client.reply.fds != fds) {
        device_lose("its answer is not one");
        return false;
    }
    memcpy(payload, client.reply.payload, size);
    return true;
}

const struct message *device_reply(void) { return &client.reply; }

bool device_introduce(void) {
    struct vfio_user_version version = {0, 1, VFIO_USER_CAPABILITIES};
    struct vfio_user_info {
        uint32_t argsz, flags, num_regions, num_irqs;
    } info = {.argsz = sizeof info};
    if (!device_query(VFIO_USER_VERSION, &version, sizeof version, 0) ||
        !device_query(VFIO_USER_DEVICE_GET_INFO, &info, sizeof info, 0))
        return false;
    if (version.major != 0 || !(info.flags & VFIO_DEVICE_FLAGS_PCI) ||
        info.num_regions <= VFIO_PCI_BAR0_REGION_INDEX || info.num_irqs <= VFIO_PCI_MSI_IRQ_INDEX)
        device_lose("it is no PCI device with MSI");
    return !client.is_lost;
}
