/*
 * From a gva to a gpa in software, as the CPU does it, and what is read that way. The modes that
 * lessons use: no paging, four levels, five.
 */
#include <asm/processor-flags.h>
#include <stdbool.h>
#include <stdint.h>

#include "host.h"
#include "vmm.h"
#include "x86.h"

/* Follow one entry; true if it leads to another table. */
static bool walk_step(struct walk *walk, gpa_t entry_gpa, unsigned level) {
    const uint64_t *entry = memory_at(entry_gpa, sizeof *entry);
    if (!entry) {
        walk->end = WALK_OUTSIDE_MEMORY;
        return false;
    }
    uint64_t value = *entry;
    walk->entry[walk->steps].gpa = entry_gpa;
    walk->entry[walk->steps++].value = value;
    if (!(value & PTE_PRESENT)) {
        walk->end = WALK_NOT_PRESENT;
        return false;
    }
    /* Any level can take the W and U permissions away; any level can forbid execution. */
    walk->permits &= value | PTE_NO_EXECUTE;
    walk->permits |= value & PTE_NO_EXECUTE;
    if (level > 1 && !(value & PTE_LARGE))
        return true;
    /* Only a PDPT or PD entry may be large, and its address is that of a large frame: the bits below
     * are reserved, but for PAT. Not modelled: MAXPHYADDR, CPUs without 1 GiB pages, NXE off. */
    walk->page_size = PAGE_SIZE << (9 * (level - 1));
    walk->gpa = value & PTE_ADDRESS & ~(level > 1 ? PTE_LARGE_PAT : 0);
    bool is_valid = level <= 3 && !(walk->gpa & (walk->page_size - 1));
    walk->end = is_valid ? WALK_MAPPED : WALK_RESERVED_BIT;
    return false;
}

static bool gva_is_canonical(gva_t gva, unsigned top_level) {
    unsigned unused_bits = 64 - (12 + 9 * top_level);
    return (gva_t)((int64_t)(gva << unused_bits) >> unused_bits) == gva;
}

/* SDM 3A "4-Level Paging and 5-Level Paging". The accessed and dirty bits stay as they are. */
struct walk host_walk(gpa_t root_gpa, gva_t gva) {
    const struct kvm_sregs *sregs = host_sregs();
    struct walk walk = {.end = WALK_NOT_MODELLED,
                        .top_level = sregs->cr4 & X86_CR4_LA57 ? 5 : 4,
                        .permits = PTE_WRITABLE | PTE_USER};
    if (!(sregs->cr0 & X86_CR0_PG))
        return (struct walk){
            .end = WALK_MAPPED, .gpa = gva, .page_size = PAGE_SIZE, .permits = walk.permits};
    if (!(sregs->efer & EFER_LMA))
        return walk;
    walk.end = WALK_NOT_CANONICAL;
    if (!gva_is_canonical(gva, walk.top_level))
        return walk;
    gpa_t table = root_gpa & PTE_ADDRESS;
    unsigned level = walk.top_level;
    while (walk_step(&walk, table + UINT64_C(8) * page_index(gva, level), level)) {
        table = walk.entry[walk.steps - 1].value & PTE_ADDRESS;
        level--;
    }
    if (walk.end == WALK_MAPPED)
        walk.gpa |= gva & (walk.page_size - 1);
    return walk;
}

bool guest_read(gva_t gva, void *to, uint64_t size) {
    for (uint64_t done = 0; done < size; done++) {
        struct walk walk = host_walk(host_sregs()->cr3, gva + done);
        const uint8_t *byte = walk.end == WALK_MAPPED ? memory_at(walk.gpa, 1) : NULL;
        if (!byte)
            return false;
        ((uint8_t *)to)[done] = *byte;
    }
    return true;
}

void guest_read_text(gva_t gva, char *to, uint64_t size) {
    uint64_t length = 0;
    while (gva && length + 1 < size && guest_read(gva + length, to + length, 1) && to[length])
        length++;
    to[length] = '\0';
}
