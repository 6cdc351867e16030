/*
 * Memory that a host half can share: a file without a name (memfd_create), mapped into the VMM. Pieces
 * of it are memory slots of the guest, above its RAM, or a device's to reach. There is one such file.
 * vmm/edu/shared_memory.c
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "host.h"

/*
 * Make it: size bytes (whole pages), filled with the random stream of this number of the run's seed
 * (random.h), 64 bits at a time. The file can become neither larger nor smaller, and around the VMM's
 * mapping nothing is mapped. The answer is the file descriptor. Ends the run if this machine cannot.
 */
int shared_memory_make(uint64_t size, unsigned stream);

/* The VMM's mapping of all of it. The guest, or a device, may write there at any time. */
uint8_t *shared_memory(void);

/* Let the guest have [offset, offset + size) of it at this gpa: a memory slot of this number. */
void shared_memory_slot(uint32_t slot, gpa_t gpa, uint64_t offset, uint64_t size);

/* RAM of the guest that nobody may write to: is all of [gpa, gpa + size) this byte? */
bool ram_is(gpa_t gpa, uint64_t size, uint8_t byte);

/* What has changed since the last call: events `changed`, one for each run of bytes that differ, with
 * their offset in the file. */
void shared_memory_changes_record(void);
