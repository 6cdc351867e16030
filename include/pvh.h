/*
 * The boot data of the PVH entry point: Xen's public header arch-x86/hvm/start_info.h describes the
 * structures, "x86/HVM direct boot ABI" (docs/misc/pvh.pandoc of Xen) the CPU state: 32-bit
 * protected mode, paging off, flat segments, interrupts off, ebx = gpa of struct hvm_start_info.
 * The VMM fills these in; the guest reads them. All addresses are gpas.
 */
#pragma once

#include <stdint.h>

/* The ELF note that names the 32-bit entry point: name "Xen", this type, a 4- or 8-byte gpa. */
#define XEN_ELFNOTE_NAME "Xen"
#define XEN_ELFNOTE_PHYS32_ENTRY 18

#define XEN_HVM_START_MAGIC_VALUE 0x336ec578
#define XEN_HVM_MEMMAP_TYPE_RAM 1

struct hvm_start_info {
    uint32_t magic;   /* XEN_HVM_START_MAGIC_VALUE */
    uint32_t version; /* 1: the memory map fields are there */
    uint32_t flags;
    uint32_t nr_modules;
    uint64_t modlist_paddr;
    uint64_t cmdline_paddr; /* NUL-terminated */
    uint64_t rsdp_paddr;    /* 0: no ACPI */
    uint64_t memmap_paddr;
    uint32_t memmap_entries;
    uint32_t reserved;
};

struct hvm_memmap_table_entry {
    uint64_t addr;
    uint64_t size; /* bytes */
    uint32_t type; /* XEN_HVM_MEMMAP_TYPE_RAM or an E820 type */
    uint32_t reserved;
};
