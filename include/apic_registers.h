/*
 * The registers of the local APIC and of the I/O APIC, and the messages between them, as far as the
 * lessons use them: SDM 3A "Advanced Programmable Interrupt Controller (APIC)", and the 82093AA I/O
 * APIC data sheet, "Register Description". The guest reaches them in memory (guest/apic.h); the VMM sees
 * the same layout in KVM_GET_LAPIC and KVM_GET_IRQCHIP.
 */
#pragma once

#include <stdint.h>

/* ---- the local APIC: 32-bit registers, 16 bytes apart, at these offsets ---- */

#define LAPIC_GPA 0xfee00000u
#define LAPIC_ID 0x020
#define LAPIC_TPR 0x080 /* task priority: bits 7:4 are the class that is held back, and all below */
#define LAPIC_EOI 0x0b0 /* any write ends the interrupt in service */
#define LAPIC_LDR 0x0d0 /* logical destination: bits 31:24 */
#define LAPIC_DFR 0x0e0 /* destination format: all ones is the flat model, a bit for each CPU */
#define LAPIC_SVR 0x0f0 /* the vector of spurious interrupts */
#define LAPIC_SVR_ENABLE (1u << 8)
#define LAPIC_ISR 0x100       /* in service: a bit for each vector, in eight registers of 32 */
#define LAPIC_TMR 0x180       /* which of them came level-triggered */
#define LAPIC_IRR 0x200       /* requested: accepted, and not in service yet */
#define LAPIC_ICR_LOW 0x300   /* a write sends an interprocessor interrupt */
#define LAPIC_LVT_TIMER 0x320 /* what the timer sends; bits 18:17 are its mode, 0 is one-shot */
#define LAPIC_LVT_LINT0 0x350 /* what the pin LINT0 sends, to which a PC has its 8259As wired */
#define LAPIC_LVT_MASKED (1u << 16)
#define LAPIC_TIMER_INITIAL 0x380 /* a write starts the timer; 0 stops it */
#define LAPIC_TIMER_CURRENT 0x390
#define LAPIC_TIMER_DIVIDE 0x3e0
#define LAPIC_TIMER_DIVIDE_BY_1 0xbu

/* "Interrupt Command Register (ICR)": beside the vector and the delivery mode. */
#define LAPIC_ICR_ASSERT (1u << 14)
#define LAPIC_ICR_TO_SELF (1u << 18) /* destination shorthand 01 */

/* ---- what an interrupt is, wherever it is described ---- */

/* The ICR, the LVT, a redirection entry and the data of a message have these bits in common. */
#define APIC_VECTOR 0xffu
#define APIC_DELIVERY_FIXED (0u << 8)
#define APIC_DELIVERY_NMI (4u << 8)    /* the vector is ignored */
#define APIC_DELIVERY_EXTINT (7u << 8) /* the vector is an 8259A's to say */
#define APIC_DELIVERY (7u << 8)

/* ---- the I/O APIC: two registers in memory, through which all others are reached ---- */

#define IOAPIC_GPA 0xfec00000u
#define IOAPIC_SELECT 0x00 /* IOREGSEL: the number of a register ... */
#define IOAPIC_WINDOW 0x10 /* IOWIN: ... and that register */
#define IOAPIC_PINS 24
#define IOAPIC_REDIRECTION(pin) (0x10u + 2 * (pin)) /* bits 31:0; the next register is bits 63:32 */

/* A redirection entry: the vector and the delivery mode as above, and these. */
#define IOAPIC_LOGICAL (UINT64_C(1) << 11)    /* the destination is a logical one */
#define IOAPIC_PENDING (UINT64_C(1) << 12)    /* read-only: sent, but not accepted yet */
#define IOAPIC_ACTIVE_LOW (UINT64_C(1) << 13) /* the line's polarity */
#define IOAPIC_REMOTE_IRR (UINT64_C(1) << 14) /* read-only, level: accepted, and not ended yet */
#define IOAPIC_LEVEL (UINT64_C(1) << 15)      /* level-triggered; else edge-triggered */
#define IOAPIC_MASKED (UINT64_C(1) << 16)
#define IOAPIC_DESTINATION_SHIFT 56

/* ---- a message: SDM 3A "Message Signalled Interrupts" ---- */

#define MSI_ADDRESS 0xfee00000u
#define MSI_ADDRESS_LOGICAL (1u << 2)
#define MSI_ADDRESS_DESTINATION_SHIFT 12
/* Data: the vector and the delivery mode as above, and, for a level-triggered interrupt, these. */
#define MSI_DATA_ASSERT (1u << 14)
#define MSI_DATA_LEVEL (1u << 15)
