/* How a guest reaches its interrupt controllers. The boot page tables map both, gva = gpa. What the
 * registers mean: include/apic_registers.h. */
#pragma once

#include "apic_registers.h"
#include "guest.h"

static inline uint32_t lapic_read(unsigned offset) { return mmio_read32(LAPIC_GPA + offset); }
static inline void lapic_write(unsigned offset, uint32_t value) {
    mmio_write32(LAPIC_GPA + offset, value);
}

/* End the interrupt in service: the one of the highest priority, if there are several. */
static inline void lapic_eoi(void) { lapic_write(LAPIC_EOI, 0); }

static inline uint32_t ioapic_read(unsigned number) {
    mmio_write32(IOAPIC_GPA + IOAPIC_SELECT, number);
    return mmio_read32(IOAPIC_GPA + IOAPIC_WINDOW);
}
static inline void ioapic_write(unsigned number, uint32_t value) {
    mmio_write32(IOAPIC_GPA + IOAPIC_SELECT, number);
    mmio_write32(IOAPIC_GPA + IOAPIC_WINDOW, value);
}
