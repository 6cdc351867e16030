/*
 * In the coverage build: send the counters that -fprofile-info-section has gathered to the host,
 * through PORT_DEBUGCON. GCC manual, "Profiling and Test Coverage in Freestanding Environments".
 *
 * The stream is, for each object file, its name and then its counters: chunks of a 32-bit length
 * and as many bytes, the last one of length 0. tools/kvmlab/coverage.py reads it.
 */
#include <gcov.h>

#include "guest.h"
#include "runtime.h"

/* What the counters and libgcov refer to, and never call in this build. */
#define NEVER_CALLED(name)     \
    _Noreturn void name(void); \
    void name(void) { PANIC("coverage: libgcov calls " #name); }
NEVER_CALLED(abort)
NEVER_CALLED(mmap)
NEVER_CALLED(__gcov_merge_add)

extern const struct gcov_info *const gcov_info_start[]; /* image.ld */
extern const struct gcov_info *const gcov_info_end[];

static void chunk_write(const void *bytes, unsigned size, void *unused) {
    (void)unused;
    out8_string(PORT_DEBUGCON, &size, sizeof size);
    out8_string(PORT_DEBUGCON, bytes, size);
}

static void name_write(const char *name, void *unused) {
    chunk_write(name, (unsigned)strlen(name), unused);
}

static void *no_memory(unsigned size, void *unused) {
    (void)size, (void)unused;
    PANIC("libgcov asks for memory");
}

void coverage_write(void) {
    for (const struct gcov_info *const *info = gcov_info_start; info < gcov_info_end; info++) {
        __gcov_info_to_gcda(*info, name_write, chunk_write, no_memory, NULL);
        chunk_write("", 0, NULL);
    }
}
