/*
 * Lesson 11, guest half: what is done with the driver of the edu device, which you write in
 * guest/edu.c. It has two devices, and cannot tell which of them is emulated and which is passed
 * through.
 */
#include "guest.h"
#include "apic.h"
#include "edu.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_KERNEL, .devices = MACHINE_DEVICE_COM1);

/* ================================ Interrupts ================================ */

#define STORM 500 /* interrupts: no work here causes so many */

static struct plan plan;
static struct edu devices[FORMS];

/* More than anybody can have asked for: take the device away. */
static void storm_check(const struct edu *edu) {
    if (edu->interrupts == STORM)
        out8(LAB_DETACH, 0);
}

static bool on_interrupt(struct trap_frame *frame) {
    struct edu *edu = &devices[0];
    while (edu->vector != frame->vector)
        edu++;
    edu_interrupted(edu);
    storm_check(edu);
    lapic_eoi();
    return true;
}

static void interrupts_setup(void) {
    edu_driver_begin(plan.tick_vector);
    for (enum form form = 0; form < FORMS; form++)
        trap_handle(plan.vector[form], on_interrupt);
}

/* ================================ The work ================================ */

static const char *const form_names[FORMS] = {"emulated", "passed through"};

static enum form form_now;

/* A device that does not do what it should, or a driver that does not: take it away. */
static _Noreturn void fail(const char *what) {
    printf("%s: %s\n", form_names[form_now], what);
    out8(LAB_DETACH, 0);
    printf("its id reads as 0x%08x now\n", edu_read(&devices[form_now], EDU_ID));
    guest_exit(1);
}

static void stage(enum stage number) { out8(LAB_STAGE, (uint8_t)number); }

/* What else was mapped into the BAR: two words of it tell where it begins and ends. */
static void part_read(const struct edu *edu) {
    unsigned first = (unsigned)plan.part.area_offset, size = (unsigned)plan.part.area_size;
    out32(LAB_PART, edu_read(edu, first));
    out32(LAB_PART, edu_read(edu, first + size - 4));
}

static struct edu *attach(enum form form) {
    struct edu *edu = &devices[form];
    form_now = form;
    out8(LAB_ATTACH, (uint8_t)form);
    if (!in8(LAB_ATTACH))
        fail("there is no such device");
    if (form == FORM_PASSED_THROUGH)
        part_read(edu);
    stage(STAGE_ATTACHED);
    return edu;
}

static void work_read(const struct edu *edu) {
    uint32_t id = 0;
    for (unsigned i = 0; i < READS; i++)
        id = edu_read(edu, EDU_ID);
    out32(LAB_ID, id);
    stage(STAGE_READ);
}

/* It is driven by mistake: it has another id. Nothing may be written to it. */
static void work_impostor(const struct edu *edu, enum form form) {
    if (form == FORM_EMULATED) {
        out8(LAB_IMPOSTOR, true);
        out8(LAB_ANSWER, edu_probe(edu, ~plan.liveness[form]));
        out8(LAB_IMPOSTOR, false);
    }
    stage(STAGE_IMPOSTOR);
}

static void work_probe(const struct edu *edu, enum form form) {
    out8(LAB_CONNECT, CONNECT_DOORBELLS);
    if (!edu_probe(edu, plan.liveness[form]))
        fail("it is no edu device, or it does not live");
    stage(STAGE_PROBED);
}

static void raise(struct edu *edu, uint32_t causes, uint32_t awaited) {
    edu_command(edu, EDU_INTERRUPT_RAISE, causes);
    if (!edu_await_interrupt(edu, awaited))
        fail("it does not interrupt, or takes no note of the acknowledgement");
}

/* The first interrupt has several causes. One of them is waited for now, another when the second
 * interrupt has come. */
static void work_raise(struct edu *edu, enum form form) {
    const uint32_t *causes = plan.raise[form];
    out8(LAB_CONNECT, CONNECT_INTERRUPT);
    raise(edu, causes[0], RAISE_ONE);
    raise(edu, causes[1], causes[1]);
    if (!edu_await_interrupt(edu, RAISE_OTHER))
        fail("the driver has forgotten what the interrupt before this one was for");
    stage(STAGE_RAISED);
}

static void work_factorial(struct edu *edu, enum form form) {
    for (unsigned i = 0; i < FACTORIALS; i++) {
        uint32_t result = 0;
        if (!edu_factorial(edu, plan.factorial[form][i], &result))
            fail("it does not say that the factorial is there");
        out32(LAB_RESULT, result);
    }
    stage(STAGE_FACTORIAL);
}

static void transfer(struct edu *edu, uint64_t from, uint64_t to, uint32_t count, bool is_to_ram) {
    if (!edu_transfer(edu, (uint32_t)from, (uint32_t)to, count, is_to_ram))
        fail("it does not say that a transfer is over");
}

static uint32_t sum(const uint8_t *bytes, uint32_t count) {
    uint32_t total = 0;
    for (uint32_t i = 0; i < count; i++)
        total += bytes[i];
    return total;
}

/* Both windows become the device's to reach. That one of them does so twice is a mistake, which the
 * device refuses. */
static void windows_map(void) {
    for (unsigned i = 0; i < WINDOWS; i++)
        out8(LAB_MAP, (uint8_t)i);
    out8(LAB_MAP, 0);
}

static void work_dma(struct edu *edu, enum form form) {
    windows_map();
    for (unsigned i = 0; i < TRANSFERS; i++) {
        const struct transfer *t = &plan.transfer[form][i];
        transfer(edu, plan.window[0].gpa + t->from, EDU_BUFFER + t->buffer, t->count, false);
        transfer(edu, EDU_BUFFER + t->buffer, plan.window[1].gpa + t->to, t->count, true);
        out32(LAB_SUM, sum((const uint8_t *)plan.window[1].gpa + t->to, t->count));
    }
    stage(STAGE_DMA);
}

/* What a driver must never ask for: RAM that the device was not given, the device's own registers,
 * and what lies before, behind and across the end of a window. */
static void work_outside(struct edu *edu, enum form form) {
    const struct window *window = &plan.window[1];
    uint32_t count = plan.transfer[form][0].count;
    uint64_t buffer = EDU_BUFFER + plan.transfer[form][0].buffer;
    transfer(edu, buffer, VICTIM_GPA, count, true);
    transfer(edu, buffer, plan.bar_gpa[form], count, true);
    transfer(edu, buffer, window->gpa - count, count, true);
    transfer(edu, buffer, window->gpa + window->size - count / 2, count, true);
    transfer(edu, buffer, window->gpa + window->size, count, true);
    stage(STAGE_OUTSIDE);
}

/* One window is taken away, the other is not. To take it away twice is refused. */
static void work_unmapped(struct edu *edu, enum form form) {
    const struct transfer *t = &plan.transfer[form][1];
    out8(LAB_UNMAP, 0);
    out8(LAB_UNMAP, 0);
    transfer(edu, plan.window[0].gpa + t->from + 1, EDU_BUFFER + t->buffer, t->count, false);
    transfer(edu, EDU_BUFFER + t->buffer, plan.window[0].gpa + t->from + 1, t->count, true);
    transfer(edu, EDU_BUFFER + t->buffer, plan.window[1].gpa + t->to + 1, t->count, true);
    stage(STAGE_UNMAPPED);
}

/* Which device process is it to be? `--append=device=NAME`, for the tests and for the curious. */
static void behaviour_choose(void) {
    char name[16];
    if (!guest_parameter("device", name, sizeof name))
        return;
    for (unsigned i = 0; i < BEHAVIOURS; i++)
        if (!memcmp(name, behaviour_names[i], strlen(behaviour_names[i]) + 1))
            out8(LAB_DEVICE, (uint8_t)i);
}

static void work(enum form form) {
    struct edu *edu = attach(form);
    work_read(edu);
    work_impostor(edu, form);
    work_probe(edu, form);
    printf("%s: alive\n", form_names[form]);
    work_raise(edu, form);
    printf("%s: %u interrupts\n", form_names[form], edu->interrupts);
    work_factorial(edu, form);
    printf("%s: %u factorials\n", form_names[form], FACTORIALS);
    work_dma(edu, form);
    printf("%s: %u transfers\n", form_names[form], 2 * TRANSFERS);
    work_outside(edu, form);
    work_unmapped(edu, form);
    printf("%s: %u interrupts in all\n", form_names[form], edu->interrupts);
}

void guest_main(void) {
    plan = plan_make(guest_seed());
    printf("lesson 11: one driver, two devices\n");
    behaviour_choose();
    for (enum form form = 0; form < FORMS; form++)
        devices[form] = (struct edu){.bar_gva = plan.bar_gpa[form], .vector = plan.vector[form]};
    memset((void *)VICTIM_GPA, VICTIM_BYTE, VICTIM_SIZE);
    interrupts_setup();
    for (enum form form = 0; form < FORMS; form++)
        work(form);
}
