/*
 * Lesson 12, guest half: given. The driver is yours, of lesson 11 (guest/edu.c). It has one device
 * now, and what it calls an address is what the host half has told the IOMMU.
 */
#include "guest.h"
#include "apic.h"
#include "edu.h"
#include "lab.h"
#include "pic.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_KERNEL, .devices = MACHINE_DEVICE_COM1);

static struct plan plan;
static struct edu edu;
static unsigned rounds; /* of the line's interrupts */

static void stage(enum stage number) { out8(LAB_STAGE, (uint8_t)number); }

static _Noreturn void fail(const char *what) {
    printf("%s\n", what);
    guest_exit(1);
}

/* ================================ Interrupts ================================ */

static bool on_message(struct trap_frame *frame) {
    (void)frame;
    out8(LAB_HEARD, INTERRUPT_MESSAGE);
    edu_interrupted(&edu);
    lapic_eoi();
    return true;
}

/* As long as the device's interrupt is not acknowledged, the line comes again after each EOI. */
static bool on_line(struct trap_frame *frame) {
    (void)frame;
    out8(LAB_HEARD, INTERRUPT_LINE);
    if (++rounds >= plan.line_rounds)
        edu_interrupted(&edu);
    pic_eoi(plan.line);
    return true;
}

static void interrupts_setup(void) {
    edu_driver_begin(plan.timer_vector);
    pic_begin(plan.line_base);
    trap_handle(plan.vector, on_message);
    trap_handle((uint8_t)(plan.line_base + plan.line), on_line);
    pic_unmask(plan.line);
}

static void raise(unsigned number) { edu_command(&edu, EDU_INTERRUPT_RAISE, plan.raise[number]); }

static void work_messages(void) {
    out8(LAB_INTERRUPT, INTERRUPT_MESSAGE);
    for (unsigned i = 0; i < 2; i++) {
        raise(i);
        if (!edu_await_interrupt(&edu, plan.raise[i]))
            fail("no message comes");
    }
    stage(STAGE_MESSAGES);
}

static void work_line(void) {
    out8(LAB_INTERRUPT, INTERRUPT_LINE);
    raise(2);
    if (!edu_await_interrupt(&edu, plan.raise[2]))
        fail("the line does not interrupt, or not again");
    stage(STAGE_LINE);
}

/* Nobody but the host half hears this one. */
static void work_by_hand(void) {
    out8(LAB_INTERRUPT, INTERRUPT_BY_HAND);
    raise(2);
    stage(STAGE_RAISED);
    edu_command(&edu, EDU_INTERRUPT_ACKNOWLEDGE, plan.raise[2]);
    stage(STAGE_ACKNOWLEDGED);
    out8(LAB_INTERRUPT, INTERRUPT_MESSAGE);
}

/* ================================ DMA ================================ */

static void transfer(uint64_t from, uint64_t to, bool is_to_ram) {
    if (!edu_transfer(&edu, (uint32_t)from, (uint32_t)to, plan.count, is_to_ram))
        fail("the device does not say that a transfer is over");
}

static void buffer_to(uint64_t iova, enum stage then) {
    transfer(EDU_BUFFER + plan.buffer, iova, true);
    stage(then);
}

static void work_dma(void) {
    const struct window *source = &plan.window[WINDOW_SOURCE];
    const struct window *destination = &plan.window[WINDOW_DESTINATION];
    out8(LAB_MAP, WINDOW_SOURCE);
    out8(LAB_MAP, WINDOW_DESTINATION);
    transfer(source->iova + plan.from, EDU_BUFFER + plan.buffer, false);
    buffer_to(destination->iova + plan.to, STAGE_MOVED);
    printf("%u bytes there and back\n", plan.count);
    buffer_to(source->iova + PAGE_SIZE + plan.from, STAGE_READ_ONLY);
    buffer_to(VICTIM_GPA, STAGE_OUTSIDE);
    printf("2 transfers that must not be\n");
    out8(LAB_UNMAP, WINDOW_DESTINATION);
    buffer_to(destination->iova + plan.from, STAGE_UNMAPPED);
    out8(LAB_MAP, WINDOW_OTHER);
    buffer_to(destination->iova + plan.to, STAGE_AGAIN);
    printf("one address, and another memory\n");
}

/* ================================ The work ================================ */

static void work_registers(void) {
    out8(LAB_ATTACH, 0);
    if (!in8(LAB_ATTACH))
        fail("there is no device");
    stage(STAGE_ATTACHED);
    for (unsigned i = 0; i < READS; i++)
        edu_read(&edu, EDU_ID);
    stage(STAGE_READ);
    if (!edu_probe(&edu, plan.liveness))
        fail("it is no edu device, or it does not live");
    stage(STAGE_PROBED);
    printf("it lives\n");
}

void guest_main(void) {
    plan = plan_make(guest_seed());
    edu = (struct edu){.bar_gva = plan.bar_gpa, .vector = plan.vector};
    memset((void *)VICTIM_GPA, VICTIM_BYTE, VICTIM_SIZE);
    printf("lesson 12: the same driver, and an IOMMU\n");
    out8(LAB_EXERCISE, 0);
    printf("the tables are tried\n");
    interrupts_setup();
    work_registers();
    work_messages();
    printf("2 messages\n");
    work_line();
    printf("%u interrupts by the line\n", rounds);
    work_by_hand();
    printf("one by hand\n");
    work_dma();
}
