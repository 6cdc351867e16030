/* The interrupt controllers of a PC: 8259A data sheet, "Programming the 8259A". */
#include "pic.h"
#include "apic.h"

#define LINES_PER_CHIP 8
#define DATA 1 /* behind the command port */
#define ALL_LINES 0xff
#define IDLE_LINE 7 /* what a chip names when it has nothing to say */

#define CPUID_1_EDX_APIC (1u << 9)

static uint8_t vector_base;

/* The chip that a line belongs to, and the line's bit there. */
static uint16_t chip(unsigned line) { return line < LINES_PER_CHIP ? PIC_MASTER : PIC_SLAVE; }
static uint8_t bit(unsigned line) { return (uint8_t)(1 << line % LINES_PER_CHIP); }

static void chip_begin(uint16_t command, uint8_t base, uint8_t cascade) {
    out8(command, PIC_ICW1 | PIC_ICW1_NEEDS_ICW4);
    out8(command + DATA, base);
    out8(command + DATA, cascade);
    out8(command + DATA, PIC_ICW4_8086);
    out8(command + DATA, ALL_LINES); /* OCW1: ICW1 has cleared the mask */
}

/* ICW1 leaves the last choice of OCW3 open: choose before each look. */
static bool is_in_service(unsigned line) {
    out8(chip(line), PIC_OCW3_READ_ISR);
    return in8(chip(line)) & bit(line);
}

/*
 * A line that falls again between the CPU's interrupt and its acknowledge leaves the chip with nothing to
 * say, and it says line 7 (8259A data sheet, "Interrupt Sequence"). Nothing is in service then, and there is
 * nothing to end; but if it was the slave that said so, the master believes in an interrupt of its line 2.
 */
static bool spurious(struct trap_frame *frame) {
    unsigned line = (unsigned)frame->vector - vector_base;
    if (is_in_service(line))
        return false;
    if (chip(line) == PIC_SLAVE)
        out8(PIC_MASTER, PIC_OCW2_SPECIFIC_EOI | PIC_CASCADE);
    return true;
}

/*
 * A local APIC stands between the 8259As and the CPU. At power-up it lets nothing through: SDM 3A "Local APIC
 * State After Power-Up or Reset". "Virtual wire mode" is firmware's to set up, which a PVH image need not have had.
 * While the APIC is disabled by software, its pins cannot be unmasked.
 */
static void local_apic_let_through(void) {
    if (!(cpuid(1, 0).edx & CPUID_1_EDX_APIC))
        return;
    lapic_write(LAPIC_SVR, lapic_read(LAPIC_SVR) | LAPIC_SVR_ENABLE);
    lapic_write(LAPIC_LVT_LINT0, APIC_DELIVERY_EXTINT);
}

void pic_begin(uint8_t base) {
    vector_base = base;
    chip_begin(PIC_MASTER, base, bit(PIC_CASCADE));
    chip_begin(PIC_SLAVE, base + LINES_PER_CHIP, PIC_CASCADE);
    out8(PIC_EDGE_LEVEL, 0);
    out8(PIC_EDGE_LEVEL + 1, 0);
    local_apic_let_through();
    trap_handle(base + IDLE_LINE, spurious);
    trap_handle(base + LINES_PER_CHIP + IDLE_LINE, spurious);
}

static void mask_change(unsigned line, bool is_masked) {
    uint16_t port = chip(line) + DATA;
    uint8_t others = in8(port) & (uint8_t)~bit(line);
    out8(port, is_masked ? others | bit(line) : others);
}

void pic_unmask(unsigned line) {
    uint16_t port = PIC_EDGE_LEVEL + line / LINES_PER_CHIP;
    out8(port, in8(port) | bit(line));
    mask_change(line, false);
    if (chip(line) == PIC_SLAVE)
        mask_change(PIC_CASCADE, false);
}

void pic_mask(unsigned line) { mask_change(line, true); }

void pic_eoi(unsigned line) {
    out8(chip(line), PIC_OCW2_SPECIFIC_EOI | line % LINES_PER_CHIP);
    if (chip(line) == PIC_SLAVE)
        out8(PIC_MASTER, PIC_OCW2_SPECIFIC_EOI | PIC_CASCADE);
}
