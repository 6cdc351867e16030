/* The 8259A pair, as a driver uses it. What the registers mean: include/pic_registers.h. Line 0 has the vector
 * base, line 15 the vector base + 15; base is a multiple of 8 from 32 on. */
#pragma once

#include "guest.h"
#include "pic_registers.h"

/* Begin: all lines masked and edge-triggered, none in service. */
void pic_begin(uint8_t base);
/* Let a line through, level-triggered. (Where there are no edge/level registers, edge-triggered.) */
void pic_unmask(unsigned line);
void pic_mask(unsigned line);
/* End the interrupt of this line; in its handler, when its device has been served. */
void pic_eoi(unsigned line);
