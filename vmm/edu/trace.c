/* What a device has done, in memory that it shares with the VMM, and its way into the record. */
#include <sys/mman.h>

#include "edu_device.h"
#include "host.h"

struct trace *trace_make(void) {
    void *memory =
        mmap(NULL, sizeof(struct trace), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void trace_add(struct trace *trace, struct trace_entry entry) {
    if (trace->count < TRACE_MAX)
        trace->entry[trace->count] = entry;
    trace->count++;
}

static void entry_fields(const struct trace_entry *entry) {
    static const char *const results[RESULTS] = {"done", "not mapped", "outside its buffer",
                                                 "cancelled", "refused"};
    event_hex("address", entry->address);
    event_hex("size", entry->size);
    event_hex("offset", entry->offset);
    if (entry->kind == TRACE_DMA)
        event_number("is_to_ram", (entry->number & EDU_DMA_TO_RAM) != 0);
    event_string("result", results[entry->result]);
}

void fault_record(uint64_t address, bool is_write, const char *text) {
    event_begin("fault");
    event_hex("address", address);
    event_number("is_write", is_write);
    event_string("text", text);
    event_end();
}

static void entry_record(const char *form, const struct trace_entry *shared) {
    static const char *const kinds[TRACE_KINDS] = {"act", "interrupt", "dma", "map", "unmap"};
    struct trace_entry entry = *shared; /* the other process may write to it meanwhile */
    if (entry.kind >= TRACE_KINDS || entry.result >= RESULTS)
        return;
    if (entry.kind == TRACE_FAULT) {
        fault_record(entry.address, entry.value, "in software");
        return;
    }
    event_begin("device");
    event_string("form", form);
    event_string("what", kinds[entry.kind]);
    switch (entry.kind) {
    case TRACE_ACT:
        event_hex("register", entry.number);
        event_hex("value", entry.value);
        break;
    case TRACE_INTERRUPT: event_hex("status", entry.number); break;
    default: entry_fields(&entry);
    }
    event_end();
}

void trace_record(const struct trace *trace, uint32_t *recorded, const char *form) {
    uint32_t count = __atomic_load_n(&trace->count, __ATOMIC_SEQ_CST);
    if (count > TRACE_MAX)
        count = TRACE_MAX;
    for (; *recorded < count; ++*recorded)
        entry_record(form, &trace->entry[*recorded]);
}
