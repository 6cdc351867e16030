/* Exceptions and interrupts: the IDT and the TSS behind boot.asm's stubs, the lessons' handlers, and
 * what happens when there is none. */
#include "guest.h"
#include "runtime.h"

#define KERNEL_CODE 0x08
#define TSS_SELECTOR 0x28
#define GATE_INTERRUPT 0x8e /* present, interrupt gate: the CPU clears IF on the way in */
#define GATE_RING3 0x60     /* int3 may reach it from ring 3 */
#define RING3 3
#define FIRST_INTERRUPT 32
#define STUB_SIZE 16
#define IST_STACK_SIZE 8192

/* SDM 3A "64-Bit IDT Gate Descriptors". */
struct gate {
    uint16_t offset_15_0, selector;
    uint8_t ist, type;
    uint16_t offset_31_16;
    uint32_t offset_63_32, reserved;
};
_Static_assert(sizeof(struct gate) == 16, "as the CPU reads it");

/* SDM 3A "64-Bit TSS Format". */
struct __attribute__((packed)) task_state {
    uint32_t reserved0;
    uint64_t rsp[3]; /* for traps from outer rings; user_call() sets rsp[0] */
    uint64_t reserved1;
    uint64_t ist[7];
    uint64_t reserved2;
    uint16_t reserved3, io_map_base;
};
_Static_assert(sizeof(struct task_state) == 104, "as the CPU reads it");

extern uint8_t trap_stubs[VECTORS][STUB_SIZE]; /* boot.asm */
extern uint64_t gdt_tss[2];
_Noreturn void user_return(uint64_t result);

struct task_state tss = {.io_map_base = sizeof tss};
static struct gate idt[VECTORS];
static trap_handler handlers[VECTORS];

/* NMI and #DF may find the current stack unusable. */
static uint8_t nmi_stack[IST_STACK_SIZE] __attribute__((aligned(16)));
static uint8_t double_fault_stack[IST_STACK_SIZE] __attribute__((aligned(16)));

static void gate_set(uint8_t vector, const void *target, uint8_t ist, uint8_t type) {
    uint64_t offset = (uint64_t)target;
    idt[vector] = (struct gate){.offset_15_0 = (uint16_t)offset,
                                .selector = KERNEL_CODE,
                                .ist = ist,
                                .type = type,
                                .offset_31_16 = (uint16_t)(offset >> 16),
                                .offset_63_32 = (uint32_t)(offset >> 32)};
}

static void tss_load(void) {
    uint64_t base = (uint64_t)&tss;
    /* SDM 3A "TSS Descriptor in 64-bit mode": an available 64-bit TSS, present. */
    gdt_tss[0] = (sizeof tss - 1) | (base & 0xffffff) << 16 | UINT64_C(0x89) << 40 |
                 (base >> 24 & 0xff) << 56;
    gdt_tss[1] = base >> 32;
    __asm__ volatile("ltr %w0" : : "r"(TSS_SELECTOR));
}

void trap_install(void) {
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } idtr = {sizeof idt - 1, (uint64_t)idt};
    for (unsigned vector = 0; vector < VECTORS; vector++)
        gate_set((uint8_t)vector, trap_stubs[vector], 0, GATE_INTERRUPT);
    gate_set(VECTOR_NMI, trap_stubs[VECTOR_NMI], 1, GATE_INTERRUPT);
    gate_set(VECTOR_DF, trap_stubs[VECTOR_DF], 2, GATE_INTERRUPT);
    gate_set(VECTOR_BP, trap_stubs[VECTOR_BP], 0, GATE_INTERRUPT | GATE_RING3);
    tss.ist[0] = (uint64_t)(nmi_stack + IST_STACK_SIZE);
    tss.ist[1] = (uint64_t)(double_fault_stack + IST_STACK_SIZE);
    tss_load();
    __asm__ volatile("lidt %0" : : "m"(idtr));
}

void trap_handle(uint8_t vector, trap_handler handler) { handlers[vector] = handler; }

uint64_t trap_nmi_stack(uint64_t top_gva) {
    uint64_t before_gva = tss.ist[0];
    tss.ist[0] = top_gva;
    return before_gva;
}

/* On a machine without the VMM the panic port does nothing, and this line is all there is. */
static _Noreturn void panic_report(const struct panic *panic) {
    coverage_write();
    out32(PORT_PANIC, (uint32_t)(uintptr_t)panic);
    const struct trap_frame *frame = (const void *)panic->frame_gva;
    if (frame)
        printf("panic: exception %lu, error code 0x%lx, rip %p, cr2 %p\n", frame->vector,
               frame->error_code, (void *)frame->rip, (void *)cr2_read());
    else
        printf("panic: %s: %s\n", (const char *)panic->location_gva,
               (const char *)panic->message_gva);
    guest_exit(3);
}

void panic_at(enum panic_kind kind, const char *message, const char *location) {
    struct panic panic = {kind, (uint64_t)message, (uint64_t)location, 0};
    panic_report(&panic);
}

/* The call that trap_try() has under way. */
static struct {
    void *context[5]; /* __builtin_setjmp's */
    struct trap_frame *caught;
    bool active;
} attempt;

bool trap_try(void (*function)(uint64_t argument), uint64_t argument, struct trap_frame *caught) {
    attempt.caught = caught;
    if (__builtin_setjmp(attempt.context))
        return true;
    attempt.active = true;
    function(argument);
    attempt.active = false;
    return false;
}

/* Back into trap_try(), with IF as the abandoned code had it. */
static _Noreturn void attempt_abandon(const struct trap_frame *frame) {
    attempt.active = false;
    *attempt.caught = *frame;
    if (frame->rflags & X86_EFLAGS_IF)
        __asm__ volatile("sti");
    __builtin_longjmp(attempt.context, 1);
}

void trap_dispatch(struct trap_frame *frame) {
    bool is_exception = frame->vector < FIRST_INTERRUPT && frame->vector != VECTOR_NMI;
    if (frame->vector == VECTOR_BP && (frame->cs & RING3))
        user_return(frame->rax);
    if (handlers[frame->vector] && handlers[frame->vector](frame))
        return;
    if (attempt.active && is_exception)
        attempt_abandon(frame);
    struct panic panic = {PANIC_EXCEPTION, 0, 0, (uint64_t)frame};
    panic_report(&panic);
}
