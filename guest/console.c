/* The console: COM1, a 16550 UART (PC16550D data sheet), polled. */
#include <linux/serial_reg.h>
#include <stdarg.h>

#include "guest.h"

#define COM1 0x3f8
#define FIFO_SIZE 16

/* An empty transmitter takes as many bytes as its FIFO holds, so one look at the line status register
 * serves 16 bytes. Each byte is an exit all the same: KVM emulates `rep outs` one element at a time. */
static void console_write(const char *text, size_t size) {
    while (size > 0) {
        size_t chunk = size < FIFO_SIZE ? size : FIFO_SIZE;
        while (!(in8(COM1 + UART_LSR) & UART_LSR_THRE))
            ;
        out8_string(COM1 + UART_TX, text, chunk);
        text += chunk;
        size -= chunk;
    }
}

/* Text collects here until it is full or its printf is over. */
static struct {
    char text[128];
    size_t size;
} line;

static void line_flush(void) {
    console_write(line.text, line.size);
    line.size = 0;
}

static void line_put(char c) {
    if (line.size == sizeof line.text)
        line_flush();
    line.text[line.size++] = c;
}

static void line_put_number(uint64_t value, unsigned base, unsigned width, char pad) {
    char digits[20];
    unsigned count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (width > count) {
        line_put(pad);
        width--;
    }
    while (count)
        line_put(digits[--count]);
}

static void line_put_signed(int64_t value, unsigned width, char pad) {
    if (value < 0)
        line_put('-');
    line_put_number(value < 0 ? 0 - (uint64_t)value : (uint64_t)value, 10, width, pad);
}

static void line_put_text(const char *text) {
    for (text = text ? text : "(null)"; *text; text++)
        line_put(*text);
}

/* One conversion, from behind its '%'; returns where the format goes on. */
static const char *line_convert(const char *format, va_list *arguments) {
    char pad = *format == '0' ? '0' : ' ';
    unsigned width = 0;
    while (*format >= '0' && *format <= '9')
        width = 10 * width + (unsigned)(*format++ - '0');
    bool is_long = *format == 'l';
    format += is_long;
    switch (*format) {
    case 'd':
        line_put_signed(is_long ? va_arg(*arguments, long) : va_arg(*arguments, int), width, pad);
        break;
    case 'u':
    case 'x':
        line_put_number(is_long ? va_arg(*arguments, unsigned long) : va_arg(*arguments, unsigned),
                        *format == 'u' ? 10 : 16, width, pad);
        break;
    case 'p':
        line_put_text("0x");
        line_put_number(va_arg(*arguments, uintptr_t), 16, width, pad);
        break;
    case 's': line_put_text(va_arg(*arguments, const char *)); break;
    case 'c': line_put((char)va_arg(*arguments, int)); break;
    case '\0': return format;
    default: line_put(*format);
    }
    return format + 1;
}

void printf(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    while (*format) {
        if (*format == '%')
            format = line_convert(format + 1, &arguments);
        else
            line_put(*format++);
    }
    va_end(arguments);
    line_flush();
}
