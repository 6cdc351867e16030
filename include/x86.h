/*
 * Names for what the guest and the VMM both read in page tables and exceptions. Control-register
 * and RFLAGS bits are not here: both sides take those from the kernel's <asm/processor-flags.h>.
 */
#pragma once

#include <stdint.h>

/* A page-table entry of any level: SDM 3A "Hierarchical Paging Structures: an Overview",
 * APM 2 "Long-Mode Page Translation". */
#define PTE_PRESENT (UINT64_C(1) << 0)
#define PTE_WRITABLE (UINT64_C(1) << 1)
#define PTE_USER (UINT64_C(1) << 2)
#define PTE_ACCESSED (UINT64_C(1) << 5)
#define PTE_DIRTY (UINT64_C(1) << 6)
#define PTE_LARGE \
    (UINT64_C(1) << 7) /* in a PDPT or PD entry: maps 1 GiB or 2 MiB and ends the walk */
#define PTE_LARGE_PAT (UINT64_C(1) << 12) /* in an entry with PTE_LARGE: memory type */
#define PTE_GLOBAL (UINT64_C(1) << 8)
#define PTE_NO_EXECUTE (UINT64_C(1) << 63)
#define PTE_ADDRESS UINT64_C(0x000ffffffffff000) /* bits 51:12 */

#undef PAGE_SIZE /* of the host, in some <limits.h> */
#define PAGE_SIZE UINT64_C(4096)
#define LARGE_PAGE_SIZE (512 * PAGE_SIZE)

/* Paging levels as the manuals count them: 4 is the PML4, 1 is the page table. */
static inline unsigned page_index(uint64_t gva, unsigned level) {
    return (gva >> (12 + 9 * (level - 1))) & 511;
}

/* SDM 3A "IA32_EFER MSR"; <asm/processor-flags.h> stops short of the MSRs. */
#define MSR_EFER 0xc0000080u
#define EFER_LME (UINT64_C(1) << 8)
#define EFER_LMA (UINT64_C(1) << 10)

/* SDM 3A "Page-Fault Error Code". */
#define PF_ERROR_PRESENT (1u << 0) /* 0: an entry on the walk was not present */
#define PF_ERROR_WRITE (1u << 1)
#define PF_ERROR_USER (1u << 2)
#define PF_ERROR_RESERVED (1u << 3)
#define PF_ERROR_FETCH (1u << 4)

/* SDM 3A "Exception and Interrupt Reference". */
#define VECTOR_DE 0
#define VECTOR_DB 1
#define VECTOR_NMI 2
#define VECTOR_BP 3
#define VECTOR_UD 6
#define VECTOR_DF 8
#define VECTOR_GP 13
#define VECTOR_PF 14
#define VECTORS 256
/* A bit for each exception that pushes an error code: 8, 10 to 14, 17, 21, and AMD's 29 and 30. */
#define VECTORS_WITH_ERROR_CODE 0x60227d00u
