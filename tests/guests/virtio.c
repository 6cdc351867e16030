/* A guest that uses a virtio console, as case= says; what it finds out about the device it prints on COM1.
 * Other words on the command line:
 *   size=NUMBER   how many bytes are sent,
 *   piece=NUMBER  and by how many at a time, if not all at once
 *   plain=1       accept no feature that can be done without */
#include "apic.h"
#include "cases.h"
#include "pic.h"
#include "virtio_console.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE,
        .devices = MACHINE_DEVICE_COM1 | MACHINE_DEVICE_VIRTIO_CONSOLE);

#define VECTOR_BASE 32
#define END_OF_INPUT 4
#define CHUNK (64 << 10)

static struct virtio_console console;
static uint8_t bytes[CHUNK];

static void open_console(void) {
    if (!virtio_console_open(&console, case_number("plain") ? 0 : VIRTIO_CONSOLE_FEATURES)) {
        printf("no console\n");
        guest_exit(1);
    }
}

static void say(const char *text) { virtio_console_write(&console, text, strlen(text)); }

/* ---- what the command line names ---- */

static void find(void) {
    struct virtio_device device = {0};
    bool found = virtio_find((uint32_t)case_number("id"), &device);
    printf("found %d at %lx irq %u\n", found, found ? device.gpa : 0, found ? device.irq : 0);
}

/* ---- out ---- */

static void say_line(void) {
    open_console();
    say("a line through the virtio console\n");
    virtio_console_close(&console);
}

/* CHUNK bytes that the seed decides, over and over, each time with their number in front. */
static void send_numbered(uint64_t size) {
    static uint64_t chunk[CHUNK / sizeof(uint64_t)];
    struct random random = random_stream(guest_seed(), 1);
    for (unsigned i = 1; i < sizeof chunk / sizeof *chunk; i++)
        chunk[i] = random_next(&random);
    for (chunk[0] = 0; size > 0; chunk[0]++) {
        uint64_t part = size < CHUNK ? size : CHUNK;
        virtio_console_write(&console, chunk, part);
        size -= part;
    }
}

static void send(void) {
    open_console();
    send_numbered(case_number("size"));
    virtio_console_close(&console);
}

/* Letters, from alphabet to alphabet: for runs whose output is looked at as text. */
static uint8_t letters[(1 << 20) + 1];

static uint64_t letters_make(void) {
    uint64_t size = case_number("size");
    for (unsigned i = 0; i < 26; i++)
        letters[i] = (uint8_t)('a' + i);
    for (uint64_t done = 26; done < size; done *= 2)
        memcpy(letters + done, letters, done < size - done ? done : size - done);
    letters[size] = '\0';
    return size;
}

static void send_letters(void) {
    uint64_t size = letters_make();
    uint64_t piece = case_number("piece") ? case_number("piece") : size;
    open_console();
    for (uint64_t done = 0; done < size; done += piece)
        virtio_console_write(&console, letters + done, size - done < piece ? size - done : piece);
    virtio_console_close(&console);
}

static void send_letters_by_com1(void) {
    letters_make();
    printf("%s", (const char *)letters);
}

/* A buffer for each byte: the 16-bit indices of the ring begin again. */
static void send_bytewise(void) {
    uint64_t size = case_number("size");
    open_console();
    for (uint64_t i = 0; i < size; i++) {
        uint8_t byte = (uint8_t)(i % 251);
        virtio_console_write(&console, &byte, 1);
    }
    virtio_console_close(&console);
}

/* ---- in and out again ---- */

/* Send what has come in. False if END_OF_INPUT was the last of it. */
static bool pass_on(void) {
    size_t size = virtio_console_read(&console, bytes, sizeof bytes);
    bool is_end = size > 0 && bytes[size - 1] == END_OF_INPUT;
    virtio_console_write(&console, bytes, size - is_end);
    return !is_end;
}

static void echo_by_polling(void) {
    open_console();
    say("ready\n");
    while (pass_on())
        pause();
    virtio_console_close(&console);
}

static void interrupts_begin(void) {
    pic_begin(VECTOR_BASE);
    if (!virtio_console_interrupts_begin(&console, VECTOR_BASE))
        PANIC("the device has no line at the 8259As");
}

static void echo_by_interrupts(void) {
    open_console();
    interrupts_begin();
    say("ready\n");
    do
        virtio_console_wait(&console);
    while (pass_on());
    virtio_console_close(&console);
}

/* By the smallest reads there are. */
static void echo_bytewise(void) {
    uint8_t byte;
    open_console();
    say("ready\n");
    for (;;) {
        while (!virtio_console_read(&console, &byte, 1))
            pause();
        if (byte == END_OF_INPUT)
            break;
        virtio_console_write(&console, &byte, 1);
    }
    virtio_console_close(&console);
}

/* ---- begin again ---- */

/* Each time with other numbers of buffers under way, which may be lost. */
static void reset_in_the_middle(void) {
    for (unsigned round = 0; round < 20; round++) {
        open_console();
        for (unsigned i = 0; i <= round; i++)
            virtio_console_write(&console, bytes, 4000);
    }
    open_console();
    say("ready\n");
    while (pass_on())
        pause();
    virtio_console_close(&console);
}

/* ---- the configuration space ---- */

static void print_size(void) {
    uint16_t columns, rows;
    if (virtio_console_size(&console, &columns, &rows))
        printf("%u columns, %u rows\n", columns, rows);
    else
        printf("no size\n");
}

static void look_at_size(void) {
    open_console();
    print_size();
    virtio_console_close(&console);
}

/* Until END_OF_INPUT comes. */
static void follow_size(void) {
    open_console();
    interrupts_begin();
    print_size();
    for (;;) {
        virtio_console_wait(&console);
        if (console.is_resized)
            print_size();
        if (!pass_on())
            break;
    }
    virtio_console_close(&console);
}

static void emergency(void) {
    static const char text[] = "without any set-up\n";
    if (!virtio_console_emergency_write(text, sizeof text - 1))
        printf("no emergency write\n");
}

/* The vectors that an 8259A gives for a line which has fallen too early, sent by the local APIC. */
static void take_spurious_interrupts(void) {
    pic_begin(VECTOR_BASE);
    for (unsigned line = 7; line < PIC_LINES; line += 8) {
        unsigned vector = VECTOR_BASE + line;
        uint32_t bit = 1u << vector % 32;
        unsigned requested = LAPIC_IRR + vector / 32 * 16;
        lapic_write(LAPIC_ICR_LOW, LAPIC_ICR_TO_SELF | LAPIC_ICR_ASSERT | vector);
        sti();
        while (lapic_read(requested) & bit)
            pause();
        cli();
        lapic_eoi();
        printf("line %u: taken\n", line);
    }
}

#define CASE(function) \
    { #function, function }
static const struct guest_case cases[] = {
    CASE(find),
    CASE(say_line),
    CASE(send),
    CASE(send_letters),
    CASE(send_letters_by_com1),
    CASE(send_bytewise),
    CASE(echo_by_polling),
    CASE(echo_by_interrupts),
    CASE(echo_bytewise),
    CASE(reset_in_the_middle),
    CASE(look_at_size),
    CASE(follow_size),
    CASE(emergency),
    CASE(take_spurious_interrupts),
};

void guest_main(void) { CASE_RUN(cases); }
