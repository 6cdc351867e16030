/*
 * The registers of the edu device, as the QEMU project documents them (docs/specs/edu, "MMIO area
 * spec"): what a driver and a device agree on. It is a PCI device with one BAR of 1 MiB and one
 * MSI.
 *
 * Registers below EDU_DMA_SOURCE take accesses of 4 bytes, those from there on of 4 or 8. All
 * others in the BAR mean nothing: a write there is ignored.
 */
#pragma once

#define EDU_BAR_SIZE 0x100000u

#define EDU_ID 0x00 /* read-only: 0xRRrr00ed, version RR.rr */
#define EDU_ID_MASK 0x0000ffffu
#define EDU_ID_VALUE 0x000000edu
#define EDU_LIVENESS 0x04  /* acts: reads as the complement of what was written */
#define EDU_FACTORIAL 0x08 /* acts: becomes the factorial of what was written, modulo 2^32 */
#define EDU_STATUS 0x20
#define EDU_STATUS_COMPUTING 0x01u /* read-only: the factorial is not there yet */
#define EDU_STATUS_INTERRUPT 0x80u /* when it is there, interrupt */
#define EDU_INTERRUPT_STATUS 0x24  /* read-only: what it has interrupted for */
#define EDU_INTERRUPT_FACTORIAL 0x001u
#define EDU_INTERRUPT_DMA 0x100u
#define EDU_INTERRUPT_RAISE 0x60 /* acts: these bits into the interrupt status, and interrupt */
#define EDU_INTERRUPT_ACKNOWLEDGE 0x64 /* acts: these bits out of the interrupt status */
#define EDU_DMA_SOURCE 0x80            /* an address: of DMA, or of the buffer */
#define EDU_DMA_DESTINATION 0x88
#define EDU_DMA_COUNT 0x90   /* bytes */
#define EDU_DMA_COMMAND 0x98 /* acts */
#define EDU_DMA_START 0x1u   /* reads as 1 until the transfer is over */
#define EDU_DMA_TO_RAM 0x2u  /* else from RAM to the device */
#define EDU_DMA_INTERRUPT 0x4u

/* The device's own memory, which a driver reaches by DMA only: these addresses are the device's. */
#define EDU_BUFFER 0x40000u
#define EDU_BUFFER_SIZE 4096u

/* Addresses of DMA have 28 bits; those above are dropped. */
#define EDU_DMA_MASK 0x0fffffffu

/*
 * Ours, and in a place that edu ignores. A device behind shared memory does not notice a write: so
 * a driver writes the number of a register that acts (above) here, when it has written to that
 * register.
 */
#define EDU_DOORBELL 0x1000
