/* What the runtime's own files need of each other; lessons use guest.h. */
#pragma once

#include <stdint.h>

/* The first C function; never returns. */
_Noreturn void guest_start(uint64_t start_info_gpa);

/* Where boot.asm's stubs lead: the frame is on the interrupted stack, and restored on return. */
struct trap_frame;
void trap_dispatch(struct trap_frame *frame);

/* Load the IDT and the TSS: from here on an exception is a message instead of a triple fault. */
void trap_install(void);

/* Send the coverage counters to the host, in the build that has them (coverage.c). */
#ifdef KVMLAB_COVERAGE
void coverage_write(void);
#else
static inline void coverage_write(void) {}
#endif
