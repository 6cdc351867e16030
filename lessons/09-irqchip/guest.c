/* Lesson 9, guest half: the local APIC, the I/O APIC, and devices that interrupt through them. */
#include "guest.h"
#include "apic.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_KERNEL, .devices = MACHINE_DEVICE_COM1);

#define PATIENCE 2500 /* turns of a loop that waits for an interrupt: far more than it can need */
#define SPURIOUS 0xff
#define STORM 64 /* interrupts of one device that no plan asks for */

static struct plan plan;
static volatile unsigned taken[DEVICES]; /* interrupts so far */

/* ---- what you write ---- */

/* Interrupt this CPU itself, with this vector: one write to the interrupt command register. */
static void self_interrupt(uint8_t vector) {
    /* BEGIN SOLUTION */
    lapic_write(LAPIC_ICR_LOW, LAPIC_ICR_TO_SELF | LAPIC_ICR_ASSERT | APIC_DELIVERY_FIXED | vector);
    /* STUB
    (void)vector;
    TODO("send an interprocessor interrupt to this CPU itself");
    END SOLUTION */
}

/*
 * The device has interrupted, and its vector is in service. Serve the device: take what it has from
 * its port, LAB_TAKE in lab.h, with one 32-bit IN. Then tell the local APIC that the interrupt is over.
 */
static void device_serve(enum device device) {
    /* BEGIN SOLUTION */
    in32((uint16_t)(LAB_TAKE + 4 * device));
    lapic_eoi();
    /* STUB
    (void)device;
    TODO("serve the device, then end the interrupt");
    END SOLUTION */
}

/* Let the timer count down once, from count, undivided, and interrupt with this vector at 0. */
static void timer_start(uint8_t vector, uint32_t count) {
    /* BEGIN SOLUTION */
    lapic_write(LAPIC_TIMER_DIVIDE, LAPIC_TIMER_DIVIDE_BY_1);
    lapic_write(LAPIC_LVT_TIMER, vector);
    lapic_write(LAPIC_TIMER_INITIAL, count);
    /* STUB
    (void)vector, (void)count;
    TODO("start the timer of the local APIC, one-shot");
    END SOLUTION */
}

/*
 * From now on hold back this vector, all of its priority class, and all classes below it. Those above
 * are let through. Vector 0: hold back nothing.
 */
static void threshold_set(uint8_t vector) {
    /* BEGIN SOLUTION */
    lapic_write(LAPIC_TPR, vector & 0xf0);
    /* STUB
    (void)vector;
    TODO("set the task priority");
    END SOLUTION */
}

/*
 * Let this pin of the I/O APIC send this vector to this CPU, whose logical destination is
 * plan.logical_id. The line is active high. The entry is 64 bits wide, in two registers; it takes
 * effect when its mask bit becomes 0.
 */
static void line_program(unsigned pin, uint8_t vector, bool is_level) {
    /* BEGIN SOLUTION */
    uint64_t entry = vector | APIC_DELIVERY_FIXED | IOAPIC_LOGICAL |
                     (uint64_t)plan.logical_id << IOAPIC_DESTINATION_SHIFT;
    if (is_level)
        entry |= IOAPIC_LEVEL;
    ioapic_write(IOAPIC_REDIRECTION(pin) + 1, (uint32_t)(entry >> 32));
    ioapic_write(IOAPIC_REDIRECTION(pin), (uint32_t)entry);
    /* STUB
    (void)pin, (void)vector, (void)is_level;
    TODO("write the redirection entry of this pin");
    END SOLUTION */
}

/* ---- interrupts ---- */

static bool on_interrupt(struct trap_frame *frame) {
    enum device device = 0;
    while (device < DEVICE_BELL && plan.vector[device] != frame->vector)
        device++;
    if (++taken[device] > STORM)
        PANIC("an interrupt storm: the same device interrupts again and again, served or not");
    device_serve(device);
    return true;
}

static bool on_bell(struct trap_frame *frame) {
    (void)frame;
    taken[DEVICE_BELL]++;
    lapic_eoi();
    return true;
}

static bool on_nmi(struct trap_frame *frame) {
    (void)frame;
    taken[DEVICE_NMI]++;
    in32(LAB_TAKE + 4 * DEVICE_NMI);
    return true;
}

/* An interrupt that no device has: somebody got a vector wrong. */
static bool on_stray(struct trap_frame *frame) {
    out8(LAB_STRAY, (uint8_t)frame->vector);
    lapic_eoi();
    return true;
}

/* An interrupt that was gone when the CPU asked for it: SDM 3A "Spurious Interrupt". It is not in
 * service, so it needs no end. */
static bool on_spurious(struct trap_frame *frame) {
    (void)frame;
    return true;
}

/* The local APIC is on, the CPU has a logical destination, and nothing is held back. */
static void interrupts_setup(void) {
    for (unsigned vector = 32; vector < VECTORS; vector++)
        trap_handle((uint8_t)vector, on_stray);
    for (enum device device = 0; device < DEVICE_BELL; device++)
        trap_handle(plan.vector[device], on_interrupt);
    trap_handle(plan.vector[DEVICE_BELL], on_bell);
    trap_handle(VECTOR_NMI, on_nmi);
    trap_handle(SPURIOUS, on_spurious);
    lapic_write(LAPIC_DFR, 0xffffffff);
    lapic_write(LAPIC_LDR, (uint32_t)plan.logical_id << 24);
    lapic_write(LAPIC_SVR, LAPIC_SVR_ENABLE | SPURIOUS);
    lapic_write(LAPIC_TPR, 0);
}

/* ---- stages: interrupts are off but while one is waited for ---- */

/* Wait until the device has interrupted so often in all; false if it does not come to that. */
static bool device_wait(enum device device, unsigned count) {
    sti();
    for (unsigned turn = 0; taken[device] < count && turn < PATIENCE; turn++)
        pause();
    cli();
    return taken[device] >= count;
}

static void stage_self(void) {
    self_interrupt(plan.vector[DEVICE_SELF]);
    device_wait(DEVICE_SELF, 1);
    out8(LAB_STAGE, STAGE_SELF);
    printf("self: %u interrupt by the guest itself\n", taken[DEVICE_SELF]);
}

static void stage_timer(void) {
    timer_start(plan.vector[DEVICE_TIMER], plan.timer_count);
    for (unsigned i = 0; i < 10 && !taken[DEVICE_TIMER]; i++) {
        out8(LAB_EXPIRY, 0);
        device_wait(DEVICE_TIMER, 1);
    }
    out8(LAB_STAGE, STAGE_TIMER);
    printf("timer: %u interrupt by the local APIC's timer\n", taken[DEVICE_TIMER]);
}

static void stage_messages(void) {
    for (unsigned i = 1; i <= plan.messages; i++) {
        out8(LAB_START, DEVICE_LOW);
        device_wait(DEVICE_LOW, i);
        out8(LAB_START, DEVICE_HIGH);
        device_wait(DEVICE_HIGH, i);
    }
    out8(LAB_STAGE, STAGE_MESSAGES);
    printf("messages: %u and %u\n", taken[DEVICE_LOW], taken[DEVICE_HIGH]);
}

static void stage_threshold(void) {
    unsigned low = taken[DEVICE_LOW];
    threshold_set(plan.vector[DEVICE_LOW]);
    out8(LAB_START, DEVICE_LOW);
    out8(LAB_START, DEVICE_HIGH);
    device_wait(DEVICE_HIGH, taken[DEVICE_HIGH] + 1);
    device_wait(DEVICE_LOW, low + 1);
    out8(LAB_STAGE, STAGE_HELD_BACK);
    printf("threshold: %u held back", 1 - (taken[DEVICE_LOW] - low));
    threshold_set(0);
    device_wait(DEVICE_LOW, low + 1);
    out8(LAB_STAGE, STAGE_RELEASED);
    printf(", then %u released\n", taken[DEVICE_LOW] - low);
}

static void stage_nmi(void) {
    out8(LAB_START, DEVICE_NMI);
    for (unsigned turn = 0; !taken[DEVICE_NMI] && turn < PATIENCE; turn++)
        pause();
    if (!taken[DEVICE_NMI])
        device_wait(DEVICE_NMI, 1); /* what came instead? */
    out8(LAB_STAGE, STAGE_NMI);
    printf("nmi: %u, with interrupts off\n", taken[DEVICE_NMI]);
}

static void stage_edge(void) {
    for (unsigned i = 1; i <= plan.edges; i++) {
        out8(LAB_START, DEVICE_EDGE);
        device_wait(DEVICE_EDGE, i);
    }
    out8(LAB_STAGE, STAGE_EDGE);
    printf("edge: %u interrupts\n", taken[DEVICE_EDGE]);
}

/* As long as the device goes on interrupting. */
static void level_wait(void) {
    unsigned most = taken[DEVICE_LEVEL] + 2 * plan.requests + 2;
    while (taken[DEVICE_LEVEL] < most && device_wait(DEVICE_LEVEL, taken[DEVICE_LEVEL] + 1))
        out8(LAB_WAIT, 0);
}

static void stage_level(void) {
    out8(LAB_START, DEVICE_LEVEL);
    level_wait();
    out8(LAB_STAGE, STAGE_LEVEL);
    printf("level: %u interrupts\n", taken[DEVICE_LEVEL]);
}

static void line_mask(unsigned pin, bool is_masked) {
    uint32_t low = ioapic_read(IOAPIC_REDIRECTION(pin)) & ~(uint32_t)IOAPIC_MASKED;
    ioapic_write(IOAPIC_REDIRECTION(pin), low | (is_masked ? (uint32_t)IOAPIC_MASKED : 0));
}

static void stage_masked(void) {
    unsigned edges = taken[DEVICE_EDGE];
    unsigned levels = taken[DEVICE_LEVEL];
    line_mask(plan.edge_pin, true);
    line_mask(plan.level_pin, true);
    out8(LAB_STAGE, STAGE_MASKED);
    out8(LAB_START, DEVICE_EDGE);
    out8(LAB_START, DEVICE_LEVEL);
    line_mask(plan.edge_pin, false);
    line_mask(plan.level_pin, false);
    out8(LAB_WAIT, 0); /* newer kernels let the VMM drive the line again, after an unmask, too */
    level_wait();
    device_wait(DEVICE_EDGE, edges + 1);
    out8(LAB_STAGE, STAGE_UNMASKED);
    printf("masked: %u by edge, %u by level\n", taken[DEVICE_EDGE] - edges,
           taken[DEVICE_LEVEL] - levels);
}

/* With interrupts on all the time, as a guest that has better to do than to wait. */
static void stage_bell(enum stage stage, uint16_t bell) {
    unsigned before = taken[DEVICE_BELL];
    out8(LAB_STAGE, (uint8_t)stage);
    sti();
    for (unsigned ring = 1; ring <= RINGS; ring++) {
        out8(bell, 0);
        for (unsigned turn = 0; taken[DEVICE_BELL] < before + ring && turn < PATIENCE; turn++)
            pause();
        if (taken[DEVICE_BELL] < before + ring)
            break;
    }
    cli();
}

void guest_main(void) {
    /* With the local APIC in the VMM there is no timer, and nothing that KVM could do by itself. */
    bool has_kernel_apic = in8(LAB_MACHINE) != MACHINE_IRQCHIP_NONE;
    plan = plan_make(guest_seed());
    printf("lesson 9: the interrupt controller in the kernel\n");
    interrupts_setup();
    stage_self();
    if (has_kernel_apic)
        stage_timer();
    stage_messages();
    stage_threshold();
    stage_nmi();
    line_program(plan.edge_pin, plan.vector[DEVICE_EDGE], false);
    line_program(plan.level_pin, plan.vector[DEVICE_LEVEL], true);
    out8(LAB_STAGE, STAGE_LINES);
    out8(LAB_CONNECT, 0);
    stage_edge();
    stage_level();
    stage_masked();
    stage_bell(STAGE_BELL, LAB_BELL);
    unsigned by_irqfd = taken[DEVICE_BELL];
    if (has_kernel_apic)
        stage_bell(STAGE_FAST_BELL, LAB_FAST_BELL);
    by_irqfd = taken[DEVICE_BELL] - by_irqfd;
    out8(LAB_STAGE, STAGE_END);
    out32(LAB_HEARD, taken[DEVICE_BELL]);
    printf("bell: %u interrupts, %u of them by irqfd\n", taken[DEVICE_BELL], by_irqfd);
}
