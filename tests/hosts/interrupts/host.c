/* A host half that injects what its guest asks for, when it asks for it. */
#include "host.h"
#include "lab.h"

/* What is to be done before an entry that follows an exit for this reason. */
static struct {
    enum command command;
    uint32_t inject_after; /* KVM_EXIT_*; 0: nothing is to be injected */
    uint32_t window_after;
} wanted;

static void exception_inject(uint8_t vector, uint32_t error_code) {
    struct kvm_vcpu_events events;
    host_vcpu(KVM_GET_VCPU_EVENTS, &events);
    events.exception.injected = 1;
    events.exception.nr = vector;
    events.exception.has_error_code = 1;
    events.exception.error_code = error_code;
    host_vcpu(KVM_SET_VCPU_EVENTS, &events);
}

static void page_fault_inject(void) {
    struct kvm_sregs registers = *host_sregs();
    registers.cr2 = LAB_FAULT_GVA;
    host_vcpu(KVM_SET_SREGS, &registers);
    exception_inject(VECTOR_PF, PF_ERROR_WRITE);
}

static void events_set_as_they_are(void) {
    struct kvm_vcpu_events events;
    host_vcpu(KVM_GET_VCPU_EVENTS, &events);
    host_vcpu(KVM_SET_VCPU_EVENTS, &events);
}

static void inject(void) {
    struct kvm_interrupt bad_interrupt = {256};
    struct kvm_irq_level line = {.irq = 4, .level = 1};
    switch (wanted.command) {
    case COMMAND_HALT_NMI: host_vcpu_number(KVM_NMI, 0); break;
    case COMMAND_EXCEPTION: exception_inject(VECTOR_GP, LAB_ERROR_CODE); break;
    case COMMAND_PAGE_FAULT:
    case COMMAND_PAGE_FAULT_WITHOUT_IDT: page_fault_inject(); break;
    case COMMAND_NO_EVENTS: events_set_as_they_are(); break;
    case COMMAND_BAD_VECTOR: host_vcpu(KVM_INTERRUPT, &bad_interrupt); break;
    case COMMAND_BAD_LINE: host_vm(KVM_IRQ_LINE, &line); break;
    default: host_vcpu(KVM_INTERRUPT, &(struct kvm_interrupt){.irq = LAB_VECTOR}); break;
    }
}

static void before_entry(void) {
    uint32_t reason = host_run()->exit_reason;
    if (wanted.window_after && reason == wanted.window_after)
        host_run()->request_interrupt_window = 1;
    if (!wanted.inject_after || reason != wanted.inject_after)
        return;
    wanted.inject_after = wanted.window_after = 0;
    host_run()->request_interrupt_window = 0;
    inject();
}

static void command_access(struct access *access) {
    wanted.command = access->data[0];
    wanted.inject_after = KVM_EXIT_IO;
    switch (wanted.command) {
    case COMMAND_WINDOW:
        wanted.inject_after = KVM_EXIT_IRQ_WINDOW_OPEN;
        wanted.window_after = KVM_EXIT_IO;
        break;
    case COMMAND_HALT_WINDOW:
        wanted.inject_after = KVM_EXIT_IRQ_WINDOW_OPEN;
        wanted.window_after = KVM_EXIT_HLT;
        break;
    case COMMAND_HALT_INTERRUPT:
    case COMMAND_HALT_NMI: wanted.inject_after = KVM_EXIT_HLT; break;
    case COMMAND_HALT_NOTHING: wanted.inject_after = 0; break;
    default: break;
    }
}

static void report_access(struct access *access) { (void)access; /* the record has it */ }

static void setup(void) {
    host_claim_pio(LAB_COMMAND, 1, "command", command_access);
    host_claim_pio(LAB_REPORT, 4, "report", report_access);
}

const struct host_half host_half = {.setup = setup, .before_entry = before_entry};
