/* Give the host half the command that command= names, in the state that it is about, and report which
 * vectors are delivered. */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

static volatile bool delivered;

static bool on_event(struct trap_frame *frame) {
    delivered = true;
    out32(LAB_REPORT, (uint32_t)(frame->vector | frame->error_code << 8));
    return true;
}

static enum command command_parse(void) {
    char text[8];
    unsigned number = 0;
    guest_parameter("command", text, sizeof text);
    for (const char *digit = text; *digit; digit++)
        number = 10 * number + (unsigned)(*digit - '0');
    return (enum command)number;
}

static void wait(void) {
    while (!delivered)
        pause();
}

static void idt_empty(void) {
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } empty = {0};
    __asm__ volatile("lidt %0" : : "m"(empty));
}

void guest_main(void) {
    enum command command = command_parse();
    trap_handle(VECTOR_GP, on_event);
    trap_handle(VECTOR_NMI, on_event);
    trap_handle(LAB_VECTOR, on_event);
    if (command == COMMAND_INTERRUPT || command == COMMAND_ONE_ONLY)
        sti();
    if (command == COMMAND_PAGE_FAULT_WITHOUT_IDT)
        idt_empty();
    out8(LAB_COMMAND, (uint8_t)command);
    switch (command) {
    case COMMAND_WINDOW:
        sti();
        wait();
        break;
    case COMMAND_HALT_INTERRUPT:
    case COMMAND_HALT_WINDOW:
        sti_halt();
        wait(); /* the window may open late: not in a loop of halts, which could miss it */
        break;
    case COMMAND_HALT_NMI:
    case COMMAND_HALT_NOTHING: halt(); break;
    case COMMAND_ONE_ONLY:
        wait();
        halt();
        break;
    case COMMAND_INTERRUPT:
    case COMMAND_EXCEPTION: wait(); break;
    default: break;
    }
    printf("done\n");
}
