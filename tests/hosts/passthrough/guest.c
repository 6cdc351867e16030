/*
 * Guests for the host half of lesson 11 that ask its devices for what they should not: `guest=hostile` and
 * `guest=unmaps` on the command line. (Both windows are mapped in either case.)
 */
#include "guest.h"
#include "apic.h"

#include "../../../lessons/11-passthrough/lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_KERNEL, .devices = MACHINE_DEVICE_COM1);

#define TRANSFERS_ASKED 56 /* each is four entries in the device's trace */
#define UNDIVIDED LAPIC_TIMER_DIVIDE_BY_1
#define TICK_NS 1000000
#define PATIENCE 5000 /* ticks */
#define TIMER_PERIODIC (1u << 17)

static struct plan plan;
static enum form form;
static volatile bool is_over;

static void wide_write(unsigned offset, uint64_t value) {
    __asm__ volatile("movq %0, (%1)" : : "r"(value), "r"(plan.bar_gpa[form] + offset) : "memory");
}

static void command(unsigned offset, uint32_t value) {
    mmio_write32(plan.bar_gpa[form] + offset, value);
    mmio_write32(plan.bar_gpa[form] + EDU_DOORBELL, offset);
}

static bool on_interrupt(struct trap_frame *frame) {
    (void)frame;
    command(EDU_INTERRUPT_ACKNOWLEDGE, mmio_read32(plan.bar_gpa[form] + EDU_INTERRUPT_STATUS));
    is_over = true;
    lapic_eoi();
    return true;
}

static bool on_tick(struct trap_frame *frame) {
    (void)frame;
    lapic_eoi();
    return true;
}

static void interrupts_setup(void) {
    trap_handle(plan.tick_vector, on_tick);
    for (unsigned i = 0; i < FORMS; i++)
        trap_handle(plan.vector[i], on_interrupt);
    lapic_write(LAPIC_SVR, LAPIC_SVR_ENABLE | 0xff);
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_TIMER_DIVIDE, UNDIVIDED);
    lapic_write(LAPIC_LVT_TIMER, TIMER_PERIODIC | plan.tick_vector);
    lapic_write(LAPIC_TIMER_INITIAL, TICK_NS);
}

static void transfer_await(void) {
    for (unsigned i = 0; i < PATIENCE; i++) {
        if (is_over && !mmio_read32(plan.bar_gpa[form] + EDU_INTERRUPT_STATUS))
            return;
        sti_halt();
        cli();
    }
    PANIC("a transfer does not end");
}

static void transfer_start(uint64_t source, uint64_t destination, uint64_t count, bool is_to_ram) {
    is_over = false;
    wide_write(EDU_DMA_SOURCE, source);
    wide_write(EDU_DMA_DESTINATION, destination);
    wide_write(EDU_DMA_COUNT, count);
    command(EDU_DMA_COMMAND, is_to_ram ? 7 : 5);
}

static void attach(enum form which) {
    form = which;
    out8(LAB_ATTACH, (uint8_t)form);
    if (!in8(LAB_ATTACH))
        PANIC("there is no such device");
    out8(LAB_CONNECT, CONNECT_DOORBELLS);
    out8(LAB_CONNECT, CONNECT_INTERRUPT);
    for (unsigned i = 0; i < WINDOWS; i++)
        out8(LAB_MAP, (uint8_t)i);
}

/* Near the places where something begins or ends. */
static uint64_t hostile_address(struct random *random) {
    const struct window *windows = plan.window;
    const uint64_t edges[] = {
        0,
        EDU_BUFFER,
        EDU_BUFFER + EDU_BUFFER_SIZE,
        windows[0].gpa,
        windows[0].gpa + windows[0].size,
        windows[0].gpa + 40,
        windows[1].gpa,
        windows[1].gpa + windows[1].size,
        windows[1].gpa + 40,
        plan.bar_gpa[form],
        VICTIM_GPA,
        EDU_DMA_MASK + UINT64_C(1),
        UINT64_C(1) << 63,
    };
    uint64_t edge = edges[random_below(random, sizeof edges / sizeof edges[0])];
    return edge + random_below(random, 80) - 40;
}

static uint64_t hostile_count(struct random *random) {
    const uint64_t counts[] = {
        0, 1, 2, 40, 41, 80, EDU_BUFFER_SIZE, EDU_BUFFER_SIZE + 1, 0 - UINT64_C(40)};
    return counts[random_below(random, sizeof counts / sizeof counts[0])];
}

/* Most of them are at least right about the device's buffer. */
static void hostile(enum form which) {
    struct random random = random_stream(guest_seed(), 4);
    attach(which);
    for (unsigned i = 0; i < TRANSFERS_ASKED; i++) {
        bool is_to_ram = random_below(&random, 2);
        uint64_t memory = hostile_address(&random);
        uint64_t buffer = random_below(&random, 4) ? EDU_BUFFER + random_below(&random, 64)
                                                   : hostile_address(&random);
        transfer_start(is_to_ram ? buffer : memory, is_to_ram ? memory : buffer,
                       hostile_count(&random), is_to_ram);
        transfer_await();
    }
    out8(LAB_STAGE, STAGE_HOSTILE);
}

/* Take a window away in the middle of a transfer to it. */
static void unmap_early(void) {
    attach(FORM_PASSED_THROUGH);
    transfer_start(EDU_BUFFER, plan.window[1].gpa, 64, true);
    out8(LAB_UNMAP, 1);
    transfer_await();
    out8(LAB_STAGE, STAGE_UNMAPPED);
}

void guest_main(void) {
    char what[16] = "";
    plan = plan_make(guest_seed());
    guest_parameter("guest", what, sizeof what);
    memset((void *)VICTIM_GPA, VICTIM_BYTE, VICTIM_SIZE);
    interrupts_setup();
    if (!memcmp(what, "unmaps", 7)) {
        out8(LAB_DEVICE, DEVICE_IDLES);
        unmap_early();
        return;
    }
    hostile(FORM_EMULATED);
    hostile(FORM_PASSED_THROUGH);
}
