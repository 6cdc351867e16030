/*
 * Lesson 11, guest half: the driver of the edu device, and what is done with it. The driver has two
 * devices, and cannot tell which of them is emulated and which is passed through.
 */
#include "guest.h"
#include "apic.h"
#include "edu.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_KERNEL, .devices = MACHINE_DEVICE_COM1);

/* Let a moment pass, with interrupts on: up to the next one, or about a millisecond; longer, if some
 * have passed in vain already. */
static void moment_pass(unsigned passed);

/* ================================ The driver ================================ */

#define EDU_PATIENCE 24 /* moments: about two seconds. A transfer takes edu 100 ms */

struct edu {
    uint64_t bar_gva;
    uint8_t vector;               /* of its interrupt */
    volatile uint32_t causes;     /* what it has interrupted for, and nobody has waited for yet */
    volatile uint32_t interrupts; /* so far */
};

static uint32_t edu_read(const struct edu *edu, unsigned offset) {
    return mmio_read32(edu->bar_gva + offset);
}

/* For a register that only keeps what it is given. */
static void edu_write(const struct edu *edu, unsigned offset, uint32_t value) {
    mmio_write32(edu->bar_gva + offset, value);
}

/* Wait until the bits of mask in this register are as in value. False: that does not happen. */
static bool edu_await(const struct edu *edu, unsigned offset, uint32_t mask, uint32_t value) {
    for (unsigned i = 0; i < EDU_PATIENCE; i++) {
        if ((edu_read(edu, offset) & mask) == value)
            return true;
        moment_pass(i);
    }
    return false;
}

/* Wait until it has interrupted for this cause, and has taken note of the acknowledgement. */
static bool edu_await_interrupt(struct edu *edu, uint32_t cause) {
    for (unsigned i = 0; i < EDU_PATIENCE; i++) {
        if ((edu->causes & cause) == cause) {
            edu->causes &= ~cause;
            return edu_await(edu, EDU_INTERRUPT_STATUS, cause, 0);
        }
        moment_pass(i);
    }
    return false;
}

/*
 * For a register that acts (edu.h): write the value to it. Then, so that a device which does not
 * see writes learns of this one, too, write the offset of the register to EDU_DOORBELL.
 */
static void edu_command(const struct edu *edu, unsigned offset, uint32_t value) {
    /* BEGIN SOLUTION */
    edu_write(edu, offset, value);
    edu_write(edu, EDU_DOORBELL, offset);
    /* STUB
    (void)edu, (void)offset, (void)value, (void)edu_write;
    TODO("edu_command: write to a register, and ring its doorbell");
    END SOLUTION */
}

/* Is it an edu device (EDU_ID_MASK of its id is EDU_ID_VALUE), and does it live? It does if the
 * register EDU_LIVENESS, some time after it was given this number, reads as its complement. */
static bool edu_probe(const struct edu *edu, uint32_t number) {
    /* BEGIN SOLUTION */
    if ((edu_read(edu, EDU_ID) & EDU_ID_MASK) != EDU_ID_VALUE)
        return false;
    edu_command(edu, EDU_LIVENESS, number);
    return edu_await(edu, EDU_LIVENESS, 0xffffffff, ~number);
    /* STUB
    (void)edu, (void)number, (void)edu_command;
    TODO("edu_probe: is it one, and does it live?");
    END SOLUTION */
}

/* It has interrupted. The interrupt status says what for: acknowledge all of that, and no more, and
 * put it into edu->causes, where there may be others already. */
static void edu_interrupt(struct edu *edu) {
    /* BEGIN SOLUTION */
    uint32_t cause = edu_read(edu, EDU_INTERRUPT_STATUS);
    edu_command(edu, EDU_INTERRUPT_ACKNOWLEDGE, cause);
    edu->causes |= cause;
    /* STUB
    (void)edu;
    TODO("edu_interrupt: what has it interrupted for? acknowledge it");
    END SOLUTION */
}

/* Let it compute a factorial, and interrupt (EDU_STATUS_INTERRUPT) when it is done:
 * EDU_INTERRUPT_FACTORIAL. Only then is the result there. False: the interrupt does not come. */
static bool edu_factorial(struct edu *edu, uint32_t number, uint32_t *result) {
    /* BEGIN SOLUTION */
    edu_write(edu, EDU_STATUS, EDU_STATUS_INTERRUPT);
    edu_command(edu, EDU_FACTORIAL, number);
    if (!edu_await_interrupt(edu, EDU_INTERRUPT_FACTORIAL))
        return false;
    *result = edu_read(edu, EDU_FACTORIAL);
    return true;
    /* STUB
    (void)edu, (void)number, (void)result;
    TODO("edu_factorial: let it compute, wait for its interrupt, fetch the result");
    END SOLUTION */
}

/*
 * Let it move count bytes from one address to another. One of the two is an address of DMA, the
 * other one of its buffer (EDU_BUFFER and up); is_to_ram says which. It interrupts when it is done:
 * EDU_INTERRUPT_DMA. Start nothing before it has all that it needs to know. False: the interrupt
 * does not come.
 */
static bool edu_transfer(struct edu *edu, uint32_t from, uint32_t to, uint32_t count,
                         bool is_to_ram) {
    /* BEGIN SOLUTION */
    edu_write(edu, EDU_DMA_SOURCE, from);
    edu_write(edu, EDU_DMA_DESTINATION, to);
    edu_write(edu, EDU_DMA_COUNT, count);
    edu_command(edu, EDU_DMA_COMMAND,
                EDU_DMA_START | EDU_DMA_INTERRUPT | (is_to_ram ? EDU_DMA_TO_RAM : 0));
    return edu_await_interrupt(edu, EDU_INTERRUPT_DMA);
    /* STUB
    (void)edu, (void)from, (void)to, (void)count, (void)is_to_ram;
    TODO("edu_transfer: program a transfer, start it, wait for its interrupt");
    END SOLUTION */
}

/* ================================ Interrupts ================================ */

#define SPURIOUS 0xff
#define UNDIVIDED LAPIC_TIMER_DIVIDE_BY_1 /* so KVM's timer counts nanoseconds */
#define MOMENT_NS 1000000u
#define MOMENT_DOUBLES 7 /* times */
#define TURNS 200        /* of a loop: a device that is quick needs no sleep and no timer */
#define STORM 500        /* interrupts: no work here causes so many */

static struct plan plan;
static struct edu devices[FORMS];

static volatile unsigned interrupts; /* of devices */

/* Who sleeps lets others have the CPU, on a machine with one. The timer wakes us if nobody else does. */
static void moment_pass(unsigned passed) {
    unsigned before = interrupts;
    sti();
    for (unsigned turn = 0; turn < TURNS && interrupts == before; turn++)
        pause();
    cli();
    if (interrupts != before)
        return;
    lapic_write(LAPIC_TIMER_INITIAL,
                MOMENT_NS << (passed < MOMENT_DOUBLES ? passed : MOMENT_DOUBLES));
    sti_halt();
    cli();
}

/* More than anybody can have asked for: take the device away. */
static void storm_check(struct edu *edu) {
    if (++edu->interrupts == STORM)
        out8(LAB_DETACH, 0);
}

static bool on_interrupt(struct trap_frame *frame) {
    struct edu *edu = &devices[0];
    while (edu->vector != frame->vector)
        edu++;
    edu_interrupt(edu);
    storm_check(edu);
    interrupts++;
    lapic_eoi();
    return true;
}

static bool on_tick(struct trap_frame *frame) {
    (void)frame;
    lapic_eoi();
    return true;
}

static bool on_spurious(struct trap_frame *frame) {
    (void)frame;
    return true;
}

static void interrupts_setup(void) {
    trap_handle(plan.tick_vector, on_tick);
    trap_handle(SPURIOUS, on_spurious);
    for (enum form form = 0; form < FORMS; form++)
        trap_handle(plan.vector[form], on_interrupt);
    lapic_write(LAPIC_SVR, LAPIC_SVR_ENABLE | SPURIOUS);
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_TIMER_DIVIDE, UNDIVIDED);
    lapic_write(LAPIC_LVT_TIMER, plan.tick_vector); /* one-shot */
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

static struct edu *attach(enum form form) {
    struct edu *edu = &devices[form];
    form_now = form;
    out8(LAB_ATTACH, (uint8_t)form);
    if (!in8(LAB_ATTACH))
        fail("there is no such device");
    stage(STAGE_ATTACHED);
    return edu;
}

static void work_read(const struct edu *edu) {
    for (unsigned i = 0; i < READS; i++)
        edu_read(edu, EDU_ID);
    stage(STAGE_READ);
}

static void work_probe(const struct edu *edu, enum form form) {
    out8(LAB_CONNECT, CONNECT_DOORBELLS);
    if (!edu_probe(edu, plan.liveness[form]))
        fail("it is no edu device, or it does not live");
    stage(STAGE_PROBED);
}

static void work_raise(struct edu *edu, enum form form) {
    out8(LAB_CONNECT, CONNECT_INTERRUPT);
    for (unsigned i = 0; i < RAISES; i++) {
        edu_command(edu, EDU_INTERRUPT_RAISE, plan.raise[form][i]);
        if (!edu_await_interrupt(edu, plan.raise[form][i]))
            fail("it does not interrupt, or takes no note of the acknowledgement");
    }
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

/* Both windows become the device's to reach. */
static void windows_map(void) {
    for (unsigned i = 0; i < WINDOWS; i++)
        out8(LAB_MAP, (uint8_t)i);
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

/* One window is taken away, the other is not. */
static void work_unmapped(struct edu *edu, enum form form) {
    const struct transfer *t = &plan.transfer[form][1];
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
