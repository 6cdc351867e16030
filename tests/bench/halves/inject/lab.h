/* What the two halves of this benchmark agree on. */
#pragma once

#define LAB_HOW 0x500  /* one byte, once: enum how */
#define LAB_NEXT 0x501 /* one byte: the guest is ready for an interrupt */
#define LAB_VECTOR 0x20

enum how {
    HOW_IOCTL,  /* KVM_INTERRUPT */
    HOW_SYNCED, /* the VMM's vcpu_interrupt(), which lets KVM_RUN take it along */
};
