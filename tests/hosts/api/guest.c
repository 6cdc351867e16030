/* Touch the host half's memory as often as memory= says and what lies behind it, give the host half
 * the command that command= names, halt, hang: each if the command line asks for it. */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

static unsigned parameter_number(const char *name) {
    char text[8];
    unsigned number = 0;
    guest_parameter(name, text, sizeof text);
    for (const char *digit = text; *digit; digit++)
        number = 10 * number + (unsigned)(*digit - '0');
    return number;
}

void guest_main(void) {
    unsigned touches = parameter_number("memory");
    for (unsigned i = 0; i < touches; i++) {
        mmio_write32(LAB_MEMORY + 4 * i, i);
        printf("memory %x\n", mmio_read32(LAB_MEMORY + 4 * i));
    }
    if (parameter_number("behind"))
        mmio_write32(LAB_MEMORY + LAB_MEMORY_SIZE, 0);
    out8(LAB_COMMAND, (uint8_t)parameter_number("command"));
    if (parameter_number("halt"))
        __asm__ volatile("sti; hlt");
    if (parameter_number("hang"))
        for (;;)
            ;
    printf("done\n");
}
