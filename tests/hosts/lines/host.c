/* A host half that sets interrupt lines: of KVM's controllers where there are some, else of the VMM's. */
#include "host.h"
#include "../../../vmm/vmm.h"
#include "lab.h"

static bool is_kvms(void) { return host_machine()->irqchip == MACHINE_IRQCHIP_KERNEL; }

static void line_access(struct access *access) {
    struct kvm_irq_level line = {.irq = access->data[0] & (uint8_t)~LAB_HIGH,
                                 .level = (access->data[0] & LAB_HIGH) != 0};
    if (is_kvms())
        host_vm(KVM_IRQ_LINE, &line);
    else
        line_set(line.irq, line.level);
}

static void nmi_access(struct access *access) {
    line_access(access);
    host_vcpu_number(KVM_NMI, 0);
}

static void report_access(struct access *access) { (void)access; /* the record has it */ }

static void setup(void) {
    host_claim_pio(LAB_LINE, 1, "line", line_access);
    host_claim_pio(LAB_NMI, 1, "nmi", nmi_access);
    host_claim_pio(LAB_REPORT, 4, "report", report_access);
    for (unsigned line = 0; line < 16 && !is_kvms(); line++)
        line_create(line);
}

const struct host_half host_half = {.setup = setup};
