/*
 * What a VMM and the process of a device say to each other: vfio-user ("vfio-user Protocol
 * Specification", in QEMU's documentation), as far as lessons need it. Each message is a header, a
 * payload, and file descriptors that travel with it. The structures of most payloads are those of
 * <linux/vfio.h>: what an ioctl of /dev/vfio takes, a message takes here.
 *
 * The socket is a SOCK_SEQPACKET one, so that each message arrives as one piece, or not at all.
 */
#pragma once

#include <linux/kvm.h>
#include <linux/vfio.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum vfio_user_command {
    VFIO_USER_VERSION = 1,
    VFIO_USER_DMA_MAP = 2,
    VFIO_USER_DMA_UNMAP = 3,
    VFIO_USER_DEVICE_GET_INFO = 4,
    VFIO_USER_DEVICE_GET_REGION_INFO = 5,
    VFIO_USER_DEVICE_GET_REGION_IO_FDS = 6,
    VFIO_USER_DEVICE_SET_IRQS = 8,
    VFIO_USER_DMA_WRITE = 12, /* the only one that a device sends here */
};

#define VFIO_USER_REPLY 0x1u /* flags 3:0: the type */
#define VFIO_USER_ERROR 0x20u

struct vfio_user_header {
    uint16_t id; /* the reply has that of its command */
    uint16_t command;
    uint32_t size; /* of all of it, in bytes */
    uint32_t flags;
    uint32_t error; /* an errno, with VFIO_USER_ERROR */
};
_Static_assert(sizeof(struct vfio_user_header) == 16, "as the protocol has it");

struct vfio_user_version {
    uint16_t major, minor;
    char capabilities[36]; /* JSON */
};
#define VFIO_USER_CAPABILITIES "{\"capabilities\":{\"max_msg_fds\":8}}"

/* Of VFIO_USER_DMA_MAP, with a file descriptor. */
struct vfio_user_dma_map {
    uint32_t argsz;  /* the size of this structure */
    uint32_t flags;  /* VFIO_USER_DMA_* */
    uint64_t offset; /* in the file */
    uint64_t addr;   /* where it begins for the device: its address for DMA */
    uint64_t size;   /* bytes */
};
#define VFIO_USER_DMA_READABLE (1u << 0)
#define VFIO_USER_DMA_WRITEABLE (1u << 1)

/* Of VFIO_USER_DMA_UNMAP: just what was mapped before. */
struct vfio_user_dma_unmap {
    uint32_t argsz, flags; /* flags: none */
    uint64_t addr, size;
};

/* The answer to VFIO_USER_DEVICE_GET_REGION_INFO: a region, a part of which may be mapped. */
struct vfio_user_region {
    struct vfio_region_info info;
    struct vfio_info_cap_header header; /* VFIO_REGION_INFO_CAP_SPARSE_MMAP */
    uint32_t nr_areas, reserved;
    struct vfio_region_sparse_mmap_area area;
};

/* Of VFIO_USER_DEVICE_GET_REGION_IO_FDS: what can be had as an eventfd. */
#define DOORBELLS_MAX 8
#define DOORBELL_FLAGS KVM_IOEVENTFD_FLAG_DATAMATCH
struct doorbell {
    uint64_t offset; /* in the region */
    uint64_t size;   /* of the write: 4 bytes */
    uint32_t fd_index;
    uint32_t type;  /* 0: an ioeventfd */
    uint32_t flags; /* as KVM_IOEVENTFD has them: DOORBELL_FLAGS */
    uint32_t padding;
    uint64_t datamatch;
};
struct vfio_user_io_fds {
    uint32_t argsz, flags, index, count;
    struct doorbell doorbell[DOORBELLS_MAX];
};

struct vfio_user_dma_access {
    uint64_t addr, count;
    uint8_t data[8];
};

/* ---- sending and receiving ---- */

#define FDS_MAX 8
#define PAYLOAD_MAX 512

struct message {
    struct vfio_user_header header;
    uint8_t payload[PAYLOAD_MAX];
    uint32_t payload_size;
    int fd[FDS_MAX];
    unsigned fds;
};

/* Send it: header.size is filled in, the file descriptors stay the sender's. False: nobody is there
 * any more. It never blocks for long, and raises no SIGPIPE. */
bool message_send(int socket, struct message *message);

/* The next message; blocks until there is one. What it carries is the receiver's to close. False:
 * there is none any more, and errno is 0, or it is not one, and errno is EPROTO. */
bool message_receive(int socket, struct message *message);

/* Close the file descriptors that it carries. */
void message_fds_close(struct message *message);
