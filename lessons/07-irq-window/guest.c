/* Lesson 7, guest half: a kernel that turns interrupts off and on, masks lines, lets a handler be
 * interrupted, and sleeps. */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/* How often to look for what should come soon: more than 10,000 instructions. Also where a window
 * opens late (tests/deviations.toml), it opens long before. */
#define PATIENCE 2000
#define LOOKS_MOST 100

static struct plan plan;
static struct round now;       /* the round under way: a copy, used up */
static volatile uint32_t due;  /* lines whose handler is still to come */
static volatile uint32_t seen; /* interrupts so far */
static uint32_t looks;         /* in this round */

/* End the run: what should have come did not, or what came should not have. */
static _Noreturn void give_up(const char *why, uint32_t lines) {
    cli(); /* each character is an exit, and nothing is to be injected at one of them */
    printf("gave up: %s: line", why);
    for (unsigned line = 0; line < LINES; line++)
        if (lines & LINE(line))
            printf(" %u", line);
    printf("\n");
    guest_exit(1);
}

/* By one instruction: of a read and a write, with a handler in between, the write would undo what that one
 * has noted. */
static void due_add(uint32_t lines) { __asm__ volatile("orl %1, %0" : "+m"(due) : "r"(lines)); }

/* Wait until the handlers of these lines have begun. */
static void wait_for(uint32_t lines, const char *what) {
    for (unsigned i = 0; due & lines; i++) {
        if (i == PATIENCE)
            give_up(what, due & lines);
        pause();
    }
}

/* Give what should be held back the time to come all the same. */
static void dawdle(void) {
    for (unsigned i = 0; i < PATIENCE / 4; i++)
        pause();
}

/* What a handler is there for. Meanwhile other lines rise: the work is over when the handlers of those
 * of higher priority have done theirs. */
static void line_work(unsigned line) {
    uint32_t rise = now.work[line];
    now.work[line] = 0;
    due_add(rise);
    out8(LAB_WORK, (uint8_t)line);
    if (rise) {
        wait_for(LINES_ABOVE(line), "no interrupt while the handler of a lower line works");
        dawdle();
    }
}

/* ---- what you write ---- */

/*
 * Serve a line. The CPU has cleared IF on the way in. The work, line_work(), may be interrupted by
 * lines of higher priority. When it is done, tell the controller so (any write to PIC_EOI): from then
 * on it lets lines of the same and of lower priority through. They must not pile up on the stack, so
 * nothing may interrupt the way from there to the end of the handler.
 */
static void line_serve(unsigned line) {
    /* BEGIN SOLUTION */
    sti();
    line_work(line);
    cli();
    out8(PIC_EOI, (uint8_t)line);
    /* STUB
    (void)line, (void)line_work;
    TODO("line_serve: work that can be interrupted, then EOI");
    END SOLUTION */
}

static bool lines_are_due(void);

/*
 * Sleep until no line is due any more: lines_are_due() says whether one is. Called and left with
 * IF = 1.
 * Each interrupt ends one HLT, also one that comes just between your look and the HLT.
 */
static void idle(void) {
    /* BEGIN SOLUTION */
    cli();
    while (lines_are_due()) {
        sti_halt();
        cli();
    }
    sti();
    /* STUB
    (void)lines_are_due;
    TODO("idle: look with interrupts off; then sti_halt(), and look again");
    END SOLUTION */
}

/* ---- the rounds ---- */

static bool lines_are_due(void) {
    bool is_due = due != 0;
    if (++looks > LOOKS_MOST)
        give_up("idle() looks and looks, but nothing comes as long as the guest is awake", due);
    out8(LAB_LOOK, is_due);
    return is_due;
}

static bool interrupt(struct trap_frame *frame) {
    unsigned line = (unsigned)frame->vector - plan.base;
    if (line >= LINES)
        return false;
    if (++seen > 10 * ROUNDS)
        give_up("more interrupts than requests", LINE(line));
    due &= ~LINE(line);
    out8(LAB_HANDLER, (uint8_t)line);
    line_serve(line);
    return true;
}

/* Let the lines of this step rise. */
static void step(unsigned number) {
    due_add(now.step[number]);
    out8(LAB_STEP, (uint8_t)number);
}

/* The next step is the one instruction after STI, whose shadow it lies in: RFLAGS.IF is 1 already, but
 * no interrupt is taken until it is over. */
static void sti_step(unsigned number) {
    uint8_t value;
    due_add(now.step[number]);
    __asm__ volatile("sti; inb %1, %0" : "=a"(value) : "Nd"((uint16_t)LAB_STEP) : "memory");
}

static void mask(uint32_t lines) { out16(PIC_IMR, (uint16_t)lines); }

static void round_calm(void) {
    for (unsigned i = 0; i < STEPS; i++) {
        step(i);
        wait_for(ALL_LINES, "IF = 1, and no interrupt");
    }
}

static void round_off(void) {
    cli();
    step(0);
    step(1);
    step(2);
    due_add(now.window);
    sti_step(3);
    wait_for(ALL_LINES, "IF = 1 again, and no interrupt");
}

static void round_masked(void) {
    mask(now.masked);
    step(0);
    wait_for(~now.masked, "not masked, and no interrupt");
    cli();
    step(1);
    mask(now.masked | now.masked_later);
    sti();
    dawdle();
    step(2);
    wait_for(~(now.masked | now.masked_later), "not masked, and no interrupt");
    mask(0);
    wait_for(ALL_LINES, "not masked any more, and no interrupt");
}

static void round_nested(void) {
    step(0);
    wait_for(ALL_LINES, "IF = 1, the handlers of higher lines are done, and no interrupt");
}

static void round_idle(void) {
    for (unsigned i = 0; i < STEPS; i++)
        due_add(now.step[i]);
    looks = 0;
    idle();
    if (due)
        give_up("idle() has returned too early", due);
}

void guest_main(void) {
    static const struct {
        const char *name;
        void (*run)(void);
    } kinds[ROUND_KINDS] = {[ROUND_CALM] = {"calm", round_calm},
                            [ROUND_OFF] = {"off", round_off},
                            [ROUND_MASKED] = {"masked", round_masked},
                            [ROUND_NESTED] = {"nested", round_nested},
                            [ROUND_IDLE] = {"idle", round_idle}};
    printf("lesson 7: interrupts and interrupt windows\n");
    plan = plan_make(guest_seed());
    for (unsigned vector = 32; vector < VECTORS; vector++)
        trap_handle((uint8_t)vector, interrupt);
    sti();
    for (unsigned i = 0; i < ROUNDS; i++) {
        now = plan.round[i];
        out8(LAB_ROUND, (uint8_t)i);
        kinds[now.kind].run();
        if (i % ROUNDS_OF_A_KIND == ROUNDS_OF_A_KIND - 1)
            printf("%s: %u interrupts so far\n", kinds[now.kind].name, seen);
    }
}
