/* A guest that tries the runtime itself, a part at a time, as case= says. What it finds it prints. */
#include "cases.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/* ---- printf ---- */

static void print_all(void) {
    printf("%d %d %d %d\n", 0, 42, -42, (int)0x80000000);
    printf("%ld %ld %ld\n", 1234567890123L, -1L, (long)0x8000000000000000);
    printf("%u %u %lu\n", 0, 0xffffffff, 0xffffffffffffffff);
    printf("%x %x %lx\n", 0, 0xdeadbeef, 0x123456789abcdef);
    printf("[%08x] [%016lx] [%04u] [%05d] [%02x]\n", 0xbeef, 0xbeefL, 7, 42, 0x12345);
    printf("[%p] [%p]\n", (void *)0x1000, NULL);
    printf("[%s] [%s] [%c%c]\n", "text", "", 'a', '\xff');
    printf("100%%\n");
}

/* What the compiler would warn of reaches printf through a variable. */
static void print_odd_formats(void) {
    static const char *volatile unknown = "[%q]\n";
    static const char *volatile no_text = "[%s]\n";
    static const char *volatile cut_off = "end %";
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
#pragma GCC diagnostic ignored "-Wformat-security"
    printf(unknown);
    printf(no_text, (char *)NULL);
    printf(cut_off);
}

/* ---- the command line ---- */

static void print_parameters(void) {
    static const char *const names[] = {"a",    "ab",   "b",    "empty", "flag",
                                        "path", "last", "none", ""};
    char value[64];
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        bool found = guest_parameter(names[i], value, sizeof value);
        printf("%s %d [%s]\n", names[i], found, value);
    }
    bool found = guest_parameter("path", value, 4);
    printf("cut %d [%s]\n", found, value);
    found = guest_parameter("path", value, 1);
    printf("cut %d [%s]\n", found, value);
}

/* ---- random.h ---- */

static void print_random(void) {
    struct random same = {guest_seed()};
    struct random first = random_stream(guest_seed(), 0);
    struct random second = random_stream(guest_seed(), 0xffffffffffffffff);
    for (unsigned i = 0; i < 4; i++) {
        printf("%lx ", random_next(&same));
        printf("%lx ", random_next(&first));
        printf("%lx ", random_next(&second));
        printf("%lu\n", random_below(&first, 1000003));
    }
}

/* ---- string.c ---- */

static void use_memory(void) {
    static uint8_t from[300], to[300];
    for (unsigned i = 0; i < sizeof from; i++)
        from[i] = (uint8_t)(i * 7);
    memset(to, 0xee, sizeof to);
    memcpy(to + 1, from, 298);
    bool right = to[0] == 0xee && to[299] == 0xee;
    for (unsigned i = 0; i < 298; i++)
        right = right && to[i + 1] == from[i];
    printf("memcpy %d memcmp %d %d %d strlen %lu %lu\n", right, memcmp("abc", "abd", 3) < 0,
           memcmp("abd", "abc", 3) > 0, memcmp("abX", "abY", 2), strlen(""), strlen("four"));
}

/* ---- pages ---- */

static void use_pages(void) {
    uint64_t first = page_alloc();
    memset(page_table(first), 0xff, PAGE_SIZE);
    uint64_t second = page_alloc();
    uint64_t sum = 0;
    for (unsigned i = 0; i < 512; i++)
        sum |= page_table(second)[i];
    printf("aligned %lx apart %lu zeroed %d\n", (first | second) & (PAGE_SIZE - 1), second - first,
           sum == 0);
}

static void use_all_pages(void) {
    for (;;)
        page_alloc();
}

/* The kernel goes on in the new space; the rest of it is empty. */
static void use_address_space(void) {
    uint64_t before = cr3_read();
    uint64_t root = address_space_create();
    page_table(before)[9] = page_alloc() | PTE_PRESENT;
    cr3_write(root);
    uint64_t others = 0;
    for (unsigned i = 1; i < 512; i++)
        others |= page_table(root)[i];
    printf("switched %d others %lx\n", cr3_read() == root && root != before, others);
}

/* ---- traps ---- */

#define UNMAPPED_GVA (UINT64_C(5) << 39)

static void print_caught(const char *what, bool caught, const struct trap_frame *frame) {
    if (caught)
        printf("%s: vector %lu, error code %lx, ring %lu\n", what, frame->vector, frame->error_code,
               frame->cs & 3);
    else
        printf("%s: nothing\n", what);
}

static void read_at(uint64_t gva) { *(volatile uint8_t *)gva; }
static void nothing(uint64_t argument) { (void)argument; }
static void undefined(uint64_t argument) {
    (void)argument;
    __asm__ volatile("ud2");
}
static void divide(uint64_t by) {
    __asm__ volatile("divl %0" : : "r"((uint32_t)by), "a"(1), "d"(0));
}

static void try_in_ring_0(void) {
    struct trap_frame caught;
    print_caught("read", trap_try(read_at, UNMAPPED_GVA, &caught), &caught);
    printf("cr2 %d\n", cr2_read() == UNMAPPED_GVA);
    print_caught("nothing", trap_try(nothing, 0, &caught), &caught);
    print_caught("undefined", trap_try(undefined, 0, &caught), &caught);
    print_caught("divide by 0", trap_try(divide, 0, &caught), &caught);
    print_caught("divide by 1", trap_try(divide, 1, &caught), &caught);
}

/* With no attempt under way, an exception is unhandled again. */
static void try_and_then_fail(void) {
    struct trap_frame caught;
    trap_try(nothing, 0, &caught);
    trap_try(undefined, 0, &caught);
    printf("tried\n");
    undefined(0);
}

static uint64_t flags_read(void) {
    uint64_t flags;
    __asm__ volatile("pushfq; popq %0" : "=r"(flags));
    return flags;
}

static void try_with_interrupts_on(void) {
    struct trap_frame caught;
    __asm__ volatile("sti");
    trap_try(undefined, 0, &caught);
    printf("interrupts %d\n", (flags_read() & X86_EFLAGS_IF) != 0);
    __asm__ volatile("cli");
    trap_try(undefined, 0, &caught);
    printf("interrupts %d\n", (flags_read() & X86_EFLAGS_IF) != 0);
}

/* The kernel's own PML4 slot stays for ring 0; PML4[6] maps the ring 3 code and a stack. */
#define USER_CODE_GVA (UINT64_C(6) << 39)
#define USER_STACK_GVA (USER_CODE_GVA + PAGE_SIZE)
#define PERMISSIONS (PTE_PRESENT | PTE_WRITABLE | PTE_USER)

static void user_map(void) {
    uint64_t pdpt = page_alloc();
    uint64_t pd = page_alloc();
    uint64_t pt = page_alloc();
    page_table(cr3_read())[6] = pdpt | PERMISSIONS;
    page_table(pdpt)[0] = pd | PERMISSIONS;
    page_table(pd)[0] = pt | PERMISSIONS;
    page_table(pt)[0] = (uint64_t)user_start | PERMISSIONS;
    page_table(pt)[1] = page_alloc() | PERMISSIONS;
}

USER_CODE static void user_double(uint64_t argument) { USER_RETURN(2 * argument); }
USER_CODE static void user_read(uint64_t gva) { USER_RETURN(*(volatile uint8_t *)gva); }
USER_CODE static void user_halt(uint64_t argument) {
    __asm__ volatile("hlt");
    USER_RETURN(argument);
}
USER_CODE static void user_segment(uint64_t argument) {
    uint64_t selector;
    (void)argument;
    __asm__ volatile("mov %%cs, %0" : "=r"(selector));
    USER_RETURN(selector);
}

static uint64_t user_run(void (*function)(uint64_t), uint64_t argument) {
    uint64_t offset = (uint64_t)function - (uint64_t)user_start;
    return user_call(USER_CODE_GVA + offset, USER_STACK_GVA + PAGE_SIZE, argument);
}
static void user_read_at(uint64_t gva) { user_run(user_read, gva); }
static void user_halt_try(uint64_t argument) { user_run(user_halt, argument); }

static void try_in_ring_3(void) {
    struct trap_frame caught;
    user_map();
    printf("double %lx\n", user_run(user_double, 0x123456789));
    printf("ring %lu\n", user_run(user_segment, 0) & 3);
    print_caught("kernel page", trap_try(user_read_at, (uint64_t)user_start, &caught), &caught);
    print_caught("own page", trap_try(user_read_at, USER_CODE_GVA, &caught), &caught);
    print_caught("hlt", trap_try(user_halt_try, 0, &caught), &caught);
    printf("double %lx\n", user_run(user_double, 21));
}

static void return_from_ring_3(void) {
    user_map();
    user_run(user_double, 0);
    printf("interrupts %d\n", (flags_read() & X86_EFLAGS_IF) != 0);
    __asm__ volatile("sti");
    user_run(user_double, 0);
    printf("interrupts %d\n", (flags_read() & X86_EFLAGS_IF) != 0);
}

/* ---- the CPU ---- */

static void print_cpuid(void) {
    struct cpuid features = cpuid(1, 0);
    struct cpuid name = cpuid(0x40000000, 0);
    char text[13] = {0};
    memcpy(text, &name.ebx, 4);
    memcpy(text + 4, &name.ecx, 4);
    memcpy(text + 8, &name.edx, 4);
    printf("hypervisor %u name %s last %x apic id %u\n", features.ecx >> 31, text, name.eax,
           features.ebx >> 24);
}

/* ---- handlers ---- */

static bool skip_ud2(struct trap_frame *frame) {
    frame->rip += 2;
    frame->r10 = 77;
    return true;
}

static bool refuse(struct trap_frame *frame) {
    (void)frame;
    return false;
}

/* Registers from before an exception, which its handler has taken care of: rax, rbx, rcx, rdx, rsi,
 * rdi, r8 to r15, rflags. */
static uint64_t registers[15];

static void take_undefined_with_known_registers(void) {
    __asm__ volatile("push %%rbp\n"
                     "mov $1, %%eax; mov $2, %%ebx; mov $3, %%ecx; mov $4, %%edx\n"
                     "mov $5, %%esi; mov $6, %%edi; mov $8, %%r8d; mov $9, %%r9d\n"
                     "mov $10, %%r10d; mov $11, %%r11d; mov $12, %%r12d; mov $13, %%r13d\n"
                     "mov $14, %%r14d; mov $15, %%r15d; std\n"
                     "ud2\n"
                     "pushfq; push %%r15; push %%r14; push %%r13; push %%r12; push %%r11\n"
                     "push %%r10; push %%r9; push %%r8; push %%rdi; push %%rsi; push %%rdx\n"
                     "push %%rcx; push %%rbx; push %%rax; cld\n"
                     "mov %%rsp, %%rsi; mov %0, %%rdi; mov $15, %%ecx; rep movsq\n"
                     "mov %%rsi, %%rsp; pop %%rbp"
                     :
                     : "i"(registers)
                     : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
                       "r13", "r14", "r15", "memory", "cc");
}

static void handle_and_go_on(void) {
    struct trap_frame caught;
    trap_handle(VECTOR_UD, skip_ud2);
    take_undefined_with_known_registers();
    printf("registers");
    for (unsigned i = 0; i < 14; i++)
        printf(" %lu", registers[i]);
    printf(" DF %d\n", (registers[14] & X86_EFLAGS_DF) != 0);
    trap_handle(VECTOR_UD, refuse);
    print_caught("refused", trap_try(undefined, 0, &caught), &caught);
    trap_handle(VECTOR_UD, NULL);
    print_caught("unhandled", trap_try(undefined, 0, &caught), &caught);
}

/* NMI and #DF run on stacks of their own, far from the one they interrupt. */
static volatile uint64_t interruptions;

static bool report_stack(struct trap_frame *frame) {
    uint64_t here = (uint64_t)frame;
    printf("vector %lu own stack %d\n", frame->vector, frame->rsp - here > PAGE_SIZE);
    interruptions = interruptions + 1;
    return true;
}

static bool report_and_exit(struct trap_frame *frame) {
    report_stack(frame);
    guest_exit(0);
}

/* An NMI to the only CPU: SDM 3A "Interrupt Command Register (ICR)". */
#define APIC_SPURIOUS UINT64_C(0xfee000f0)
#define APIC_ICR_LOW UINT64_C(0xfee00300)
#define APIC_ICR_HIGH UINT64_C(0xfee00310)
static void send_nmi_and_wait(uint64_t argument) {
    (void)argument;
    mmio_write32(APIC_SPURIOUS, 0x1ff); /* enabled */
    mmio_write32(APIC_ICR_HIGH, 0);
    mmio_write32(APIC_ICR_LOW, 0x4400);
    while (interruptions == 0)
        ;
}

static uint64_t frame_gva; /* of the last NMI */

static bool report_frame(struct trap_frame *frame) {
    frame_gva = (uint64_t)frame;
    interruptions++;
    return true;
}

static void take_nmi(void) {
    trap_handle(VECTOR_NMI, report_stack);
    send_nmi_and_wait(0);
    printf("and on\n");
}

/* NMIs run where trap_nmi_stack() says, and again where they did before. */
static void move_nmi_stack(void) {
    static uint8_t stack[4096] __attribute__((aligned(16)));
    trap_handle(VECTOR_NMI, report_frame);
    uint64_t own_gva = trap_nmi_stack((uint64_t)(stack + sizeof stack));
    send_nmi_and_wait(0);
    bool is_moved = frame_gva - (uint64_t)stack < sizeof stack;
    uint64_t moved_gva = trap_nmi_stack(own_gva);
    interruptions = 0;
    send_nmi_and_wait(0);
    printf("moved %d says so %d moved back %d\n", is_moved,
           moved_gva == (uint64_t)(stack + sizeof stack),
           own_gva - frame_gva <= sizeof(struct trap_frame) + 16);
}

/* trap_try() is for exceptions: this is none, and nobody handles it. */
static void try_nmi(void) {
    struct trap_frame caught;
    print_caught("nmi", trap_try(send_nmi_and_wait, 0, &caught), &caught);
}

static void take_double_fault(void) {
    trap_handle(VECTOR_DF, report_and_exit);
    __asm__ volatile("mov %0, %%rsp; ud2" : : "r"(UNMAPPED_GVA));
}

/* A trap on the current stack, for comparison. */
static void take_undefined(void) {
    trap_handle(VECTOR_UD, report_and_exit);
    __asm__ volatile("ud2");
}

#define CASE(function) \
    { #function, function }
static const struct guest_case cases[] = {
    CASE(print_all),
    CASE(print_odd_formats),
    CASE(print_parameters),
    CASE(print_random),
    CASE(use_memory),
    CASE(use_pages),
    CASE(use_all_pages),
    CASE(use_address_space),
    CASE(try_in_ring_0),
    CASE(try_and_then_fail),
    CASE(try_with_interrupts_on),
    CASE(try_in_ring_3),
    CASE(return_from_ring_3),
    CASE(print_cpuid),
    CASE(handle_and_go_on),
    CASE(take_nmi),
    CASE(move_nmi_stack),
    CASE(try_nmi),
    CASE(take_double_fault),
    CASE(take_undefined),
};

void guest_main(void) { CASE_RUN(cases); }
