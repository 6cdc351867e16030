/* A host half that uses all of host.h, and misbehaves when its guest tells it to. */
#include <string.h>

#include "host.h"
#include "lab.h"

static uint64_t entries, memory_writes;
static bool loop_in_end;

static void event_of_memory(gpa_t gpa, uint64_t size) {
    event_begin("memory");
    event_hex("at", gpa);
    event_hex("bytes", size);
    event_number("given", host_memory(gpa, size) != NULL);
    event_end();
}

/* Around both ends of 16 MiB, and with sums that would wrap. */
static void try_memory(void) {
    const uint64_t end = UINT64_C(16) << 20;
    static const uint64_t wraps = UINT64_MAX;
    event_of_memory(0, 0);
    event_of_memory(0, end);
    event_of_memory(end - 1, 1);
    event_of_memory(end, 0);
    event_of_memory(end, 1);
    event_of_memory(end - 1, 2);
    event_of_memory(0, end + 1);
    event_of_memory(1, wraps);
    event_of_memory(wraps, 1);
    event_of_memory(wraps, wraps);
    event_of_memory(wraps - end + 1, 2 * end);
}

static void try_strings(void) {
    event_begin("strings");
    event_string("odd", "\"\\\n\x01\x7f\xff/");
    event_string("empty", "");
    event_bytes("bytes", "\x00\x0f\xff", 3);
    event_bytes("no_bytes", NULL, 0);
    event_number("most", UINT64_MAX);
    event_hex("hex", UINT64_MAX);
    event_end();
}

/* One address in the boot mapping, one outside; the VMM's walk and KVM's own. */
static void walk_record(gva_t gva) {
    struct walk walk = host_walk(host_sregs()->cr3, gva);
    struct kvm_translation kvm = host_translate(gva);
    event_begin("walk");
    event_hex("gva", gva);
    event_number("mapped", walk.end == WALK_MAPPED);
    event_number("steps", walk.steps);
    event_hex("gpa", walk.gpa);
    event_hex("page_size", walk.page_size);
    event_number("kvm_valid", kvm.valid);
    event_hex("kvm_gpa", kvm.physical_address);
    event_end();
}

static void try_walk(void) {
    event_begin("registers");
    event_hex("rip", host_regs()->rip);
    event_hex("seed", host_seed());
    event_end();
    walk_record(host_regs()->rip);
    walk_record(UINT64_C(1) << 40);
    walk_record(UINT64_C(1) << 62);
}

static void try_machine(void) {
    event_begin("machine");
    event_number("irqchip", host_machine()->irqchip);
    event_number("memory_mib", host_machine()->memory_mib);
    event_end();
}

static void use_null_pointer(void) {
    volatile int *volatile nowhere = NULL;
    *nowhere = 1; /* the crash */
}

static void divide(void) {
    volatile int zero = 0;
    zero = 7 / zero; /* the division */
}

/* Deeper than any stack: the end is a number that never comes. */
static uint64_t recurse(volatile uint64_t *above) {
    volatile uint64_t here[64] = {*above + 1};                  /* the end of the stack */
    return here[0] == UINT64_MAX ? 0 : recurse(here) + here[0]; /* the end of the stack */
}

static void loop(void) {
    for (volatile unsigned i = 0;; i++)
        ;
}

/* In the middle of an event of its own. */
static void todo(void) {
    event_begin("unfinished");
    event_number("before", 1);
    HOST_TODO("serve the command");
}

static void command_access(struct access *access) {
    switch ((enum command)access->data[0]) {
    case COMMAND_NOTHING: break;
    case COMMAND_NULL_POINTER: use_null_pointer(); break;
    case COMMAND_DIVIDE: divide(); break;
    case COMMAND_RECURSE: recurse(&entries); break;
    case COMMAND_LOOP: loop(); break;
    case COMMAND_LOOP_IN_END: loop_in_end = true; break;
    case COMMAND_TODO: todo(); break;
    case COMMAND_CANNOT: host_cannot("it has no such thing"); break;
    case COMMAND_MEMORY: try_memory(); break;
    case COMMAND_STRINGS: try_strings(); break;
    case COMMAND_WALK: try_walk(); break;
    case COMMAND_MACHINE: try_machine(); break;
    case COMMAND_STATISTICS: host_statistics("a \"moment\""); break;
    }
}

static bool memory_event(struct access *access) {
    if (access->address < LAB_MEMORY || access->address >= LAB_MEMORY + LAB_MEMORY_SIZE)
        return false;
    uint32_t word = LAB_MEMORY_WORD;
    memory_writes += access->is_write;
    if (!access->is_write)
        memcpy(access->data, &word, access->size);
    return true;
}

static void setup(void) { host_claim_pio(LAB_COMMAND, 1, "command", command_access); }
static void before_entry(void) { entries++; }

static void end(void) {
    event_begin("host_end");
    event_number("entries", entries);
    event_number("memory_writes", memory_writes);
    event_end();
    if (loop_in_end)
        loop();
}

const struct host_half host_half = {
    .setup = setup, .before_entry = before_entry, .memory_event = memory_event, .end = end};
