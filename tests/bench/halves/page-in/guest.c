/* Touch count= pages, one after the other. case= says where they come from. */
#include "../../../guests/cases.h"
#include "lab.h"

MACHINE(.memory_mib = 64, .irqchip = MACHINE_IRQCHIP_NONE);

static void pages_touch(enum source source) {
    uint64_t count = case_number("count");
    if (count > LAB_PAGES)
        PANIC("the slot has not so many pages");
    out8(LAB_SOURCE, (uint8_t)source);
    for (uint64_t i = 0; i < count; i++)
        mmio_write32(LAB_GPA + i * PAGE_SIZE, 1);
}

static void anonymous(void) { pages_touch(SOURCE_ANONYMOUS); }
static void uffd1(void) { pages_touch(SOURCE_PAGE); }
static void uffd16(void) { pages_touch(SOURCE_BLOCK); }

void guest_main(void) {
    static const struct guest_case cases[] = {
        {"anonymous", anonymous}, {"uffd1", uffd1}, {"uffd16", uffd16}};
    CASE_RUN(cases);
}
