/*
 * Another host's KVM, by LD_PRELOAD: this library stands between the VMM and the ioctls of the real
 * one, and changes what KVM_SHIM says.
 *
 *   reset         a triple fault leaves the registers of a reset, as KVM on AMD does
 *   fail_entry    the CPU refuses the first entry
 *   unknown_exit  the first exit has a reason that nobody knows
 *   run_fails     KVM_RUN fails
 *   no_memory     KVM_RUN fails, since there is no memory behind a slot, and says at which gpa
 *   no_sync_regs  the capability KVM_CAP_SYNC_REGS is missing
 *   no_counters   there is no KVM_GET_STATS_FD
 */
#include <dlfcn.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif

static struct kvm_run *shared;

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    void *hva = real(address, size, protection, flags, fd, offset);
    if (fd >= 0 && (flags & MAP_SHARED)) /* the vCPU's; images are private */
        shared = hva;
    return hva;
}

static bool shim_is(const char *what) {
    const char *shim = getenv("KVM_SHIM");
    return shim && !strcmp(shim, what);
}

static void after_run(void) {
    if (shim_is("reset") && shared->exit_reason == KVM_EXIT_SHUTDOWN) {
        shared->s.regs.regs = (struct kvm_regs){.rip = 0xfff0, .rflags = 2};
        shared->s.regs.sregs = (struct kvm_sregs){.cr0 = 0x60000010};
    } else if (shim_is("fail_entry")) {
        shared->exit_reason = KVM_EXIT_FAIL_ENTRY;
        shared->fail_entry.hardware_entry_failure_reason = 0x80000021;
    } else if (shim_is("unknown_exit")) {
        shared->exit_reason = 12345;
    }
}

/* kvm_run's member memory_fault, as far as KVM has a member of that name: flags, gpa, size. */
static int run_without_memory(void) {
    const uint64_t fault[] = {0, 0x7654000, 4096};
    shared->exit_reason = KVM_EXIT_MEMORY_FAULT;
    memcpy(shared->padding, fault, sizeof fault);
    errno = EFAULT;
    return -1;
}

#ifdef __GLIBC__
int ioctl(int fd, unsigned long number, ...) {
#else
int ioctl(int fd, int number, ...) { /* as in POSIX */
#endif
    int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
    unsigned request = (unsigned)number;
    va_list arguments;
    va_start(arguments, number);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == KVM_CHECK_EXTENSION && (long)argument == KVM_CAP_SYNC_REGS &&
        shim_is("no_sync_regs"))
        return 0;
    if ((request == KVM_RUN && shim_is("run_fails")) ||
        (request == KVM_GET_STATS_FD && shim_is("no_counters"))) {
        errno = request == KVM_RUN ? ENOEXEC : ENOTTY;
        return -1;
    }
    if (request == KVM_RUN && shim_is("no_memory"))
        return run_without_memory();
    int result = real(fd, request, argument);
    if (request == KVM_RUN && result == 0)
        after_run();
    return result;
}
