/* The 8259A pair, as a driver uses it. What the registers mean: include/pic_registers.h. Line 0 has the vector
 * base, line 15 the vector base + 15; base is a multiple of 8 from 32 on. */
#pragma once

#include "guest.h"
#include "pic_registers.h"

/* Begin, with interrupts off: all lines masked and edge-triggered, none in service. Spurious interrupts, which
 * come as those of line 7 or 15, are taken care of; who uses one of these lines itself takes them over. */
void pic_begin(uint8_t base);
/* Let a line through, level-triggered. (Where there are no edge/level registers, edge-triggered.) */
void pic_unmask(unsigned line);
void pic_mask(unsigned line);
/* End the interrupt of this line; in its handler, when its device has been served. */
void pic_eoi(unsigned line);
