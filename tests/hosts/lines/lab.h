/* What the two halves of this test agree on. */
#pragma once

#define LAB_LINE 0x500   /* one byte: an interrupt line, and LAB_HIGH if it is high from now on */
#define LAB_NMI 0x501    /* the same, and an NMI comes with it */
#define LAB_REPORT 0x504 /* four bytes: what the guest has seen */
#define LAB_HIGH 0x80
#define LAB_BASE 0x60 /* the vector of line 0 */
