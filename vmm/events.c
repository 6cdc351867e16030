/*
 * The event record: JSON Lines, as include/events.h describes them, written by hand. An exit costs some thousand
 * instructions; printf() and a system call for each line would cost as much again.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vmm.h"

static struct {
    bool is_recording;
    int fd;
    bool is_open; /* between event_begin() and event_end() */
    int error;    /* the first errno of a write that failed */
    uint64_t sequence, started_ns;
    size_t used;
    char buffer[16384];
} events;

bool events_open(const char *path, uint64_t started_ns) {
    events.started_ns = started_ns;
    events.fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    events.is_recording = events.fd >= 0;
    atexit(events_flush); /* a host half may leave, too */
    return events.is_recording;
}

bool events_are_recorded(void) { return events.is_recording; }

/* Safe in a signal handler: at worst it writes a line whose end is still missing. */
void events_flush(void) {
    for (size_t written = 0; written < events.used && !events.error;) {
        ssize_t result = write(events.fd, events.buffer + written, events.used - written);
        if (result < 0 && errno != EINTR)
            events.error = errno;
        else if (result > 0)
            written += (size_t)result;
    }
    events.used = 0;
}

static void event_put(const char *bytes, size_t size) {
    while (events.is_recording && size > 0) {
        size_t room = sizeof events.buffer - events.used;
        size_t piece = size < room ? size : room;
        memcpy(events.buffer + events.used, bytes, piece);
        events.used += piece;
        bytes += piece;
        size -= piece;
        if (events.used == sizeof events.buffer)
            events_flush();
    }
}

void event_text(const char *text) { event_put(text, strlen(text)); }

static void event_digits(uint64_t value, unsigned base) {
    char digits[20];
    unsigned first = sizeof digits;
    do
        digits[--first] = "0123456789abcdef"[value % base];
    while (value /= base);
    event_put(digits + first, sizeof digits - first);
}

/* False: there is no event, and the field goes nowhere. */
static bool event_name(const char *name) {
    if (!events.is_open)
        return false;
    event_text(",\"");
    event_text(name);
    event_text("\":");
    return true;
}

void event_begin(const char *kind) {
    if (!events.is_recording)
        return;
    events.is_open = true;
    event_text("{\"seq\":");
    event_digits(events.sequence++, 10);
    event_number("ns", clock_ns() - events.started_ns);
    event_string("kind", kind);
}

void event_end(void) {
    if (events.is_open)
        event_text("}\n");
    events.is_open = false;
}

void event_number(const char *name, uint64_t value) {
    if (!event_name(name))
        return;
    event_digits(value, 10);
}

void event_hex(const char *name, uint64_t value) {
    if (!event_name(name))
        return;
    event_text("\"0x");
    event_digits(value, 16);
    event_text("\"");
}

static void event_hex_byte(uint8_t byte) {
    const char *digits = "0123456789abcdef";
    event_put((const char[]){digits[byte >> 4], digits[byte & 15]}, 2);
}

/* Strings come from the guest, too: anything that is not plain ASCII is escaped byte by byte. */
void event_string(const char *name, const char *value) {
    if (!event_name(name))
        return;
    event_text("\"");
    for (const char *c = value; *c; c++) {
        if (*c >= 0x20 && *c <= 0x7e && *c != '"' && *c != '\\') {
            event_put(c, 1);
        } else {
            event_text("\\u00");
            event_hex_byte((uint8_t)*c);
        }
    }
    event_text("\"");
}

void event_bytes(const char *name, const void *bytes, uint64_t size) {
    if (!event_name(name))
        return;
    event_text("\"");
    for (uint64_t i = 0; i < size; i++)
        event_hex_byte(((const uint8_t *)bytes)[i]);
    event_text("\"");
}

int events_close(void) {
    if (!events.is_recording)
        return 0;
    events_flush();
    if (close(events.fd) < 0 && !events.error)
        events.error = errno;
    events.is_recording = false;
    return events.error;
}
