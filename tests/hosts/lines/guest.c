/* Do what the seed says to a pair of 8259As and to the lines that lead there, and report after each step what
 * their registers show and which interrupt has come. With nmi=1: take an interrupt and an NMI that come together. */
#include "guest.h"
#include "lab.h"
#include "pic.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

#define NMI_LINE 4
#define STEPS 400
#define PATIENCE 500 /* a window may open late, an NMI come late: tests/deviations.toml */

static volatile unsigned taken; /* a vector */

/* It leaves interrupts off: one at a time. */
static bool on_interrupt(struct trap_frame *frame) {
    taken = (unsigned)frame->vector;
    frame->rflags &= ~(uint64_t)X86_EFLAGS_IF;
    return true;
}

static void interrupt_take(void) {
    sti();
    for (unsigned i = 0; i < PATIENCE && !taken; i++)
        pause();
    cli();
}

static uint8_t register_read(uint16_t chip, uint8_t which) {
    out8(chip, which);
    return in8(chip);
}

static void report(void) {
    uint32_t master = register_read(PIC_MASTER, PIC_OCW3_READ_IRR) |
                      (uint32_t)register_read(PIC_MASTER, PIC_OCW3_READ_ISR) << 8 |
                      (uint32_t)in8(PIC_MASTER + 1) << 16;
    uint32_t slave = register_read(PIC_SLAVE, PIC_OCW3_READ_IRR) |
                     (uint32_t)register_read(PIC_SLAVE, PIC_OCW3_READ_ISR) << 8 |
                     (uint32_t)in8(PIC_SLAVE + 1) << 16;
    out32(LAB_REPORT, master | taken << 24);
    out32(LAB_REPORT, slave);
    taken = 0;
}

static void step(struct random *random) {
    uint16_t chip = random_below(random, 2) ? PIC_MASTER : PIC_SLAVE;
    uint8_t line = (uint8_t)random_below(random, PIC_LINES);
    switch (random_below(random, 8)) {
    case 0: out8(chip + 1, (uint8_t)(random_next(random) & random_next(random))); break;
    case 1: out8(chip, PIC_OCW2_EOI); break;
    case 2: out8(chip, PIC_OCW2_SPECIFIC_EOI | line % 8); break;
    case 3:
    case 4: interrupt_take(); break;
    case 5: out8(LAB_LINE, line == PIC_CASCADE ? 0 : line); break;
    default: out8(LAB_LINE, (line == PIC_CASCADE ? 0 : line) | LAB_HIGH); break;
    }
}

static volatile unsigned nmis;

static bool on_nmi(struct trap_frame *frame) {
    (void)frame;
    nmis++;
    return true;
}

static void nmi_take(void) {
    trap_handle(VECTOR_NMI, on_nmi);
    pic_unmask(NMI_LINE);
    sti();
    out8(LAB_NMI, NMI_LINE | LAB_HIGH);
    interrupt_take();
    for (unsigned i = 0; i < PATIENCE && !nmis; i++)
        pause();
    out32(LAB_REPORT, taken | nmis << 8);
}

void guest_main(void) {
    char nmi[2];
    struct random random = random_stream(guest_seed(), 1);
    pic_begin(LAB_BASE);
    for (unsigned line = 0; line < PIC_LINES; line++)
        trap_handle((uint8_t)(LAB_BASE + line), on_interrupt);
    if (guest_parameter("nmi", nmi, sizeof nmi)) {
        nmi_take();
        guest_exit(0);
    }
    out8(PIC_EDGE_LEVEL, (uint8_t)random_next(&random));
    out8(PIC_EDGE_LEVEL + 1, (uint8_t)random_next(&random));
    out32(LAB_REPORT, in8(PIC_EDGE_LEVEL) | (uint32_t)in8(PIC_EDGE_LEVEL + 1) << 8);
    for (unsigned i = 0; i < STEPS; i++) {
        step(&random);
        report();
    }
    guest_exit(0); /* and no halt, which with a local APIC in the kernel does not end the run */
}
