/*
 * What stands around the VMM's virtio code in its tests, instead of a machine: guest memory with nothing beside
 * it, an event record that somebody reads, the device's registers, its interrupt line, its console. The device's
 * own files are the VMM's, as they are.
 */
#pragma once

#include "../../vmm/vmm.h"

/* Guest memory of so many bytes (whole pages): from a file, which somebody else may have mapped too, or, if fd is
 * -1, zeros. No page beside it can be accessed: an access outside ends the process. */
void memory_create(int fd, uint64_t size);

/* From now on only such accesses (PROT_*) to these pages do not end the process. */
void memory_protect(gpa_t gpa, uint64_t size, int protection);

/* When the device has accessed the page of this gpa so many times (in instructions), this value stands there, as if
 * another CPU of the guest had written it at that moment. 0 times: there is no change any more to wait for. */
void memory_change_after(gpa_t gpa, uint64_t value, unsigned accesses);

/* The guest reads or writes value, of size bytes, in the device's registers. False: nobody claims that. */
bool register_access(uint32_t offset, uint32_t size, bool is_write, uint64_t *value);

/* The guest writes what an ioeventfd waits for; false: none does. */
bool doorbell_ring(uint32_t value);

/* Standard input becomes a pipe. Bytes come in, and the device is called as long as it wants to have them: at
 * once, and after each access from then on. False: some are still there. In the end there is no more to come. */
void input_create(void);
bool input_arrives(const void *bytes, size_t size);
void input_ends(void);

/* The interrupt line. */
bool line_is_high(void);

/* What was said of the driver so far: events virtio_misuse, and of them those that broke the device. */
struct complaints {
    unsigned all, broken;
};
struct complaints complaints(void);

/* What is not given (NULL) nobody wants to know. */
struct listeners {
    void (*event)(const char *json);
    void (*output)(const void *bytes, size_t size);
    void (*line)(bool is_high);
};
extern struct listeners listeners; /* of the program */
