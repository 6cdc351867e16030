/* Memory that can be shared: a sealed memfd, and what has become of it. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "random.h"
#include "shared_memory.h"

#define GUARD_SIZE (16 * PAGE_SIZE)

static struct {
    uint64_t size;
    uint8_t *bytes;  /* there are guard pages around */
    uint8_t *before; /* what was in them when they were last looked at */
    uint8_t *now;
} shared;

/* Nothing of this process is next to it: who runs over its end finds out. */
static uint8_t *guarded_map(int file, uint64_t size) {
    uint8_t *room =
        mmap(NULL, size + 2 * GUARD_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED || mmap(room + GUARD_SIZE, size, PROT_READ | PROT_WRITE,
                                   MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED)
        return NULL;
    return room + GUARD_SIZE;
}

int shared_memory_make(uint64_t size, unsigned stream) {
    struct random content = random_stream(host_seed(), stream);
    int file = memfd_create("windows", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (file < 0 || ftruncate(file, (off_t)size) < 0)
        host_cannot("it has no memory that can be shared: memfd_create() fails");
    fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    shared.size = size;
    shared.bytes = guarded_map(file, size);
    shared.before = malloc(size);
    shared.now = malloc(size);
    if (!shared.bytes || !shared.before || !shared.now)
        host_cannot("there is no memory left for the lab");
    for (uint64_t at = 0; at < size; at += sizeof(uint64_t)) {
        uint64_t word = random_next(&content);
        memcpy(shared.bytes + at, &word, sizeof word);
    }
    memcpy(shared.before, shared.bytes, size);
    return file;
}

uint8_t *shared_memory(void) { return shared.bytes; }

void shared_memory_slot(uint32_t slot, gpa_t gpa, uint64_t offset, uint64_t size) {
    struct kvm_userspace_memory_region memory = {.slot = slot,
                                                 .guest_phys_addr = gpa,
                                                 .memory_size = size,
                                                 .userspace_addr =
                                                     (uintptr_t)shared.bytes + offset};
    host_vm(KVM_SET_USER_MEMORY_REGION, &memory);
}

bool ram_is(gpa_t gpa, uint64_t size, uint8_t byte) {
    const uint8_t *ram = host_memory(gpa, size);
    bool is_same = ram != NULL;
    for (uint64_t i = 0; is_same && i < size; i++)
        is_same = ram[i] == byte;
    return is_same;
}

void shared_memory_changes_record(void) {
    memcpy(shared.now, shared.bytes, shared.size);
    for (uint64_t at = 0; at < shared.size; at++) {
        uint64_t end = at;
        while (end < shared.size && shared.now[end] != shared.before[end])
            end++;
        if (end == at)
            continue;
        event_begin("changed");
        event_hex("offset", at);
        event_bytes("bytes", shared.now + at, end - at);
        event_end();
        at = end;
    }
    memcpy(shared.before, shared.now, shared.size);
}
