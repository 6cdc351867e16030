/* What the two halves of this test agree on. */
#pragma once

#define LAB_COMMAND 0x500   /* one byte: enum command */
#define LAB_SLOT 0x20000000 /* the host half's slot, of two pages; the host takes the second away */

enum command {
    COMMAND_MEND,       /* memory_fault gives the memory back */
    COMMAND_REFUSE,     /* it does not, and says so */
    COMMAND_LIE,        /* it does not, and says that it did */
    COMMAND_NOT_MINE,   /* the host half wants to change a slot of the VMM's */
    COMMAND_SLOT_AGAIN, /* the slot moves, and is removed */
};
