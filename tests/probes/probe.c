/*
 * Does this KVM do what the hardware does? Runs a few bytes in real mode and prints what it saw: the
 * name of the first exit, and how far the guest had come. `./probe CASE`; the cases are those of
 * tests/deviations.toml. It speaks to KVM itself, so that no code of ours is between.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { CODE = 0x1000, HANDLER = 0x2000, HLT = 0xf4 };

struct probe {
    const char *name;
    uint8_t code[8];
    uint32_t debug; /* for KVM_SET_GUEST_DEBUG */
    uint8_t window; /* request_interrupt_window */
};

static const struct probe probes[] = {
    {"breakpoint", {0xcc, HLT}, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, 0},
    {"single-step", {0x90, 0x90, HLT}, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, 0},
    {"short-window", {0xfb, 0x90, 0x90, 0xfa, HLT}, 0, 1}, /* sti; nop; nop; cli; hlt */
};

static int must(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static const char *exit_name(uint32_t reason) {
    switch (reason) {
    case KVM_EXIT_DEBUG: return "debug";
    case KVM_EXIT_HLT: return "halt";
    case KVM_EXIT_IRQ_WINDOW_OPEN: return "window";
    default: return "other";
    }
}

static void run(const struct probe *probe) {
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    must(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul), "KVM_SET_TSS_ADDR");
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    uint8_t *memory = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, flags, -1, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = 0x10000,
                                               .userspace_addr = (uintptr_t)memory};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    memcpy(memory + CODE, probe->code, sizeof probe->code);
    memory[HANDLER] = HLT;
    for (size_t vector = 0; vector < 256; vector++)
        memcpy(memory + 4 * vector, &(uint32_t){HANDLER}, 4);

    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = CODE, .rsp = 0x8000, .rflags = 2};
    must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    if (probe->debug)
        must(ioctl(vcpu, KVM_SET_GUEST_DEBUG, &(struct kvm_guest_debug){.control = probe->debug}),
             "KVM_SET_GUEST_DEBUG");
    run->request_interrupt_window = probe->window;
    must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    must(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
    printf("%s at %+d\n", exit_name(run->exit_reason), (int)regs.rip - CODE);
}

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof probes / sizeof probes[0]; i++)
        if (argc == 2 && !strcmp(argv[1], probes[i].name)) {
            run(&probes[i]);
            return 0;
        }
    fprintf(stderr, "usage: probe CASE\n");
    return 2;
}
