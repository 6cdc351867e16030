/*
 * Interrupt lines. Where KVM has the interrupt controllers, a line is an irqfd. Where it has not, a pair of
 * 8259As stands here, and what they have for the CPU is injected before an entry: 8259A data sheet.
 *
 * Not modelled: polling, rotating priorities, special mask mode, special fully nested mode, MCS-80 mode.
 */
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "pic_registers.h"
#include "vmm.h"

#define CHIP_LINES 8
#define BIT(line) ((uint8_t)(1u << (line)))
#define SPURIOUS_LINE 7 /* what a chip names if the request has gone again */

/* Of these lines the edge/level registers can say "level": not of the timer's, the keyboard's and the like. */
#define MASTER_LEVELS 0xf8
#define SLAVE_LEVELS 0xde

enum { MASTER, SLAVE };

static struct chip {
    uint8_t irr, isr, imr;
    uint8_t level; /* lines that are level-triggered */
    uint8_t high;  /* lines that are high now */
    uint8_t base;  /* the vector of line 0 */
    unsigned icw;  /* which initialization word comes next at the data port; 0: none */
    bool needs_icw4;
    bool auto_eoi;
    bool shows_isr; /* at the command port */
} chips[2];

static bool has_chips;

/* ---- one chip ---- */

static uint8_t lowest_bit(uint8_t bits) { return bits & (uint8_t)(0u - bits); }

/* The request that the chip presents, as a bit, or 0. Fully nested mode: the lowest bit in service holds back itself
 * and all above it, which are of lower priority. */
static uint8_t chip_request(const struct chip *chip) {
    uint8_t free = chip->isr ? (uint8_t)(lowest_bit(chip->isr) - 1u) : 0xff;
    return lowest_bit(chip->irr & free & (uint8_t)~chip->imr);
}

/* An edge is a request until it is acknowledged, a level as long as it lasts. (In a real 8259A an edge that does
 * not stay high so long becomes a spurious interrupt; KVM's keeps it, and so does this one.) */
static void chip_set(struct chip *chip, unsigned line, bool is_high) {
    uint8_t bit = BIT(line);
    bool rises = is_high && !(chip->high & bit);
    chip->high = is_high ? chip->high | bit : chip->high & (uint8_t)~bit;
    if (rises || (is_high && (chip->level & bit)))
        chip->irr |= bit;
    else if (!is_high && (chip->level & bit))
        chip->irr &= (uint8_t)~bit;
}

static uint8_t chip_acknowledge(struct chip *chip) {
    uint8_t bit = chip_request(chip);
    unsigned line = bit ? (unsigned)__builtin_ctz(bit) : SPURIOUS_LINE;
    if (!(chip->level & bit))
        chip->irr &= (uint8_t)~bit;
    if (!chip->auto_eoi)
        chip->isr |= bit;
    return (uint8_t)(chip->base + line);
}

static void chip_command(struct chip *chip, uint8_t value) {
    if (value & PIC_ICW1) {
        *chip = (struct chip){.level = chip->level, .high = chip->high, .icw = 2};
        chip->irr = chip->high & chip->level;
        chip->needs_icw4 = value & PIC_ICW1_NEEDS_ICW4;
    } else if (value & PIC_OCW3) {
        if ((value & PIC_OCW3_READ_IRR) == PIC_OCW3_READ_IRR)
            chip->shows_isr = value == PIC_OCW3_READ_ISR;
    } else if ((value & PIC_OCW2_SPECIFIC_EOI) == PIC_OCW2_SPECIFIC_EOI) {
        chip->isr &= (uint8_t)~BIT(value % CHIP_LINES);
    } else if (value & PIC_OCW2_EOI) {
        chip->isr &= chip->isr - 1;
    }
}

static void chip_data(struct chip *chip, uint8_t value) {
    switch (chip->icw) {
    case 2:
        chip->base = value & (uint8_t) ~(CHIP_LINES - 1);
        chip->icw = 3;
        break;
    case 3: /* where the slave is: here it is where a PC has it */
        chip->icw = chip->needs_icw4 ? 4 : 0;
        break;
    case 4:
        chip->auto_eoi = value & PIC_ICW4_AUTO_EOI;
        chip->icw = 0;
        break;
    default: chip->imr = value; break;
    }
}

/* ---- the pair ---- */

/* A request of the slave's is an edge of the master's line that it is behind, again whenever something changes, so
 * that none is lost while an earlier one is in service. */
static void cascade_update(void) {
    if (!chip_request(&chips[SLAVE]))
        return;
    chip_set(&chips[MASTER], PIC_CASCADE, true);
    chip_set(&chips[MASTER], PIC_CASCADE, false);
}

static uint8_t pair_acknowledge(void) {
    bool is_slave = chip_request(&chips[MASTER]) == BIT(PIC_CASCADE);
    uint8_t vector = chip_acknowledge(&chips[MASTER]);
    if (is_slave)
        vector = chip_acknowledge(&chips[SLAVE]);
    cascade_update();
    return vector;
}

static uint8_t chip_read(const struct chip *chip, bool is_data) {
    if (is_data)
        return chip->imr;
    return chip->shows_isr ? chip->isr : chip->irr;
}

static void chip_access(struct access *access) {
    struct chip *chip = &chips[access->address < PIC_SLAVE ? MASTER : SLAVE];
    bool is_data = access->address & 1;
    for (uint32_t i = 0; i < access->size * access->count; i++) {
        if (!access->is_write)
            access->data[i] = chip_read(chip, is_data);
        else if (is_data)
            chip_data(chip, access->data[i]);
        else
            chip_command(chip, access->data[i]);
    }
    cascade_update();
}

static void edge_level_access(struct access *access) {
    for (uint32_t i = 0; i < access->size * access->count; i++) {
        struct chip *chip = &chips[(access->address + i % access->size) & 1];
        if (access->is_write)
            chip->level = access->data[i] & (chip == &chips[MASTER] ? MASTER_LEVELS : SLAVE_LEVELS);
        else
            access->data[i] = chip->level;
    }
    cascade_update();
}

static void chips_create(void) {
    if (has_chips)
        return;
    has_chips = true;
    chips[MASTER].imr = chips[SLAVE].imr = 0xff; /* nothing comes through that nobody expects */
    host_claim_pio(PIC_MASTER, 2, "pic", chip_access);
    host_claim_pio(PIC_SLAVE, 2, "pic", chip_access);
    host_claim_pio(PIC_EDGE_LEVEL, 2, "pic", edge_level_access);
}

void pic_before_entry(void) {
    struct kvm_run *run = host_run();
    if (!has_chips)
        return;
    if (run->ready_for_interrupt_injection && chip_request(&chips[MASTER]))
        vcpu_interrupt(pair_acknowledge());
    run->request_interrupt_window = chip_request(&chips[MASTER]) != 0;
}

/* ---- lines that are KVM's: KVM_IRQFD with a resample eventfd ---- */

/* Raising is a write to one eventfd. The end of the interrupt lowers the line and is told by the other; if the
 * device still has something, it is raised again. */
static struct {
    int raise, resample;
    bool is_high;
} kvm_lines[PIC_LINES];

static void kvm_line_raise(unsigned line) {
    uint64_t one = 1;
    if (write(kvm_lines[line].raise, &one, sizeof one) != sizeof one)
        die(STATUS_HOST, "cannot raise interrupt line %u: %s", line, strerror(errno));
}

static void kvm_line_resample(void *context) {
    unsigned line = (unsigned)(uintptr_t)context;
    uint64_t ends;
    if (read(kvm_lines[line].resample, &ends, sizeof ends) == sizeof ends &&
        kvm_lines[line].is_high)
        kvm_line_raise(line);
}

static void kvm_line_create(unsigned line) {
    kvm_lines[line].raise = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    kvm_lines[line].resample = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (kvm_lines[line].raise < 0 || kvm_lines[line].resample < 0)
        die(STATUS_HOST, "no eventfd for interrupt line %u: %s", line, strerror(errno));
    struct kvm_irqfd request = {.fd = (uint32_t)kvm_lines[line].raise,
                                .gsi = line,
                                .flags = KVM_IRQFD_FLAG_RESAMPLE,
                                .resamplefd = (uint32_t)kvm_lines[line].resample};
    host_vm(KVM_IRQFD, &request);
    io_watch(kvm_lines[line].resample, false, kvm_line_resample, (void *)(uintptr_t)line);
}

/* ---- lines ---- */

void line_create(unsigned line) {
    if (line >= PIC_LINES)
        die(STATUS_HOST, "there is no interrupt line %u: a PC has %u", line, PIC_LINES);
    if (host_machine()->irqchip == MACHINE_IRQCHIP_KERNEL)
        kvm_line_create(line);
    else
        chips_create();
}

void line_set(unsigned line, bool is_high) {
    if (has_chips) {
        chip_set(&chips[line / CHIP_LINES], line % CHIP_LINES, is_high);
        cascade_update();
        if (chip_request(&chips[MASTER]))
            vcpu_kick();
        return;
    }
    if (is_high && !kvm_lines[line].is_high)
        kvm_line_raise(line);
    kvm_lines[line].is_high = is_high;
}
