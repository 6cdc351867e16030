/*
 * KVM's own counters, of a VM or of a vCPU: KVM API, KVM_GET_STATS_FD. The file that the ioctl opens
 * describes itself: a header, a table of descriptors with names, and the values. It is read once for
 * each record; nothing is kept open.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "vmm.h"

static void statistics_read(int file, void *to, size_t size, uint64_t offset) {
    ssize_t done = pread(file, to, size, (off_t)offset);
    if (done < 0 || (size_t)done != size)
        die(STATUS_HOST, "cannot read KVM's statistics: %s",
            done < 0 ? strerror(errno) : "they end early");
}

/* Counts of something. Left out: histograms, which have several values, and times, which have a unit. */
static bool is_count(const struct kvm_stats_desc *descriptor) {
    return descriptor->size == 1 &&
           (descriptor->flags & KVM_STATS_UNIT_MASK) == KVM_STATS_UNIT_NONE;
}

void statistics_add(int vm_or_vcpu) {
    struct kvm_stats_header header;
    int file = ioctl(vm_or_vcpu, KVM_GET_STATS_FD, NULL);
    if (file < 0) /* Linux has it since 5.14 */
        return;
    statistics_read(file, &header, sizeof header, 0);
    size_t descriptor_size = sizeof(struct kvm_stats_desc) + header.name_size;
    char *descriptors = calloc(header.num_desc, descriptor_size);
    if (!descriptors)
        die(STATUS_HOST, "no memory for KVM's statistics");
    statistics_read(file, descriptors, header.num_desc * descriptor_size, header.desc_offset);
    for (uint32_t i = 0; i < header.num_desc; i++) {
        const struct kvm_stats_desc *descriptor = (const void *)(descriptors + i * descriptor_size);
        uint64_t value;
        if (!is_count(descriptor))
            continue;
        statistics_read(file, &value, sizeof value, header.data_offset + descriptor->offset);
        event_number(descriptor->name, value);
    }
    free(descriptors);
    close(file);
}
