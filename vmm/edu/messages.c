/*
 * Messages of vfio-user on a socket, with the file descriptors that travel with them: unix(7),
 * SCM_RIGHTS.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vfio_user.h"

union control {
    struct cmsghdr header; /* for its alignment */
    char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
};

bool message_send(int socket, struct message *message) {
    struct iovec parts[] = {{&message->header, sizeof message->header},
                            {message->payload, message->payload_size}};
    union control control = {0};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = 2};
    size_t fds_size = message->fds * sizeof(int);
    if (message->fds) {
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(fds_size);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(fds_size);
        memcpy(CMSG_DATA(rights), message->fd, fds_size);
    }
    message->header.size = (uint32_t)sizeof message->header + message->payload_size;
    return sendmsg(socket, &header, MSG_NOSIGNAL) == (ssize_t)message->header.size;
}

void message_fds_close(struct message *message) {
    for (unsigned i = 0; i < message->fds; i++)
        close(message->fd[i]);
    message->fds = 0;
}

static void message_fds_take(struct message *message, struct msghdr *header) {
    struct cmsghdr *rights = CMSG_FIRSTHDR(header);
    message->fds = 0;
    if (!rights || rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS)
        return;
    message->fds = (unsigned)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(message->fd, CMSG_DATA(rights), message->fds * sizeof(int));
}

bool message_receive(int socket, struct message *message) {
    struct iovec parts[] = {{&message->header, sizeof message->header},
                            {message->payload, sizeof message->payload}};
    union control control;
    struct msghdr header = {.msg_iov = parts,
                            .msg_iovlen = 2,
                            .msg_control = control.bytes,
                            .msg_controllen = sizeof control};
    memset(message, 0, sizeof *message);
    ssize_t size = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    if (size > 0)
        message_fds_take(message, &header);
    bool is_whole = size >= (ssize_t)sizeof message->header && message->header.size == size &&
                    !(header.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
    if (!is_whole) {
        message_fds_close(message);
        errno = size > 0 ? EPROTO : 0;
        return false;
    }
    message->payload_size = (uint32_t)(size - (ssize_t)sizeof message->header);
    return true;
}
