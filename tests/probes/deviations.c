/*
 * The probes of tests/deviations.toml: `deviations NAME` runs a few instructions in a VM of its
 * own, looks at how KVM leaves it, and prints
 *
 *   conforms   what the manual says is what happens
 *   deviates   what the row calls `seen` happens
 *   neither    (status 1) the probe or the row is wrong; standard error has the last exit
 *
 * Without a name it lists the names. It uses nothing of the VMM, which might hide a deviation.
 */
#include <asm/debugreg.h>
#include <asm/processor-flags.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "apic_registers.h"
#include "x86.h"

#define VECTOR_AC 17 /* beside those of x86.h, which no guest of ours raises */

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* ================================ The machine ================================ */

/* RAM, by gpa; mapped at the same gva, by 4-KiB pages that ring 3 may use, too. */
enum {
    PML4 = 0x1000,
    PDPT = 0x2000,
    PD = 0x3000,
    PT = 0x4000,
    GDT = 0x5000,
    IDT = 0x6000,
    TSS = 0x7000,
    HANDLERS = 0x8000,
    CODE = 0xa000,
    RING_0_STACK = 0xc000, /* where it begins, downwards */
    RING_3_STACK = 0xe000,
    ONE = 0x10000, /* pages that hold these numbers */
    TWO = 0x11000,
    FRESH = 0x40000, /* a page that nobody has touched: KVM must map it first */
    RAM_SIZE = 0x200000,
};

#define PTE_ALL (PTE_PRESENT | PTE_WRITABLE | PTE_USER)
#define PTE_AT(gva) (PT + 8 * page_index(gva, 1))

enum { RING_0, RING_3 = 3 };
enum { CS_0 = 0x08, DS_0 = 0x10, DS_3 = 0x1b, CS_3 = 0x23, TSS_SELECTOR = 0x28 };

/* The port that a guest writes to when it is done. A handler writes to the one of its vector. */
#define DONE 0xf0
#define SAY_DONE "out %al, $0xf0\n"

static uint8_t *ram;
static int vcpu;
static struct kvm_run *run;
static struct kvm_regs regs; /* as they were at the last exit */

static int ioctl_or_die(int fd, unsigned long request, const char *name, uintptr_t argument) {
    int result = ioctl(fd, request, argument);
    if (result < 0) {
        fprintf(stderr, "%s failed: %s\n", name, strerror(errno));
        exit(5);
    }
    return result;
}

#define KVM(fd, request, argument) ioctl_or_die(fd, request, #request, (uintptr_t)(argument))

static void *map(int fd, int flags, size_t size) {
    void *hva = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (hva == MAP_FAILED) {
        perror("mmap");
        exit(5);
    }
    return hva;
}

static void ram_set(uint64_t gpa, uint64_t value) { memcpy(ram + gpa, &value, sizeof value); }

static uint64_t ram_get(uint64_t gpa) {
    uint64_t value;
    memcpy(&value, ram + gpa, sizeof value);
    return value;
}

static void ram_map(void) {
    ram_set(PML4, PDPT | PTE_ALL);
    ram_set(PDPT, PD | PTE_ALL);
    ram_set(PD, PT | PTE_ALL);
    for (uint64_t gpa = 0; gpa < RAM_SIZE; gpa += PAGE_SIZE)
        ram_set(PTE_AT(gpa), gpa | PTE_ALL);
    ram_set(ONE, 1);
    ram_set(TWO, 2);
}

/* SDM 3A "Segment Descriptors", "64-Bit IDT Gate Descriptors", "64-Bit TSS Format". */
static void ram_describe(void) {
    ram_set(GDT + CS_0, 0x00af9b000000ffff);
    ram_set(GDT + DS_0, 0x00cf93000000ffff);
    ram_set(GDT + (DS_3 & ~3), 0x00cff3000000ffff);
    ram_set(GDT + (CS_3 & ~3), 0x00affb000000ffff);
    ram_set(TSS + 4, RING_0_STACK);
    for (uint64_t vector = 0; vector < VECTORS; vector++) {
        uint64_t handler = HANDLERS + 4 * vector;
        const uint8_t out_iretq[] = {0xe6, (uint8_t)vector, 0x48, 0xcf};
        memcpy(ram + handler, out_iretq, sizeof out_iretq);
        ram_set(IDT + 16 * vector, handler | CS_0 << 16 | UINT64_C(0xee00) << 32);
    }
}

/* The VM. has_local_apic: the vCPU's is in the kernel. */
static int machine_create(bool has_local_apic) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = KVM(kvm, KVM_CREATE_VM, 0);
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
    if (has_local_apic)
        KVM(vm, KVM_ENABLE_CAP, &split);
    vcpu = KVM(vm, KVM_CREATE_VCPU, 0);
    run = map(vcpu, MAP_SHARED, (size_t)KVM(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    ram = map(-1, MAP_PRIVATE | MAP_ANONYMOUS, RAM_SIZE);
    struct kvm_userspace_memory_region slot = {.memory_size = RAM_SIZE,
                                               .userspace_addr = (uintptr_t)ram};
    KVM(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    static union {
        struct kvm_cpuid2 cpuid;
        uint8_t room[sizeof(struct kvm_cpuid2) + 256 * sizeof(struct kvm_cpuid_entry2)];
    } supported = {.cpuid.nent = 256};
    KVM(kvm, KVM_GET_SUPPORTED_CPUID, &supported);
    KVM(vcpu, KVM_SET_CPUID2, &supported);
    ram_map();
    ram_describe();
    return vm;
}

/* ================================ The vCPU ================================ */

/* A few instructions for the guest, and room behind them. Its registers when it starts:
 * rbx = ONE, rsi = FRESH, rdx = the gva of ONE's page-table entry, rcx = TWO's page-table entry. */
#define GUEST_SIZE 64
#define GUEST(name, instructions)                                                               \
    asm(".pushsection .rodata\n" #name ": " instructions "\n.org " #name " + 64\n.popsection"); \
    extern const uint8_t name[GUEST_SIZE]

static struct kvm_segment segment(uint16_t selector, uint8_t type, bool is_code) {
    return (struct kvm_segment){.selector = selector,
                                .limit = UINT32_MAX,
                                .type = type,
                                .present = 1,
                                .dpl = selector & 3,
                                .db = !is_code,
                                .s = 1,
                                .l = is_code,
                                .g = 1};
}

static struct kvm_sregs sregs_get(void) {
    struct kvm_sregs sregs;
    KVM(vcpu, KVM_GET_SREGS, &sregs);
    return sregs;
}

static void vcpu_start(const uint8_t *guest, unsigned ring) {
    memcpy(ram + CODE, guest, GUEST_SIZE);
    struct kvm_sregs sregs = sregs_get();
    sregs.cr0 = X86_CR0_PE | X86_CR0_ET | X86_CR0_NE | X86_CR0_WP | X86_CR0_AM | X86_CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = X86_CR4_PAE | X86_CR4_PGE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs.cs = segment(ring ? CS_3 : CS_0, 0xb, true);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(ring ? DS_3 : DS_0, 0x3, false);
    sregs.tr = (struct kvm_segment){
        .base = TSS, .limit = 0x67, .selector = TSS_SELECTOR, .type = 0xb, .present = 1};
    sregs.gdt = (struct kvm_dtable){.base = GDT, .limit = CS_3 | 7};
    sregs.idt = (struct kvm_dtable){.base = IDT, .limit = 16 * VECTORS - 1};
    KVM(vcpu, KVM_SET_SREGS, &sregs);
    regs = (struct kvm_regs){.rip = CODE,
                             .rsp = ring ? RING_3_STACK : RING_0_STACK,
                             .rflags = X86_EFLAGS_FIXED,
                             .rbx = ONE,
                             .rsi = FRESH,
                             .rdx = PTE_AT(ONE),
                             .rcx = ram_get(PTE_AT(TWO))};
    KVM(vcpu, KVM_SET_REGS, &regs);
}

static void vcpu_run(void) {
    KVM(vcpu, KVM_RUN, 0);
    KVM(vcpu, KVM_GET_REGS, &regs);
}

static bool left_for(uint32_t reason) { return run->exit_reason == reason; }
static bool left_at(uint16_t port) { return left_for(KVM_EXIT_IO) && run->io.port == port; }

/* KVM_GUESTDBG_USE_HW_BP stops before the guest's second byte, which is its second instruction. */
static void vcpu_debug(uint32_t control) {
    struct kvm_guest_debug debug = {
        .control = KVM_GUESTDBG_ENABLE | control,
        .arch.debugreg = {[0] = CODE + 1, [DR_CONTROL] = DR_LOCAL_ENABLE},
    };
    KVM(vcpu, KVM_SET_GUEST_DEBUG, &debug);
}

/* ================================ The probes ================================ */

enum verdict { CONFORMS, DEVIATES, NEITHER };

static enum verdict verdict(bool conforms, bool deviates) {
    return conforms ? CONFORMS : deviates ? DEVIATES : NEITHER;
}

/* ---- software interrupts ---- */

GUEST(int_30, "int $0x30");

static enum verdict int_n_in_ring_3(void) {
    vcpu_start(int_30, RING_3);
    vcpu_run();
    return verdict(left_at(0x30), left_at(VECTOR_UD));
}

static enum verdict int_n_in_ring_0(void) {
    vcpu_start(int_30, RING_0);
    vcpu_run();
    return verdict(left_at(0x30), left_for(KVM_EXIT_INTERNAL_ERROR));
}

/* ---- when events are taken ---- */

/* Lateness has luck in it: the host's own interrupts let KVM look at the guest's. */
#define LAPS 20

GUEST(window_laps, "1: sti; nop; nop; cli\n" SAY_DONE "jmp 1b");

static enum verdict late_interrupt_window(void) {
    vcpu_start(window_laps, RING_0);
    for (int lap = 0; lap < LAPS; lap++) {
        run->request_interrupt_window = 1;
        vcpu_run();
        if (!left_for(KVM_EXIT_IRQ_WINDOW_OPEN))
            return verdict(false, left_at(DONE));
        run->request_interrupt_window = 0;
        vcpu_run();
    }
    return CONFORMS;
}

GUEST(nmi_laps, "1: nop; nop\n" SAY_DONE "jmp 1b");

/* Of each two NMIs the second one comes while the first one's handler runs. */
static enum verdict late_nmi(void) {
    vcpu_start(nmi_laps, RING_0);
    for (int lap = 0; lap < LAPS; lap++) {
        for (int i = 0; i < 2; i++) {
            KVM(vcpu, KVM_NMI, 0);
            vcpu_run();
            if (!left_at(VECTOR_NMI))
                return verdict(false, left_at(DONE));
        }
        vcpu_run();
    }
    return CONFORMS;
}

/* The instruction in the shadow is left once, so that KVM can map the page that it touches. */
GUEST(exit_in_shadow, "sti; mov (%rsi), %al; 1: jmp 1b");

static enum verdict sti_shadow_lost(void) {
    vcpu_start(exit_in_shadow, RING_0);
    run->request_interrupt_window = 1;
    vcpu_run();
    bool opened = left_for(KVM_EXIT_IRQ_WINDOW_OPEN);
    return verdict(opened && regs.rip > CODE + 1, opened && regs.rip == CODE + 1);
}

GUEST(interrupts_on, "sti; 1: jmp 1b");

/* In another machine: a message comes, and at the exit that its handler makes we look at ISR. */
static enum verdict interrupt_never_in_service(void) {
    int vm = machine_create(true);
    struct kvm_lapic_state apic;
    struct kvm_msi message = {.address_lo = LAPIC_GPA, .data = 0x30};
    KVM(vcpu, KVM_GET_LAPIC, &apic);
    memcpy(apic.regs + LAPIC_SVR, &(uint32_t){LAPIC_SVR_ENABLE | 0xff}, sizeof(uint32_t));
    KVM(vcpu, KVM_SET_LAPIC, &apic);
    vcpu_start(interrupts_on, RING_0);
    KVM(vm, KVM_SIGNAL_MSI, &message);
    vcpu_run();
    KVM(vcpu, KVM_GET_LAPIC, &apic);
    uint32_t in_service; /* vectors 0x20 to 0x3f */
    memcpy(&in_service, apic.regs + LAPIC_ISR + 0x10, sizeof in_service);
    return verdict(left_at(0x30) && in_service == 1u << 16, left_at(0x30) && !in_service);
}

/* ---- exceptions that the VMM injects ---- */

#define VECTOR_NP 11
#define GATE_PRESENT (UINT64_C(0x80) << 40)

GUEST(divide, "xor %ecx, %ecx; div %ecx");

/* Inject an exception whose gate is not present: while the CPU delivers it, #NP comes up. An exception
 * of the guest's own goes before, so that KVM has mapped all pages that a delivery needs. */
static void inject_without_gate(uint8_t vector) {
    struct kvm_vcpu_events events;
    uint64_t gate = IDT + UINT64_C(16) * vector;
    vcpu_start(divide, RING_0);
    vcpu_run();
    ram_set(gate, ram_get(gate) & ~GATE_PRESENT);
    KVM(vcpu, KVM_GET_VCPU_EVENTS, &events);
    events.exception.injected = 1;
    events.exception.nr = vector;
    events.exception.has_error_code = VECTORS_WITH_ERROR_CODE >> vector & 1;
    KVM(vcpu, KVM_SET_VCPU_EVENTS, &events);
    vcpu_run();
}

static enum verdict fault_while_injecting_benign(void) {
    inject_without_gate(VECTOR_UD);
    return verdict(left_at(VECTOR_NP), left_at(VECTOR_DF));
}

static enum verdict fault_while_injecting_contributory(void) {
    inject_without_gate(VECTOR_GP);
    return verdict(left_at(VECTOR_DF), left_at(VECTOR_NP));
}

/* ---- what ring 3 sees ---- */

GUEST(read_cs, "mov %cs, %eax; ud2");

static enum verdict selectors_in_ring_3(void) {
    vcpu_start(read_cs, RING_3);
    vcpu_run();
    bool is_right = regs.rax == CS_3;
    bool frame_is_right = left_at(VECTOR_UD) && ram_get(regs.rsp + 8) == CS_3;
    return verdict(frame_is_right && is_right, frame_is_right && !is_right);
}

GUEST(read_flags, "pushf; pop %rax; ud2");

static enum verdict interrupt_flag_in_ring_3(void) {
    vcpu_start(read_flags, RING_3);
    vcpu_run();
    bool is_right = !(regs.rax & X86_EFLAGS_IF);
    bool frame_is_right = left_at(VECTOR_UD) && !(ram_get(regs.rsp + 16) & X86_EFLAGS_IF);
    return verdict(frame_is_right && is_right, frame_is_right && !is_right);
}

GUEST(read_misaligned, "mov 1(%rbx), %eax; ud2");

static enum verdict alignment_check(void) {
    vcpu_start(read_misaligned, RING_3);
    regs.rflags |= X86_EFLAGS_AC;
    KVM(vcpu, KVM_SET_REGS, &regs);
    vcpu_run();
    return verdict(left_at(VECTOR_AC), left_at(VECTOR_UD));
}

/* ---- segmentation and paging ---- */

GUEST(read_beyond_limit, ".code32; mov %fs:0x1000, %al; ud2; .code64");

/* In compatibility mode: 64-bit mode has no limits. */
static enum verdict segment_limit(void) {
    vcpu_start(read_beyond_limit, RING_0);
    struct kvm_sregs sregs = sregs_get();
    sregs.cs.l = 0;
    sregs.cs.db = 1;
    sregs.fs.g = 0;
    sregs.fs.limit = 0xfff;
    KVM(vcpu, KVM_SET_SREGS, &sregs);
    vcpu_run();
    return verdict(left_at(VECTOR_GP), left_at(VECTOR_UD));
}

GUEST(read_second_512_gib, "movabs $0x8000000000, %rbx; mov (%rbx), %al");

static enum verdict reserved_bit_error_code(void) {
    vcpu_start(read_second_512_gib, RING_0);
    ram_set(PML4 + 8, PDPT | PTE_ALL | PTE_LARGE); /* reserved at this level */
    vcpu_run();
    uint64_t error_code = ram_get(regs.rsp);
    return verdict(left_at(VECTOR_PF) && error_code == (PF_ERROR_RESERVED | PF_ERROR_PRESENT),
                   left_at(VECTOR_PF) && error_code == PF_ERROR_RESERVED);
}

GUEST(remap, "mov (%rbx), %al; mov %rcx, (%rdx); mov (%rbx), %rax\n" SAY_DONE);

/* Conforms here: keeps the translation, as a CPU does that is not told that it has changed. */
static enum verdict translation_not_kept(void) {
    vcpu_start(remap, RING_0);
    vcpu_run();
    return verdict(left_at(DONE) && regs.rax == 1, left_at(DONE) && regs.rax == 2);
}

GUEST(remap_global, "mov (%rbx), %al; mov %rcx, (%rdx); mov %cr3, %rax; mov %rax, %cr3\n"
                    "mov (%rbx), %rax\n" SAY_DONE);

static enum verdict global_translation_not_kept(void) {
    vcpu_start(remap_global, RING_0);
    ram_set(PTE_AT(ONE), ONE | PTE_ALL | PTE_GLOBAL);
    vcpu_run();
    return verdict(left_at(DONE) && regs.rax == 1, left_at(DONE) && regs.rax == 2);
}

/* KVM asks the host for the memory behind a slot, and the host has none. */
GUEST(touch_fresh, "mov (%rsi), %rax\n" SAY_DONE);

static enum verdict slot_without_memory_in_ring_0(void) {
    vcpu_start(touch_fresh, RING_0);
    mprotect(ram + FRESH, PAGE_SIZE, PROT_NONE);
    int result = ioctl(vcpu, KVM_RUN, 0);
    return verdict(result < 0 && errno == EFAULT, result == 0 && left_for(KVM_EXIT_MMIO));
}

GUEST(remap_and_keep,
      "mov %cr4, %rax; bts $17, %rax; mov %rax, %cr4\n"
      "mov (%rbx), %al; mov %rcx, (%rdx); mov %cr3, %rax; bts $63, %rax; mov %rax, %cr3\n"
      "mov (%rbx), %rax\n" SAY_DONE);

/* Conforms here: keeps what it need not drop. Without PCIDs, CR4.PCIDE (bit 17) raises #GP. */
static enum verdict pcid_translation_not_kept(void) {
    vcpu_start(remap_and_keep, RING_0);
    vcpu_run();
    return verdict(left_at(DONE) && regs.rax == 1,
                   (left_at(DONE) && regs.rax == 2) || left_at(VECTOR_GP));
}

/* ---- debugging ---- */

GUEST(watch, "mov %rbx, %dr0; mov $0x10001, %eax; mov %rax, %dr7; mov %al, (%rbx); nop\n" SAY_DONE);

static enum verdict watchpoint_in_ring_0(void) {
    vcpu_start(watch, RING_0);
    vcpu_run();
    return verdict(left_at(VECTOR_DB), left_at(DONE));
}

GUEST(nops_and_ud2, "nop; nop; ud2");

static enum verdict hardware_breakpoint(unsigned ring) {
    vcpu_start(nops_and_ud2, ring);
    vcpu_debug(KVM_GUESTDBG_USE_HW_BP);
    vcpu_run();
    return verdict(left_for(KVM_EXIT_DEBUG), left_at(VECTOR_UD));
}

static enum verdict hardware_breakpoint_in_ring_0(void) { return hardware_breakpoint(RING_0); }
static enum verdict hardware_breakpoint_in_ring_3(void) { return hardware_breakpoint(RING_3); }

GUEST(breakpoint, "int3");

static enum verdict software_breakpoint(unsigned ring) {
    vcpu_start(breakpoint, ring);
    vcpu_debug(KVM_GUESTDBG_USE_SW_BP);
    vcpu_run();
    return verdict(left_for(KVM_EXIT_DEBUG),
                   left_at(VECTOR_BP) || left_for(KVM_EXIT_INTERNAL_ERROR));
}

static enum verdict software_breakpoint_in_ring_0(void) { return software_breakpoint(RING_0); }
static enum verdict software_breakpoint_in_ring_3(void) { return software_breakpoint(RING_3); }

static enum verdict single_step_in_ring_3(void) {
    vcpu_start(nops_and_ud2, RING_3);
    vcpu_debug(KVM_GUESTDBG_SINGLESTEP);
    vcpu_run();
    return verdict(left_for(KVM_EXIT_DEBUG), left_at(VECTOR_DB));
}

/* Begins with an exit, so that the page of the code is mapped. Each step must get further. */
GUEST(touch, SAY_DONE "mov (%rsi), %rax; nop; nop; nop");

static enum verdict single_step_repeated(void) {
    vcpu_start(touch, RING_0);
    vcpu_run();
    vcpu_debug(KVM_GUESTDBG_SINGLESTEP);
    for (uint64_t last_rip = 0; regs.rip < CODE + 5; last_rip = regs.rip) {
        vcpu_run();
        if (!left_for(KVM_EXIT_DEBUG) || regs.rip == last_rip)
            return verdict(false, left_for(KVM_EXIT_DEBUG));
    }
    return CONFORMS;
}

/* ================================ Which one ================================ */

static const struct probe {
    const char *name;
    enum verdict (*run)(void);
} probes[] = {
    {"int-n-in-ring-3", int_n_in_ring_3},
    {"int-n-in-ring-0", int_n_in_ring_0},
    {"late-interrupt-window", late_interrupt_window},
    {"late-nmi", late_nmi},
    {"sti-shadow-lost", sti_shadow_lost},
    {"interrupt-never-in-service", interrupt_never_in_service},
    {"fault-while-injecting-benign", fault_while_injecting_benign},
    {"fault-while-injecting-contributory", fault_while_injecting_contributory},
    {"selectors-in-ring-3", selectors_in_ring_3},
    {"interrupt-flag-in-ring-3", interrupt_flag_in_ring_3},
    {"alignment-check", alignment_check},
    {"segment-limit", segment_limit},
    {"reserved-bit-error-code", reserved_bit_error_code},
    {"translation-not-kept", translation_not_kept},
    {"global-translation-not-kept", global_translation_not_kept},
    {"slot-without-memory-in-ring-0", slot_without_memory_in_ring_0},
    {"pcid-translation-not-kept", pcid_translation_not_kept},
    {"watchpoint-in-ring-0", watchpoint_in_ring_0},
    {"hardware-breakpoint-in-ring-0", hardware_breakpoint_in_ring_0},
    {"hardware-breakpoint-in-ring-3", hardware_breakpoint_in_ring_3},
    {"software-breakpoint-in-ring-0", software_breakpoint_in_ring_0},
    {"software-breakpoint-in-ring-3", software_breakpoint_in_ring_3},
    {"single-step-in-ring-3", single_step_in_ring_3},
    {"single-step-repeated", single_step_repeated},
};

static int probe_run(const struct probe *probe) {
    static const char *const words[] = {"conforms", "deviates", "neither"};
    machine_create(false);
    alarm(5); /* no probe waits for anything */
    enum verdict seen = probe->run();
    puts(words[seen]);
    fprintf(stderr, "last exit: reason %u, port 0x%x, rip CODE%+lld, rax 0x%llx\n",
            run->exit_reason, left_for(KVM_EXIT_IO) ? run->io.port : 0, regs.rip - CODE, regs.rax);
    return seen == NEITHER;
}

int main(int argc, char **argv) {
    for (size_t i = 0; i < LENGTH(probes); i++) {
        if (argc < 2)
            puts(probes[i].name);
        else if (!strcmp(argv[1], probes[i].name))
            return probe_run(&probes[i]);
    }
    return argc < 2 ? 0 : 2;
}
