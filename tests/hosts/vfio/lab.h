/* What the two halves of this test agree on; and, of edu's registers (QEMU, docs/specs/edu), those that it uses. */
#pragma once

#define EDU_BAR_SIZE 0x100000u
#define EDU_ID 0x00
#define EDU_LIVENESS 0x04
#define EDU_INTERRUPT_STATUS 0x24
#define EDU_INTERRUPT_RAISE 0x60
#define EDU_INTERRUPT_ACKNOWLEDGE 0x64
#define EDU_DMA_SOURCE 0x80
#define EDU_DMA_DESTINATION 0x88
#define EDU_DMA_COUNT 0x90
#define EDU_DMA_COMMAND 0x98
#define EDU_DMA_START 0x1u
#define EDU_DMA_TO_RAM 0x2u
#define EDU_BUFFER 0x40000u
#define EDU_BUFFER_SIZE 4096u

#define LAB_BAR 0xd0000000u /* the device's registers, by way of a memory slot */

/* Pages of RAM, and the addresses by which the device knows two of them. The third is not mapped for it, and
 * its address for the device would be that of the third in RAM. */
#define LAB_SOURCE 0xa00000u /* which the device may only read */
#define LAB_DESTINATION 0xb00000u
#define LAB_VICTIM 0xc00000u
#define LAB_SOURCE_IOVA 0x8000000u
#define LAB_DESTINATION_IOVA 0x9000000u
#define LAB_BYTES 64
#define LAB_UNTOUCHED 0xc5

#define LAB_STAGE 0x500     /* one byte, enum stage: it begins */
#define LAB_INTERRUPT 0x501 /* one byte, enum form: how the device is to interrupt from now on */
#define LAB_WRONG 0x504     /* four bytes each: how often the id was not as it should be; */
#define LAB_LIVENESS 0x508  /* what the register has become; */
#define LAB_CAUSE 0x50c     /* why the device has interrupted */

#define LAB_READS 1000

enum stage {
    STAGE_READ, /* the guest reads a register */
    STAGE_HAS_READ,
    STAGE_BY_HAND, /* the device has interrupted, and nothing but VFIO and the host half know */
    STAGE_ACKNOWLEDGED,
    STAGE_READ_ONLY,    /* the device was to write where it may only read, */
    STAGE_MOVED,        /* has moved data from source to destination, */
    STAGE_CACHED,       /* and was to write again where it may only read, and just has */
    STAGE_UNMAP,        /* the destination must go, for the device */
    STAGE_UNMAPPED,     /* the device was to write there, */
    STAGE_NEVER_MAPPED, /* and where it never might */
};

enum form {
    FORM_MSI,
    FORM_LINE,    /* INTx, unmasked by KVM when the guest ends the interrupt */
    FORM_BY_HAND, /* INTx, unmasked by the host half */
};

#define LAB_MSI_VECTOR 0x50
#define LAB_LINE_VECTOR 0x60
#define LAB_LINE_PIN 10
