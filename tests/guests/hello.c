/* The smallest guest: it says what it was given, and ends. */
#include "guest.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

void guest_main(void) {
    printf("hello from seed %lu with %lu MiB\n", guest_seed(), guest_memory_size() >> 20);
}
