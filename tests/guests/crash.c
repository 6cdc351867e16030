/* A guest that dies, in the way that case= names. Each way is a function of its own, so that a
 * post-mortem can name it. */
#include "cases.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/* The boot mapping ends at 4 GiB: PML4[5] is empty. */
#define UNMAPPED_GVA ((UINT64_C(5) << 39) + 0x81234)
/* What the cases map: PML4[6]. */
#define MAPPED_GVA ((UINT64_C(6) << 39) + 0x5000)
#define TOP_GVA UINT64_C(0xffffff8000081000)
#define NOT_CANONICAL_GVA (UINT64_C(1) << 62)
#define OUTSIDE_MEMORY_GPA UINT64_C(0x7fff0000)

#define PERMISSIONS (PTE_PRESENT | PTE_WRITABLE | PTE_USER)

static void entry_set(uint64_t table, uint64_t gva, unsigned level, uint64_t entry) {
    page_table(table)[page_index(gva, level)] = entry;
}

/* A page of 4 KiB, alone in its slot of the PML4. */
static void map_page(uint64_t gva, uint64_t gpa, uint64_t permissions) {
    uint64_t pdpt = page_alloc();
    uint64_t pd = page_alloc();
    uint64_t pt = page_alloc();
    entry_set(cr3_read(), gva, 4, pdpt | PERMISSIONS);
    entry_set(pdpt, gva, 3, pd | PERMISSIONS);
    entry_set(pd, gva, 2, pt | PERMISSIONS);
    entry_set(pt, gva, 1, gpa | permissions | PTE_PRESENT);
    invlpg(gva);
}

/* Inlined, so that rip is in the function that the case names. */
#define INLINE static inline __attribute__((always_inline))
INLINE void read_at(uint64_t gva) { *(volatile uint8_t *)gva; }
INLINE void write_at(uint64_t gva) { *(volatile uint8_t *)gva = 1; }
INLINE void execute_at(uint64_t gva) { ((void (*)(void))gva)(); }

/* ---- exceptions that no handler takes ---- */

static void write_unmapped(void) { write_at(UNMAPPED_GVA); }
static void read_unmapped(void) { read_at(UNMAPPED_GVA); }
static void fetch_unmapped(void) { execute_at(UNMAPPED_GVA); }

static void write_read_only(void) {
    map_page(MAPPED_GVA, page_alloc(), 0);
    write_at(MAPPED_GVA);
}

static void fetch_no_execute(void) {
    map_page(MAPPED_GVA, page_alloc(), PTE_NO_EXECUTE);
    execute_at(MAPPED_GVA);
}

static void read_reserved_bit(void) {
    entry_set(cr3_read(), UNMAPPED_GVA, 4, page_alloc() | PERMISSIONS | PTE_LARGE);
    read_at(UNMAPPED_GVA);
}

/* A page of 2 MiB, alone in its slot. */
static void map_large_page(uint64_t gva, uint64_t gpa) {
    uint64_t pdpt = page_alloc();
    uint64_t pd = page_alloc();
    entry_set(cr3_read(), gva, 4, pdpt | PERMISSIONS);
    entry_set(pdpt, gva, 3, pd | PERMISSIONS);
    entry_set(pd, gva, 2, gpa | PTE_LARGE | PTE_PRESENT);
}

static void write_read_only_large(void) {
    map_large_page(MAPPED_GVA, 0x800000 | 1 << 12); /* the bit is PAT, not an address */
    write_at((MAPPED_GVA & ~(LARGE_PAGE_SIZE - 1)) + 0x12345);
}

static void read_misaligned_large(void) {
    map_large_page(MAPPED_GVA, 0x802000);
    read_at(MAPPED_GVA);
}

USER_CODE static void user_read(uint64_t gva) { USER_RETURN(*(volatile uint8_t *)gva); }
static void read_from_ring_3(void) {
    uint64_t offset = (uint64_t)user_read - (uint64_t)user_start;
    map_page(MAPPED_GVA, (uint64_t)user_start, PTE_USER);
    user_call(MAPPED_GVA + offset, MAPPED_GVA, (uint64_t)user_start);
}

static void undefined_instruction(void) { __asm__ volatile("ud2"); }
static void load_bad_selector(void) { __asm__ volatile("mov %0, %%fs" : : "r"(0x1230)); }
static void write_not_canonical(void) { write_at(NOT_CANONICAL_GVA); }

/* A fixed interrupt by the local APIC to itself: SDM 3A "Local APIC Register Address Map". */
#define APIC_SPURIOUS UINT64_C(0xfee000f0)
#define APIC_ICR_LOW UINT64_C(0xfee00300)
static void stray_interrupt(void) {
    mmio_write32(APIC_SPURIOUS, 0x1ff);  /* enabled */
    mmio_write32(APIC_ICR_LOW, 0x44040); /* to self, vector 0x40 */
    __asm__ volatile("sti");
    for (;;)
        ;
}

static void divide_by_zero(void) { __asm__ volatile("divl %0" : : "r"(0), "a"(1), "d"(0)); }

/* The CPU cannot push the frame of the #UD: that is #DF, on a stack of its own. */
static void lose_the_stack(void) { __asm__ volatile("mov %0, %%rsp\n ud2" : : "r"(UNMAPPED_GVA)); }

/* ---- panics ---- */

static void give_up(void) { PANIC("out of ideas"); }
static void not_written(void) { TODO("write the \"other\" half"); }
static void lack_something(void) { CANNOT("its CPU has no such thing"); }
static void panic_unprintable(void) { PANIC("\"quoted\" back\\slash \n\t\x01\x7f\x80\xff end"); }
static void panic_port(uint32_t gva) { out32(PORT_PANIC, gva); }
static void panic_nowhere(void) { panic_port(0xfffffff0); }
static void panic_8_bits(void) {
    in32(PORT_PANIC); /* 32 ones, which the next access must not leave to be read */
    out8(PORT_PANIC, 0x40);
}
static void panic_read(void) { in32(PORT_PANIC); }

static void panic_unknown_kind(void) {
    static const struct panic panic = {.kind = 77};
    panic_port((uint32_t)(uintptr_t)&panic);
}

static void panic_wild_strings(void) {
    static const struct panic panic = {PANIC_MESSAGE, UNMAPPED_GVA, NOT_CANONICAL_GVA, 0};
    panic_port((uint32_t)(uintptr_t)&panic);
}

static void panic_wild_frame(void) {
    static const struct panic panic = {PANIC_EXCEPTION, 0, 0, UNMAPPED_GVA};
    panic_port((uint32_t)(uintptr_t)&panic);
}

/* Longer than any message: no NUL for a page. */
static void panic_endless_message(void) {
    static char text[PAGE_SIZE];
    memset(text, 'x', sizeof text);
    PANIC(text);
}

/* ---- triple faults ---- */

struct __attribute__((packed)) descriptor_table {
    uint16_t limit;
    uint64_t base;
};

static void idt_load(uint16_t limit, uint64_t base) {
    struct descriptor_table idtr = {limit, base};
    __asm__ volatile("lidt %0" : : "m"(idtr));
}

static void enter_empty_space(void) { cr3_write(page_alloc()); }

/* The VMM needs one free slot of the top-level table to find out what began it: here the lowest, and
 * here none at all. */
INLINE void enter_full_space(unsigned from) {
    uint64_t root = page_alloc();
    for (unsigned slot = from; slot < 512; slot++)
        page_table(root)[slot] = OUTSIDE_MEMORY_GPA | PERMISSIONS;
    cr3_write(root);
}
static void enter_nearly_full_space(void) { enter_full_space(2); }
static void enter_quite_full_space(void) { enter_full_space(1); }

static void enter_reserved_space(void) {
    uint64_t root = page_alloc();
    entry_set(root, 0, 4, page_table(cr3_read())[0] | PTE_LARGE);
    cr3_write(root);
}

static void enter_space_outside_memory(void) {
    uint64_t root = page_alloc();
    entry_set(root, 0, 4, OUTSIDE_MEMORY_GPA | PERMISSIONS);
    cr3_write(root);
}

static void enter_root_outside_memory(void) { cr3_write(OUTSIDE_MEMORY_GPA); }

static void empty_idt(void) {
    idt_load(0, 0);
    __asm__ volatile("ud2");
}

/* There are exits before it, after which the VMM may go step by step. */
static void empty_idt_after_a_line(void) {
    printf("a line\n");
    empty_idt();
}

static void fault_behind_an_exit(void) {
    idt_load(0, 0);
    __asm__ volatile("out %%al, $0xe9; ud2" : : "a"(0));
}

static void unmapped_idt(void) {
    idt_load(0xfff, UNMAPPED_GVA & ~UINT64_C(0xfff));
    __asm__ volatile("ud2");
}

/* In the last slot of the PML4, which the VMM borrows to find out what began it. */
static void unmapped_idt_above(void) {
    idt_load(0xfff, TOP_GVA);
    __asm__ volatile("ud2");
}

/* Gates whose present bit is clear, to a handler that is not mapped either. */
static void absent_gates(void) {
    static uint64_t gates[VECTORS][2];
    for (unsigned vector = 0; vector < VECTORS; vector++) {
        gates[vector][0] = (UNMAPPED_GVA & 0xffff) | 8 << 16 | UINT64_C(0x0e00) << 32 |
                           (UNMAPPED_GVA & 0xffff0000) << 32;
        gates[vector][1] = UNMAPPED_GVA >> 32;
    }
    idt_load(sizeof gates - 1, (uint64_t)gates);
    __asm__ volatile("ud2");
}

/* ---- unknown devices, hangs and halts ---- */

static void read_unknown_port(void) { in16(0x1234); }
static void write_unknown_port(void) { out8(0xed, 1); }
static void read_unknown_gpa(void) { mmio_read32(0xd0001000); }
static void write_unknown_gpa(void) { mmio_write32(0xd0001000, 1); }

static void hang_with_interrupts_off(void) {
    printf("hanging\n");
    for (;;)
        ;
}

static void hang_with_interrupts_on(void) {
    printf("hanging\n");
    __asm__ volatile("sti");
    for (;;)
        ;
}

static void halt_with_interrupts_on(void) {
    printf("halting\n");
    __asm__ volatile("sti; hlt");
}
static void halt_with_interrupts_off(void) { halt(); }

/* KVM has to emulate what touches MMIO, and does not know x87 arithmetic. */
static void emulate_x87(void) { __asm__ volatile("fldt (%0)" : : "r"(UINT64_C(0xd0001000))); }

static void exit_with_7(void) { guest_exit(7); }

#define CASE(function) \
    { #function, function }
static const struct guest_case cases[] = {
    CASE(write_unmapped),
    CASE(read_unmapped),
    CASE(fetch_unmapped),
    CASE(write_read_only),
    CASE(fetch_no_execute),
    CASE(read_reserved_bit),
    CASE(write_read_only_large),
    CASE(read_misaligned_large),
    CASE(read_from_ring_3),
    CASE(undefined_instruction),
    CASE(load_bad_selector),
    CASE(write_not_canonical),
    CASE(stray_interrupt),
    CASE(divide_by_zero),
    CASE(lose_the_stack),
    CASE(give_up),
    CASE(not_written),
    CASE(lack_something),
    CASE(panic_unprintable),
    CASE(panic_nowhere),
    CASE(panic_8_bits),
    CASE(panic_read),
    CASE(panic_unknown_kind),
    CASE(panic_wild_strings),
    CASE(panic_wild_frame),
    CASE(panic_endless_message),
    CASE(enter_empty_space),
    CASE(enter_nearly_full_space),
    CASE(enter_quite_full_space),
    CASE(enter_reserved_space),
    CASE(enter_space_outside_memory),
    CASE(enter_root_outside_memory),
    CASE(empty_idt),
    CASE(empty_idt_after_a_line),
    CASE(fault_behind_an_exit),
    CASE(unmapped_idt),
    CASE(unmapped_idt_above),
    CASE(absent_gates),
    CASE(read_unknown_port),
    CASE(write_unknown_port),
    CASE(read_unknown_gpa),
    CASE(write_unknown_gpa),
    CASE(hang_with_interrupts_off),
    CASE(hang_with_interrupts_on),
    CASE(halt_with_interrupts_on),
    CASE(halt_with_interrupts_off),
    CASE(emulate_x87),
    CASE(exit_with_7),
};

void guest_main(void) { CASE_RUN(cases); }
