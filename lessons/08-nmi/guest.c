/* Lesson 8, guest half: the handlers of NMIs and of interrupts, and the scenes they run in. */
#include "guest.h"
#include "plan.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

#define FIRST_INTERRUPT 32
#define PATIENCE 5000 /* rounds of a loop that waits for what should come */
#define LINGER 500    /* rounds in which what should not come has its chance */
#define NMIS_MAX 50   /* of one scene: more, and they never end */
#define DEPTH_MAX 16  /* of NMI handlers inside NMI handlers */
#define STACK_SIZE 8192

static struct plan plan;

static volatile struct {
    const struct scene *scene;
    uint8_t exception;
    unsigned nmis_taken;              /* the CPU has called nmi_handle() */
    unsigned nmis_begun, nmis_served; /* nmi_serve() was called, is through */
    unsigned interrupts_served;
    bool has_faulted;
} lab;

/* ---- the NMI handler ---- */

/* Run into an exception. Its handler, exception_skip(), ends with IRET like any other. */
static void exception_raise(uint8_t vector) {
    if (vector == VECTOR_UD)
        __asm__ volatile("ud2");
    else
        __asm__ volatile("div %1" : : "a"(0), "r"(0), "d"(0) : "cc");
}

/* Both instructions are two bytes long. */
static bool exception_skip(struct trap_frame *frame) {
    frame->rip += 2;
    return true;
}

/* What an NMI is for: a watchdog would look at the clock here, a profiler at the frame. In the last
 * scenes it runs into an exception, and gives a second NMI the time to come in. */
static void nmi_serve(void) {
    if (++lab.nmis_begun > NMIS_MAX)
        PANIC("nmi_serve() is called again and again, and no new NMI has come");
    out8(LAB_BEGIN, VECTOR_NMI);
    if (lab.scene->faults && !lab.has_faulted) {
        unsigned taken = lab.nmis_taken;
        lab.has_faulted = true;
        exception_raise(lab.exception);
        out8(LAB_FAULTED, lab.exception);
        for (unsigned i = 0; i < PATIENCE && lab.nmis_taken == taken; i++)
            pause();
    }
    out8(LAB_END, VECTOR_NMI);
    lab.nmis_served++;
}

/* For nmi_guard(). volatile: an NMI may change it between any two instructions. */
enum { NMI_NOT_RUNNING, NMI_EXECUTING, NMI_LATCHED };
static volatile unsigned nmi_state;
static uint8_t nested_stack[STACK_SIZE] __attribute__((aligned(16)));

/*
 * The handler of an NMI whose nmi_serve() may run into an exception. The exception handler's IRET
 * unblocks NMIs, so the next one can come while this one is still being served, at any instruction
 * from there on.
 *
 * Each NMI is served, but none inside another: one that comes in between only leaves word, and the
 * first does the work once more before it returns. And none may destroy the frame of another:
 * trap_nmi_stack() says on which stack the next one starts.
 */
static void nmi_guard(void) {
    /* BEGIN SOLUTION */
    if (nmi_state != NMI_NOT_RUNNING) {
        nmi_state = NMI_LATCHED;
        return;
    }
    nmi_state = NMI_EXECUTING;
    uint64_t own_stack = trap_nmi_stack((uint64_t)(nested_stack + STACK_SIZE));
    do /* once more if latched; looked at and counted down in one step, so that none is missed */
        nmi_serve();
    while (__atomic_sub_fetch(&nmi_state, 1, __ATOMIC_SEQ_CST) != NMI_NOT_RUNNING);
    trap_nmi_stack(own_stack);
    /* STUB
    (void)nmi_state; // (void): the compiler need not complain of what is not used yet
    (void)nested_stack;
    TODO("serve an NMI that may be interrupted by another one");
    END SOLUTION */
}

/* The CPU has taken an NMI: trap.c calls this on the stack of trap_nmi_stack(). */
static bool nmi_handle(struct trap_frame *frame) {
    static uint64_t rips[DEPTH_MAX]; /* not on the stack, which another NMI may overwrite */
    static volatile unsigned depth;
    out32(LAB_FRAME, (uint32_t)(uintptr_t)frame);
    if (++lab.nmis_taken > NMIS_MAX)
        PANIC("NMI after NMI, and no end: is KVM_NMI called again and again for the same one?");
    rips[depth++ % DEPTH_MAX] = frame->rip;
    if (lab.scene->faults)
        nmi_guard();
    else
        nmi_serve();
    if (frame->rip != rips[--depth % DEPTH_MAX])
        PANIC("another NMI has overwritten the frame of this one: its IRET would lead back into "
              "its own handler");
    return true;
}

/* ---- interrupts ---- */

static bool interrupt_handle(struct trap_frame *frame) {
    out8(LAB_BEGIN, (uint8_t)frame->vector);
    if (lab.scene->raise[AT_INTERRUPT_BEGIN].nmis)
        for (unsigned i = 0; i < PATIENCE && !lab.nmis_served; i++)
            pause();
    out8(LAB_END, (uint8_t)frame->vector);
    lab.interrupts_served++;
    return true;
}

/* ---- scenes ---- */

static void served_wait(unsigned nmis, unsigned interrupts) {
    for (unsigned i = 0; i < PATIENCE; i++) {
        if (lab.nmis_served >= nmis && lab.interrupts_served >= interrupts)
            return;
        pause();
    }
}

static unsigned scene_interrupts(const struct scene *scene) {
    unsigned count = 0;
    for (unsigned when = 0; when < WHENS; when++)
        count += scene->raise[when].interrupts;
    return count;
}

static void scene_begin(uint8_t number) {
    lab.scene = &scenes[number];
    lab.exception = plan.exception[number];
    lab.nmis_taken = lab.nmis_begun = lab.nmis_served = lab.interrupts_served = 0;
    lab.has_faulted = false;
    if (lab.scene->interrupts_on)
        sti();
    pause(); /* STI's shadow ends here */
    out8(LAB_SCENE, number);
}

static void scene_play(uint8_t number) {
    const struct scene *scene = &scenes[number];
    unsigned interrupts = scene_interrupts(scene);
    scene_begin(number);
    if (scene->halts)
        halt();
    served_wait(scene->early_nmis, 0);
    if (interrupts)
        sti();
    served_wait(scene->nmis, interrupts);
    for (unsigned i = 0; i < LINGER; i++)
        pause();
    cli();
    out8(LAB_OVER, number);
    printf("%u NMIs, %u interrupts: %s\n", lab.nmis_served, lab.interrupts_served, scene->name);
}

void guest_main(void) {
    plan = plan_make(guest_seed());
    trap_handle(VECTOR_NMI, nmi_handle);
    trap_handle(VECTOR_UD, exception_skip);
    trap_handle(VECTOR_DE, exception_skip);
    for (unsigned vector = FIRST_INTERRUPT; vector < VECTORS; vector++)
        trap_handle((uint8_t)vector, interrupt_handle);
    printf("lesson 8: NMI versus IRQ\n");
    for (unsigned i = 0; i < SCENES; i++)
        scene_play(plan.order[i]);
    halt();
}
