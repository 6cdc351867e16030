/* Inject an interrupt after each exit that asks for one, as lessons do it and as the VMM does it itself. */
#include "host.h"
#include "../../../../vmm/vmm.h"
#include "lab.h"

static enum how how;
static bool is_wanted;

static void how_access(struct access *access) { how = (enum how)access->data[0]; }

static void next_access(struct access *access) {
    (void)access;
    is_wanted = true;
}

static void before_entry(void) {
    if (!is_wanted || !host_run()->ready_for_interrupt_injection)
        return;
    is_wanted = false;
    if (how == HOW_SYNCED)
        vcpu_interrupt(LAB_VECTOR);
    else
        host_vcpu(KVM_INTERRUPT, &(struct kvm_interrupt){.irq = LAB_VECTOR});
}

static void setup(void) {
    host_claim_pio(LAB_HOW, 1, "how", how_access);
    host_claim_pio(LAB_NEXT, 1, "next", next_access);
}

const struct host_half host_half = {.setup = setup, .before_entry = before_entry};
