/*
 * The contract between a guest image and the VMM: what the image says about the machine it needs,
 * and the three ports through which the guest speaks to the VMM itself. The C code of both sides
 * includes this file; guest/boot.asm follows it by hand.
 *
 * Everything else the guest meets is a published interface: the entry state and hvm_start_info
 * (pvh.h), COM1 (PC16550D data sheet), page tables and exceptions (x86.h).
 */
#pragma once

#include <stdint.h>

/*
 * The machine note: an ELF note that the image carries, so that `vmm image.elf` alone builds the
 * machine the image needs. Name "kvmlab", type MACHINE_NOTE_TYPE, descriptor struct machine_note,
 * little-endian. A guest declares it once, at the top of guest.c, with MACHINE() from guest.h.
 */
#define MACHINE_NOTE_NAME "kvmlab"
#define MACHINE_NOTE_TYPE 1
#define MACHINE_NOTE_VERSION 1

enum machine_irqchip {
    MACHINE_IRQCHIP_NONE = 0,   /* interrupts are the VMM's business: KVM_INTERRUPT */
    MACHINE_IRQCHIP_SPLIT = 1,  /* local APIC in the kernel, the rest in the VMM */
    MACHINE_IRQCHIP_KERNEL = 2, /* PIC, I/O APIC and local APIC in the kernel */
};

enum machine_device {
    MACHINE_DEVICE_COM1 = 1 << 0, /* 16550 UART at 0x3f8, no interrupt */
    /* The VMM's virtio console (virtio_device.h says where). It takes standard input: COM1 gets none. */
    MACHINE_DEVICE_VIRTIO_CONSOLE = 1 << 1,
};

enum machine_unknown_io {
    MACHINE_UNKNOWN_IO_FATAL = 0,  /* an access that no device claims ends the run */
    MACHINE_UNKNOWN_IO_IGNORE = 1, /* it reads as all ones, is dropped when written, and goes on */
};

struct machine_note {
    uint32_t version;    /* MACHINE_NOTE_VERSION */
    uint32_t memory_mib; /* 1 to MACHINE_MEMORY_MIB_MAX, contiguous from gpa 0 */
    uint32_t irqchip;    /* enum machine_irqchip */
    uint32_t devices;    /* set of enum machine_device */
    uint32_t unknown_io; /* enum machine_unknown_io */
};

/* Where something stands in the source: "lessons/01-vm-exit/guest.c:13". */
#define LOCATION __FILE__ ":" LOCATION_LINE(__LINE__)
#define LOCATION_LINE(line) LOCATION_TEXT(line)
#define LOCATION_TEXT(line) #line

/* RAM ends below the addresses where PCs have devices and the APICs. */
#define MACHINE_MEMORY_MIB_MAX 3072

/* The port of QEMU's isa-debug-exit. A write ends the run: 0 for success, anything else for
 * failure. Any access width. */
#define PORT_EXIT 0xf4

/* The port of QEMU's isa-debugcon: bytes written go to the file that --debugcon names, if any. */
#define PORT_DEBUGCON 0xe9

/*
 * A 32-bit write of the gva of a struct panic ends the run as a crash, and the VMM explains it.
 * The image is linked below 4 GiB, so 32 bits are enough. On a machine without the VMM the write
 * goes nowhere and the guest carries on to PORT_EXIT.
 */
#define PORT_PANIC 0xf8

enum panic_kind {
    PANIC_EXCEPTION = 1, /* an exception that no handler took: frame_gva says where */
    PANIC_MESSAGE = 2,   /* the guest found itself in a state it cannot continue from */
    PANIC_TODO = 3,      /* the student has not written this part yet */
    PANIC_CANNOT = 4,    /* this machine lacks what the lesson needs */
};

struct panic {
    uint64_t kind;         /* enum panic_kind */
    uint64_t message_gva;  /* NUL-terminated text, or 0 */
    uint64_t location_gva; /* NUL-terminated "file:line", or 0 */
    uint64_t frame_gva;    /* struct trap_frame of the exception, or 0 */
};

/*
 * What the guest's exception stubs (guest/boot.asm) leave on the stack: the registers they save,
 * the vector, an error code (0 where the CPU pushes none), and what the CPU pushed: SDM 3A "64-Bit
 * Mode Stack Frame".
 */
struct trap_frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8;
    uint64_t rdi, rsi, rbp, rdx, rcx, rbx, rax;
    uint64_t vector, error_code;
    uint64_t rip, cs, rflags, rsp, ss;
};
