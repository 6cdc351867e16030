/* Lesson 6, guest half: a kernel that takes what the host injects, and goes on where it should. */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = MEMORY_MIB, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/* ---- what you write ---- */

/*
 * Where does the interrupted code go on, so that each of its instructions takes effect exactly once?
 * frame is as the CPU pushed it. #DB is a trap here (a single step), all other vectors that come to
 * this function are faults. remedy: who does the work of an instruction that has faulted (lab.h);
 * length: how many bytes it has. An instruction that has trapped has done its work.
 */
static uint64_t resume_at(const struct trap_frame *frame, enum remedy remedy, unsigned length) {
    /* BEGIN SOLUTION */
    bool is_fault = frame->vector != VECTOR_DB;
    return frame->rip + (is_fault && remedy == REMEDY_EMULATE ? length : 0);
    /* STUB
    (void)frame, (void)remedy, (void)length;
    TODO("resume_at: where the interrupted code goes on, after a fault and after a trap");
    END SOLUTION */
}

/* ---- the rounds ---- */

static struct plan plan;
static const struct round *current; /* NULL between rounds */

/*
 * Halt on a stack of its own, whose page holds nothing yet, and add. At the HLT the VM exits; at the
 * next entry the VMM injects. So the exception comes between the two instructions: a fault is one of
 * the ADD, a trap is one of the HLT.
 */
void halt_and_add(uint64_t *cell, uint64_t addend, uint64_t stack_top);
extern const char fault_point[], fault_point_end[];
__asm__(".text\n"
        ".globl halt_and_add, fault_point, fault_point_end\n"
        ".type halt_and_add, @function\n"
        "halt_and_add:\n"
        "    push %rbp\n"
        "    mov %rsp, %rbp\n"
        "    mov %rdx, %rsp\n"
        "    hlt\n"
        "fault_point:\n"
        "    add %rsi, (%rdi)\n"
        "fault_point_end:\n"
        "    .skip 8, 0x90\n" // NOPs, for a handler that goes too far
        "    mov %rbp, %rsp\n"
        "    pop %rbp\n"
        "    ret\n"
        ".size halt_and_add, . - halt_and_add\n");

static void dr6_clear(void) { __asm__ volatile("mov %0, %%dr6" : : "r"(DR6_CLEAR)); }

/* The host half looks at the frame in memory before anybody can change it. */
static bool exception_caught(struct trap_frame *frame) {
    if (!current)
        return false;
    out32(LAB_CAUGHT, (uint32_t)(uintptr_t)frame);
    dr6_clear();
    if (frame->vector == VECTOR_DF) { /* an abort: what was interrupted cannot go on */
        frame->rip = (uint64_t)fault_point_end;
        return true;
    }
    if (frame->vector != VECTOR_DB && current->remedy == REMEDY_EMULATE)
        *(volatile uint64_t *)current->cell_gpa += current->addend;
    frame->rip = resume_at(frame, current->remedy, (unsigned)(fault_point_end - fault_point));
    return true;
}

static void round_run(unsigned number) {
    const struct round *round = &plan.rounds[number];
    out32(LAB_ROUND, number);
    current = round;
    halt_and_add((uint64_t *)round->cell_gpa, round->addend, round->stack_gpa + PAGE_SIZE);
    current = NULL;
    out32(LAB_DONE, number);
}

static volatile bool nmi_over;

static bool nmi_caught(struct trap_frame *frame) {
    (void)frame;
    round_run(SINGLES);
    nmi_over = true;
    return true;
}

/* Where an NMI is taken late, it comes while this waits. */
static void round_run_in_nmi(void) {
    out32(LAB_NMI, 0);
    for (unsigned i = 0; i < 10000 && !nmi_over; i++)
        pause();
}

/* SDM 3A "64-Bit IDT Gate Descriptors". */
struct gate {
    uint16_t offset_15_0, selector;
    uint8_t ist, type;
    uint16_t offset_31_16;
    uint32_t offset_63_32, reserved;
};
#define GATE_PRESENT 0x80
#define IST_UNUSED 3 /* the TSS has 0 there: the first push goes to the last 8 bytes of all */

struct __attribute__((packed)) idt_register {
    uint16_t limit;
    uint64_t base;
};

static struct gate *gate_of(uint8_t vector) {
    struct idt_register idt;
    __asm__ volatile("sidt %0" : "=m"(idt));
    return (struct gate *)idt.base + vector;
}

/* The exception of this round meets an obstacle on its way. */
static void round_run_broken(unsigned number) {
    struct gate *gate = gate_of(plan.rounds[number].order.vector);
    struct gate whole = *gate;
    if (plan.rounds[number].second.vector == OBSTACLE_GATE)
        gate->type &= (uint8_t)~GATE_PRESENT;
    else
        gate->ist = IST_UNUSED;
    round_run(number);
    *gate = whole;
}

static void idt_empty(void) {
    struct idt_register idt = {0};
    __asm__ volatile("lidt %0" : : "m"(idt));
}

void guest_main(void) {
    unsigned number = 0;
    plan = plan_make(guest_seed());
    for (unsigned vector = 0; vector < 32; vector++)
        trap_handle((uint8_t)vector, exception_caught);
    trap_handle(VECTOR_NMI, nmi_caught);
    printf("lesson 6: exceptions that the host injects\n");
    while (number < SINGLES)
        round_run(number++);
    printf("single: %u exceptions came and went\n", number);
    round_run_in_nmi();
    number++;
    printf("nmi: %s\n", nmi_over ? "one exception inside its handler" : "none came");
    for (unsigned i = 0; i < PAIRS; i++)
        round_run(number++);
    printf("pairs: %d times two exceptions became one\n", PAIRS);
    for (unsigned i = 0; i < BROKEN; i++)
        round_run_broken(number++);
    printf("broken: %d exceptions could not be delivered\n", BROKEN);
    printf("last: the IDT is empty now\n");
    idt_empty();
    round_run(number);
    printf("last: still here\n");
}
