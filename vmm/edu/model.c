/*
 * The edu device: what it does when a register that acts has been written to. It is the same in the
 * VMM and in a process of its own. They differ in where the registers are (a page of the VMM, or one
 * that the guest has as memory), in who calls edu_act() (the VMM at an exit, or the process when a
 * doorbell rings), and in how an interrupt leaves.
 *
 * Whoever writes to the registers or asks for DMA is hostile: each field is read once, and an
 * address becomes a pointer in edu_reach() alone.
 */
#include <string.h>

#include "edu_device.h"
#include "x86.h"

static uint32_t *edu_register(const struct edu *edu, unsigned offset) {
    return (uint32_t *)(void *)(edu->registers + offset);
}

static uint32_t edu_get(const struct edu *edu, unsigned offset) {
    return __atomic_load_n(edu_register(edu, offset), __ATOMIC_SEQ_CST);
}

static uint64_t edu_get64(const struct edu *edu, unsigned offset) {
    return __atomic_load_n((uint64_t *)(void *)(edu->registers + offset), __ATOMIC_SEQ_CST);
}

static void edu_set(const struct edu *edu, unsigned offset, uint32_t value) {
    __atomic_store_n(edu_register(edu, offset), value, __ATOMIC_SEQ_CST);
}

static void edu_set_bits(const struct edu *edu, unsigned offset, uint32_t bits) {
    __atomic_fetch_or(edu_register(edu, offset), bits, __ATOMIC_SEQ_CST);
}

static void edu_clear_bits(const struct edu *edu, unsigned offset, uint32_t bits) {
    __atomic_fetch_and(edu_register(edu, offset), ~bits, __ATOMIC_SEQ_CST);
}

void edu_reset(const struct edu *edu) {
    memset(edu->registers, 0, PAGE_SIZE);
    edu_set(edu, EDU_ID, 0x01000000 | EDU_ID_VALUE);
}

/* A device with MSI sends its message whenever there is something new in the status. */
static void edu_raise(const struct edu *edu, uint32_t bits) {
    edu_set_bits(edu, EDU_INTERRUPT_STATUS, bits);
    uint32_t status = edu_get(edu, EDU_INTERRUPT_STATUS);
    if (!status)
        return;
    trace_add(edu->trace, (struct trace_entry){.kind = TRACE_INTERRUPT, .number = status});
    edu->interrupt();
}

static void edu_factorial(const struct edu *edu, uint32_t number) {
    uint32_t factorial = 1;
    edu_set_bits(edu, EDU_STATUS, EDU_STATUS_COMPUTING);
    for (uint32_t i = 2; i <= number && factorial; i++) /* from 34! on, modulo 2^32, it stays 0 */
        factorial *= i;
    edu_set(edu, EDU_FACTORIAL, factorial);
    edu_clear_bits(edu, EDU_STATUS, EDU_STATUS_COMPUTING);
    if (edu_get(edu, EDU_STATUS) & EDU_STATUS_INTERRUPT)
        edu_raise(edu, EDU_INTERRUPT_FACTORIAL);
}

/* ---- DMA ---- */

/* The memory at [iova, iova + *size). Without an IOMMU: NULL if not all of it lies in one mapping. */
static uint8_t *edu_reach(const struct edu *edu, uint64_t iova, uint64_t *size, bool is_write) {
    if (edu->reach)
        return edu->reach(iova, size, is_write);
    for (unsigned i = 0; i < MAPPINGS_MAX; i++) {
        const struct mapping *mapping = &edu->mapping[i];
        if (mapping->size && *size <= mapping->size && iova >= mapping->iova &&
            iova - mapping->iova <= mapping->size - *size)
            return mapping->memory + (iova - mapping->iova);
    }
    return NULL;
}

static void edu_transfer_end(struct edu *edu, enum trace_result result) {
    struct transfer_state *transfer = &edu->transfer;
    trace_add(edu->trace, (struct trace_entry){.kind = TRACE_DMA,
                                               .result = result,
                                               .number = transfer->command,
                                               .address = transfer->iova,
                                               .size = transfer->count,
                                               .offset = transfer->buffer - EDU_BUFFER});
    transfer->is_running = false;
    edu_clear_bits(edu, EDU_DMA_COMMAND, EDU_DMA_START);
    if (transfer->command & EDU_DMA_INTERRUPT)
        edu_raise(edu, EDU_INTERRUPT_DMA);
}

static void edu_transfer_start(struct edu *edu, uint32_t command) {
    bool is_to_ram = command & EDU_DMA_TO_RAM;
    uint64_t source = edu_get64(edu, EDU_DMA_SOURCE);
    uint64_t destination = edu_get64(edu, EDU_DMA_DESTINATION);
    if (!(command & EDU_DMA_START) || edu->transfer.is_running)
        return;
    edu->transfer = (struct transfer_state){
        .is_running = true,
        .command = command,
        .iova = (is_to_ram ? destination : source) & EDU_DMA_MASK,
        .buffer = is_to_ram ? source : destination,
        .count = edu_get64(edu, EDU_DMA_COUNT),
    };
}

/* Piece by piece; the first that it cannot reach ends it. Nothing at all can be moved anywhere. */
static enum trace_result edu_move(const struct edu *edu, uint8_t *buffer) {
    const struct transfer_state *transfer = &edu->transfer;
    bool is_to_ram = transfer->command & EDU_DMA_TO_RAM;
    uint64_t done = 0;
    while (done < transfer->count) {
        uint64_t size = transfer->count - done;
        uint8_t *memory = edu_reach(edu, transfer->iova + done, &size, is_to_ram);
        if (!memory)
            return RESULT_NOT_MAPPED;
        memcpy(is_to_ram ? memory : buffer + done, is_to_ram ? buffer + done : memory, size);
        done += size;
    }
    return RESULT_DONE;
}

void edu_transfer(struct edu *edu) {
    const struct transfer_state *transfer = &edu->transfer;
    uint64_t offset = transfer->buffer - EDU_BUFFER;
    bool is_inside =
        transfer->count <= EDU_BUFFER_SIZE && offset <= EDU_BUFFER_SIZE - transfer->count;
    edu_transfer_end(edu, is_inside ? edu_move(edu, edu->trace->buffer + offset)
                                    : RESULT_OUTSIDE_BUFFER);
}

struct mapping *edu_mapping_place(struct edu *edu, uint64_t iova, uint64_t size) {
    struct mapping *place = NULL;
    if (size == 0 || iova + size < iova)
        return NULL;
    for (unsigned i = 0; i < MAPPINGS_MAX; i++) {
        struct mapping *mapping = &edu->mapping[i];
        if (mapping->size == 0)
            place = mapping;
        else if (iova < mapping->iova + mapping->size && mapping->iova < iova + size)
            return NULL;
    }
    return place;
}

struct mapping *edu_mapping_find(struct edu *edu, uint64_t iova, uint64_t size) {
    for (unsigned i = 0; i < MAPPINGS_MAX; i++)
        if (edu->mapping[i].size && edu->mapping[i].iova == iova && edu->mapping[i].size == size)
            return &edu->mapping[i];
    return NULL;
}

void edu_unmap(struct edu *edu, struct mapping *mapping) {
    const struct transfer_state *transfer = &edu->transfer;
    bool is_concerned = transfer->is_running && transfer->iova >= mapping->iova &&
                        transfer->iova - mapping->iova < mapping->size;
    *mapping = (struct mapping){0};
    if (is_concerned)
        edu_transfer_end(edu, RESULT_CANCELLED);
}

/* ---- registers that act ---- */

const uint16_t edu_acting[EDU_ACTING] = {EDU_INTERRUPT_ACKNOWLEDGE, EDU_LIVENESS, EDU_FACTORIAL,
                                         EDU_INTERRUPT_RAISE, EDU_DMA_COMMAND};

void edu_act(struct edu *edu, unsigned offset) {
    uint32_t value = edu_get(edu, offset);
    trace_add(edu->trace,
              (struct trace_entry){.kind = TRACE_ACT, .number = offset, .value = value});
    if (edu->delay)
        edu->delay(offset);
    switch (offset) {
    case EDU_LIVENESS: edu_set(edu, offset, ~value); break;
    case EDU_FACTORIAL: edu_factorial(edu, value); break;
    case EDU_INTERRUPT_RAISE: edu_raise(edu, value); break;
    case EDU_INTERRUPT_ACKNOWLEDGE: edu_clear_bits(edu, EDU_INTERRUPT_STATUS, value); break;
    case EDU_DMA_COMMAND: edu_transfer_start(edu, value); break;
    default: break;
    }
}
