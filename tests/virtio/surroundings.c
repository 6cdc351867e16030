/* See surroundings.h. What the VMM's other files do for the virtio code is in vmm/vmm.h and include/host.h. */
#include "surroundings.h"

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

/* ---- the end of the process ---- */

void die(enum status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\nthe device has ended the VMM, with status %d\n", status);
    abort();
}

/* ---- memory ---- */

/* On either side of guest memory: as far as an offset of 32 bits reaches. */
#define GUARD_SIZE (UINT64_C(4) << 30)

static struct {
    uint8_t *hva;
    uint64_t size;
} memory;

static struct sigaction sanitizers_action;

/* A page that changes under the device: no access to it is permitted, so that each is seen; the instruction is
 * then executed alone, and after the access that was waited for the value is put there. */
static struct {
    gpa_t gpa;
    uint64_t value;
    unsigned accesses_left; /* 0: there is no such page */
} change;

#define PAGE UINT64_C(0x1000)
#define RFLAGS_TF 0x100

static void change_protect(int protection) {
    mprotect(memory.hva + change.gpa / PAGE * PAGE, PAGE, protection);
}

void memory_change_after(gpa_t gpa, uint64_t value, unsigned accesses) {
    assert(memory_at(gpa, sizeof value));
    change_protect(PROT_READ | PROT_WRITE);
    change.gpa = gpa;
    change.value = value;
    change.accesses_left = accesses;
    if (accesses > 0)
        change_protect(PROT_NONE);
}

static void trap_flag_set(void *context, bool value) {
    greg_t *rflags = &((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL];
    *rflags = value ? *rflags | RFLAGS_TF : *rflags & ~RFLAGS_TF;
}

/* An access to a guarded page: say to which gpa, if there is one, before the sanitizer says where from. */
static void guard_hit(int number, siginfo_t *info, void *context) {
    gpa_t gpa = (gpa_t)((uint8_t *)info->si_addr - memory.hva);
    if (change.accesses_left && gpa / PAGE == change.gpa / PAGE) {
        change_protect(PROT_READ | PROT_WRITE);
        trap_flag_set(context, true);
        return;
    }
    if (gpa < memory.size)
        dprintf(STDERR_FILENO, "guarded: gpa 0x%" PRIx64 "\n", gpa);
    sanitizers_action.sa_sigaction(number, info, context);
}

static void access_done(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    trap_flag_set(context, false);
    change.accesses_left--;
    if (change.accesses_left == 0)
        memcpy(memory.hva + change.gpa, &change.value, sizeof change.value);
    else
        change_protect(PROT_NONE);
}

static void guard_install(void) {
    struct sigaction hit = {.sa_sigaction = guard_hit, .sa_flags = SA_SIGINFO};
    struct sigaction done = {.sa_sigaction = access_done, .sa_flags = SA_SIGINFO};
    sigaction(SIGTRAP, &done, NULL);
    sigaction(SIGSEGV, NULL, &sanitizers_action);
    if (sanitizers_action.sa_flags & SA_SIGINFO) /* there is a sanitizer */
        sigaction(SIGSEGV, &hit, NULL);
}

void memory_create(int fd, uint64_t size) {
    uint8_t *reserved = mmap(NULL, size + 2 * GUARD_SIZE, PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int kind = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    assert(reserved != MAP_FAILED && size % 4096 == 0);
    memory.size = size;
    memory.hva = mmap(reserved + GUARD_SIZE, size, PROT_READ | PROT_WRITE,
                      kind | MAP_FIXED | MAP_NORESERVE, fd, 0);
    assert(memory.hva == reserved + GUARD_SIZE);
    guard_install();
}

void memory_protect(gpa_t gpa, uint64_t size, int protection) {
    int failed = mprotect(memory_at(gpa, size), size, protection);
    assert(!failed);
}

void *memory_at(gpa_t gpa, uint64_t size) {
    if (size > memory.size || gpa > memory.size - size)
        return NULL;
    return memory.hva + gpa;
}

void *host_memory(gpa_t gpa, uint64_t size) { return memory_at(gpa, size); }

uint64_t memory_size(void) { return memory.size; }

/* ---- the record ---- */

static struct {
    char line[1024];
    size_t length;
    bool is_misuse;
} event;
static struct complaints seen;

__attribute__((format(printf, 1, 2))) static void event_print(const char *format, ...) {
    va_list arguments;
    if (!listeners.event)
        return;
    size_t room = sizeof event.line - event.length;
    va_start(arguments, format);
    size_t length = (size_t)vsnprintf(event.line + event.length, room, format, arguments);
    va_end(arguments);
    assert(length < room);
    event.length += length;
}

bool events_are_recorded(void) { return listeners.event != NULL; }

void event_begin(const char *kind) {
    assert(event.length == 0); /* each ends before the next begins */
    event_print("{\"kind\":\"%s\"", kind);
    event.is_misuse = !strcmp(kind, "virtio_misuse");
    seen.all += event.is_misuse;
}

void event_number(const char *name, uint64_t value) {
    event_print(",\"%s\":%" PRIu64, name, value);
    seen.broken += event.is_misuse && !strcmp(name, "is_broken") && value;
}

void event_hex(const char *name, uint64_t value) {
    event_print(",\"%s\":\"0x%" PRIx64 "\"", name, value);
}

void event_string(const char *name, const char *value) {
    assert(!strpbrk(value, "\"\\\n"));
    event_print(",\"%s\":\"%s\"", name, value);
}

void event_bytes(const char *name, const void *bytes, uint64_t size) {
    event_print(",\"%s\":\"", name);
    for (uint64_t i = 0; i < size; i++)
        event_print("%02x", ((const uint8_t *)bytes)[i]);
    event_print("\"");
}

void event_end(void) {
    event_print("}");
    if (listeners.event)
        listeners.event(event.line);
    event.length = 0;
}

struct complaints complaints(void) {
    return seen;
}

/* ---- the device on its bus ---- */

static struct {
    gpa_t gpa;
    uint64_t size;
    access_handler handler;
} claim;

void host_claim_mmio(gpa_t first_gpa, uint64_t bytes, const char *name, access_handler handler) {
    assert(!claim.handler && *name);
    claim.gpa = first_gpa;
    claim.size = bytes;
    claim.handler = handler;
}

void command_line_add(const char *word) { assert(!strncmp(word, "virtio_mmio.device=", 19)); }

static void sources_serve(void);

/* Of each size one, so that a sanitizer sees an access beyond its end. */
static uint8_t *access_data(uint32_t size) {
    static uint8_t one[1], two[2], four[4], eight[8];
    switch (size) {
    case 1: return one;
    case 2: return two;
    case 4: return four;
    case 8: return eight;
    }
    abort();
}

/* As the VMM's bus does it: what straddles the end is nobody's. */
bool register_access(uint32_t offset, uint32_t size, bool is_write, uint64_t *value) {
    struct access access = {claim.gpa + offset, size, 1, is_write, access_data(size)};
    bool is_claimed = (uint64_t)offset + size <= claim.size;
    memcpy(access.data, value, size);
    if (is_claimed)
        claim.handler(&access);
    *value = 0;
    memcpy(value, access.data, size);
    if (is_write)
        sources_serve();
    return is_claimed;
}

static unsigned line_number;
static bool line_level;

void line_create(unsigned line) { line_number = line; }

void line_set(unsigned line, bool is_high) {
    assert(line == line_number);
    if (listeners.line && is_high != line_level)
        listeners.line(is_high);
    line_level = is_high;
}

bool line_is_high(void) { return line_level; }

/* ---- notifications ---- */

static struct doorbell {
    uint32_t value;
    void (*ready)(void *context);
    void *context;
} doorbells[8];
static unsigned doorbell_count;

/* The device asks for its doorbells; a test uses them or writes the register itself. */
bool notifications_use_ioeventfd(void) { return true; }

void io_doorbell(gpa_t gpa, uint32_t value, void (*ready)(void *context), void *context) {
    assert(gpa == claim.gpa + VIRTIO_MMIO_QUEUE_NOTIFY && doorbell_count < LENGTH(doorbells));
    doorbells[doorbell_count++] = (struct doorbell){value, ready, context};
}

bool doorbell_ring(uint32_t value) {
    for (unsigned i = 0; i < doorbell_count; i++) {
        if (doorbells[i].value == value) {
            doorbells[i].ready(doorbells[i].context);
            sources_serve();
            return true;
        }
    }
    return false;
}

/* ---- the console's other side ---- */

void console_write(const void *bytes, size_t size) {
    if (listeners.output)
        listeners.output(bytes, size);
}

void io_lock(void) {}
void io_unlock(void) {}

static struct io_source {
    void (*ready)(void *context);
    void *context;
    int fd;
    bool enabled;
    bool is_idle; /* there was nothing when it was last looked at, and nothing has come since */
} sources[8];
static unsigned source_count;
static int input_end = -1; /* where bytes for standard input go in */

void input_create(void) {
    int ends[2];
    int failed = pipe2(ends, O_CLOEXEC | O_NONBLOCK) || dup2(ends[0], STDIN_FILENO) < 0;
    assert(!failed);
    close(ends[0]);
    input_end = ends[1];
}

struct io_source *io_watch(int fd, bool is_input, void (*ready)(void *context), void *context) {
    assert(source_count < LENGTH(sources) && is_input == (fd == STDIN_FILENO));
    sources[source_count] = (struct io_source){ready, context, fd, true, false};
    return &sources[source_count++];
}

void io_enable(struct io_source *source, bool enabled) { source->enabled = enabled; }

static int input_waiting(void) {
    int bytes = 0;
    ioctl(STDIN_FILENO, FIONREAD, &bytes);
    return bytes;
}

static bool source_serve(struct io_source *source) {
    struct pollfd file = {.fd = source->fd, .events = POLLIN};
    if (!source->enabled || source->is_idle)
        return false;
    source->is_idle = poll(&file, 1, 0) <= 0;
    if (!source->is_idle)
        source->ready(source->context);
    return !source->is_idle;
}

/* As the VMM's second thread does it, but at once. The driver adds nothing meanwhile, so that it ends; a source that
 * takes nothing and stays enabled would keep that thread busy for ever. */
static void sources_serve(void) {
    unsigned rounds = 0;
    bool is_more = true;
    while (is_more) {
        is_more = false;
        for (unsigned i = 0; i < source_count; i++)
            is_more |= source_serve(&sources[i]);
        rounds++;
        assert(rounds < 1000);
    }
}

/* Signals do not come here: what waits for them is idle. */
static void input_came(void) {
    for (unsigned i = 0; i < source_count; i++)
        sources[i].is_idle &= sources[i].fd != STDIN_FILENO;
    sources_serve();
}

bool input_arrives(const void *bytes, size_t size) {
    ssize_t written = write(input_end, bytes, size);
    input_came();
    (void)written; /* what the pipe does not hold is lost, as at a terminal */
    return input_waiting() == 0;
}

void input_ends(void) {
    close(input_end);
    input_came();
}
