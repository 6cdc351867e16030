/* What the two halves of this test agree on. */
#pragma once

#define LAB_COMMAND 0x500 /* one byte: enum command; the next entry is the one it is about */
#define LAB_REPORT 0x504  /* four bytes: a vector that was delivered, its error code above it */
#define LAB_VECTOR 0x31
#define LAB_ERROR_CODE 0x18
#define LAB_FAULT_GVA 0x123456789000

enum command {
    COMMAND_INTERRUPT,      /* inject at once */
    COMMAND_NOT_READY,      /* the same, but the guest has interrupts off */
    COMMAND_ONE_ONLY,       /* the same; the guest halts afterwards */
    COMMAND_WINDOW,         /* ask for a window, inject when it is open */
    COMMAND_HALT_INTERRUPT, /* inject when the guest has halted */
    COMMAND_HALT_WINDOW,    /* ask for a window when it has, inject when that is open */
    COMMAND_HALT_NMI,
    COMMAND_HALT_NOTHING,
    COMMAND_EXCEPTION,
    COMMAND_PAGE_FAULT,             /* which the guest does not handle, */
    COMMAND_PAGE_FAULT_WITHOUT_IDT, /* and of which it can know nothing */
    COMMAND_NO_EVENTS,              /* set the vCPU's events to what they are */
    COMMAND_BAD_VECTOR,
    COMMAND_BAD_LINE, /* of a controller that this machine has not */
};
