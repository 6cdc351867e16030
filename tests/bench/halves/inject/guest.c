/* Take count= interrupts, an exit for each. case= says how they are injected. */
#include "../../../guests/cases.h"
#include "lab.h"

MACHINE(.memory_mib = 64, .irqchip = MACHINE_IRQCHIP_NONE);

static volatile uint64_t taken;

static bool on_interrupt(struct trap_frame *frame) {
    (void)frame;
    taken++;
    return true;
}

static void interrupts_take(enum how how) {
    uint64_t count = case_number("count");
    trap_handle(LAB_VECTOR, on_interrupt);
    out8(LAB_HOW, (uint8_t)how);
    sti();
    for (uint64_t i = 0; i < count; i++)
        out8(LAB_NEXT, 0);
    cli();
    if (taken != count)
        PANIC("an interrupt is missing, or is one too many");
}

static void by_ioctl(void) { interrupts_take(HOW_IOCTL); }
static void by_synced_events(void) { interrupts_take(HOW_SYNCED); }

void guest_main(void) {
    static const struct guest_case cases[] = {{"ioctl", by_ioctl}, {"synced", by_synced_events}};
    CASE_RUN(cases);
}
