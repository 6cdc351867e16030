/*
 * The 8259A interrupt controllers of a PC: a master for lines 0 to 7, a slave for 8 to 15 behind the
 * master's line 2. 8259A data sheet, "Initialization Command Words" and "Operation Command Words"; the
 * edge/level registers: 82371AB (PIIX4) data sheet, "Interrupt Controller Registers".
 */
#pragma once

#define PIC_MASTER 0x20 /* ports: command here, data at the next one */
#define PIC_SLAVE 0xa0
#define PIC_EDGE_LEVEL \
    0x4d0 /* bit i: line i is level-triggered; at the next port, of lines 8 to 15 */
#define PIC_LINES 16
#define PIC_CASCADE 2 /* the master's line that the slave is behind */

/* Command port. A write with PIC_ICW1 begins the initialization: ICW2 to ICW4 follow at the data port. */
#define PIC_ICW1 0x10
#define PIC_ICW1_NEEDS_ICW4 0x01
#define PIC_ICW4_8086 0x01
#define PIC_ICW4_AUTO_EOI 0x02
#define PIC_OCW2_EOI 0x20 /* end of interrupt: of the line in service with the highest priority, */
#define PIC_OCW2_SPECIFIC_EOI 0x60 /* or of the line in bits 2:0 */
#define PIC_OCW3 0x08
#define PIC_OCW3_READ_IRR 0x0a /* what the command port shows from now on */
#define PIC_OCW3_READ_ISR 0x0b
