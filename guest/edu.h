/*
 * The driver of the edu device (edu_registers.h). It knows where the device's BAR is and which vector
 * its interrupt has, and nothing of what stands behind them: a model in the VMM, a process next to
 * it, or a device of QEMU's. What a student of lesson 11 writes is in edu.c.
 */
#pragma once

#include "edu_registers.h"
#include "guest.h"

struct edu {
    uint64_t bar_gva;
    uint8_t vector;               /* of its interrupt */
    volatile uint32_t causes;     /* what it has interrupted for, and nobody has waited for yet */
    volatile uint32_t interrupts; /* so far */
};

/* Once, before the first device: the local APIC is enabled, and its timer, which has this vector, is
 * the driver's while it waits. */
void edu_driver_begin(uint8_t timer_vector);

static inline uint32_t edu_read(const struct edu *edu, unsigned offset) {
    return mmio_read32(edu->bar_gva + offset);
}
/* For a register that only keeps what it is given. */
static inline void edu_write(const struct edu *edu, unsigned offset, uint32_t value) {
    mmio_write32(edu->bar_gva + offset, value);
}
/* For a register that acts. */
void edu_command(const struct edu *edu, unsigned offset, uint32_t value);

/* It has interrupted: for the handler, which then tells the interrupt controller. */
void edu_interrupted(struct edu *edu);

/*
 * Interrupts are off when these are called and when they return; while they wait, they are on. False:
 * what was waited for has not come in about two seconds. A device may need 100 ms for a transfer.
 */
bool edu_await_interrupt(struct edu *edu, uint32_t cause); /* and its acknowledgement was noticed */
bool edu_probe(const struct edu *edu, uint32_t number);    /* it is one, and lives */
bool edu_factorial(struct edu *edu, uint32_t number, uint32_t *result);
/* Move count bytes: one address is one of DMA, the other one of the device's buffer (EDU_BUFFER and
 * up). That the interrupt has come does not say that the bytes have arrived: edu never tells. */
bool edu_transfer(struct edu *edu, uint32_t from, uint32_t to, uint32_t count, bool is_to_ram);
