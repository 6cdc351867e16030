/* A slot behind which the host has no memory, and what a host half may do then. */
#include <stddef.h>
#include <sys/mman.h>

#include "host.h"
#include "lab.h"

static struct {
    enum command command;
    uint8_t *hva; /* of the slot */
} lab;

static void slot_set(uint32_t slot, gpa_t gpa, uint64_t size) {
    struct kvm_userspace_memory_region region = {.slot = slot,
                                                 .guest_phys_addr = gpa,
                                                 .memory_size = size,
                                                 .userspace_addr = (uintptr_t)lab.hva};
    host_vm(KVM_SET_USER_MEMORY_REGION, &region);
}

static bool memory_fault(gpa_t gpa) {
    event_begin("fault");
    event_number("is_known", gpa != HOST_GPA_UNKNOWN); /* both are right */
    event_end();
    if (lab.command == COMMAND_MEND)
        mprotect(lab.hva + PAGE_SIZE, PAGE_SIZE, PROT_READ | PROT_WRITE);
    return lab.command != COMMAND_REFUSE;
}

static void command_access(struct access *access) {
    lab.command = (enum command)access->data[0];
    if (lab.command == COMMAND_NOT_MINE)
        slot_set(HOST_SLOT_FIRST - 1, LAB_SLOT, PAGE_SIZE);
    if (lab.command == COMMAND_SLOT_AGAIN) {
        slot_set(HOST_SLOT_FIRST, LAB_SLOT + 2 * PAGE_SIZE, 2 * PAGE_SIZE);
        slot_set(HOST_SLOT_FIRST, 0, 0);
    }
}

static void setup(void) {
    lab.hva = mmap(NULL, 2 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(lab.hva + PAGE_SIZE, PAGE_SIZE, PROT_NONE);
    slot_set(HOST_SLOT_FIRST, LAB_SLOT, 2 * PAGE_SIZE);
    host_claim_pio(LAB_COMMAND, 1, "command", command_access);
}

static void end(void) { munmap(lab.hva, 2 * PAGE_SIZE); }

const struct host_half host_half = {.setup = setup, .memory_fault = memory_fault, .end = end};
