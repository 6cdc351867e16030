/*
 * The host half's view of the VMM. A lesson whose subject is the host has a host.c that is linked
 * with vmm.c; it defines `host_half` and calls the functions below. vmm.c works without one.
 *
 * The VMM has one thread, which calls the host half, and may call the functions below. A host half may
 * start another thread, for what must be done while the VMM's sleeps in KVM_RUN. That thread
 *   - blocks all signals but those that it causes (a crash, a timer): they are for the VMM's thread;
 *   - calls none of the functions below, but for HOST_TODO() while the VMM's thread sleeps, and
 *     host_stuck();
 *   - leaves what it has to record under a lock, and the VMM's thread records it, in an order that the
 *     seed decides;
 *   - is ended by `end`. Where the VMM ends without `end`, the process ends, and the thread with it.
 *
 * An address called _gpa is guest-physical, _gva is guest-virtual; the only way to a pointer is
 * host_memory(), and its answer must be looked at.
 */
#pragma once

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>

#include "machine.h"
#include "x86.h"

typedef uint64_t gpa_t;
typedef uint64_t gva_t;

/*
 * One access by the guest to a port or to an MMIO address, as KVM reports it. A string instruction
 * (`rep outs`, `rep ins`) may arrive as one access with count > 1; whether it does is KVM's choice.
 * data has size * count bytes, little-endian: read it when is_write, fill it when not.
 */
struct access {
    uint64_t address; /* port or gpa of each of the count elements (they do not advance) */
    uint32_t size;    /* bytes of one element: 1, 2 or 4; MMIO up to 8 */
    uint32_t count;   /* elements; always 1 for MMIO */
    bool is_write;
    uint8_t *data;
};
typedef void (*access_handler)(struct access *access);

/* What a lesson's host half does; every member may be NULL. */
struct host_half {
    /* Once, when the machine is built and the image is loaded, before the first entry. */
    void (*setup)(void);
    /* Before every entry: the place to put an event into the guest, and to look at what the last exit
     * has left. The guest goes on after a halt only if this injects something, or, with interrupts
     * on, asks for an interrupt window. Each entry of a machine that has this is recorded. */
    void (*before_entry)(void);
    /* An access to a gpa that is neither memory nor claimed. True: served, the run goes on. False:
     * it is what the machine note says unknown I/O is. */
    bool (*memory_event)(struct access *access);
    /* KVM_RUN has failed with EFAULT: the host has no memory behind a slot, at this gpa, or at
     * HOST_GPA_UNKNOWN where KVM does not say. (KVM_CAP_MEMORY_FAULT_INFO, since Linux 6.8; on x86 it is
     * said of guest_memfd only.) True: now there is memory, and the guest repeats its access. False: the
     * VMM ends with one line. In the record it is an exit with the reason MEMORY_FAULT. */
    bool (*memory_fault)(gpa_t gpa);
    /* Once, after the last exit, however the run ended; not if the VMM itself failed or HOST_TODO()
     * ended it. */
    void (*end)(void);
};
extern const struct host_half host_half;

#define HOST_GPA_UNKNOWN UINT64_MAX

/* A host half's own memory slots (KVM_SET_USER_MEMORY_REGION) have numbers from here on; those below are
 * the VMM's. host_memory() knows nothing of them. */
#define HOST_SLOT_FIRST 2

/* Claim ports or gpas, in setup. A range that overlaps a claimed one is a bug of the host half and
 * ends the VMM with one line; so is MMIO where there is memory. An access that straddles the end of a
 * range belongs to nobody. */
void host_claim_pio(uint16_t first, uint32_t ports, const char *name, access_handler handler);
void host_claim_mmio(gpa_t first_gpa, uint64_t bytes, const char *name, access_handler handler);

/* The seed of this run (--seed), the same that the guest finds on its command line. */
uint64_t host_seed(void);

/* The machine as it was built: what the image asks for, unless options of the VMM override it. */
const struct machine_note *host_machine(void);

/* The bytes [gpa, gpa + size) of guest memory, or NULL if any of them lies outside. Valid until the
 * VMM ends; the guest writes there too while it runs. */
__attribute__((warn_unused_result)) void *host_memory(gpa_t gpa, uint64_t size);

/* The registers at this exit, as KVM_CAP_SYNC_REGS brought them. */
const struct kvm_regs *host_regs(void);
const struct kvm_sregs *host_sregs(void);

/*
 * The page that KVM and the VMM share: KVM API, "5. The kvm_run structure". Of the last exit it has
 * exit_reason, if_flag and ready_for_interrupt_injection; before the first, all of them are 0.
 * request_interrupt_window is the host half's to set. So is immediate_exit: the next KVM_RUN returns
 * with KVM_EXIT_INTR before it enters the guest, as after a signal; then it must be cleared. Everything
 * else in it is for reading.
 */
struct kvm_run *host_run(void);

/*
 * An ioctl of the vCPU or of the VM, by its name in the KVM API, with a pointer to the structure that
 * it takes, or with a number. The answer is the ioctl's; if KVM refuses, the VMM ends with one line.
 *
 *     host_vcpu(KVM_INTERRUPT, &(struct kvm_interrupt){.irq = vector});
 *     host_vcpu_number(KVM_NMI, 0);
 *
 * What puts an event into the guest (KVM_INTERRUPT, KVM_NMI, KVM_SET_VCPU_EVENTS) is recorded, and so
 * are KVM_SET_USER_MEMORY_REGION and the messages of KVM_SET_GSI_ROUTING. Set registers with
 * KVM_SET_REGS and KVM_SET_SREGS: host_regs() shows those of the last exit until the next.
 */
#define host_vcpu(request, pointer) \
    host_vcpu_ioctl(request, #request, HOST_ARGUMENT(request, pointer))
#define host_vcpu_number(request, number) \
    host_vcpu_ioctl(request, #request, (void *)(uintptr_t)(number))
#define host_vm(request, pointer) host_vm_ioctl(request, #request, HOST_ARGUMENT(request, pointer))
#define host_vm_number(request, number) \
    host_vm_ioctl(request, #request, (void *)(uintptr_t)(number))
int host_vcpu_ioctl(unsigned long request, const char *name, void *argument);
int host_vm_ioctl(unsigned long request, const char *name, void *argument);

/* The pointer, if it is to a structure of the size that the request itself encodes. (Of those that
 * end in an array, that is the size without it.) The pointer stands outside of the block, so that a
 * structure written in its place lives as long as the call. */
#define HOST_ARGUMENT(request, pointer)                                                           \
    (({                                                                                           \
         _Static_assert(_IOC_SIZE(request) == sizeof *(pointer), #request " takes another type"); \
     }),                                                                                          \
     (void *)(pointer))

/* KVM's own answer to gva -> gpa, in the vCPU's current address space: KVM_TRANSLATE. KVM walks as
 * the CPU does: it sets the accessed bits of the entries it uses. */
struct kvm_translation host_translate(gva_t gva);

/*
 * The VMM's walk of the guest's page tables from root_gpa (CR3), without side effects on them. The
 * mode (paging off, four levels, five) is the vCPU's current one; 32-bit paging is not modelled.
 * Where the walk stopped and why, each entry it read, and what the path permits.
 */
enum walk_end {
    WALK_MAPPED,
    WALK_NOT_PRESENT,
    WALK_RESERVED_BIT,   /* a large-page bit in a PML4 or PML5 entry */
    WALK_OUTSIDE_MEMORY, /* the next table is not in guest memory */
    WALK_NOT_CANONICAL,
    WALK_NOT_MODELLED,
};
struct walk {
    enum walk_end end;
    unsigned steps; /* entries read: entry[0] is of the top level */
    unsigned top_level;
    struct {
        gpa_t gpa;
        uint64_t value;
    } entry[5];
    gpa_t gpa;          /* of the byte at gva, if WALK_MAPPED */
    uint64_t page_size; /* bytes, if WALK_MAPPED */
    uint64_t permits;   /* PTE_WRITABLE, PTE_USER and PTE_NO_EXECUTE, combined over the path */
};
struct walk host_walk(gpa_t root_gpa, gva_t gva);

/*
 * Add an event of the host half's own to the record (events.h): begin, fields, end. Does nothing
 * if the run records no events. Names are plain ASCII; strings are escaped.
 */
void event_begin(const char *kind);
void event_number(const char *name, uint64_t value); /* a count or a flag: decimal */
void event_hex(const char *name, uint64_t value);    /* an address or a value: "0x..." */
void event_string(const char *name, const char *value);
void event_bytes(const char *name, const void *bytes, uint64_t size); /* "00ff..." */
void event_end(void);

/*
 * Put KVM's own counters of the VM and of the vCPU into the record: an event `statistics`, whose field
 * `when` is the text given. They count from the VM's creation on, so what happened between two moments
 * is a difference. The VMM does so itself at the end of each run (when: "end").
 */
void host_statistics(const char *when);

/* End the run: this machine lacks what the lesson needs, such as "its KVM has no dirty ring". */
_Noreturn void host_cannot(const char *what);

/* End the run, from any thread: a part of the host half has not come back, such as "f() in host.c waits". */
_Noreturn void host_stuck(const char *what);

/* End the run: the student has not written this part yet. */
#define HOST_TODO(task) host_todo(LOCATION, task)
_Noreturn void host_todo(const char *location, const char *task);
