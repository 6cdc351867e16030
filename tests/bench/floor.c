/*
 * The floor that the benchmark measures from: what a program needs to have KVM run a guest that prints one
 * byte, and nothing else. No C library, no look at what a call returns but that it is no error. With EXITS, the
 * guest leaves as often for a port that nobody answers before it prints; with CPUID, it has one.
 */
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/kvm.h>
#include <linux/mman.h>
#include <stdint.h>

#ifndef EXITS
#define EXITS 0
#endif
#ifndef CPUID
#define CPUID 0
#endif

#define MEMORY (UINT64_C(64) << 20)
#define CODE_GPA 0x1000
#define PORT_EXIT 0xf4 /* as in include/machine.h */
#define PORT_COM1 0x3f8

/* SDM 2, in real mode: mov cx, EXITS; jcxz on; mov dx, 0x80; again: out dx, al; loop again;
 * on: mov dx, PORT_COM1; mov al, '!'; out dx, al; mov dx, PORT_EXIT; out dx, al */
static const uint8_t code[] = {0xb9, EXITS & 255, EXITS >> 8, 0xe3, 6,    0xba, 0x80,
                               0,    0xee,        0xe2,       0xfd, 0xba, 0xf8, 3,
                               0xb0, '!',         0xee,       0xba, 0xf4, 0,    0xee};

static long call(long number, long a, long b, long c, long d, long e) {
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static _Noreturn void end(int status) {
    call(__NR_exit_group, status, 0, 0, 0, 0);
    __builtin_unreachable();
}

static long must(long result) {
    if (result < 0)
        end(1);
    return result;
}

static long request(long fd, unsigned long number, void *argument) {
    return must(call(__NR_ioctl, fd, (long)number, (long)argument, 0, 0));
}

static void *map(uint64_t size, long flags, long fd) {
    return (void *)must(call(__NR_mmap, 0, (long)size, PROT_READ | PROT_WRITE, flags, fd));
}

static long vm_create(long kvm, uint8_t *memory) {
    long vm = request(kvm, KVM_CREATE_VM, 0);
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
    request(vm, KVM_ENABLE_CAP, &split);
    struct kvm_userspace_memory_region slot = {.memory_size = MEMORY,
                                               .userspace_addr = (uintptr_t)memory};
    request(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    return vm;
}

/* What a guest needs that looks at CPUID, as the way into long mode does. */
static void cpuid_set(long kvm, long vcpu) {
    static struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[255];
    } cpuid;
    cpuid.header.nent = sizeof cpuid.entries / sizeof *cpuid.entries;
    request(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    request(vcpu, KVM_SET_CPUID2, &cpuid);
}

static void registers_set(long vcpu) {
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = CODE_GPA, .rflags = 2};
    request(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    request(vcpu, KVM_SET_SREGS, &sregs);
    request(vcpu, KVM_SET_REGS, &regs);
}

static void run(long vcpu, struct kvm_run *shared) {
    for (;;) {
        request(vcpu, KVM_RUN, 0);
        if (shared->exit_reason != KVM_EXIT_IO)
            end(2);
        if (shared->io.port == PORT_EXIT)
            end(0);
        if (shared->io.port == PORT_COM1)
            call(__NR_write, 1, (long)((uint8_t *)shared + shared->io.data_offset), 1, 0, 0);
    }
}

/* Where a program begins that no C library starts. */
__attribute__((force_align_arg_pointer)) _Noreturn void floor_start(void) __asm__("_start");

void floor_start(void) {
    uint8_t *memory = map(MEMORY, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    for (unsigned i = 0; i < sizeof code; i++)
        memory[CODE_GPA + i] = code[i];
    long kvm = must(call(__NR_open, (long)"/dev/kvm", O_RDWR, 0, 0, 0));
    long vm = vm_create(kvm, memory);
    long vcpu = request(vm, KVM_CREATE_VCPU, 0);
    long size = request(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *shared = map((uint64_t)size, MAP_SHARED, vcpu);
    if (CPUID)
        cpuid_set(kvm, vcpu);
    registers_set(vcpu);
    run(vcpu, shared);
    end(0);
}
