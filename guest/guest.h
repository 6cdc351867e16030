/*
 * The runtime that every guest links: what a lesson's guest.c may use. A guest is one file with
 * MACHINE() and guest_main(); when guest_main() returns, the run ends as a success.
 *
 * The boot page tables map gva = gpa for the first 4 GiB, ring 0 only; all code runs at ring 0 with
 * interrupts off unless a lesson changes that. No SSE, no x87, no heap.
 */
#pragma once

#include <asm/processor-flags.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "machine.h"
#include "random.h"
#include "x86.h"

/* Declare the machine this image needs, once, at file scope. Members not named are 0. */
#define MACHINE(...)                                                                 \
    __attribute__((section(".note.kvmlab"), used, aligned(4))) static const struct { \
        uint32_t name_size, descriptor_size, type;                                   \
        char name[8];                                                                \
        struct machine_note machine;                                                 \
    } machine_elf_note = {sizeof MACHINE_NOTE_NAME,                                  \
                          sizeof(struct machine_note),                               \
                          MACHINE_NOTE_TYPE,                                         \
                          MACHINE_NOTE_NAME,                                         \
                          {.version = MACHINE_NOTE_VERSION, __VA_ARGS__}}
_Static_assert(sizeof MACHINE_NOTE_NAME == 7, "padded to 8 bytes in the note");

/* The lesson itself. */
void guest_main(void);

/* ---- boot.c: what the boot loader said ---- */

/* This run's seed: `seed=` on the command line; 0 if there is none. */
uint64_t guest_seed(void);
/* The text after `name=` on the command line, up to a blank, copied to value (size bytes with its
 * NUL, cut if longer). False if the command line has no such word. */
bool guest_parameter(const char *name, char *value, size_t size);
/* The same of one among several words of this name: number counts them from 0. */
bool guest_parameter_at(const char *name, unsigned number, char *value, size_t size);
/* RAM in bytes: it starts at gpa 0. */
uint64_t guest_memory_size(void);

/* ---- console.c: COM1 ---- */

/* %s %c %d %u %x %p %%, with l for 64 bits and a zero-padded width: %08x, %lu. */
void printf(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- string.c ---- */
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *text);

/* ---- trap.c: exceptions and interrupts ---- */

/*
 * A handler returns true if the interrupted code may go on, at frame->rip: all of the frame is
 * restored from what the handler leaves in it. False: the exception is unhandled, and the guest
 * panics. NMI and #DF run on stacks of their own (IST); everything else on the current one, or, out
 * of ring 3, on the one that user_call() was called on.
 */
typedef bool (*trap_handler)(struct trap_frame *frame);
void trap_handle(uint8_t vector, trap_handler handler); /* NULL: unhandled again */

/* From the next NMI on they run on the stack that ends at top_gva, which is a multiple of 16. The
 * answer is where the one before ends. */
uint64_t trap_nmi_stack(uint64_t top_gva);

/*
 * Call function(argument); false if it returned. If an exception interrupts it, in ring 0 or in ring
 * 3 below it, that no handler takes, the call is abandoned: *caught is the frame, and the answer is
 * true. Interrupts and NMIs are not caught. Not to be nested.
 */
bool trap_try(void (*function)(uint64_t argument), uint64_t argument, struct trap_frame *caught);

/* End the run as a crash, with a reason that the VMM shows. */
#define PANIC(message) panic_at(PANIC_MESSAGE, message, LOCATION)
/* End the run: the student has not written this part yet. */
#define TODO(task) panic_at(PANIC_TODO, task, LOCATION)
/* End the run: this machine lacks what the lesson needs, such as "its CPU has no PCID". */
#define CANNOT(what) panic_at(PANIC_CANNOT, what, LOCATION)
_Noreturn void panic_at(enum panic_kind kind, const char *message, const char *location);
/* End the run with 0 for success, anything else for failure. */
_Noreturn void guest_exit(uint8_t status);

/* ---- paging.c: what page tables are made of ---- */

/* A zeroed page of RAM for a page table or for data, by its gpa (and gva: the boot mapping holds).
 * There is no way back. Comes from below PAGE_POOL_END; the RAM above is the lesson's own. */
#define PAGE_POOL_END (UINT64_C(8) << 20)
uint64_t page_alloc(void);

/* The 512 entries of the table at this gpa, or of the table that an entry points to. */
static inline uint64_t *page_table(uint64_t entry_or_gpa) {
    return (uint64_t *)(entry_or_gpa & PTE_ADDRESS);
}

/* A new top-level table: its first slot is the boot mapping, so the kernel runs there; all other
 * slots are empty. Its gpa is what CR3 takes. */
uint64_t address_space_create(void);

static inline uint64_t cr2_read(void) {
    uint64_t value;
    __asm__ volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}

static inline uint64_t cr3_read(void) {
    uint64_t value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

/* Switch address spaces. Flushes the TLB but for global pages: SDM 3A "Operations that Invalidate
 * TLBs and Paging-Structure Caches". */
static inline void cr3_write(uint64_t value) {
    __asm__ volatile("mov %0, %%cr3" : : "r"(value) : "memory");
}

/* Drop the TLB entry for gva in the current address space. */
static inline void invlpg(uint64_t gva) { __asm__ volatile("invlpg (%0)" : : "r"(gva) : "memory"); }

/* ---- boot.asm: ring 3 ---- */

/*
 * Run code in ring 3: entry_gva(argument) with the stack pointer stack_gva, in the current address
 * space, which must map both for ring 3. It comes back through USER_RETURN(), whose value is the
 * result. Not to be nested.
 */
uint64_t user_call(uint64_t entry_gva, uint64_t stack_gva, uint64_t argument);

/* A breakpoint, of ring 3 only: the trap handlers never see it. */
#define USER_RETURN(value)                       \
    do {                                         \
        __asm__ volatile("int3" : : "a"(value)); \
        __builtin_unreachable();                 \
    } while (0)

/* A function for ring 3: it is placed between user_start and user_end, whole pages, and must not
 * call or touch anything outside, since it runs wherever the lesson maps those pages. */
#define USER_CODE __attribute__((section(".user"), noinline, used, no_profile_instrument_function))
extern char user_start[], user_end[];

/* ---- ports, memory-mapped registers, and single instructions ---- */

static inline void out8(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline void out16(uint16_t port, uint16_t value) {
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline void out32(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline uint8_t in8(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline uint16_t in16(uint16_t port) {
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline uint32_t in32(uint16_t port) {
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* The string forms: count elements between memory and one port, in one instruction. */
static inline void out8_string(uint16_t port, const void *from, uint64_t count) {
    __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port) : "memory");
}
static inline void out16_string(uint16_t port, const void *from, uint64_t count) {
    __asm__ volatile("rep outsw" : "+S"(from), "+c"(count) : "d"(port) : "memory");
}
static inline void out32_string(uint16_t port, const void *from, uint64_t count) {
    __asm__ volatile("rep outsl" : "+S"(from), "+c"(count) : "d"(port) : "memory");
}
static inline void in8_string(uint16_t port, void *to, uint64_t count) {
    __asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"(port) : "memory");
}
static inline void in16_string(uint16_t port, void *to, uint64_t count) {
    __asm__ volatile("rep insw" : "+D"(to), "+c"(count) : "d"(port) : "memory");
}
static inline void in32_string(uint16_t port, void *to, uint64_t count) {
    __asm__ volatile("rep insl" : "+D"(to), "+c"(count) : "d"(port) : "memory");
}

/* A register in memory: one access of just this width, which the compiler neither splits nor drops.
 * Plain mov: KVM emulates the instruction, and need not know every other. */
static inline uint32_t mmio_read32(uint64_t gva) {
    uint32_t value;
    __asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(gva) : "memory");
    return value;
}
static inline void mmio_write32(uint64_t gva, uint32_t value) {
    __asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(gva) : "memory");
}

struct cpuid {
    uint32_t eax, ebx, ecx, edx;
};
static inline struct cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
    struct cpuid result;
    __asm__ volatile("cpuid"
                     : "=a"(result.eax), "=b"(result.ebx), "=c"(result.ecx), "=d"(result.edx)
                     : "a"(leaf), "c"(subleaf));
    return result;
}

/* Interrupts off; interrupts on, after the next instruction: SDM 2B "STI—Set Interrupt Flag". */
static inline void cli(void) { __asm__ volatile("cli" : : : "memory"); }
static inline void sti(void) { __asm__ volatile("sti" : : : "memory"); }
/* Wait a moment in a loop; one in which interrupts are on can be interrupted here. */
static inline void pause(void) { __asm__ volatile("pause" : : : "memory"); }
/* Turn interrupts on and stop until one comes: STI's shadow keeps it from coming in between. */
static inline void sti_halt(void) { __asm__ volatile("sti; hlt" : : : "memory"); }

/* Stop until an interrupt comes. With interrupts off that ends the run, as a success, but on a machine
 * whose local APIC is in the kernel: there only guest_exit() ends it. */
static inline void halt(void) { __asm__ volatile("hlt" : : : "memory"); }
