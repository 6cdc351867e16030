/*
 * The I/O page tables of the software IOMMU, and its IOTLB: how they look, and how to get at them.
 * What uses them is yours, in host.c.
 *
 * The format is that of the hardware on the engine svm: an entry of Intel's second-stage tables (VT-d
 * specification, "Second-Stage Paging Entries"), three levels of 9 bits each for an iova of 39 bits.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>

#include "host.h"

#define IO_LEVELS 3
#define IO_IOVA_BITS 39
#define IO_TABLE_ENTRIES 512u

/* An entry. With neither permission, it is not present. */
#define IO_READ 0x1u
#define IO_WRITE 0x2u
#define IO_ADDRESS 0x000ffffffffff000u /* hpa of the next table, or of the page */

/* Which entry of a table of this level an iova selects: level 3 is the root, level 1 has the pages. */
static inline unsigned io_index(uint64_t iova, unsigned level) {
    return (unsigned)(iova >> (12 + 9 * (level - 1))) % IO_TABLE_ENTRIES;
}

/* ---- tables: memory that the VMM and the device's process share ---- */

#define IO_TABLES 96u
#define IO_TABLES_HPA UINT64_C(0x240000000)

struct io_memory {
    uint64_t table[IO_TABLES][IO_TABLE_ENTRIES];
    uint32_t tables; /* that are in use */
    uint32_t reads;  /* of entries, by io_read() */
    uint32_t strays; /* accesses that were to no table */
};
static struct io_memory *io_memory;

/* A new table, in which nothing is present: its hpa. */
static uint64_t io_table_new(void) {
    if (io_memory->tables == IO_TABLES)
        host_stuck("io_table_new() in host.c has made 96 tables");
    return IO_TABLES_HPA + PAGE_SIZE * io_memory->tables++;
}

static uint64_t *io_place(uint64_t table, unsigned index) {
    uint64_t number = (table - IO_TABLES_HPA) / PAGE_SIZE;
    if (table % PAGE_SIZE == 0 && number < io_memory->tables && index < IO_TABLE_ENTRIES)
        return &io_memory->table[number][index];
    io_memory->strays++;
    return NULL;
}

/* The entry of the table at this hpa. (Where there is no table: 0, and a check finds out.) */
static uint64_t io_read(uint64_t table, unsigned index) {
    const uint64_t *place = io_place(table, index);
    io_memory->reads++;
    return place ? __atomic_load_n(place, __ATOMIC_SEQ_CST) : 0;
}

static void io_write(uint64_t table, unsigned index, uint64_t entry) {
    uint64_t *place = io_place(table, index);
    if (place)
        __atomic_store_n(place, entry, __ATOMIC_SEQ_CST);
}

static void io_memory_make(void) {
    void *memory =
        mmap(NULL, sizeof *io_memory, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        host_cannot("there is no memory left for the lab");
    io_memory = memory;
}

/* ---- the IOTLB ---- */

/* The translation of a page can stand in one place only: that of its number, modulo the number of
 * places. */
#define IOTLB_ENTRIES 8u

struct iotlb_entry {
    uint64_t iova, hpa;   /* of the page */
    uint64_t permissions; /* IO_READ, IO_WRITE; 0: there is nothing in this place */
};
struct iotlb {
    struct iotlb_entry entry[IOTLB_ENTRIES];
};

static inline struct iotlb_entry *iotlb_place(struct iotlb *iotlb, uint64_t iova) {
    return &iotlb->entry[iova / PAGE_SIZE % IOTLB_ENTRIES];
}
