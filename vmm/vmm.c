/*
 * kvmlab's virtual machine monitor: one guest, one vCPU, one file. Beside it stand what can be read
 * alone: files of images (image.c), the event record (events.c), the walk from a gva to a gpa (walk.c),
 * KVM's counters (statistics.c), interrupt lines (pic.c), a thread for input (io.c), gdb's remote protocol
 * (gdb.c), and the virtio console in three layers (virtio_mmio.c, virtqueue.c, virtio_console.c).
 *
 * How to read it. main(), at the end, is the table of contents: each line is one stage in the life
 * of a virtual machine. The sections stand in the order in which a machine comes to life, and each
 * uses what stands above it. On a first reading, skip Post-mortem.
 *
 *   Errors          one line, an exit status, and what to do next
 *   Options         what the caller asked for
 *   Record          what a run has cost, and how its record ends (include/events.h)
 *   Memory          the guest's RAM, and the one checked way to it
 *   Machine         /dev/kvm: the VM, its memory slot, its vCPU
 *   Entry state     the registers and the boot data that an entry point expects
 *   Post-mortem     what to tell a student whose guest has died
 *   Exit record     names and counts of exits
 *   Bus             who answers at a port or at an address
 *   Devices         COM1 and the three ports of include/machine.h
 *   Exits           what to do when KVM_RUN returns, a row for each reason
 *   Run             enter the guest, leave it, until something ends the run
 *   Host-half API   what a lesson's host.c may call (include/host.h)
 *
 * The loop that everything else serves is vm_run(): prepare the entry, KVM_RUN, look at the exit.
 * All guest state that an exit needs arrives with it in the shared kvm_run page (KVM_CAP_SYNC_REGS),
 * so an exit costs one system call.
 *
 * Words: a gva is a guest-virtual address, a gpa guest-physical, an hva one of this process. Guest
 * memory and every number the guest chose are hostile: memory_at() is the only way from a gpa to a
 * pointer.
 */
#include <asm/processor-flags.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "events.h"
#include "host.h"
#include "machine.h"
#include "pvh.h"
#include "vmm.h"
#include "x86.h"

/* The host half is optional: without a host.c the linker leaves it undefined, at address 0, and this
 * copy stays empty. */
#pragma weak host_half
static struct host_half half;

/* ---------------------------------------------------------------------------------------------- */
/* Errors */

static void record_end(enum status status, const char *how);

void die(enum status status, const char *format, ...) {
    va_list arguments;
    fflush(stdout);
    fputs("vmm: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    record_end(status, "host failure");
    exit(status);
}

static int ioctl_or_die(int fd, unsigned long request, const char *name, const void *argument) {
    int result = ioctl(fd, request, argument);
    if (result < 0)
        die(STATUS_HOST, "%s failed: %s", name, strerror(errno));
    return result;
}

/* An ioctl whose argument is a number, and one whose argument is a structure of the size that the
 * request itself encodes. KVM_GET/SET_CPUID2 and the like encode the size of the fixed part. */
#define KVM_NUMBER(fd, request, number) \
    ioctl_or_die(fd, request, #request, (void *)(uintptr_t)(number))
#define KVM_STRUCT(fd, request, pointer) \
    ioctl_or_die(fd, request, #request, HOST_ARGUMENT(request, pointer))

uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---------------------------------------------------------------------------------------------- */
/* Options */

/* By enum machine_irqchip and enum machine_unknown_io, and how virtio drivers notify. */
static const char *const irqchip_names[] = {"none", "split", "kernel"};
static const char *const unknown_io_names[] = {"fatal", "ignore"};
static const char *const notify_names[] = {"exit", "ioeventfd"};

#define NOT_GIVEN UINT32_MAX
#define NEVER UINT64_MAX

static struct {
    const char *image, *append, *events, *debugcon, *kvm, *gdb;
    uint64_t seed;
    uint64_t step_after; /* an exit */
    double time_limit;   /* seconds; 0: none */
    bool summary;
    bool ioeventfd;
    int argc;
    char **argv;
    struct machine_note machine; /* NOT_GIVEN where the image's note decides */
} options = {
    .kvm = "/dev/kvm",
    .time_limit = 10,
    .step_after = NEVER,
    .machine = {.memory_mib = NOT_GIVEN, .irqchip = NOT_GIVEN, .unknown_io = NOT_GIVEN},
};

static const char help_text[] =
    "usage: vmm [OPTION]... IMAGE\n"
    "\n"
    "Run IMAGE, an ELF file with a PVH entry note or a Multiboot 1 kernel, in a virtual machine\n"
    "on KVM. COM1 is standard input and output. What machine an image needs stands in its machine\n"
    "note (include/machine.h); the first three options override it.\n"
    "\n"
    "  -m, --memory=MIB             guest memory, 1 to 3072 MiB (without a note: 64)\n"
    "  -i, --irqchip=none|split|kernel\n"
    "                               where the interrupt controller lives (without a note: none)\n"
    "  -u, --unknown-io=fatal|ignore\n"
    "                               an access that no device answers (without a note: fatal)\n"
    "  -n, --virtio-notify=exit|ioeventfd\n"
    "                               how a virtio driver's notification arrives (default: exit)\n"
    "  -s, --seed=NUMBER            put seed=NUMBER on the guest's command line (default: 0)\n"
    "  -a, --append=TEXT            add TEXT to the guest's command line\n"
    "  -t, --time-limit=SECONDS     end a run that takes longer; 0 is no limit (default: 10)\n"
    "  -e, --events=FILE            record what happens as JSON Lines (include/events.h)\n"
    "  -d, --debugcon=FILE          write the bytes the guest sends to port 0xe9 to FILE\n"
    "  -S, --summary                after the run, say what the exits were and what they cost\n"
    "  -k, --kvm=FILE               the KVM device (default: /dev/kvm)\n"
    "  -x, --step-after=EXIT        after this exit, run one instruction at a time: slow, but a\n"
    "                               triple fault then shows the registers before it on any CPU\n"
    "  -g, --gdb=SOCKET             wait for gdb before the first instruction: target remote "
    "SOCKET\n"
    "  -h, --help                   print this help and leave\n"
    "\n"
    "Exit status: 0 the guest ended the run and reported success; 1 it reported failure, or a\n"
    "part is not written yet; 2 usage; 3 the guest crashed; 4 it hung; 5 the host refused "
    "something;\n"
    "77 this machine lacks what the lesson needs; 128+n ended by signal n.\n";

static const struct option long_options[] = {
    {"memory", required_argument, NULL, 'm'},
    {"irqchip", required_argument, NULL, 'i'},
    {"unknown-io", required_argument, NULL, 'u'},
    {"virtio-notify", required_argument, NULL, 'n'},
    {"seed", required_argument, NULL, 's'},
    {"append", required_argument, NULL, 'a'},
    {"time-limit", required_argument, NULL, 't'},
    {"events", required_argument, NULL, 'e'},
    {"debugcon", required_argument, NULL, 'd'},
    {"summary", no_argument, NULL, 'S'},
    {"kvm", required_argument, NULL, 'k'},
    {"step-after", required_argument, NULL, 'x'},
    {"gdb", required_argument, NULL, 'g'},
    {"help", no_argument, NULL, 'h'},
    {0},
};

static uint64_t option_number(const char *name, const char *text, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 0);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value < min || value > max)
        die(STATUS_USAGE, "--%s=%s: expected a number from %" PRIu64 " to %" PRIu64, name, text,
            min, max);
    return value;
}

static double option_seconds(const char *name, const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value <= 86400))
        die(STATUS_USAGE, "--%s=%s: expected a number of seconds from 0 to 86400", name, text);
    return value;
}

static uint32_t option_choice(const char *name, const char *text, const char *const *choices,
                              uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if (!strcmp(text, choices[i]))
            return i;
    die(STATUS_USAGE, "--%s=%s: there is no such choice; `vmm --help` lists them", name, text);
}

static void option_take(int option, const char *value) {
    switch (option) {
    case 'm':
        options.machine.memory_mib =
            (uint32_t)option_number("memory", value, 1, MACHINE_MEMORY_MIB_MAX);
        break;
    case 'i':
        options.machine.irqchip =
            option_choice("irqchip", value, irqchip_names, LENGTH(irqchip_names));
        break;
    case 'u':
        options.machine.unknown_io =
            option_choice("unknown-io", value, unknown_io_names, LENGTH(unknown_io_names));
        break;
    case 'n':
        options.ioeventfd =
            option_choice("virtio-notify", value, notify_names, LENGTH(notify_names));
        break;
    case 's': options.seed = option_number("seed", value, 0, UINT64_MAX); break;
    case 'a': options.append = value; break;
    case 't': options.time_limit = option_seconds("time-limit", value); break;
    case 'e': options.events = value; break;
    case 'd': options.debugcon = value; break;
    case 'S': options.summary = true; break;
    case 'k': options.kvm = value; break;
    case 'x': options.step_after = option_number("step-after", value, 0, NEVER - 1); break;
    case 'g': options.gdb = value; break;
    case 'h': exit(fputs(help_text, stdout) < 0 || fflush(stdout) ? STATUS_HOST : STATUS_OK);
    default: /* getopt_long has said what is wrong, in one line */ exit(STATUS_USAGE);
    }
}

static void options_parse(int argc, char **argv) {
    int option;
    while ((option = getopt_long(argc, argv, "m:i:u:n:s:a:t:e:d:Sk:x:g:h", long_options, NULL)) !=
           -1)
        option_take(option, optarg);
    if (optind == argc)
        die(STATUS_USAGE, "which image? usage: vmm [OPTION]... IMAGE; `vmm --help` explains");
    if (optind + 1 < argc)
        die(STATUS_USAGE, "one image at a time: %s is one too many", argv[optind + 1]);
    options.image = argv[optind];
    options.argc = argc;
    options.argv = argv;
}

bool notifications_use_ioeventfd(void) { return options.ioeventfd; }

/* ---------------------------------------------------------------------------------------------- */
/* Record */

/* What a run has cost so far. Kept here because both the record and the summary tell it. */
static struct {
    uint64_t started_ns;
    uint64_t exits;
    uint64_t guest_ns; /* inside KVM_RUN */
    uint64_t vmm_ns;   /* between two KVM_RUN */
} run_totals;

static void record_end(enum status status, const char *how) {
    gdb_end(status);
    event_end(); /* one that a failure has left open */
    event_begin("end");
    event_number("status", status);
    event_string("how", how);
    event_number("exits", run_totals.exits);
    event_number("guest_ns", run_totals.guest_ns);
    event_number("vmm_ns", run_totals.vmm_ns);
    event_end();
    int error = events_close();
    if (error)
        die(STATUS_HOST, "cannot write the events to %s: %s", options.events, strerror(error));
}

/* ---------------------------------------------------------------------------------------------- */
/* Memory */

/* RAM is one memory slot from gpa 0. */
static struct {
    uint8_t *hva;
    uint64_t size;
} memory;

static void memory_create(uint64_t size) {
    memory.hva = mmap(NULL, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory.hva == MAP_FAILED)
        die(STATUS_HOST, "cannot get %" PRIu64 " MiB for the guest: %s; try a smaller --memory",
            size / MIB, strerror(errno));
    memory.size = size;
}

/* Written so that no sum can wrap: both numbers may be the guest's. */
void *memory_at(gpa_t gpa, uint64_t size) {
    if (size > memory.size || gpa > memory.size - size)
        return NULL;
    return memory.hva + gpa;
}

uint64_t memory_size(void) { return memory.size; }

/* ---------------------------------------------------------------------------------------------- */
/* Machine */

#define KVMLAB_CPUID_LEAF 0x40000000u /* where a hypervisor names itself */
#define CPUID_ENTRIES_MAX 256

static struct {
    struct machine_note note;
    struct entry entry;
    int kvm, vm, vcpu;
    struct kvm_run *run;   /* shared with the kernel: the last exit, and the registers */
    bool is_changed;       /* the host half has changed the vCPU since the last exit, */
    bool is_injected;      /* by putting an event into it, */
    bool is_exception_set; /* an exception perhaps */
    bool is_halted;        /* the last exit was that of a halt which only an event can end */
} machine;

/* The options override what the image asks for. */
static struct machine_note machine_choose(struct machine_note note) {
    if (options.machine.memory_mib != NOT_GIVEN)
        note.memory_mib = options.machine.memory_mib;
    if (options.machine.irqchip != NOT_GIVEN)
        note.irqchip = options.machine.irqchip;
    if (options.machine.unknown_io != NOT_GIVEN)
        note.unknown_io = options.machine.unknown_io;
    return note;
}

static void kvm_open(void) {
    machine.kvm = open(options.kvm, O_RDWR | O_CLOEXEC);
    if (machine.kvm < 0)
        die(STATUS_HOST, "cannot open %s: %s%s", options.kvm, strerror(errno),
            errno == EACCES ? "; add yourself to the group kvm: sudo usermod -aG kvm $USER" : "");
    /* Who has this is KVM, and younger than version 12 of its API, which is the last. */
    int synced = ioctl(machine.kvm, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS);
    if (synced < 0)
        die(STATUS_HOST, "%s is not KVM: %s", options.kvm, strerror(errno));
    if ((synced & KVM_SYNC_X86_VALID_FIELDS) != KVM_SYNC_X86_VALID_FIELDS)
        die(STATUS_HOST, "this KVM lacks KVM_CAP_SYNC_REGS; Linux has it since 4.17");
}

static void irqchip_create(void) {
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
    switch ((enum machine_irqchip)machine.note.irqchip) {
    case MACHINE_IRQCHIP_NONE: break;
    case MACHINE_IRQCHIP_SPLIT: KVM_STRUCT(machine.vm, KVM_ENABLE_CAP, &split); break;
    case MACHINE_IRQCHIP_KERNEL: KVM_NUMBER(machine.vm, KVM_CREATE_IRQCHIP, 0); break;
    }
}

enum slot { SLOT_RAM, SLOT_RESCUE, SLOTS };
_Static_assert(SLOTS <= HOST_SLOT_FIRST, "the host half's slots are others");

/* Back the gpas [gpa, gpa + size) with memory of this process. */
static void slot_set(enum slot slot, gpa_t gpa, void *hva, uint64_t size) {
    struct kvm_userspace_memory_region region = {.slot = slot,
                                                 .guest_phys_addr = gpa,
                                                 .memory_size = size,
                                                 .userspace_addr = (uintptr_t)hva};
    KVM_STRUCT(machine.vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static void vm_create(void) {
    machine.vm = KVM_NUMBER(machine.kvm, KVM_CREATE_VM, 0);
    /* Intel CPUs without unrestricted guests need scratch pages above all of RAM: three for a task
     * state, and one for an identity map, which by default is the page before these. */
    KVM_NUMBER(machine.vm, KVM_SET_TSS_ADDR, 0xfffbd000);
    irqchip_create();
    slot_set(SLOT_RAM, 0, memory.hva, memory.size);
}

/* The guest sees the host's CPU as far as KVM supports it, and who runs it: "kvmlab" stands in
 * place of KVM's own leaves, whose paravirtual features no lesson uses. */
static void vcpu_set_cpuid(void) {
    static struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[CPUID_ENTRIES_MAX];
    } cpuid;
    cpuid.header.nent = CPUID_ENTRIES_MAX - 1;
    KVM_STRUCT(machine.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid.header);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < cpuid.header.nent; i++) {
        struct kvm_cpuid_entry2 *entry = &cpuid.entries[i];
        if (entry->function == 1) {
            entry->ebx &= 0x00ffffff; /* the APIC id of this vCPU, not of the CPU we run on */
            entry->ecx |= 1u << 31;   /* there is a hypervisor */
        } else if (entry->function == 0xb || entry->function == 0x1f) {
            entry->edx = 0; /* the x2APIC id */
        }
        if ((entry->function & 0xffffff00) != KVMLAB_CPUID_LEAF)
            cpuid.entries[kept++] = *entry;
    }
    struct kvm_cpuid_entry2 *leaf = &cpuid.entries[kept++];
    *leaf = (struct kvm_cpuid_entry2){.function = KVMLAB_CPUID_LEAF, .eax = KVMLAB_CPUID_LEAF};
    memcpy(&leaf->ebx, "kvml", 4);
    memcpy(&leaf->ecx, "ab\0\0", 4);
    cpuid.header.nent = kept;
    KVM_STRUCT(machine.vcpu, KVM_SET_CPUID2, &cpuid.header);
}

static void vcpu_create(void) {
    machine.vcpu = KVM_NUMBER(machine.vm, KVM_CREATE_VCPU, 0);
    size_t run_size = (size_t)KVM_NUMBER(machine.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    machine.run =
        mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, machine.vcpu, 0);
    if (machine.run == MAP_FAILED)
        die(STATUS_HOST, "cannot map the vCPU: %s", strerror(errno));
    vcpu_set_cpuid();
    machine.run->kvm_valid_regs = KVM_SYNC_X86_VALID_FIELDS;
}

/* The registers of the last exit; to change them, write them and mark them dirty. */
static struct kvm_regs *vcpu_regs(void) { return &machine.run->s.regs.regs; }
static struct kvm_sregs *vcpu_sregs(void) { return &machine.run->s.regs.sregs; }

/* ---------------------------------------------------------------------------------------------- */
/* Entry state */

#define COMMAND_LINE_MAX 2048

/* What devices have to say on it, each word after a blank. */
static char command_line_devices[256];

void command_line_add(const char *word) {
    size_t length = strlen(command_line_devices);
    assert(length + 1 + strlen(word) < sizeof command_line_devices);
    snprintf(command_line_devices + length, sizeof command_line_devices - length, " %s", word);
}

static void boot_command_line(char text[COMMAND_LINE_MAX]) {
    int length = snprintf(text, COMMAND_LINE_MAX, "seed=%" PRIu64 "%s%s%s", options.seed,
                          command_line_devices, options.append ? " " : "",
                          options.append ? options.append : "");
    if (length >= COMMAND_LINE_MAX)
        die(STATUS_USAGE, "--append: the guest's command line would have %d bytes; %d fit", length,
            COMMAND_LINE_MAX - 1);
}

struct pvh_boot_data {
    struct hvm_start_info start_info;
    struct hvm_memmap_table_entry memory_map[1];
    char command_line[COMMAND_LINE_MAX];
};

/* Multiboot Specification 0.6.96, "Boot information format". */
#define MULTIBOOT_BOOTLOADER_MAGIC 0x2badb002u
#define MULTIBOOT_INFO_MEMORY (1u << 0)
#define MULTIBOOT_INFO_COMMAND_LINE (1u << 2)
#define MULTIBOOT_INFO_MEMORY_MAP (1u << 6)
#define MULTIBOOT_MEMORY_AVAILABLE 1

struct multiboot_boot_data {
    struct {
        uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
        uint32_t mmap_length, mmap_addr;
    } info;
    struct __attribute__((packed)) multiboot_memory {
        uint32_t size; /* of the rest */
        uint64_t addr, len;
        uint32_t type;
    } memory_map[1];
    char command_line[COMMAND_LINE_MAX];
};

_Static_assert(sizeof(struct pvh_boot_data) <= BOOT_DATA_SIZE &&
                   sizeof(struct multiboot_boot_data) <= BOOT_DATA_SIZE,
               "the boot data fits the place kept for it");

#define BOOT_DATA_FIELD(type, field) (BOOT_DATA_GPA + offsetof(type, field))

static void boot_data_write(void) {
    void *hva = memory_at(BOOT_DATA_GPA, BOOT_DATA_SIZE);
    assert(hva); /* RAM has at least one MiB */
    if (machine.entry.protocol == ENTRY_PVH) {
        struct pvh_boot_data *data = hva;
        data->start_info = (struct hvm_start_info){
            .magic = XEN_HVM_START_MAGIC_VALUE,
            .version = 1,
            .cmdline_paddr = BOOT_DATA_FIELD(struct pvh_boot_data, command_line),
            .memmap_paddr = BOOT_DATA_FIELD(struct pvh_boot_data, memory_map),
            .memmap_entries = 1,
        };
        data->memory_map[0] = (struct hvm_memmap_table_entry){
            .addr = 0, .size = memory.size, .type = XEN_HVM_MEMMAP_TYPE_RAM};
        boot_command_line(data->command_line);
    } else {
        struct multiboot_boot_data *data = hva;
        data->info.flags =
            MULTIBOOT_INFO_MEMORY | MULTIBOOT_INFO_COMMAND_LINE | MULTIBOOT_INFO_MEMORY_MAP;
        data->info.mem_lower = 640;
        data->info.mem_upper = (uint32_t)((memory.size - MIB) / 1024);
        data->info.cmdline = BOOT_DATA_FIELD(struct multiboot_boot_data, command_line);
        data->info.mmap_length = sizeof data->memory_map;
        data->info.mmap_addr = BOOT_DATA_FIELD(struct multiboot_boot_data, memory_map);
        data->memory_map[0] = (struct multiboot_memory){sizeof data->memory_map[0] - 4, 0,
                                                        memory.size, MULTIBOOT_MEMORY_AVAILABLE};
        boot_command_line(data->command_line);
    }
}

/* PVH ("x86/HVM direct boot ABI") and Multiboot ("Machine state") agree but for two registers:
 * 32-bit protected mode, flat segments, paging and interrupts off. */
static void vcpu_set_entry_state(void) {
    /* Segment types as in SDM 3A "Code- and Data-Segment Descriptor Types". */
    struct kvm_segment code = {
        .limit = 0xffffffff, .selector = 0x8, .type = 0xb, .present = 1, .db = 1, .s = 1, .g = 1};
    struct kvm_segment data = code;
    data.selector = 0x10;
    data.type = 0x3;
    struct kvm_segment task = {.limit = 0x67, .type = 0xb, .present = 1};
    struct kvm_sregs *sregs = vcpu_sregs();
    KVM_STRUCT(machine.vcpu, KVM_GET_SREGS, sregs);
    sregs->cs = code;
    sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
    sregs->tr = task;
    sregs->cr0 = X86_CR0_PE | X86_CR0_ET;
    sregs->cr4 = 0;
    sregs->efer = 0;
    if (machine.note.irqchip == MACHINE_IRQCHIP_NONE)
        sregs->apic_base = 0; /* where there is no local APIC, CPUID says so: KVM goes by this */
    *vcpu_regs() = (struct kvm_regs){
        .rip = machine.entry.gpa,
        .rflags = X86_EFLAGS_FIXED,
        .rbx = BOOT_DATA_GPA,
        .rax = machine.entry.protocol == ENTRY_MULTIBOOT ? MULTIBOOT_BOOTLOADER_MAGIC : 0,
    };
    machine.run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
}

/* ---------------------------------------------------------------------------------------------- */
/* Post-mortem */

/* After the limit, the timer goes on once a second. Rounded up, since 0 stops the timer. */
static void time_limit_set(double seconds) {
    int64_t us = (int64_t)(seconds * 1e6 + 0.999999);
    struct itimerval limit = {.it_interval.tv_sec = 1, .it_value = {us / 1000000, us % 1000000}};
    setitimer(ITIMER_REAL, &limit, NULL);
}

/* How the run ended, once something has ended it. */
static struct {
    bool ended;
    enum status status;
    const char *how; /* as in the `end` event */
} outcome;

static void run_end(enum status status, const char *how) {
    if (!outcome.ended) {
        outcome.ended = true;
        outcome.status = status;
        outcome.how = how;
    }
}

/* A line for the person at the terminal, after all that the guest printed. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    char line[1024];
    va_list arguments;
    fflush(stdout);
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (!gdb_say(line))
        fprintf(stderr, "%s\n", line);
}

void run_stop(enum status status, const char *how) {
    if (!outcome.ended)
        say("vmm: ended: %s", how);
    run_end(status, how);
}

/* Nobody hurries a person who thinks. */
void run_limit_start(void) { time_limit_set(gdb_is_there() ? 0 : options.time_limit); }

static const char *vector_name(uint64_t vector) {
    static const char *const names[] = {
        "#DE (divide error)",
        "#DB (debug)",
        "NMI",
        "#BP (breakpoint)",
        "#OF (overflow)",
        "#BR (bound range exceeded)",
        "#UD (invalid opcode)",
        "#NM (no x87 or SSE)",
        "#DF (double fault)",
        "vector 9",
        "#TS (invalid TSS)",
        "#NP (segment not present)",
        "#SS (stack-segment fault)",
        "#GP (general protection)",
        "#PF (page fault)",
    };
    static char other[16];
    snprintf(other, sizeof other, "vector %u", (uint8_t)vector);
    return vector < LENGTH(names) ? names[vector] : other;
}

/* What a page fault's error code says: " (write by the kernel, page not present)". */
static const char *error_code_text(uint64_t vector, uint64_t error_code) {
    static char text[96];
    if (vector != VECTOR_PF)
        return "";
    snprintf(text, sizeof text, " (%s by %s, %s)",
             error_code & PF_ERROR_FETCH   ? "instruction fetch"
             : error_code & PF_ERROR_WRITE ? "write"
                                           : "read",
             error_code & PF_ERROR_USER ? "ring 3" : "the kernel",
             error_code & PF_ERROR_RESERVED  ? "a reserved bit is set on the walk"
             : error_code & PF_ERROR_PRESENT ? "page present, but not permitted"
                                             : "page not present");
    return text;
}

static void say_registers(const struct kvm_regs *regs) {
    say("  rax %016llx  rbx %016llx  rcx %016llx  rdx %016llx", regs->rax, regs->rbx, regs->rcx,
        regs->rdx);
    say("  rsi %016llx  rdi %016llx  rbp %016llx  rsp %016llx", regs->rsi, regs->rdi, regs->rbp,
        regs->rsp);
    say("  r8  %016llx  r9  %016llx  r10 %016llx  r11 %016llx", regs->r8, regs->r9, regs->r10,
        regs->r11);
    say("  r12 %016llx  r13 %016llx  r14 %016llx  r15 %016llx", regs->r12, regs->r13, regs->r14,
        regs->r15);
    say("  rip %016llx  rflags %08llx  cr0 %08llx  cr2 %016llx  cr3 %08llx  cr4 %08llx", regs->rip,
        regs->rflags, vcpu_sregs()->cr0, vcpu_sregs()->cr2, vcpu_sregs()->cr3, vcpu_sregs()->cr4);
}

/* Frames as -fno-omit-frame-pointer lays them out: [rbp] is the caller's rbp, [rbp + 8] the return
 * address. Stacks grow down, so a frame that is not above the last one is garbage. */
static void say_backtrace(gva_t rip, gva_t rbp) {
    gva_t frame[2] = {rbp, rip};
    say("  backtrace:");
    for (unsigned depth = 0; depth < 12 && frame[1]; depth++) {
        say("    %s", symbol_or_address(frame[1]).text);
        gva_t below = frame[0];
        if (!below || !guest_read(below, frame, sizeof frame) || (frame[0] && frame[0] <= below))
            break;
    }
}

static const char *const walk_end_texts[] = {
    [WALK_NOT_PRESENT] = "the walk stops here: bit 0 (present) is clear",
    [WALK_RESERVED_BIT] =
        "the walk stops here: a large page, but misaligned or at a wrong level (reserved bit)",
    [WALK_OUTSIDE_MEMORY] = "the walk stops here: the next table is outside guest memory",
    [WALK_NOT_CANONICAL] = "not canonical: the upper bits must all equal bit 47",
    [WALK_NOT_MODELLED] = "32-bit paging, which this walk does not model",
};

static void say_walk_entry(const struct walk *walk, unsigned step, gva_t gva) {
    static const char *const tables[] = {"", "PT", "PD", "PDPT", "PML4", "PML5"};
    unsigned level = walk->top_level - step;
    uint64_t value = walk->entry[step].value;
    say("    %4s[%3u] at gpa 0x%08" PRIx64 " is %016" PRIx64 " %c%c%c%c%s", tables[level],
        page_index(gva, level), walk->entry[step].gpa, value, value & PTE_PRESENT ? 'P' : '-',
        value & PTE_WRITABLE ? 'W' : '-', value & PTE_USER ? 'U' : '-',
        value & PTE_NO_EXECUTE ? '-' : 'X', level > 1 && (value & PTE_LARGE) ? "  large page" : "");
}

static void say_walk(gva_t gva) {
    struct walk walk = host_walk(vcpu_sregs()->cr3, gva);
    say("  page walk of gva 0x%" PRIx64 " from cr3 0x%llx (P present, W writable, U user, X "
        "executable):",
        gva, vcpu_sregs()->cr3);
    for (unsigned step = 0; step < walk.steps; step++)
        say_walk_entry(&walk, step, gva);
    if (walk.end == WALK_MAPPED)
        say("    mapped to gpa 0x%" PRIx64 ", %s, %s, %s", walk.gpa,
            walk.permits & PTE_WRITABLE ? "writable" : "read-only",
            walk.permits & PTE_USER ? "user" : "kernel only",
            walk.permits & PTE_NO_EXECUTE ? "no-execute" : "executable");
    else
        say("    %s", walk_end_texts[walk.end]);
}

static void say_state(const struct kvm_regs *regs) {
    say_registers(regs);
    say_backtrace(regs->rip, regs->rbp);
}

/* The exception itself, in one line, and what its kind needs to be understood. */
static void say_exception(const char *what, uint64_t vector, uint64_t error_code,
                          const struct kvm_regs *regs) {
    say("vmm: the guest crashed: %s %s, error code 0x%" PRIx64 "%s at rip %s", what,
        vector_name(vector), error_code, error_code_text(vector, error_code),
        symbol_or_address(regs->rip).text);
    if (vector == VECTOR_PF)
        say_walk(vcpu_sregs()->cr2);
    say_state(regs);
}

static void panic_exception(const struct panic *panic) {
    struct trap_frame frame;
    if (!guest_read(panic->frame_gva, &frame, sizeof frame)) {
        say("vmm: the guest crashed: its panic names a trap frame at unmapped gva 0x%" PRIx64,
            panic->frame_gva);
        return;
    }
    /* In the order of struct kvm_regs. */
    struct kvm_regs regs = {frame.rax, frame.rbx, frame.rcx, frame.rdx, frame.rsi, frame.rdi,
                            frame.rsp, frame.rbp, frame.r8,  frame.r9,  frame.r10, frame.r11,
                            frame.r12, frame.r13, frame.r14, frame.r15, frame.rip, frame.rflags};
    event_number("vector", frame.vector);
    event_hex("error_code", frame.error_code);
    event_hex("cr2", vcpu_sregs()->cr2);
    event_hex("rip", frame.rip);
    event_string("symbol", symbol_at(frame.rip).text);
    gdb_stop(SIGSEGV, &regs, "vmm: unhandled exception %s, error code 0x%" PRIx64,
             vector_name(frame.vector), frame.error_code);
    say_exception("unhandled exception", frame.vector, frame.error_code, &regs);
}

static void say_todo(const char *location, const char *task) {
    say("vmm: %s: not written yet: %s", location, task);
    say("vmm: open that file; the README.md of its lesson says what is asked for");
}

static void say_cannot(const char *what) {
    say("vmm: this machine cannot run the lesson: %s", what);
}

/* The guest gave up and says why (include/machine.h). */
static void panic_end(gva_t panic_gva) {
    static const struct {
        const char *reason, *how;
        enum status status;
    } ends[] = {{"?", "panic", STATUS_CRASH},
                [PANIC_EXCEPTION] = {"exception", "panic", STATUS_CRASH},
                [PANIC_MESSAGE] = {"message", "panic", STATUS_CRASH},
                [PANIC_TODO] = {"todo", "todo", STATUS_FAILED},
                [PANIC_CANNOT] = {"cannot", "cannot", STATUS_CANNOT}};
    struct panic panic = {0};
    char message[512];
    char location[128];
    if (!guest_read(panic_gva, &panic, sizeof panic) || panic.kind >= LENGTH(ends))
        panic = (struct panic){0};
    guest_read_text(panic.message_gva, message, sizeof message);
    guest_read_text(panic.location_gva, location, sizeof location);
    event_begin("panic");
    event_string("reason", ends[panic.kind].reason);
    event_string("message", message);
    event_string("location", location);
    if (panic.kind == PANIC_EXCEPTION)
        panic_exception(&panic);
    event_end();
    if (panic.kind != PANIC_EXCEPTION)
        gdb_stop(SIGABRT, NULL, "vmm: the guest gives up: %s: %s (%s)", ends[panic.kind].reason,
                 message, location);
    if (panic.kind == PANIC_TODO) {
        say_todo(location, message);
    } else if (panic.kind == PANIC_CANNOT) {
        say_cannot(message);
    } else if (panic.kind == PANIC_MESSAGE) {
        say("vmm: the guest panicked: %s (%s)", message, location);
        say_backtrace(vcpu_regs()->rip, vcpu_regs()->rbp);
    } else if (panic.kind != PANIC_EXCEPTION) {
        say("vmm: the guest crashed: it wrote 0x%" PRIx64 " to the panic port; no panic is there",
            panic_gva);
    }
    run_end(ends[panic.kind].status, ends[panic.kind].how);
}

/* An event of a kind that starts with where the guest was. */
static void event_begin_at_rip(const char *kind) {
    if (!events_are_recorded()) /* then nobody needs the symbol */
        return;
    event_begin(kind);
    event_hex("rip", vcpu_regs()->rip);
    event_string("symbol", symbol_at(vcpu_regs()->rip).text);
}

/*
 * A triple fault tells nothing of the exception it began with: CR2 may be that of the IDT's page,
 * which the CPU could not read either. So the VMM asks the CPU once more. It adds a page with an IDT
 * that works, and all that delivery through it needs, in an unused slot of the guest's own top-level
 * table, and lets the vCPU repeat the instruction it died of.
 */
#define RESCUE_GPA (MACHINE_MEMORY_MIB_MAX * MIB)

struct rescue {
    uint64_t pdpt[512], pd[512];
    uint64_t idt[VECTORS][2];
    uint8_t stubs[VECTORS][16]; /* an OUT each; rip tells which */
    uint64_t gdt[2], reserved;
    uint8_t task_state[104]; /* SDM 3A "64-Bit TSS Format": IST1 at offset 36 */
    uint8_t stack[2048] __attribute__((aligned(16)));
};
#define RESCUE_SIZE ((sizeof(struct rescue) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1))

static void rescue_fill(struct rescue *rescue, gva_t base) {
    rescue->pdpt[0] = (RESCUE_GPA + offsetof(struct rescue, pd)) | PTE_PRESENT | PTE_WRITABLE;
    rescue->pd[0] = RESCUE_GPA | PTE_PRESENT | PTE_WRITABLE | PTE_LARGE;
    rescue->gdt[1] = 0x00af9b000000ffff; /* selector 8: 64-bit code, ring 0 */
    gva_t stack_top = base + offsetof(struct rescue, stack) + sizeof rescue->stack;
    memcpy(rescue->task_state + 36, &stack_top, sizeof stack_top);
    for (unsigned vector = 0; vector < VECTORS; vector++) {
        /* SDM 3A "64-Bit IDT Gate Descriptors": an interrupt gate for all rings, selector 8, IST1. */
        gva_t stub = base + offsetof(struct rescue, stubs) + UINT64_C(16) * vector;
        rescue->idt[vector][0] =
            (stub & 0xffff) | (stub & 0xffff0000) << 32 | 8 << 16 | UINT64_C(0xee01) << 32;
        rescue->idt[vector][1] = stub >> 32;
        memcpy(rescue->stubs[vector], (uint8_t[]){0xe6, PORT_PANIC}, 2); /* out PORT_PANIC, al */
    }
}

static void rescue_set_registers(gva_t base) {
    struct kvm_sregs *sregs = vcpu_sregs();
    sregs->idt.base = base + offsetof(struct rescue, idt);
    sregs->idt.limit = sizeof((struct rescue *)0)->idt - 1;
    sregs->gdt.base = base + offsetof(struct rescue, gdt);
    sregs->gdt.limit = sizeof((struct rescue *)0)->gdt - 1;
    sregs->tr.base = base + offsetof(struct rescue, task_state);
    sregs->tr.limit = 103;
    vcpu_regs()->rflags &= ~(uint64_t)X86_EFLAGS_IF;
    machine.run->s.regs.events = (struct kvm_vcpu_events){0};
    machine.run->kvm_dirty_regs = KVM_SYNC_X86_VALID_FIELDS;
}

/* What began it, as far as it can be found out. */
struct first_fault {
    bool known;
    bool is_injected; /* by the host half, not raised by an instruction */
    uint64_t vector, error_code;
    gva_t cr2;
};

static struct first_fault rescue_run(const struct rescue *rescue, gva_t base) {
    rescue_set_registers(base);
    time_limit_set(0.1); /* if it was an interrupt that began it, the guest now just runs on */
    int result = ioctl(machine.vcpu, KVM_RUN, NULL);
    time_limit_set(0);
    uint64_t stub = vcpu_regs()->rip - base - offsetof(struct rescue, stubs);
    uint64_t stack = vcpu_regs()->rsp - base;
    struct first_fault fault = {.vector = stub / 16, .cr2 = vcpu_sregs()->cr2};
    fault.known = result == 0 && machine.run->exit_reason == KVM_EXIT_IO &&
                  stub < sizeof rescue->stubs && stack < RESCUE_SIZE - 8;
    if (fault.known && fault.vector < 32 && (VECTORS_WITH_ERROR_CODE >> fault.vector & 1))
        memcpy(&fault.error_code, (const uint8_t *)rescue + stack, 8);
    return fault;
}

static struct first_fault first_fault_find(void) {
    struct first_fault fault = {0};
    uint64_t *root = memory_at(vcpu_sregs()->cr3 & PTE_ADDRESS, PAGE_SIZE);
    unsigned slot = 511;
    while (root && slot > 0 && (root[slot] & PTE_PRESENT))
        slot--;
    struct rescue *rescue =
        mmap(NULL, RESCUE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!root || slot == 0 || rescue == MAP_FAILED || !(vcpu_sregs()->efer & EFER_LMA) ||
        (vcpu_sregs()->cr4 & X86_CR4_LA57))
        return fault;
    gva_t base = (gva_t)slot << 39 | (slot >= 256 ? UINT64_C(0xffff) << 48 : 0);
    struct kvm_sync_regs at_fault = machine.run->s.regs;
    uint64_t slot_before = root[slot];
    rescue_fill(rescue, base);
    slot_set(SLOT_RESCUE, RESCUE_GPA, rescue, RESCUE_SIZE);
    root[slot] = RESCUE_GPA | PTE_PRESENT | PTE_WRITABLE;
    fault = rescue_run(rescue, base);
    root[slot] = slot_before;
    machine.run->s.regs = at_fault;
    return fault;
}

/* Why the exception did not reach its handler. */
static void say_delivery(uint64_t vector) {
    const struct kvm_dtable *idt = &vcpu_sregs()->idt;
    uint64_t gate[2];
    gva_t gate_gva = idt->base + vector * sizeof gate;
    if ((vector + 1) * sizeof gate > idt->limit + UINT64_C(1)) {
        say("  it could not be delivered: the IDT's limit 0x%x leaves no gate for vector %" PRIu64,
            idt->limit, vector);
        return;
    }
    if (!guest_read(gate_gva, gate, sizeof gate)) {
        say("  it could not be delivered: its gate, in the IDT at gva 0x%llx, is not mapped",
            idt->base);
        say_walk(gate_gva);
        return;
    }
    gva_t handler = (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000) | gate[1] << 32;
    say("  it could not be delivered through its gate %016" PRIx64 "%016" PRIx64 " to handler %s",
        gate[1], gate[0], symbol_or_address(handler).text);
    if (host_walk(vcpu_sregs()->cr3, handler).end != WALK_MAPPED)
        say_walk(handler);
}

/* The exception that the host half has put into the last entry, if any, and where the guest was then. */
static struct {
    struct first_fault fault;
    gva_t rip;
} injected;

/* Before an entry. What the host half has set, it may have taken back again: KVM knows. */
static void injected_note(void) {
    struct kvm_vcpu_events vcpu;
    struct kvm_sregs sregs;
    injected.fault.known = false;
    if (!machine.is_exception_set)
        return;
    KVM_STRUCT(machine.vcpu, KVM_GET_VCPU_EVENTS, &vcpu);
    KVM_STRUCT(machine.vcpu, KVM_GET_SREGS, &sregs);
    injected.rip = vcpu_regs()->rip;
    injected.fault = (struct first_fault){
        .known = vcpu.exception.injected || vcpu.exception.pending,
        .is_injected = true,
        .vector = vcpu.exception.nr,
        .error_code = vcpu.exception.has_error_code ? vcpu.exception.error_code : 0,
        .cr2 = sregs.cr2,
    };
}

/* To repeat the instruction tells nothing of an exception that no instruction has raised. */
static struct first_fault first_fault_find_or_recall(void) {
    struct first_fault fault = {0};
    if (!injected.fault.known || injected.rip != vcpu_regs()->rip)
        fault = first_fault_find();
    if (!fault.known)
        fault = injected.fault;
    if (fault.known)
        vcpu_sregs()->cr2 = fault.cr2;
    return fault;
}

/* The registers before each instruction, while the guest goes step by step (--step-after, --gdb). */
static struct kvm_sync_regs last_step;
static bool is_stepped;

/* Become a second VMM that repeats the run in silence, with its record going into this pipe. */
static _Noreturn void replay_become(int record_fd) {
    char step_after[40];
    char record[40];
    char **arguments = calloc((size_t)options.argc + 4, sizeof *arguments);
    int null = open("/dev/null", O_RDWR);
    dup2(null, STDIN_FILENO);
    dup2(null, STDOUT_FILENO);
    snprintf(step_after, sizeof step_after, "--step-after=%" PRIu64, run_totals.exits - 1);
    snprintf(record, sizeof record, "--events=/proc/self/fd/%d", dup(record_fd));
    if (!arguments)
        _exit(STATUS_HOST);
    memcpy(arguments, options.argv, (size_t)options.argc * sizeof *arguments);
    arguments[options.argc] = step_after;
    arguments[options.argc + 1] = record;
    arguments[options.argc + 2] = "--debugcon=/dev/null";
    execv("/proc/self/exe", arguments);
    _exit(STATUS_HOST);
}

/* Add what the other record says of the triple fault to ours. */
static void replay_copy_fault(FILE *record) {
    static const char kind[] = "\"kind\":\"triple_fault\"";
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, record) > 0) {
        char *fields = strstr(line, kind);
        char *end = strrchr(line, '}');
        if (fields && end) {
            *end = '\0';
            event_text(fields + sizeof kind - 1);
        }
    }
    free(line);
}

/* KVM on AMD resets the vCPU at a shutdown, which leaves its state undefined (APM 2 "Shutdown
 * Intercept"). A second VMM repeats the run in silence, and after the last exit goes step by step:
 * it knows the registers before the fatal instruction. It has no input, so a guest that reads the
 * console may not get there again. */
static void triple_fault_replay(void) {
    int ends[2];
    fflush(NULL);
    time_limit_set(0); /* the second VMM has its own */
    if (pipe2(ends, O_CLOEXEC) < 0)
        return;
    pid_t child = fork();
    if (child == 0)
        replay_become(ends[1]);
    close(ends[1]);
    FILE *record = fdopen(ends[0], "r");
    if (record) {
        replay_copy_fault(record);
        fclose(record);
    }
    while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
}

static void triple_fault_end(void) {
    bool was_reset = !(vcpu_sregs()->cr0 & X86_CR0_PE);
    if (was_reset && is_stepped)
        machine.run->s.regs = last_step;
    gdb_stop(SIGSEGV, NULL, "vmm: triple fault%s",
             was_reset && !is_stepped ? "; KVM on AMD has reset the registers" : "");
    if (was_reset && !is_stepped) {
        event_begin("triple_fault");
        if (options.gdb) /* the same commands would have to be given again */
            say("vmm: the guest crashed: triple fault; without gdb, the VMM can say where");
        else
            triple_fault_replay();
        event_end();
        run_end(STATUS_CRASH, "triple fault");
        return;
    }
    struct first_fault fault = first_fault_find_or_recall();
    event_begin_at_rip("triple_fault");
    if (fault.known) {
        event_number("injected", fault.is_injected);
        event_number("vector", fault.vector);
        event_hex("error_code", fault.error_code);
        event_hex("cr2", fault.cr2);
    }
    event_end();
    if (fault.known) {
        say_exception(fault.is_injected ? "triple fault; it began with the injected"
                                        : "triple fault; it began with",
                      fault.vector, fault.error_code, vcpu_regs());
        say_delivery(fault.vector);
    } else {
        say("vmm: the guest crashed: triple fault at rip %s",
            symbol_or_address(vcpu_regs()->rip).text);
        say_walk(vcpu_regs()->rip);
        say_state(vcpu_regs());
    }
    run_end(STATUS_CRASH, "triple fault");
}

static void emulation_failure_end(void) {
    uint8_t bytes[15]; /* no instruction is longer */
    char text[3 * sizeof bytes + 1] = "";
    gva_t rip = vcpu_regs()->rip;
    size_t count = 0;
    while (count < sizeof bytes && guest_read(rip + count, &bytes[count], 1)) {
        snprintf(text + 3 * count, 4, "%02x ", bytes[count]);
        count++;
    }
    gdb_stop(SIGILL, NULL, "vmm: KVM cannot go on here");
    event_begin_at_rip("emulation_failure");
    event_bytes("bytes", bytes, count);
    event_end();
    bool is_emulation = machine.run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION;
    say("vmm: the guest crashed: KVM %s at rip %s (suberror %u)",
        is_emulation ? "cannot emulate the instruction" : "gives up", symbol_or_address(rip).text,
        machine.run->internal.suberror);
    say("  bytes at rip: %s", count ? text : "none, there is no memory");
    say("  KVM emulates what accesses MMIO, among others: use a plain mov there");
    say_state(vcpu_regs());
    run_end(STATUS_CRASH, "emulation failure");
}

/* ---------------------------------------------------------------------------------------------- */
/* Exit record */

/* Exits by reason, and the one that kept the VMM busy longest. */
static struct {
    uint64_t by_reason[40];
    uint64_t last_guest_ns, last_vmm_ns;
    struct slowest_exit {
        uint64_t number, ns;
        uint32_t reason;
        gva_t rip;
    } slowest;
} exit_totals;

/* "IO" for KVM_EXIT_IO and so on; "?" if this VMM does not know the reason. */
static const char *exit_name(uint32_t reason);

static void exit_record_begin(void) {
    event_begin_at_rip("exit");
    event_number("exit", run_totals.exits);
    event_string("reason", exit_name(machine.run->exit_reason));
    event_number("reason_number", machine.run->exit_reason);
    event_number("if_flag", machine.run->if_flag);
    event_number("guest_ns", exit_totals.last_guest_ns);
    event_number("vmm_ns", exit_totals.last_vmm_ns);
}

static void say_exits(void) {
    for (unsigned i = 0; i < LENGTH(exit_totals.by_reason); i++)
        if (exit_totals.by_reason[i])
            say("  %8" PRIu64 " %s", exit_totals.by_reason[i], exit_name(i));
}

/* ---------------------------------------------------------------------------------------------- */
/* Bus */

/* x86 has two address spaces that devices can live in. */
enum bus_space { BUS_PIO, BUS_MMIO };

struct bus_range {
    enum bus_space space;
    uint64_t first, last; /* port or gpa, both included */
    const char *name;
    access_handler handler;
};

static struct {
    struct bus_range ranges[32];
    unsigned count;
} bus;

static const char *const bus_space_names[] = {[BUS_PIO] = "port", [BUS_MMIO] = "gpa"};

static void bus_claim(enum bus_space space, uint64_t first, uint64_t size, const char *name,
                      access_handler handler) {
    uint64_t last = first + size - 1;
    if (size == 0 || last < first || (space == BUS_PIO && last > UINT16_MAX))
        die(STATUS_HOST,
            "%s claims an empty or impossible range: 0x%" PRIx64 " %ss from 0x%" PRIx64, name, size,
            bus_space_names[space], first);
    for (unsigned i = 0; i < bus.count; i++)
        if (bus.ranges[i].space == space && first <= bus.ranges[i].last &&
            bus.ranges[i].first <= last)
            die(STATUS_HOST, "%s and %s both claim %s 0x%" PRIx64, bus.ranges[i].name, name,
                bus_space_names[space], first);
    if (bus.count == LENGTH(bus.ranges))
        die(STATUS_HOST, "%s claims one range too many: %u are claimed", name, bus.count);
    bus.ranges[bus.count++] = (struct bus_range){space, first, last, name, handler};
}

static const struct bus_range *bus_find(enum bus_space space, const struct access *access) {
    uint64_t last = access->address + access->size - 1;
    for (unsigned i = 0; i < bus.count; i++)
        if (bus.ranges[i].space == space && bus.ranges[i].first <= access->address &&
            last <= bus.ranges[i].last)
            return &bus.ranges[i];
    return NULL;
}

/* Nobody answers: the machine note says what follows. */
static void bus_unknown(enum bus_space space, struct access *access) {
    if (space == BUS_MMIO && half.memory_event && half.memory_event(access))
        return;
    event_begin("unknown");
    event_string("space", bus_space_names[space]);
    event_hex("address", access->address);
    event_number("is_write", access->is_write);
    event_number("size", access->size);
    event_end();
    if (machine.note.unknown_io == MACHINE_UNKNOWN_IO_IGNORE)
        return;
    gdb_stop(SIGSEGV, NULL, "vmm: %u-byte %s %s 0x%" PRIx64 ", where there is no device",
             access->size, access->is_write ? "write to" : "read of", bus_space_names[space],
             access->address);
    say("vmm: the guest crashed: %u-byte %s %s 0x%" PRIx64 ", where there is no device, at rip %s",
        access->size, access->is_write ? "write to" : "read of", bus_space_names[space],
        access->address, symbol_or_address(vcpu_regs()->rip).text);
    say("  if the guest may probe for devices, run it with --unknown-io=ignore");
    say_backtrace(vcpu_regs()->rip, vcpu_regs()->rbp);
    run_end(STATUS_CRASH, "unknown access");
}

static void exit_record_access(enum bus_space space, const struct access *access,
                               const struct bus_range *range) {
    if (!events_are_recorded())
        return;
    exit_record_begin();
    event_hex(bus_space_names[space], access->address);
    event_number("is_write", access->is_write);
    event_number("size", access->size);
    if (space == BUS_PIO)
        event_number("count", access->count);
    event_bytes("data", access->data, (uint64_t)access->size * access->count);
    if (range)
        event_string("device", range->name);
    event_end();
}

static void bus_access(enum bus_space space, struct access *access) {
    const struct bus_range *range = bus_find(space, access);
    if (!access->is_write) /* what an empty bus shows, unless a device fills it in */
        memset(access->data, 0xff, (size_t)access->size * access->count);
    /* The cause stands before its consequences in the record; what a read gave is known after. */
    if (access->is_write)
        exit_record_access(space, access, range);
    if (range)
        range->handler(access);
    else
        bus_unknown(space, access);
    if (!access->is_write)
        exit_record_access(space, access, range);
}

/* ---------------------------------------------------------------------------------------------- */
/* Devices */

#define COM1 0x3f8

/* A 16550 UART (PC16550D data sheet, "Registers") whose transmitter is always ready: what the guest
 * sends is standard output, by the line. Not modelled: interrupts, modem lines and the receive FIFO;
 * a byte that the guest has not asked for simply stays in standard input. */
static struct {
    uint8_t registers[8]; /* as written, for those that just keep what they are given */
    uint8_t divisor[2];   /* behind RX/TX and IER while LCR.DLAB is set */
    int received;         /* a byte not read yet, or -1 */
    bool input_at_end;
} com1 = {.received = -1};

static void console_check(bool has_failed) {
    if (has_failed)
        die(STATUS_HOST, "cannot write the console to standard output: %s", strerror(errno));
}

/* What COM1 has sent before comes first. */
void console_write(const void *bytes, size_t size) {
    if (__fpending(stdout) > 0)
        console_check(fflush(stdout));
    for (size_t written = 0; written < size;) {
        ssize_t result = write(STDOUT_FILENO, (const uint8_t *)bytes + written, size - written);
        console_check(result < 0);
        written += (size_t)result;
    }
}

static bool com1_has_input(void) {
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    console_check(fflush(stdout)); /* a guest that looks for input has prompted for it */
    if (com1.received < 0 && !com1.input_at_end && poll(&input, 1, 0) == 1) {
        uint8_t byte;
        if (read(STDIN_FILENO, &byte, 1) == 1)
            com1.received = byte;
        else
            com1.input_at_end = true;
    }
    return com1.received >= 0;
}

static uint8_t com1_receive(void) {
    uint8_t byte = com1_has_input() ? (uint8_t)com1.received : 0;
    com1.received = -1;
    return byte;
}

static bool com1_is_divisor(unsigned offset) {
    return offset < 2 && (com1.registers[UART_LCR] & UART_LCR_DLAB);
}

static uint8_t com1_read(unsigned offset) {
    if (com1_is_divisor(offset))
        return com1.divisor[offset];
    switch (offset) {
    case UART_RX: return com1_receive();
    case UART_IIR: return UART_IIR_NO_INT;
    case UART_LSR: return UART_LSR_THRE | UART_LSR_TEMT | (com1_has_input() ? UART_LSR_DR : 0);
    case UART_MSR: return UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD;
    default: return com1.registers[offset];
    }
}

static void com1_write(unsigned offset, uint8_t value) {
    if (com1_is_divisor(offset))
        com1.divisor[offset] = value;
    else if (offset == UART_TX)
        console_check(putchar(value) == EOF);
    else
        com1.registers[offset] = value;
}

/* An access wider than a byte reaches the registers that follow, as on the ISA bus. */
static void com1_access(struct access *access) {
    for (uint32_t i = 0; i < access->size * access->count; i++) {
        unsigned offset = (unsigned)(access->address - COM1) + i % access->size;
        if (access->is_write)
            com1_write(offset, access->data[i]);
        else
            access->data[i] = com1_read(offset);
    }
}

static void exit_port_access(struct access *access) {
    uint32_t code = 0;
    if (!access->is_write)
        return;
    memcpy(&code, access->data, access->size);
    if (code != 0)
        gdb_stop(SIGABRT, NULL, "vmm: the guest reports failure %u", code);
    run_end(code == 0 ? STATUS_OK : STATUS_FAILED, "exit");
    if (code != 0)
        say("vmm: the guest reports failure %u", code);
}

static void panic_port_access(struct access *access) {
    uint32_t panic_gva = 0;
    if (!access->is_write)
        return;
    memcpy(&panic_gva, access->data, access->size);
    panic_end(panic_gva);
}

static FILE *debugcon_file;

static void debugcon_access(struct access *access) {
    size_t size = (size_t)access->size * access->count;
    if (!access->is_write)
        memset(access->data, 0xe9, size); /* how a guest finds that it is there */
    else if (debugcon_file && fwrite(access->data, 1, size, debugcon_file) != size)
        die(STATUS_HOST, "cannot write to %s: %s", options.debugcon, strerror(errno));
}

static void devices_create(void) {
    if (machine.note.devices & MACHINE_DEVICE_COM1)
        bus_claim(BUS_PIO, COM1, 8, "com1", com1_access);
    if (machine.note.devices & MACHINE_DEVICE_VIRTIO_CONSOLE) {
        com1.input_at_end = true;
        virtio_console_create();
    }
    bus_claim(BUS_PIO, PORT_EXIT, 4, "exit", exit_port_access);
    bus_claim(BUS_PIO, PORT_PANIC, 4, "panic", panic_port_access);
    bus_claim(BUS_PIO, PORT_DEBUGCON, 1, "debugcon", debugcon_access);
    if (options.debugcon && !(debugcon_file = fopen(options.debugcon, "we")))
        die(STATUS_HOST, "cannot write to %s: %s", options.debugcon, strerror(errno));
}

static void devices_destroy(void) {
    if (debugcon_file && fclose(debugcon_file))
        die(STATUS_HOST, "cannot write to %s: %s", options.debugcon, strerror(errno));
    console_check(fflush(stdout));
}

/* ---------------------------------------------------------------------------------------------- */
/* Exits */

static void say_pending(void) {
    const struct kvm_vcpu_events *pending = &machine.run->s.regs.events;
    bool exception = pending->exception.injected || pending->exception.pending;
    bool nmi = pending->nmi.injected || pending->nmi.pending;
    bool interrupt = pending->interrupt.injected;
    say("  interrupts are %s; waiting to be delivered:%s%s%s%s",
        machine.run->if_flag ? "on" : "off (RFLAGS.IF = 0)", exception ? " an exception" : "",
        nmi ? " an NMI" : "", interrupt ? " an interrupt" : "",
        exception || nmi || interrupt ? "" : " nothing");
}

static void hang_end(const char *how, const char *why) {
    gdb_stop(SIGINT, NULL, "vmm: the guest hangs: %s", why);
    event_begin_at_rip("hang");
    event_end();
    say("vmm: the guest hangs: %s, at rip %s", why, symbol_or_address(vcpu_regs()->rip).text);
    say_pending();
    say("  exits so far:");
    say_exits();
    say_state(vcpu_regs());
    run_end(STATUS_HANG, how);
}

static void exit_io(void) {
    struct kvm_run *run = machine.run;
    struct access access = {.address = run->io.port,
                            .size = run->io.size,
                            .count = run->io.count,
                            .is_write = run->io.direction == KVM_EXIT_IO_OUT,
                            .data = (uint8_t *)run + run->io.data_offset};
    bus_access(BUS_PIO, &access);
}

static void exit_mmio(void) {
    struct kvm_run *run = machine.run;
    struct access access = {.address = run->mmio.phys_addr,
                            .size = run->mmio.len,
                            .count = 1,
                            .is_write = run->mmio.is_write,
                            .data = run->mmio.data};
    bus_access(BUS_MMIO, &access);
}

/* Whether anything can end the halt shows before the next entry: halt_end(). With a local APIC in the
 * kernel there is no such exit; the kernel waits. */
static void exit_hlt(void) { machine.is_halted = true; }

static void exit_again(void) {}

/* Intel checks what it is to inject, too: SDM 3C "Checks on Guest RIP, RFLAGS, and SSP". AMD delivers
 * an interrupt that comes with IF = 0. */
static void exit_fail_entry(void) {
    bool is_early =
        machine.run->s.regs.events.interrupt.injected && !(vcpu_regs()->rflags & X86_EFLAGS_IF);
    die(STATUS_HOST, "the CPU refused the VM entry%s: hardware reason 0x%llx, rip 0x%llx",
        is_early ? " with an interrupt injected while RFLAGS.IF was 0" : "",
        machine.run->fail_entry.hardware_entry_failure_reason, vcpu_regs()->rip);
}

/* KVM_RUN has come back with EFAULT: the host has no memory behind a slot. If KVM says where, it is the
 * second number in a member of kvm_run that <linux/kvm.h> has since Linux 6.8 only. */
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
static gpa_t memory_fault_gpa;

static void memory_fault_take(void) {
    bool is_told = machine.run->exit_reason == KVM_EXIT_MEMORY_FAULT;
    memory_fault_gpa = is_told ? ((const uint64_t *)machine.run->padding)[1] : HOST_GPA_UNKNOWN;
    machine.run->exit_reason = KVM_EXIT_MEMORY_FAULT;
}

static void exit_memory_fault(void) {
    char where[32] = "a slot";
    if (half.memory_fault && half.memory_fault(memory_fault_gpa))
        return;
    if (memory_fault_gpa != HOST_GPA_UNKNOWN)
        snprintf(where, sizeof where, "gpa 0x%" PRIx64, memory_fault_gpa);
    die(STATUS_HOST, "KVM_RUN failed at rip %s: the host has no memory behind %s",
        symbol_or_address(vcpu_regs()->rip).text, where);
}

/* The reasons that a machine like this one can produce. */
static const struct exit_kind {
    const char *name;
    void (*handle)(void);
} exit_kinds[] = {
    [KVM_EXIT_IO] = {"IO", exit_io},
    [KVM_EXIT_DEBUG] = {"DEBUG", exit_again},
    [KVM_EXIT_HLT] = {"HLT", exit_hlt},
    [KVM_EXIT_MMIO] = {"MMIO", exit_mmio},
    [KVM_EXIT_IRQ_WINDOW_OPEN] = {"IRQ_WINDOW_OPEN", exit_again},
    [KVM_EXIT_SHUTDOWN] = {"SHUTDOWN", triple_fault_end},
    [KVM_EXIT_FAIL_ENTRY] = {"FAIL_ENTRY", exit_fail_entry},
    [KVM_EXIT_INTR] = {"INTR", exit_again},
    [KVM_EXIT_INTERNAL_ERROR] = {"INTERNAL_ERROR", emulation_failure_end},
    [KVM_EXIT_IOAPIC_EOI] = {"IOAPIC_EOI", exit_again},
    [KVM_EXIT_MEMORY_FAULT] = {"MEMORY_FAULT", exit_memory_fault},
};
_Static_assert(LENGTH(exit_kinds) <= LENGTH(exit_totals.by_reason), "each reason has a counter");

static const char *exit_name(uint32_t reason) {
    return reason < LENGTH(exit_kinds) && exit_kinds[reason].name ? exit_kinds[reason].name : "?";
}

static void exit_dispatch(void) {
    uint32_t reason = machine.run->exit_reason;
    bool is_access = reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO;
    if (!is_access) { /* bus_access() records those, with their data */
        exit_record_begin();
        if (reason == KVM_EXIT_MEMORY_FAULT && memory_fault_gpa != HOST_GPA_UNKNOWN)
            event_hex("gpa", memory_fault_gpa);
        event_end();
    }
    if (reason < LENGTH(exit_kinds) && exit_kinds[reason].handle) {
        exit_totals.by_reason[reason]++;
        exit_kinds[reason].handle();
        return;
    }
    say("vmm: KVM exits with reason %u, which this VMM does not know, at rip %s", reason,
        symbol_or_address(vcpu_regs()->rip).text);
    run_end(STATUS_CRASH, "unknown exit");
}

/* ---------------------------------------------------------------------------------------------- */
/* Run */

static volatile sig_atomic_t stop_signal;

/* Does the code before this address end with a call? E8 or FF /2, SDM 2 "CALL". */
static bool is_behind_call(uintptr_t address) {
    extern const uint8_t program_start[] __asm__("__executable_start");
    extern const uint8_t etext[]; /* the end of the program's code: end(3) */
    if (address < (uintptr_t)program_start + 6 || address > (uintptr_t)etext)
        return false;
    const uint8_t *code = (const uint8_t *)address;
    return code[-5] == 0xe8 || (code[-2] == 0xff && (code[-1] & 0x38) == 0x10) ||
           (code[-3] == 0xff && (code[-2] & 0x38) == 0x10) ||
           (code[-6] == 0xff && (code[-5] & 0x38) == 0x10);
}

static const uintptr_t *stack_end; /* of the vCPU's thread: where main() begins */

/* What on the stack may be a return address, from the innermost call on. The C library keeps no frame
 * pointers, so that there is nothing better to go by; now and then one is left from an earlier call. */
__attribute__((no_sanitize("address"))) static void say_callers(const uintptr_t *stack) {
    bool is_main = (uintptr_t)stack_end - (uintptr_t)stack < 8 * MIB;
    unsigned most = is_main ? 1024 : 32;
    for (unsigned found = 0; found < 16 && most > 0 && stack != stack_end; stack++, most--)
        if (is_behind_call(*stack)) {
            dprintf(STDERR_FILENO, " 0x%" PRIxPTR, *stack);
            found++;
        }
}

/* From a signal handler: nothing can be trusted any more, but what was printed and recorded so far is
 * worth the risk. So are the calls that led here: `make run` makes a line of host.c of them. */
static _Noreturn void leave_at_once(enum status status, const char *message, uintptr_t pc,
                                    const void *stack) {
    terminal_restore();
    struct pollfd output = {.fd = STDOUT_FILENO, .events = POLLOUT};
    if (poll(&output, 1, 0) == 1) /* a pipe that nobody reads would keep us here */
        fflush_unlocked(stdout);
    events_flush();
    dprintf(STDERR_FILENO, "%s [at pc 0x%" PRIxPTR " called from", message, pc);
    say_callers(stack);
    dprintf(STDERR_FILENO, "]\n");
    _exit(status);
}

/* immediate_exit makes the next KVM_RUN return at once, so that a signal that arrives just before
 * the entry is not lost (KVM API, "immediate_exit"). The run loop looks at stop_signal; a second
 * signal has found the VMM outside that loop. */
static void on_stop_signal(int number, siginfo_t *info, void *context) {
    const greg_t *registers = ((const ucontext_t *)context)->uc_mcontext.gregs;
    (void)info;
    if (stop_signal)
        leave_at_once(number == SIGALRM ? STATUS_HANG : (enum status)(STATUS_SIGNALLED + number),
                      "vmm: the VMM itself is stuck: a loop in the host half (host.c), or nobody "
                      "reads the console",
                      (uintptr_t)registers[REG_RIP], (const void *)registers[REG_RSP]);
    stop_signal = number;
    machine.run->immediate_exit = 1;
}

/* The thread of the vCPU, and whether it has given the lock away, to sleep in KVM_RUN or in a halt. */
static struct {
    pthread_t id;
    bool is_asleep;
    volatile sig_atomic_t is_kicked;
} vcpu_thread;

static void on_kick(int number) {
    (void)number;
    vcpu_thread.is_kicked = true;
    machine.run->immediate_exit = 1;
}

void vcpu_kick(void) {
    if (vcpu_thread.is_asleep)
        pthread_kill(vcpu_thread.id, SIGUSR1);
}

int vcpu_fd(void) { return machine.vcpu; }

void vcpu_return_at_once(void) { on_kick(SIGUSR1); }

bool run_is_stopping(void) { return stop_signal != 0; }

static void vcpu_fall_asleep(void) {
    vcpu_thread.is_asleep = true;
    io_unlock();
}

static void vcpu_wake_up(void) {
    io_lock();
    vcpu_thread.is_asleep = false;
    if (vcpu_thread.is_kicked && !stop_signal)
        machine.run->immediate_exit = 0;
    vcpu_thread.is_kicked = false;
}

/* A stray pointer in a host half ends here; `make run` turns the address into a line of host.c. */
__attribute__((unused)) static void on_crash(int number, siginfo_t *info, void *context) {
    char message[160];
    const greg_t *registers = ((const ucontext_t *)context)->uc_mcontext.gregs;
    snprintf(message, sizeof message, "vmm: the VMM itself crashed: signal %d, address %p", number,
             info->si_addr);
    uintptr_t stack = (uintptr_t)registers[REG_RSP];
    bool is_at_its_end = (uintptr_t)info->si_addr - stack + PAGE_SIZE < 2 * PAGE_SIZE;
    if (is_at_its_end) /* an endless recursion: this page is not there */
        stack = (stack | (PAGE_SIZE - 1)) + 1;
    leave_at_once(STATUS_HOST, message, (uintptr_t)registers[REG_RIP], (const void *)stack);
}

static void signals_install(void) {
    /* SA_RESTART: a write to the console goes on; KVM_RUN returns all the same. */
    struct sigaction stop = {.sa_sigaction = on_stop_signal, .sa_flags = SA_RESTART | SA_SIGINFO};
    sigaction(SIGALRM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    sigaction(SIGTERM, &stop, NULL);
    vcpu_thread.id = pthread_self();
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_kick, .sa_flags = SA_RESTART}, NULL);
    signal(SIGPIPE, SIG_IGN); /* write errors are reported where they happen */
}

/* For those who write a host half, and for a terminal that must be restored. */
static void crash_signals_install(void) {
#ifndef __SANITIZE_ADDRESS__ /* which reports crashes itself */
    struct sigaction crash = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    static char stack[16384]; /* an endless recursion has used up the other one */
    sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL);
    sigaction(SIGSEGV, &crash, NULL);
    sigaction(SIGBUS, &crash, NULL);
    sigaction(SIGFPE, &crash, NULL);
    sigaction(SIGILL, &crash, NULL); /* what the compiler puts where the C has no meaning */
    sigaction(SIGABRT, &crash, NULL);
#endif
}

/* The guest was interrupted wherever it happened to be: that is the best clue there is. */
static void stop_end(void) {
    char why[64];
    if (stop_signal == SIGALRM) {
        snprintf(why, sizeof why, "it was still running after %g s", options.time_limit);
        hang_end("time limit", why);
        return;
    }
    say("vmm: ended by signal %d at rip %s", (int)stop_signal,
        symbol_or_address(vcpu_regs()->rip).text);
    run_end((enum status)(STATUS_SIGNALLED + stop_signal), "signal");
}

/* What the guest takes with it into this entry. The vCPU's state came with the last exit; only what
 * the host half has changed since then must be asked for. */
static void entry_record(void) {
    struct kvm_vcpu_events vcpu = machine.run->s.regs.events;
    if (!events_are_recorded())
        return;
    if (machine.is_changed)
        KVM_STRUCT(machine.vcpu, KVM_GET_VCPU_EVENTS, &vcpu);
    event_begin("entry");
    event_number("entry", run_totals.exits + 1);
    event_number("if_flag", machine.run->if_flag);
    event_number("ready", machine.run->ready_for_interrupt_injection);
    event_number("window", machine.run->request_interrupt_window);
    if (vcpu.exception.injected || vcpu.exception.pending)
        event_number("exception", vcpu.exception.nr);
    if (vcpu.interrupt.injected)
        event_number("interrupt", vcpu.interrupt.nr);
    event_number("nmi_injected", vcpu.nmi.injected);
    event_number("nmi_pending", vcpu.nmi.pending);
    event_number("nmi_masked", vcpu.nmi.masked);
    event_end();
}

/* Signals that come after the last look and before the sleep wait with it. */
static void halt_sleep(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    vcpu_fall_asleep();
    while (!stop_signal && !vcpu_thread.is_kicked)
        sigsuspend(&before);
    vcpu_wake_up();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* The guest has halted with interrupts on: wait for one, as long as something may cause it. */
static void halt_wait(void) {
    for (;;) {
        bool may_come = io_serve();
        if (gdb_has_interrupted())
            gdb_stop(SIGINT, NULL, NULL);
        pic_before_entry();
        if (!may_come || stop_signal || outcome.ended || machine.is_injected ||
            machine.run->request_interrupt_window)
            return;
        halt_sleep();
    }
}

/* The guest has halted. With interrupts off it has stopped for good, unless it is given an NMI. With
 * interrupts on it waits for one: KVM would go on behind the HLT at the next entry, with or without. */
static void halt_end(void) {
    bool if_flag = machine.run->if_flag;
    machine.is_halted = false;
    if (if_flag && !machine.is_injected && !machine.run->request_interrupt_window)
        halt_wait();
    if (stop_signal || outcome.ended || machine.is_injected ||
        (if_flag && machine.run->request_interrupt_window))
        return;
    if (!if_flag)
        run_end(STATUS_OK, "halt");
    else if (half.before_entry)
        hang_end("halt", "hlt with interrupts on, and the host half neither injects an event nor "
                         "asks for an interrupt window");
    else
        hang_end("halt", "hlt with interrupts on, and nothing here can interrupt it");
}

/* The one place where something can still be put into the guest before it runs. */
static void vcpu_prepare_entry(void) {
    /* Again for each step: KVM drops the trap flag with an instruction that it emulates. */
    struct kvm_guest_debug step = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP};
    is_stepped = gdb_before_entry() || options.step_after <= run_totals.exits;
    if (options.step_after <= run_totals.exits)
        KVM_STRUCT(machine.vcpu, KVM_SET_GUEST_DEBUG, &step);
    if (is_stepped)
        last_step = machine.run->s.regs;
    if (half.before_entry)
        half.before_entry();
    pic_before_entry();
    if (machine.is_halted)
        halt_end();
    injected_note();
    if (half.before_entry && !outcome.ended)
        entry_record();
    machine.is_changed = machine.is_injected = machine.is_exception_set = false;
}

/* One VM entry and the exit that ends it, with the time spent on either side. */
static void vcpu_enter(void) {
    static uint64_t left_ns; /* when the guest was last left */
    uint64_t entered_ns = clock_ns();
    if (run_totals.exits > 0) {
        exit_totals.last_vmm_ns = entered_ns - left_ns;
        run_totals.vmm_ns += exit_totals.last_vmm_ns;
        if (exit_totals.last_vmm_ns > exit_totals.slowest.ns)
            exit_totals.slowest = (struct slowest_exit){run_totals.exits, exit_totals.last_vmm_ns,
                                                        machine.run->exit_reason, vcpu_regs()->rip};
    }
    machine.run->exit_reason = KVM_EXIT_UNKNOWN; /* with an error KVM may leave the last one */
    vcpu_fall_asleep();
    int error = ioctl(machine.vcpu, KVM_RUN, NULL) < 0 ? errno : 0;
    vcpu_wake_up();
    if (error == EFAULT)
        memory_fault_take();
    else if (error == EINTR)
        machine.run->exit_reason = KVM_EXIT_INTR;
    else if (error)
        die(STATUS_HOST, "KVM_RUN failed at rip %s: %s", symbol_or_address(vcpu_regs()->rip).text,
            strerror(error));
    left_ns = clock_ns();
    exit_totals.last_guest_ns = left_ns - entered_ns;
    run_totals.guest_ns += exit_totals.last_guest_ns;
    run_totals.exits++;
}

static void vm_run(void) {
    while (!outcome.ended) {
        vcpu_prepare_entry();
        if (outcome.ended) /* nothing will end the halt that the guest is in */
            return;
        vcpu_enter();
        exit_dispatch();
        if (!outcome.ended)
            gdb_after_exit();
        if (stop_signal && !outcome.ended)
            stop_end();
    }
}

static void summary_print(void) {
    say("exits: %" PRIu64 ", %.3f ms in the guest, %.3f ms in the VMM", run_totals.exits,
        (double)run_totals.guest_ns / 1e6, (double)run_totals.vmm_ns / 1e6);
    say_exits();
    if (exit_totals.slowest.number)
        say("slowest: exit %" PRIu64 " (%s at %s) kept the VMM busy for %.3f ms",
            exit_totals.slowest.number, exit_name(exit_totals.slowest.reason),
            symbol_or_address(exit_totals.slowest.rip).text, (double)exit_totals.slowest.ns / 1e6);
}

/* ---------------------------------------------------------------------------------------------- */
/* Host-half API */

void host_claim_pio(uint16_t first, uint32_t ports, const char *name, access_handler handler) {
    bus_claim(BUS_PIO, first, ports, name, handler);
}

void host_claim_mmio(gpa_t first_gpa, uint64_t bytes, const char *name, access_handler handler) {
    if (first_gpa < memory.size)
        die(STATUS_HOST, "%s claims gpa 0x%" PRIx64 ", which is memory: no access would exit", name,
            first_gpa);
    bus_claim(BUS_MMIO, first_gpa, bytes, name, handler);
}

uint64_t host_seed(void) { return options.seed; }
const struct machine_note *host_machine(void) { return &machine.note; }
void *host_memory(gpa_t gpa, uint64_t size) { return memory_at(gpa, size); }
const struct kvm_regs *host_regs(void) { return vcpu_regs(); }
const struct kvm_sregs *host_sregs(void) { return vcpu_sregs(); }

struct kvm_translation host_translate(gva_t gva) {
    struct kvm_translation translation = {.linear_address = gva};
    KVM_STRUCT(machine.vcpu, KVM_TRANSLATE, &translation);
    return translation;
}

struct kvm_run *host_run(void) {
    return machine.run;
}

static void inject_record(const char *type, uint64_t vector, const uint32_t *error_code) {
    machine.is_injected = true;
    if (!events_are_recorded())
        return;
    event_begin_at_rip("inject");
    event_string("type", type);
    event_number("vector", vector);
    if (error_code)
        event_hex("error_code", *error_code);
    event_number("if_flag", machine.run->if_flag);
    event_number("ready", machine.run->ready_for_interrupt_injection);
    event_end();
}

/* KVM_SET_VCPU_EVENTS sets all there is: what was not there before has been injected. */
static void inject_record_new(const struct kvm_vcpu_events *new) {
    struct kvm_vcpu_events old = {0};
    KVM_STRUCT(machine.vcpu, KVM_GET_VCPU_EVENTS, &old);
    machine.is_exception_set = true;
    bool had_exception = old.exception.injected || old.exception.pending;
    if ((new->exception.injected || new->exception.pending) &&
        (!had_exception || new->exception.nr != old.exception.nr))
        inject_record("exception", new->exception.nr,
                      new->exception.has_error_code ? &new->exception.error_code : NULL);
    if (new->interrupt.injected && !old.interrupt.injected)
        inject_record("interrupt", new->interrupt.nr, NULL);
    if ((new->nmi.injected && !old.nmi.injected) || (new->nmi.pending && !old.nmi.pending))
        inject_record("nmi", VECTOR_NMI, NULL);
}

int host_vcpu_ioctl(unsigned long request, const char *name, void *argument) {
    machine.is_changed = true;
    if (request == KVM_INTERRUPT)
        inject_record("interrupt", ((const struct kvm_interrupt *)argument)->irq, NULL);
    else if (request == KVM_NMI)
        inject_record("nmi", VECTOR_NMI, NULL);
    else if (request == KVM_SET_VCPU_EVENTS)
        inject_record_new(argument);
    return ioctl_or_die(machine.vcpu, request, name, argument);
}

/*
 * KVM_RUN takes back in what it has brought out with the last exit, and here one event more: KVM API,
 * KVM_CAP_SYNC_REGS. Of the 2,600 instructions of an exit and an injection, the ioctl that this saves has 300. But it
 * would undo what an ioctl has changed since the exit; and a local APIC in the kernel has its own say.
 */
void vcpu_interrupt(uint8_t vector) {
    struct kvm_vcpu_events *events = &machine.run->s.regs.events;
    if (machine.is_changed || machine.note.irqchip != MACHINE_IRQCHIP_NONE) {
        host_vcpu(KVM_INTERRUPT, &(struct kvm_interrupt){.irq = vector});
        return;
    }
    inject_record("interrupt", vector, NULL);
    events->interrupt.injected = 1;
    events->interrupt.nr = vector;
    events->flags = 0; /* what may be left out stays as it is */
    machine.run->kvm_dirty_regs |= KVM_SYNC_X86_EVENTS;
}

/* The VMM's own slots are not for the host half to change; all others are put into the record. */
static void slot_admit(const struct kvm_userspace_memory_region *region) {
    if (region->slot < HOST_SLOT_FIRST)
        die(STATUS_HOST, "slot %u is the VMM's own: the host half's begin with HOST_SLOT_FIRST, %u",
            region->slot, HOST_SLOT_FIRST);
    event_begin("slot");
    event_number("slot", region->slot);
    event_hex("gpa", region->guest_phys_addr);
    event_hex("size", region->memory_size);
    event_hex("flags", region->flags);
    event_end();
}

/* Nothing else shows what is in a message: KVM takes any address for one to a local APIC. */
static void messages_record(const struct kvm_irq_routing *table) {
    for (uint32_t i = 0; i < table->nr; i++) {
        const struct kvm_irq_routing_entry *entry = &table->entries[i];
        if (entry->type != KVM_IRQ_ROUTING_MSI)
            continue;
        event_begin("route");
        event_number("gsi", entry->gsi);
        event_hex("address", (uint64_t)entry->u.msi.address_hi << 32 | entry->u.msi.address_lo);
        event_hex("data", entry->u.msi.data);
        event_end();
    }
}

int host_vm_ioctl(unsigned long request, const char *name, void *argument) {
    if (request == KVM_SET_USER_MEMORY_REGION)
        slot_admit(argument);
    int answer = ioctl_or_die(machine.vm, request, name, argument);
    if (request == KVM_SET_GSI_ROUTING)
        messages_record(argument);
    return answer;
}

/* KVM counts for its own ends, and does not stop: what one run leaves is not what the next will. */
void host_statistics(const char *when) {
    if (!events_are_recorded())
        return;
    event_begin("statistics");
    event_string("when", when);
    statistics_add(machine.vm);
    statistics_add(machine.vcpu);
    event_end();
}

void host_todo(const char *location, const char *task) {
    say_todo(location, task);
    record_end(STATUS_FAILED, "todo");
    exit(STATUS_FAILED);
}

/* The other threads may be anywhere. */
void host_stuck(const char *what) {
    char message[256];
    snprintf(message, sizeof message, "vmm: the VMM itself is stuck: %s", what);
    leave_at_once(STATUS_HANG, message, (uintptr_t)__builtin_return_address(0),
                  __builtin_frame_address(0));
}

void host_cannot(const char *what) {
    event_begin("cannot");
    event_string("message", what);
    event_end();
    say_cannot(what);
    record_end(STATUS_CANNOT, "cannot");
    exit(STATUS_CANNOT);
}

/* ---------------------------------------------------------------------------------------------- */

static void record_start(void) {
    assert(options.image); /* options_parse() insists on one */
    event_begin("start");
    event_number("version", EVENTS_VERSION);
    event_string("image", options.image);
    event_hex("seed", options.seed);
    event_number("memory_mib", machine.note.memory_mib);
    event_string("irqchip", irqchip_names[machine.note.irqchip]);
    event_end();
}

int main(int argc, char **argv) {
    run_totals.started_ns = clock_ns();
    stack_end = __builtin_frame_address(0);
    options_parse(argc, argv);
    if (&host_half)
        half = host_half;

    image_open(options.image);
    machine.note = machine_choose(image_machine());
    memory_create(machine.note.memory_mib * MIB);
    machine.entry = image_load();

    kvm_open();
    vm_create();
    vcpu_create();
    vcpu_set_entry_state();

    if (options.events && !events_open(options.events, run_totals.started_ns))
        die(STATUS_HOST, "cannot write the events to %s: %s", options.events, strerror(errno));
    record_start();
    events_flush(); /* whatever comes, that is there */
    signals_install();
    if (&host_half || machine.note.devices & MACHINE_DEVICE_VIRTIO_CONSOLE)
        crash_signals_install();
    setvbuf(stdout, NULL, _IOLBF, PIPE_BUF); /* what a pipe that has room takes at once */
    io_lock();
    devices_create();
    run_limit_start();
    if (half.setup)
        half.setup();
    boot_data_write(); /* the command line names the devices */
    if (options.gdb) {
        time_limit_set(0);
        gdb_start(options.gdb);
        run_limit_start();
    }
    vm_run();
    host_statistics("end");
    if (half.end) {
        run_limit_start();
        half.end();
        time_limit_set(0);
    }

    devices_destroy();
    if (options.summary && options.step_after == NEVER) /* single steps would be counted as exits */
        summary_print();
    record_end(outcome.status, outcome.how);
    return outcome.status;
}
