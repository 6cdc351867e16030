/*
 * Lesson 5, guest half: what speaks to the MMU. Each function does what its name says, and notes it in
 * the guest's memory; the host half reads the notes at the end of a stage. An exit for each would be
 * simpler, but on most machines an exit empties the TLB, and then there is nothing to see.
 */
#pragma once

#include "guest.h"
#include "plan.h"

/* SDM 2A "CPUID—CPU Identification": whether the CPU has PCIDs, and INVPCID. */
#define CPUID_1_ECX_PCID (1u << 17)
#define CPUID_7_EBX_INVPCID (1u << 10)

static struct log mmu_log;

static inline void mmu_note(enum note_kind kind, uint32_t detail, uint64_t root, uint64_t gva,
                            uint64_t value) {
    if (mmu_log.count == LOG_NOTES)
        PANIC("the log is full: does a loop change tables or drop entries without end?");
    mmu_log.notes[mmu_log.count] = (struct note){kind, detail, root, gva, value};
    mmu_log.count++;
}

/* MOV to CR3. SDM 3A "Use of CR3 with 4-Level Paging and 5-Level Paging and CR4.PCIDE = 1". */
#define CR3_KEEP (UINT64_C(1) << 63) /* what the TLB holds for this PCID may stay */
#define CR3_PCID UINT64_C(0xfff)     /* with CR4.PCIDE = 0 bits 3 and 4 are PWT and PCD instead */
static inline void mmu_cr3_write(uint64_t value) {
    mmu_note(NOTE_CR3, 0, 0, 0, value);
    cr3_write(value);
}

/* MOV to CR4: X86_CR4_PGE, X86_CR4_PCIDE and others. */
static inline uint64_t mmu_cr4_read(void) {
    uint64_t value;
    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}
static inline void mmu_cr4_write(uint64_t value) {
    mmu_note(NOTE_CR4, 0, 0, 0, value);
    __asm__ volatile("mov %0, %%cr4" : : "r"(value) : "memory");
}

static inline void mmu_invlpg(uint64_t gva) {
    mmu_note(NOTE_INVLPG, 0, 0, gva, 0);
    invlpg(gva);
}

/* SDM 2A "INVPCID—Invalidate Process-Context Identifier". What a type does not use must be 0. */
enum invpcid_type {
    INVPCID_ADDRESS = 0,         /* gva, of one PCID; not the global ones */
    INVPCID_CONTEXT = 1,         /* all of one PCID; not the global ones */
    INVPCID_ALL_AND_GLOBALS = 2, /* all of all PCIDs, and the global ones */
    INVPCID_ALL = 3,             /* all of all PCIDs; not the global ones */
};
static inline void mmu_invpcid(enum invpcid_type type, uint16_t pcid, uint64_t gva) {
    struct {
        uint64_t pcid, gva;
    } descriptor = {pcid, gva};
    mmu_note(NOTE_INVPCID, type, 0, gva, pcid);
    __asm__ volatile("invpcid %0, %1" : : "m"(descriptor), "r"((uint64_t)type) : "memory");
}

/* The page-table entry of gva in the tables that begin at root; tables that are missing are made. */
static inline uint64_t *mmu_entry(uint64_t root, uint64_t gva) {
    uint64_t table = root;
    for (unsigned level = 4; level >= 2; level--) {
        uint64_t *upper = &page_table(table)[page_index(gva, level)];
        if (*upper == 0)
            *upper = page_alloc() | PTE_PRESENT | PTE_WRITABLE;
        table = *upper;
    }
    return &page_table(table)[page_index(gva, 1)];
}

/* Change it. The CPU is not told. */
static inline void mmu_entry_write(uint64_t root, uint64_t gva, uint64_t value) {
    volatile uint64_t *entry = mmu_entry(root, gva);
    mmu_note(NOTE_ENTRY, 0, root, gva, value);
    *entry = value;
}

/* Read the word at gva: what the CPU's translation leads to, remembered or not. */
static inline uint64_t mmu_look(uint64_t gva) {
    uint64_t value = *(volatile uint64_t *)gva;
    mmu_note(NOTE_LOOK, 0, 0, gva, value);
    return value;
}
