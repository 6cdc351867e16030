/*
 * Lesson 9: the interrupt controller as a program. The host half uses the I/O APIC on the split
 * machine (--irqchip=split), and both on the one that has no controller in the kernel
 * (--irqchip=none). Registers and bits: apic_registers.h. Nothing to write here.
 */
#pragma once

#include <string.h>

#include "apic_registers.h"
#include "host.h"

static bool irqchip_is(enum machine_irqchip irqchip) { return host_machine()->irqchip == irqchip; }

/* In host.c. */
static struct kvm_msi message_make(uint8_t destination, uint32_t delivery, uint8_t vector,
                                   bool is_level);
static void message_send(const char *from, struct kvm_msi message);

/* ---- the local APIC ---- */

/* Its registers, as KVM_GET_LAPIC would show them. Not modelled: the timer, other CPUs, errors. */
static struct kvm_lapic_state lapic;
/* A level-triggered vector that the guest has ended just now; else 0. */
static uint8_t lapic_ended;

static uint32_t lapic_register(const struct kvm_lapic_state *state, unsigned offset) {
    uint32_t value;
    memcpy(&value, state->regs + offset, sizeof value);
    return value;
}

/* A vector's bit in ISR, TMR or IRR. */
static bool lapic_bit(const struct kvm_lapic_state *state, unsigned offset, unsigned vector) {
    return lapic_register(state, offset + vector / 32 * 16) >> vector % 32 & 1;
}

static void lapic_bit_set(unsigned offset, unsigned vector, bool bit) {
    unsigned at = offset + vector / 32 * 16;
    uint32_t others = lapic_register(&lapic, at) & ~(1u << vector % 32);
    uint32_t value = others | (uint32_t)bit << vector % 32;
    memcpy(lapic.regs + at, &value, sizeof value);
}

/* The highest vector whose bit is set; 0 if there is none. */
static unsigned lapic_highest(unsigned offset) {
    unsigned vector = VECTORS - 1;
    while (vector > 0 && !lapic_bit(&lapic, offset, vector))
        vector--;
    return vector;
}

static bool lapic_accept(struct kvm_msi message) {
    uint8_t destination = (uint8_t)(message.address_lo >> MSI_ADDRESS_DESTINATION_SHIFT);
    bool is_logical = message.address_lo & MSI_ADDRESS_LOGICAL;
    uint32_t id = lapic_register(&lapic, is_logical ? LAPIC_LDR : LAPIC_ID) >> 24;
    if (is_logical ? !(destination & id) : destination != id)
        return false;
    if ((message.data & APIC_DELIVERY) == APIC_DELIVERY_NMI) {
        host_vcpu_number(KVM_NMI, 0);
        return true;
    }
    lapic_bit_set(LAPIC_TMR, message.data & APIC_VECTOR, (message.data & MSI_DATA_LEVEL) != 0);
    lapic_bit_set(LAPIC_IRR, message.data & APIC_VECTOR, true);
    return true;
}

static void lapic_write(unsigned offset, uint32_t value) {
    unsigned in_service = lapic_highest(LAPIC_ISR);
    if (offset >= LAPIC_ISR && offset < LAPIC_ICR_LOW)
        return; /* read-only */
    memcpy(lapic.regs + offset, &value, sizeof value);
    if (offset == LAPIC_EOI) {
        lapic_ended = lapic_bit(&lapic, LAPIC_TMR, in_service) ? (uint8_t)in_service : 0;
        lapic_bit_set(LAPIC_ISR, in_service, false);
    } else if (offset == LAPIC_ICR_LOW && (value & LAPIC_ICR_TO_SELF)) {
        lapic_bit_set(LAPIC_IRR, value & APIC_VECTOR, true);
    }
}

static void lapic_access(struct access *access) {
    unsigned offset = (unsigned)(access->address - LAPIC_GPA);
    uint32_t value;
    if (access->size != sizeof value || offset % 16 || offset >= sizeof lapic.regs)
        return;
    if (!access->is_write) {
        memcpy(access->data, lapic.regs + offset, sizeof value);
        return;
    }
    memcpy(&value, access->data, sizeof value);
    lapic_write(offset, value);
}

/* Give the CPU the highest vector whose class is above the task's and above what is in service, now or
 * when the CPU can take it: lessons 6 and 7. */
static void lapic_prepare_entry(void) {
    struct kvm_run *run = host_run();
    unsigned vector = lapic_highest(LAPIC_IRR);
    struct kvm_interrupt interrupt = {.irq = vector};
    bool is_due = vector >> 4 > lapic_register(&lapic, LAPIC_TPR) >> 4 &&
                  vector >> 4 > lapic_highest(LAPIC_ISR) >> 4;
    run->request_interrupt_window = is_due && !run->ready_for_interrupt_injection;
    if (!is_due || !run->ready_for_interrupt_injection)
        return;
    lapic_bit_set(LAPIC_IRR, vector, false);
    lapic_bit_set(LAPIC_ISR, vector, true);
    host_vcpu(KVM_INTERRUPT, &interrupt);
}

/* ---- the I/O APIC: 82093AA data sheet ---- */

static struct {
    uint8_t select;
    uint64_t entry[IOAPIC_PINS];
    bool is_high[IOAPIC_PINS];
    struct kvm_irq_routing_entry bell; /* a route that is not of a pin */
} ioapic;

static void ioapic_reset(void) {
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++)
        ioapic.entry[pin] = IOAPIC_MASKED;
}

static struct kvm_msi ioapic_message(uint64_t entry) {
    return message_make((uint8_t)(entry >> IOAPIC_DESTINATION_SHIFT),
                        (uint32_t)entry & APIC_DELIVERY, (uint8_t)entry,
                        (entry & IOAPIC_LEVEL) != 0);
}

static void ioapic_send(unsigned pin) {
    uint64_t entry = ioapic.entry[pin];
    if (entry & (IOAPIC_MASKED | IOAPIC_REMOTE_IRR))
        return;
    if (entry & IOAPIC_LEVEL)
        ioapic.entry[pin] |= IOAPIC_REMOTE_IRR;
    message_send("I/O APIC", ioapic_message(entry));
}

static void ioapic_line(unsigned pin, bool is_high) {
    bool is_edge = is_high && !ioapic.is_high[pin];
    ioapic.is_high[pin] = is_high;
    if (is_high && (is_edge || (ioapic.entry[pin] & IOAPIC_LEVEL)))
        ioapic_send(pin);
}

/*
 * Split: KVM leaves with KVM_EXIT_IOAPIC_EOI when the guest ends a level-triggered interrupt of an I/O
 * APIC that it does not see. It knows their vectors from the routes of those GSIs that are pins.
 */
static void ioapic_route(void) {
    struct {
        struct kvm_irq_routing header;
        struct kvm_irq_routing_entry entries[IOAPIC_PINS + 1];
    } table = {.entries = {ioapic.bell}, .header.nr = ioapic.bell.gsi != 0};
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) {
        struct kvm_irq_routing_entry *route = &table.entries[table.header.nr];
        if (ioapic.entry[pin] & IOAPIC_MASKED)
            continue;
        struct kvm_msi message = ioapic_message(ioapic.entry[pin]);
        *route = (struct kvm_irq_routing_entry){.gsi = pin, .type = KVM_IRQ_ROUTING_MSI};
        route->u.msi.address_lo = message.address_lo;
        route->u.msi.data = message.data;
        table.header.nr++;
    }
    if (irqchip_is(MACHINE_IRQCHIP_SPLIT))
        host_vm(KVM_SET_GSI_ROUTING, &table.header);
}

static void ioapic_write_entry(unsigned pin, bool is_upper, uint32_t value) {
    uint64_t read_only = IOAPIC_REMOTE_IRR | IOAPIC_PENDING;
    uint64_t entry = ioapic.entry[pin];
    ioapic.entry[pin] = is_upper
                            ? (entry & 0xffffffff) | (uint64_t)value << 32
                            : (entry & (read_only | ~UINT64_C(0xffffffff))) | (value & ~read_only);
    ioapic_route();
    if (ioapic.is_high[pin] && (ioapic.entry[pin] & IOAPIC_LEVEL))
        ioapic_send(pin);
}

static void ioapic_access(struct access *access) {
    uint32_t value = 0;
    unsigned number = ioapic.select - IOAPIC_REDIRECTION(0);
    bool is_window = access->address == IOAPIC_GPA + IOAPIC_WINDOW;
    if (access->size != sizeof value || (is_window && number >= 2 * IOAPIC_PINS))
        return;
    memcpy(&value, access->data, sizeof value);
    if (!access->is_write) {
        value =
            is_window ? (uint32_t)(ioapic.entry[number / 2] >> 32 * (number % 2)) : ioapic.select;
        memcpy(access->data, &value, sizeof value);
    } else if (is_window) {
        ioapic_write_entry(number / 2, number % 2, value);
    } else if (access->address == IOAPIC_GPA + IOAPIC_SELECT) {
        ioapic.select = (uint8_t)value;
    }
}

/* The guest has ended an interrupt with this vector. True if it was of this pin and level-triggered: its
 * line is low now, as KVM leaves one that an irqfd with a resamplefd drives. */
static bool ioapic_end(unsigned pin, uint8_t vector) {
    if (!(ioapic.entry[pin] & IOAPIC_LEVEL) || (uint8_t)ioapic.entry[pin] != vector)
        return false;
    ioapic.entry[pin] &= ~IOAPIC_REMOTE_IRR;
    ioapic.is_high[pin] = false;
    return true;
}
