/* Lesson 7, host half: an interrupt controller, and the decision what to inject and when. */
#include <string.h>

#include "host.h"
#include "lab.h"

#define NO_LINE (-1)

/* The controller's registers (lab.h). */
static struct {
    uint32_t irr, isr, imr;
    uint8_t base; /* the vector of line 0 */
} pic;

/* ---- what you write ---- */

/*
 * The line that the controller would present to the CPU now, or NO_LINE: of the lines that have risen
 * and are not masked the first, unless it is in service itself or one above it is.
 */
static int pic_pick(void) {
    /* BEGIN SOLUTION */
    for (int line = 0; line < LINES; line++) {
        if (pic.isr & LINE(line))
            return NO_LINE;
        if (pic.irr & ~pic.imr & LINE(line))
            return line;
    }
    return NO_LINE;
    /* STUB
    HOST_TODO("pic_pick: the waiting line of highest priority that nothing holds back");
    END SOLUTION */
}

/* The CPU takes this line: it waits no longer, it is in service. The answer is its vector. */
static uint8_t pic_acknowledge(int line) {
    /* BEGIN SOLUTION */
    pic.irr &= ~LINE(line);
    pic.isr |= LINE(line);
    return (uint8_t)(pic.base + line);
    /* STUB
    (void)line;
    HOST_TODO("pic_acknowledge: from IRR to ISR; the vector");
    END SOLUTION */
}

/* The guest says EOI, and not of which line: of those in service, the one of highest priority is
 * done. It is the one that interrupted all the others. */
static void pic_eoi(void) {
    /* BEGIN SOLUTION */
    pic.isr &= pic.isr - 1;
    /* STUB
    HOST_TODO("pic_eoi: take the line of highest priority out of ISR");
    END SOLUTION */
}

/*
 * KVM_RUN is about to be called, and this is the moment to decide. If the controller has a line to
 * present and the guest is ready to take an interrupt, acknowledge the line and inject its vector. If
 * the guest is not ready, have KVM say when it is (run->request_interrupt_window), and leave the
 * line where it is: a better one may rise until then. If there is nothing to present, there is
 * nothing to ask for: the request of last time still stands in run.
 */
static void interrupt_decide(struct kvm_run *run) {
    /* BEGIN SOLUTION */
    int line = pic_pick();
    bool is_ready = run->ready_for_interrupt_injection;
    if (line != NO_LINE && is_ready)
        host_vcpu(KVM_INTERRUPT, &(struct kvm_interrupt){.irq = pic_acknowledge(line)});
    run->request_interrupt_window = line != NO_LINE && !is_ready;
    /* STUB
    (void)run, (void)pic_pick, (void)pic_acknowledge;
    HOST_TODO("interrupt_decide: inject, or ask for an interrupt window, or neither");
    END SOLUTION */
}

/* ---- the lab ---- */

#define WINDOWS_MOST 8
#define RESCUES_MOST 8

static struct {
    struct plan plan;
    struct round now;     /* the round under way: a copy, used up */
    unsigned round, step; /* the numbers of the next ones */
    unsigned windows;     /* exits in a row because the window is open */
    unsigned rescues;     /* times that the guest was woken by nothing */
    bool is_touched;      /* the controller, since its state was recorded */
} lab;

static bool is_asleep(const struct kvm_run *run) {
    return run->exit_reason == KVM_EXIT_HLT && run->if_flag;
}

/* These lines rise. A set of the plan rises once. */
static void lines_rise(uint32_t *lines, const char *when) {
    for (unsigned line = 0; line < LINES; line++) {
        if (!(*lines & LINE(line)))
            continue;
        pic.irr |= LINE(line);
        lab.is_touched = true;
        event_begin("rise");
        event_number("line", line);
        event_string("when", when);
        event_end();
    }
    *lines = 0;
}

static unsigned lines_count(const struct round *round) {
    unsigned count = (unsigned)__builtin_popcount(round->window);
    for (unsigned i = 0; i < STEPS; i++)
        count += (unsigned)__builtin_popcount(round->step[i]);
    for (unsigned i = 0; i < LINES; i++)
        count += (unsigned)__builtin_popcount(round->work[i]);
    return count;
}

static void round_begin(unsigned number) {
    static const char *const names[ROUND_KINDS] = {"calm", "off", "masked", "nested", "idle"};
    if (number != lab.round || number >= ROUNDS)
        return;
    lab.now = lab.plan.round[lab.round++];
    lab.step = 0;
    event_begin("round");
    event_number("round", number);
    event_string("of", names[lab.now.kind]);
    event_number("lines", lines_count(&lab.now));
    event_end();
}

static void step_rise(unsigned step, const char *when) {
    if (step >= STEPS)
        return;
    lines_rise(&lab.now.step[step], when);
    lab.step = step + 1;
}

/* In an idle round it is not the guest that says when to go on: a line rises when the guest sleeps,
 * the next one when it has just looked whether one is due, and so on. */
static void idle_rise(unsigned parity, const char *when) {
    if (lab.now.kind == ROUND_IDLE && lab.step % 2 == parity)
        step_rise(lab.step, when);
}

static void lab_write(uint64_t port, unsigned value) {
    if (port == LAB_ROUND)
        round_begin(value);
    else if (port == LAB_STEP && lab.now.kind != ROUND_IDLE)
        step_rise(value, "step");
    else if (port == LAB_WORK && value < LINES)
        lines_rise(&lab.now.work[value], "work");
    else if (port == LAB_LOOK && value)
        idle_rise(1, "look");
}

static void lab_access(struct access *access) {
    if (access->is_write && access->size == 1)
        lab_write(access->address, access->data[0]);
    if (access->is_write)
        return;
    memset(access->data, 0, (size_t)access->size * access->count);
    if (access->address == LAB_STEP)
        lab_write(LAB_STEP, lab.step);
}

static void eoi_access(struct access *access) {
    if (!access->is_write)
        return;
    lab.is_touched = true;
    event_begin("eoi");
    event_number("if_flag", host_run()->if_flag);
    event_end();
    pic_eoi();
}

static void imr_access(struct access *access) {
    uint16_t imr;
    if (!access->is_write || access->size != sizeof imr)
        return;
    memcpy(&imr, access->data, sizeof imr);
    pic.imr = imr;
    event_begin("mask");
    event_hex("imr", pic.imr);
    event_end();
}

/* The guest sleeps with interrupts on: for the record, the code that made it, `sti; hlt` or another. */
static void halt_record(void) {
    uint8_t none[2] = {0};
    const void *code = host_memory(host_regs()->rip - sizeof none, sizeof none);
    event_begin("halt");
    event_bytes("code", code ? code : none, sizeof none);
    event_end();
}

/* What rises because of the exit itself. */
static void exit_look(const struct kvm_run *run) {
    bool is_window = run->exit_reason == KVM_EXIT_IRQ_WINDOW_OPEN;
    lab.windows = is_window ? lab.windows + 1 : 0;
    if (is_window)
        lines_rise(&lab.now.window, "window");
    if (!is_asleep(run))
        return;
    halt_record();
    if (!(pic.irr & ~pic.imr))
        idle_rise(0, "halt");
}

/*
 * What a real machine would hang in, so that the run gets to its checks. A window that is requested
 * with nothing to inject opens again and again before the guest has executed one instruction. And a
 * guest that sleeps through its last interrupt is woken by nothing: here it is, some times.
 */
static void rescue(struct kvm_run *run) {
    struct kvm_vcpu_events vcpu = {0};
    if (lab.windows >= WINDOWS_MOST)
        run->request_interrupt_window = 0;
    if (!is_asleep(run) || run->request_interrupt_window || lab.rescues >= RESCUES_MOST)
        return;
    host_vcpu(KVM_GET_VCPU_EVENTS, &vcpu);
    if (vcpu.interrupt.injected)
        return;
    lab.rescues++;
    run->request_interrupt_window = 1; /* the VMM goes on, and KVM behind the HLT */
    event_begin("rescue");
    event_end();
}

/* What the controller holds when the decision is taken, if anything has happened to it. */
static void pic_record(void) {
    static uint32_t irr, isr;
    if (!lab.is_touched && pic.irr == irr && pic.isr == isr)
        return;
    lab.is_touched = false;
    irr = pic.irr, isr = pic.isr;
    event_begin("pic");
    event_hex("irr", irr);
    event_hex("isr", isr);
    event_end();
}

static void lab_before_entry(void) {
    struct kvm_run *run = host_run();
    exit_look(run);
    interrupt_decide(run);
    pic_record();
    rescue(run);
}

static void lab_setup(void) {
    lab.plan = plan_make(host_seed());
    pic.base = lab.plan.base;
    event_begin("plan");
    event_hex("base", pic.base);
    event_end();
    host_claim_pio(PIC_EOI, 1, "pic eoi", eoi_access);
    host_claim_pio(PIC_IMR, 2, "pic imr", imr_access);
    host_claim_pio(LAB_ROUND, LAB_PORTS, "lab", lab_access);
}

const struct host_half host_half = {.setup = lab_setup, .before_entry = lab_before_entry};
