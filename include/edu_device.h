/*
 * The edu device from its own side (edu_registers.h): what it does when a register that acts has
 * been written to, in the VMM or in a process of its own, and the VMM's end of that process. For
 * host halves; vmm/edu has the code.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "edu_behaviour.h"
#include "edu_registers.h"
#include "vfio_user.h"

/* ---- what it has done, for the VMM to record ---- */

enum trace_kind {
    TRACE_ACT,
    TRACE_INTERRUPT,
    TRACE_DMA,
    TRACE_MAP,
    TRACE_UNMAP,
    TRACE_FAULT, /* of an IOMMU between the device and memory */
    TRACE_KINDS,
};
enum trace_result {
    RESULT_DONE,
    RESULT_NOT_MAPPED,     /* nobody has given the device this memory */
    RESULT_OUTSIDE_BUFFER, /* not in its own buffer either */
    RESULT_CANCELLED,      /* the memory was taken away before it got that far */
    RESULT_REFUSED,
    RESULTS,
};

struct trace_entry {
    uint32_t kind, result;
    /* The offset of the register that acts; the interrupt status; the command of a transfer. */
    uint32_t number;
    uint32_t value; /* of that register; of a fault, whether the device was to write */
    uint64_t address, size, offset; /* of DMA, or of what is mapped; in the device's buffer, or in
                                       the file */
};

#define TRACE_MAX 256

/* Shared by the device and the VMM, so that the VMM can look into the device: the course has this,
 * no other VMM does. The device writes to it at any time. */
struct trace {
    uint32_t count;     /* of all; those beyond TRACE_MAX are not kept */
    uint32_t behaviour; /* enum behaviour */
    struct trace_entry entry[TRACE_MAX];
    uint8_t buffer[EDU_BUFFER_SIZE];
};

/* An empty one, in memory that a child process shares; NULL: there is no memory left. */
struct trace *trace_make(void);

void trace_add(struct trace *trace, struct trace_entry entry);

/* Record what was added since the last call with this count, as events of kind `device`, whose `form`
 * is the name given; but faults as below. */
void trace_record(const struct trace *trace, uint32_t *recorded, const char *form);

/* Record what an IOMMU has blocked, and what is said of it, as an event `fault`. */
void fault_record(uint64_t address, bool is_write, const char *text);

/* ---- the device itself ---- */

#define MAPPINGS_MAX 4

struct mapping {
    uint64_t iova, size; /* bytes; size 0: there is none */
    uint8_t *memory;
};

struct transfer_state {
    bool is_running;
    uint32_t command;
    uint64_t iova, buffer, count;
};

struct edu {
    uint8_t *registers; /* a page; whoever drives the device writes there */
    struct trace *trace;
    struct mapping mapping[MAPPINGS_MAX];
    struct transfer_state transfer;
    /* There is something in the interrupt status: called at each cause, old or new. */
    void (*interrupt)(void);
    /* Called when this register is to act, before it does: a device takes its time. NULL: this one does
     * not. */
    void (*delay)(unsigned offset);
    /* The way to memory: the hva of [iova, iova + *size) for reading or writing, or NULL. It may make
     * *size smaller: then the rest is asked for next. Where this is NULL, the mappings are the way. */
    uint8_t *(*reach)(uint64_t iova, uint64_t *size, bool is_write);
};

/* The registers that act, in the order in which a process looks at its doorbells. */
#define EDU_ACTING 5
extern const uint16_t edu_acting[EDU_ACTING];

/* As after a reset: all registers are 0, but for the id. */
void edu_reset(const struct edu *edu);

/* The register at this offset, one of edu_acting, has been written to. A transfer is only begun:
 * transfer.is_running says so, and edu_transfer() moves the data. The driver is never told how that
 * went. */
void edu_act(struct edu *edu, unsigned offset);
void edu_transfer(struct edu *edu);

/* A place for a mapping; NULL if there is none, or if it would overlap another. */
struct mapping *edu_mapping_place(struct edu *edu, uint64_t iova, uint64_t size);

/* The mapping of just this address and size, or NULL. */
struct mapping *edu_mapping_find(struct edu *edu, uint64_t iova, uint64_t size);

/* Forget a mapping. A transfer that is under way there is given up first: when this returns, the
 * device touches that memory no more. */
void edu_unmap(struct edu *edu, struct mapping *mapping);

/* ---- the device in a process of its own ---- */

/* What the process has besides its socket, because it is a child of the VMM. */
struct process_home {
    struct trace *trace;
    uint64_t file_offset; /* of the registers, in the file that the process makes; whole pages */
    /* For a device behind an IOMMU: the way to memory, as in struct edu, and what VFIO_USER_DMA_UNMAP
     * does. NULL: it has what VFIO_USER_DMA_MAP gives it. */
    uint8_t *(*reach)(uint64_t iova, uint64_t *size, bool is_write);
    void (*unmap)(uint64_t iova, uint64_t size);
};

/* Be that process: answer messages and doorbells, until the VMM at the other end of the socket, the
 * process `parent`, is gone. Of the VMM's files it keeps none. */
_Noreturn void process_run(int socket, int32_t parent, const struct process_home *home);

/* ---- the VMM's end: one process ---- */

/* Start it. It has neither the guest's RAM nor the vCPU, not even as a copy, nor the memory
 * [hidden, hidden + size). `lost` is called when the device is lost; it may be NULL. Ends the run if
 * this machine cannot. */
void device_start(const struct process_home *home, void *hidden, size_t size, void (*lost)(void));

/* Kill it, wherever it is; it is gone when this returns. */
void device_end(void);

/* The device is of no use any more: record why, as an event `lost`, and end its process. */
void device_lose(const char *why);
bool device_is_lost(void);

/* Has its process ended? Then the device is lost. */
void device_look(void);

/*
 * Send a message with this payload, and with the file descriptor fd (-1: none), and wait for the
 * reply, for a second at most. The answer is 0, or an errno. A device that does not answer, or not as
 * the protocol says, is lost (ENODEV). What the device asks for meanwhile is refused.
 */
int device_ask(enum vfio_user_command command, const void *payload, size_t size, int fd);

/* The same for a message whose reply has a payload of the same size and so many file descriptors; else
 * the device is lost, and the answer false. They are in device_reply() until the next message. */
bool device_query(enum vfio_user_command command, void *payload, size_t size, unsigned fds);
const struct message *device_reply(void);

/* Version and kind: a PCI device with a BAR and MSI, or it is lost. */
bool device_introduce(void);

/* 0 for what is no file. */
uint64_t file_size(int fd);
