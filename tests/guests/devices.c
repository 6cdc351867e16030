/* A guest that drives the devices of the machine, politely and not, as case= says. What it finds it
 * prints. */
#include <linux/serial_reg.h>

#include "cases.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

#define COM1 0x3f8
#define PIC_MASK 0x21
#define APIC_VERSION UINT64_C(0xfee00030)
#define NO_DEVICE_PORT 0x1234
#define NO_DEVICE_GPA UINT64_C(0xd0001000)

/* ---- what the options and the machine note decide ---- */

static void read_apic(void) { printf("apic version %08x\n", mmio_read32(APIC_VERSION)); }
static void read_pic(void) { printf("pic mask %02x\n", in8(PIC_MASK)); }
static void halt_with_interrupts_on(void) { __asm__ volatile("sti; hlt"); }

static void print_word(void) {
    static char word[2048];
    bool found = guest_parameter("word", word, sizeof word);
    printf("word %s: %s\n", found ? "found" : "missing", word);
}

static void touch_nothing(void) {
    out8(NO_DEVICE_PORT, 1);
    out16(NO_DEVICE_PORT, 2);
    out32(NO_DEVICE_PORT, 3);
    mmio_write32(NO_DEVICE_GPA, 4);
    printf("in %02x", in8(NO_DEVICE_PORT));
    printf(" %04x", in16(NO_DEVICE_PORT));
    printf(" %08x", in32(NO_DEVICE_PORT));
    printf(" mmio %08x\n", mmio_read32(NO_DEVICE_GPA));
}

static void use_debugcon(void) {
    printf("debugcon %02x\n", in8(PORT_DEBUGCON));
    out8_string(PORT_DEBUGCON, "to the debug console\n", 21);
    out8(PORT_DEBUGCON, 0xff);
    halt(); /* and not guest_exit(), which sends more in the coverage build */
}

/* ---- COM1 ---- */

#define END_OF_INPUT 4

static uint8_t receive(void) {
    while (!(in8(COM1 + UART_LSR) & UART_LSR_DR))
        ;
    return in8(COM1 + UART_RX);
}

static void echo(void) {
    uint8_t byte;
    while ((byte = receive()) != END_OF_INPUT)
        out8(COM1 + UART_TX, byte);
}

/* `rep ins`: as one exit or as several, each element must be a byte of its own. */
static void echo_string(void) {
    static char text[16];
    in8_string(COM1 + UART_RX, text, sizeof text - 1);
    printf("received %s\n", text);
}

static void read_without_input(void) {
    uint8_t status = in8(COM1 + UART_LSR);
    printf("line status %02x, data %02x\n", status, in8(COM1 + UART_RX));
}

static void use_uart_registers(void) {
    out8(COM1 + UART_SCR, 0x5a);
    out8(COM1 + UART_IER, UART_IER_RDI);
    out8(COM1 + UART_MCR, UART_MCR_DTR | UART_MCR_RTS);
    out8(COM1 + UART_LCR, UART_LCR_DLAB | UART_LCR_WLEN8);
    out8(COM1 + UART_DLL, 'D'); /* not to be printed */
    out8(COM1 + UART_DLM, 0x12);
    uint8_t low = in8(COM1 + UART_DLL);
    uint8_t high = in8(COM1 + UART_DLM);
    out8(COM1 + UART_LCR, UART_LCR_WLEN8);
    out8(COM1 + UART_FCR, UART_FCR_ENABLE_FIFO);
    out8(COM1 + UART_LSR, 0); /* read-only, as is the next */
    out8(COM1 + UART_MSR, 0);
    printf("divisor %02x%02x scratch %02x ier %02x mcr %02x lcr %02x lsr %02x iir %02x\n", high,
           low, in8(COM1 + UART_SCR), in8(COM1 + UART_IER), in8(COM1 + UART_MCR),
           in8(COM1 + UART_LCR), in8(COM1 + UART_LSR), in8(COM1 + UART_IIR) & UART_IIR_NO_INT);
}

/* Every length around the FIFO's 16 bytes and printf's own buffer of 128. */
static void print_lengths(void) {
    static const unsigned lengths[] = {0, 1, 15, 16, 17, 31, 32, 33, 126, 127, 128, 129, 300};
    static char text[301];
    for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (unsigned at = 0; at < lengths[i]; at++)
            text[at] = (char)('a' + at % 26);
        text[lengths[i]] = '\0';
        printf("%s\n", text);
    }
}

static void chatter(void) {
    static const uint8_t bytes[4096] = {'?'};
    for (;;)
        out8_string(COM1 + UART_TX, bytes, sizeof bytes);
}

#define FLOOD_CHUNK (64 << 10)
#define FLOOD_CHUNKS 32

static void flood(void) {
    static uint64_t chunk[FLOOD_CHUNK / sizeof(uint64_t)];
    struct random random = random_stream(guest_seed(), 1);
    for (unsigned i = 0; i < sizeof chunk / sizeof *chunk; i++)
        chunk[i] = random_next(&random);
    for (unsigned i = 0; i < FLOOD_CHUNKS; i++)
        out8_string(COM1 + UART_TX, chunk, sizeof chunk);
}

/* ---- accesses that no driver would make ---- */

/* As on the ISA bus: the bytes reach the registers that follow, IER and SCR. */
static void write_com1_wide(void) {
    out16(COM1 + UART_TX, 0x0041);
    out32(COM1 + UART_TX, 0x03000142); /* IER = 1, LCR = 3 */
    out16(COM1 + UART_MSR, 0x7700);
    uint32_t first = in32(COM1 + UART_RX);
    uint16_t last = in16(COM1 + UART_MSR);
    printf("\nwide %08x %04x\n", first & 0xff00ff00, last & 0xff00);
}

static void write_com1_words(void) { out16_string(COM1 + UART_TX, "A\0B\0C\0D\0", 4); }

static void straddle_com1(void) { in32(COM1 + UART_LSR); }
static void straddle_exit_start(void) { out16(PORT_EXIT - 1, 0); }
static void straddle_exit_end(void) { out32(PORT_EXIT + 2, 0); }
static void straddle_port_space(void) { in16(0xffff); }

static void exit_16_bits(void) { out16(PORT_EXIT, 0x0100); }
static void exit_32_bits(void) { out32(PORT_EXIT, 0x01000000); }
static void exit_zero_32_bits(void) { out32(PORT_EXIT, 0); }
static void exit_string(void) { out8_string(PORT_EXIT, "\0\7\7\7", 4); }
static void read_exit_port(void) { printf("exit port %08x\n", in32(PORT_EXIT)); }

/* An MMIO access of each width, and strings of elements where there is nothing. */
static void read_nothing_in_every_way(void) {
    static uint8_t bytes[6000];
    uint64_t wide = 0;
    in8_string(NO_DEVICE_PORT, bytes, 0);
    in8_string(NO_DEVICE_PORT, bytes, 5000);
    unsigned ones = 0;
    for (unsigned i = 0; i < sizeof bytes; i++)
        ones += bytes[i] == 0xff;
    __asm__ volatile("movb (%1), %b0" : "+r"(wide) : "r"(NO_DEVICE_GPA));
    printf("string %u mmio %lx", ones, wide);
    __asm__ volatile("movw (%1), %w0" : "+r"(wide) : "r"(NO_DEVICE_GPA + 3));
    printf(" %lx", wide);
    __asm__ volatile("movq (%1), %0" : "+r"(wide) : "r"(NO_DEVICE_GPA + 8));
    printf(" %lx\n", wide);
}

/* Two bytes in the last page of RAM, two behind it. */
static void straddle_end_of_memory(void) {
    uint64_t gpa = guest_memory_size() - 2;
    mmio_write32(gpa, 0xaabbccdd);
    printf("end of memory %08x\n", mmio_read32(gpa));
}

#define CASE(function) \
    { #function, function }
static const struct guest_case cases[] = {
    CASE(read_apic),
    CASE(read_pic),
    CASE(halt_with_interrupts_on),
    CASE(print_word),
    CASE(touch_nothing),
    CASE(use_debugcon),
    CASE(echo),
    CASE(echo_string),
    CASE(read_without_input),
    CASE(use_uart_registers),
    CASE(print_lengths),
    CASE(chatter),
    CASE(flood),
    CASE(write_com1_wide),
    CASE(write_com1_words),
    CASE(straddle_com1),
    CASE(straddle_exit_start),
    CASE(straddle_exit_end),
    CASE(straddle_port_space),
    CASE(exit_16_bits),
    CASE(exit_32_bits),
    CASE(exit_zero_32_bits),
    CASE(exit_string),
    CASE(read_exit_port),
    CASE(read_nothing_in_every_way),
    CASE(straddle_end_of_memory),
};

void guest_main(void) { CASE_RUN(cases); }
