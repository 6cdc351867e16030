/*
 * A stub for gdb: GDB manual, "Remote Protocol". `vmm --gdb=SOCKET` waits for gdb before the guest's first
 * instruction; in gdb, `target remote SOCKET`.
 *
 * How it hangs together. At any time either gdb has the word, or the guest runs. gdb_stop() gives gdb the
 * word: it answers packets until one of them lets the guest go on, and then returns. The run loop asks for
 * that in three places: gdb_start() before the run; gdb_after_exit() when an exit is a breakpoint, the end of
 * a step, or gdb's Ctrl-C; and gdb_stop() itself where a guest has failed, before the VMM says so. What the
 * guest is to do next (on, or one instruction) gdb_before_entry() tells KVM: KVM_SET_GUEST_DEBUG.
 * While the guest runs, the thread for input (io.c) looks at the socket, for Ctrl-C is all that may come.
 *
 * Breakpoints. No kind of them works on every engine (tests/deviations.toml). Those of the CPU, DR0 to DR3,
 * leave the guest and its speed as they are: they are tried at the start, and used where they work. Where
 * they do not, and where there are more than four, the guest goes step by step, and its rip is looked at
 * after each. INT3 in the guest's code has no advantage over that, and the guest would see it.
 *
 * The sections: the line, registers, memory, breakpoints, packets, the conversation, the run.
 *
 * Packets are hostile: each is one text in a buffer of fixed size, all numbers are checked where they are
 * read, and what cannot be understood is answered as the protocol has it, with nothing or with an error.
 */
#include <asm/debugreg.h>
#include <asm/processor-flags.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "host.h"
#include "vmm.h"
#include "x86.h"

#define PACKET_SIZE 4096 /* what is between $ and #, either way */
#define BREAKPOINTS_MAX 64
#define BREAKPOINTS_OF_CPU 4
#define STEPS_IN_VAIN \
    8 /* then the instruction jumps to itself; fewer: tests/deviations.toml, single-step-repeated */

static struct {
    int socket;  /* -1: there is no gdb (any more) */
    bool no_ack; /* QStartNoAckMode */
    bool has_word;
    bool interrupted;           /* Ctrl-C, not answered yet */
    int signal;                 /* why the guest stopped last */
    struct kvm_sync_regs state; /* the registers that gdb sees */
    bool is_past; /* they are those of an exception in the past, and not to be changed */
} gdb = {.socket = -1};

bool gdb_is_there(void) { return gdb.socket >= 0; }

/* ---- the line ---- */

#define CTRL_C 3 /* between packets */

static struct io_source *line_source; /* for the thread for input */

static struct {
    char bytes[512];
    size_t next, end;
} input;

static void line_close(void) {
    io_enable(line_source, false);
    close(gdb.socket);
    gdb.socket = -1;
    gdb.has_word = false;
}

/* gdb is no more, but did not say that the guest may go on without it. */
static void line_lose(void) {
    if (gdb.socket < 0)
        return;
    line_close();
    run_stop((enum status)(STATUS_SIGNALLED + SIGHUP), "gdb is gone");
}

/* Until there is something to read; false if a signal asks the VMM to end. */
static bool line_wait(int fd) {
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (!run_is_stopping() && ppoll(&readable, 1, NULL, &before) < 0 && errno == EINTR)
        ;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !run_is_stopping();
}

/* -1: there will be none. */
static int line_byte(void) {
    if (input.next == input.end) {
        if (gdb.socket < 0 || !line_wait(gdb.socket))
            return -1;
        ssize_t size = recv(gdb.socket, input.bytes, sizeof input.bytes, 0);
        if (size <= 0) {
            line_lose();
            return -1;
        }
        input.next = 0;
        input.end = (size_t)size;
    }
    return (uint8_t)input.bytes[input.next++];
}

/* What goes to gdb: cut off where it is too long, which no answer is. */
static struct text {
    char bytes[PACKET_SIZE + 1];
    size_t length;
} answer;

__attribute__((format(printf, 1, 2))) static void answer_add(const char *format, ...) {
    va_list arguments;
    size_t room = sizeof answer.bytes - answer.length;
    va_start(arguments, format);
    int length = vsnprintf(answer.bytes + answer.length, room, format, arguments);
    va_end(arguments);
    answer.length += (size_t)length < room ? (size_t)length : room - 1;
}

static void answer_add_hex(const void *bytes, size_t size) {
    for (size_t i = 0; i < size; i++)
        answer_add("%02x", ((const uint8_t *)bytes)[i]);
}

static void answer_send(void) {
    char packet[PACKET_SIZE + 5];
    uint8_t sum = 0;
    for (size_t i = 0; i < answer.length; i++)
        sum = (uint8_t)(sum + (uint8_t)answer.bytes[i]);
    int size = snprintf(packet, sizeof packet, "$%s#%02x", answer.bytes, sum);
    for (int sent = 0; gdb.socket >= 0 && sent < size;) {
        ssize_t more = send(gdb.socket, packet + sent, (size_t)(size - sent), MSG_NOSIGNAL);
        if (more < 0)
            line_lose();
        else
            sent += (int)more;
    }
}

static void answer_begin(void) { answer.bytes[answer.length = 0] = '\0'; }

bool gdb_say(const char *line) {
    if (gdb.socket < 0 || gdb.has_word)
        return false;
    answer_begin();
    answer_add("O");
    answer_add_hex(line, strlen(line));
    answer_add_hex("\n", 1);
    answer_send();
    return true;
}

static int hex_digit(int c) {
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Of two digits; -1: they are none. */
static int hex_byte(const char *digits) {
    int high = hex_digit(digits[0]);
    int low = high < 0 ? high : hex_digit(digits[1]);
    return low < 0 ? low : high << 4 | low;
}

/* What stands between $ and #, into packet; its sum is right if the answer is. A $ begins a new one. */
static bool packet_body(char *packet, bool *is_too_long) {
    uint8_t sum = 0;
    size_t length = 0;
    int c;
    while ((c = line_byte()) != '#' && c >= 0) {
        sum = c == '$' ? 0 : (uint8_t)(sum + c);
        length = c == '$' ? 0 : length + 1;
        if (length > 0 && length <= PACKET_SIZE)
            packet[length - 1] = (char)c;
    }
    *is_too_long = length > PACKET_SIZE;
    packet[*is_too_long ? 0 : length] = '\0';
    int high = hex_digit(c < 0 ? c : line_byte());
    int low = hex_digit(high < 0 ? high : line_byte());
    return high >= 0 && low >= 0 && (high << 4 | low) == sum;
}

/* The next packet that has arrived whole. False: none will come. */
static bool packet_receive(char *packet) {
    bool is_too_long;
    int c;
    while ((c = line_byte()) >= 0) {
        if (c == '-') /* the last answer has not */
            answer_send();
        if (c == CTRL_C) /* too late for the last step: it is for the next */
            gdb.interrupted = true;
        if (c != '$')
            continue;
        bool is_whole = packet_body(packet, &is_too_long);
        if (!gdb.no_ack && gdb.socket >= 0)
            (void)!send(gdb.socket, is_whole ? "+" : "-", 1, MSG_NOSIGNAL);
        if (is_whole && !is_too_long)
            return true;
        if (is_whole) {
            answer_begin();
            answer_add("E%02x", E2BIG);
            answer_send();
        }
    }
    return false;
}

/* ---- registers ---- */

/* As GDB manual, "i386 Features", has them, in that order; then the control registers, which gdb shows as
 * it shows any other. What the guest has not got, x87, is there without a value. */
static const struct reg {
    const char *name, *type;
    unsigned bits;
    size_t offset, size; /* in struct kvm_sync_regs; size 0: nowhere */
} reg_table[] = {
#define REG(name, type, bits, size, field) \
    { name, type, bits, offsetof(struct kvm_sync_regs, field), size }
#define GENERAL(name, type) REG(#name, type, 64, 8, regs.name)
#define SEGMENT(name) REG(#name, "int32", 32, 2, sregs.name.selector)
#define X87(name, type, bits) \
    { name, type, bits, 0, 0 }
    GENERAL(rax, "int64"),
    GENERAL(rbx, "int64"),
    GENERAL(rcx, "int64"),
    GENERAL(rdx, "int64"),
    GENERAL(rsi, "int64"),
    GENERAL(rdi, "int64"),
    GENERAL(rbp, "data_ptr"),
    GENERAL(rsp, "data_ptr"),
    GENERAL(r8, "int64"),
    GENERAL(r9, "int64"),
    GENERAL(r10, "int64"),
    GENERAL(r11, "int64"),
    GENERAL(r12, "int64"),
    GENERAL(r13, "int64"),
    GENERAL(r14, "int64"),
    GENERAL(r15, "int64"),
    GENERAL(rip, "code_ptr"),
    REG("eflags", "eflags", 32, 4, regs.rflags),
    SEGMENT(cs),
    SEGMENT(ss),
    SEGMENT(ds),
    SEGMENT(es),
    SEGMENT(fs),
    SEGMENT(gs),
    X87("st0", "i387_ext", 80),
    X87("st1", "i387_ext", 80),
    X87("st2", "i387_ext", 80),
    X87("st3", "i387_ext", 80),
    X87("st4", "i387_ext", 80),
    X87("st5", "i387_ext", 80),
    X87("st6", "i387_ext", 80),
    X87("st7", "i387_ext", 80),
    X87("fctrl", "int", 32),
    X87("fstat", "int", 32),
    X87("ftag", "int", 32),
    X87("fiseg", "int", 32),
    X87("fioff", "int", 32),
    X87("foseg", "int", 32),
    X87("fooff", "int", 32),
    X87("fop", "int", 32),
#define CORE_REGS 40
    REG("cr0", "cr0", 64, 8, sregs.cr0),
    REG("cr2", "data_ptr", 64, 8, sregs.cr2),
    REG("cr3", "data_ptr", 64, 8, sregs.cr3),
    REG("cr4", "cr4", 64, 8, sregs.cr4),
    REG("efer", "efer", 64, 8, sregs.efer),
};

/* Bits by name, so that gdb shows "[ PE ET PG ]": SDM 3A "Control Registers", "IA32_EFER MSR", and
 * SDM 1 "EFLAGS Register". */
static const struct flag {
    const char *type, *name;
    unsigned bit;
} flag_table[] = {
    {"eflags", "CF", 0},  {"eflags", "PF", 2},  {"eflags", "AF", 4},  {"eflags", "ZF", 6},
    {"eflags", "SF", 7},  {"eflags", "TF", 8},  {"eflags", "IF", 9},  {"eflags", "DF", 10},
    {"eflags", "OF", 11}, {"eflags", "NT", 14}, {"eflags", "RF", 16}, {"eflags", "AC", 18},
    {"cr0", "PE", 0},     {"cr0", "MP", 1},     {"cr0", "EM", 2},     {"cr0", "TS", 3},
    {"cr0", "ET", 4},     {"cr0", "NE", 5},     {"cr0", "WP", 16},    {"cr0", "AM", 18},
    {"cr0", "NW", 29},    {"cr0", "CD", 30},    {"cr0", "PG", 31},    {"cr4", "DE", 3},
    {"cr4", "PSE", 4},    {"cr4", "PAE", 5},    {"cr4", "PGE", 7},    {"cr4", "OSFXSR", 9},
    {"cr4", "LA57", 12},  {"cr4", "PCIDE", 17}, {"cr4", "SMEP", 20},  {"cr4", "SMAP", 21},
    {"efer", "SCE", 0},   {"efer", "LME", 8},   {"efer", "LMA", 10},  {"efer", "NXE", 11},
    {"efer", "SVME", 12},
};

/* target.xml: GDB manual, "Target Description Format". */
static char target_xml[8192];

static void xml_add_types(FILE *xml) {
    for (unsigned i = 0; i < LENGTH(flag_table); i++) {
        const struct flag *flag = &flag_table[i];
        if (i == 0 || strcmp(flag->type, flag[-1].type) != 0)
            fprintf(xml, "<flags id=\"%s\" size=\"%d\">", flag->type,
                    strcmp(flag->type, "eflags") ? 8 : 4);
        fprintf(xml, "<field name=\"%s\" start=\"%u\" end=\"%u\"/>", flag->name, flag->bit,
                flag->bit);
        if (i + 1 == LENGTH(flag_table) || strcmp(flag->type, flag[1].type) != 0)
            fputs("</flags>", xml);
    }
}

static void xml_make(void) {
    static const char head[] = "<?xml version=\"1.0\"?><target version=\"1.0\">"
                               "<architecture>i386:x86-64</architecture>"
                               "<feature name=\"org.gnu.gdb.i386.core\">";
    FILE *xml = fmemopen(target_xml, sizeof target_xml, "w");
    if (!xml || fputs(head, xml) < 0)
        die(STATUS_HOST, "cannot describe the CPU to gdb: %s", strerror(errno));
    xml_add_types(xml);
    for (unsigned i = 0; i < LENGTH(reg_table); i++) {
        if (i == CORE_REGS) {
            fputs("</feature><feature name=\"kvmlab.control\">", xml);
            xml_add_types(xml);
        }
        fprintf(xml, "<reg name=\"%s\" bitsize=\"%u\" type=\"%s\"/>", reg_table[i].name,
                reg_table[i].bits, reg_table[i].type);
    }
    fputs("</feature></target>", xml);
    bool is_whole = !ferror(xml) && ftell(xml) < (long)sizeof target_xml;
    if (fclose(xml) || !is_whole)
        die(STATUS_HOST, "the description of the CPU for gdb is too long");
}

static void reg_read(const struct reg *reg) {
    uint64_t value = 0;
    if (reg->size == 0) {
        for (unsigned i = 0; i < reg->bits / 8; i++)
            answer_add("xx");
        return;
    }
    memcpy(&value, (const uint8_t *)&gdb.state + reg->offset, reg->size);
    answer_add_hex(&value, reg->bits / 8);
}

/* From hexadecimal digits, two for each byte of the register. Where they end, or NULL: there are too few. */
static const char *reg_write(const struct reg *reg, const char *digits) {
    uint8_t bytes[16] = {0};
    for (unsigned i = 0; i < reg->bits / 8; i++, digits += 2) {
        bool has_none = reg->size == 0 && digits[0] == 'x' && digits[1] == 'x';
        int byte = has_none ? 0 : hex_byte(digits);
        if (byte < 0)
            return NULL;
        bytes[i] = (uint8_t)byte;
    }
    memcpy((uint8_t *)&gdb.state + reg->offset, bytes, reg->size);
    return digits;
}

/* By ioctl, and not by kvm_dirty_regs: KVM steps from the rip that it has when it is told to step, and it can say that
 * it refuses. */
static bool regs_set(const struct kvm_regs *regs, const struct kvm_sregs *sregs) {
    struct kvm_run *run = host_run();
    if (ioctl(vcpu_fd(), KVM_SET_SREGS, sregs) < 0 || ioctl(vcpu_fd(), KVM_SET_REGS, regs) < 0)
        return false;
    run->s.regs.regs = *regs;
    run->s.regs.sregs = *sregs;
    run->kvm_dirty_regs = 0;
    return true;
}

/* What gdb has changed. False: the CPU would not take it, and all is as before. */
static bool regs_commit(void) {
    const struct kvm_sync_regs before = host_run()->s.regs;
    if (!gdb.is_past && regs_set(&gdb.state.regs, &gdb.state.sregs))
        return true;
    if (!gdb.is_past)
        (void)regs_set(&before.regs, &before.sregs);
    gdb.state = before;
    return false;
}

/* ---- memory ---- */

/* The byte of RAM at gva; NULL: none is there. In the modes that the VMM's walk does not know, KVM's own
 * walk is good enough, although it sets accessed bits. */
static uint8_t *byte_at(gva_t gva) {
    struct walk walk = host_walk(gdb.state.sregs.cr3, gva);
    struct kvm_translation translation;
    if (walk.end == WALK_MAPPED)
        return memory_at(walk.gpa, 1);
    if (walk.end != WALK_NOT_MODELLED)
        return NULL;
    translation = host_translate(gva);
    return translation.valid ? memory_at(translation.physical_address, 1) : NULL;
}

/* ---- breakpoints ---- */

static struct {
    struct breakpoint {
        char kind; /* of the packet: Z0 and Z1 are the same to us */
        gva_t gva;
    } list[BREAKPOINTS_MAX];
    unsigned count;
    bool cpu_has_them;   /* in ring 0, where nearly all of a guest runs */
    bool steps_in_ring3; /* single steps work there, too */
} breakpoints;

static struct breakpoint *breakpoint_find(char kind, gva_t gva) {
    for (unsigned i = 0; i < breakpoints.count; i++)
        if (breakpoints.list[i].kind == kind && breakpoints.list[i].gva == gva)
            return &breakpoints.list[i];
    return NULL;
}

static bool breakpoint_is_at(gva_t gva) {
    return breakpoint_find('0', gva) || breakpoint_find('1', gva);
}

/* False: it would not be hit. Step by step must not be the way through a ring 3 that cannot be stepped. */
static bool breakpoint_insert(char kind, gva_t gva) {
    bool cpu_can = breakpoints.cpu_has_them && breakpoints.count < BREAKPOINTS_OF_CPU;
    if (breakpoint_find(kind, gva))
        return true;
    if (breakpoints.count == BREAKPOINTS_MAX || (!cpu_can && !breakpoints.steps_in_ring3)) {
        fprintf(stderr, "vmm: this machine's KVM stops at no more than %u breakpoints\n",
                breakpoints.count);
        return false;
    }
    breakpoints.list[breakpoints.count++] = (struct breakpoint){kind, gva};
    return true;
}

static void breakpoint_remove(char kind, gva_t gva) {
    struct breakpoint *found = breakpoint_find(kind, gva);
    if (found)
        *found = breakpoints.list[--breakpoints.count];
}

static bool breakpoints_need_steps(void) {
    return breakpoints.count > (breakpoints.cpu_has_them ? BREAKPOINTS_OF_CPU : 0);
}

/* KVM_GUESTDBG_USE_HW_BP is always on: a trap flag that a step has left behind, in a frame that an
 * interrupt has pushed, then leads to an exit, and not to the guest's handler of #DB. The breakpoint
 * that the guest stands at must not stop a step. */
static void debug_set(bool is_step) {
    struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP};
    if (is_step)
        debug.control |= KVM_GUESTDBG_SINGLESTEP;
    for (unsigned i = 0; !is_step && i < breakpoints.count && i < BREAKPOINTS_OF_CPU; i++) {
        debug.arch.debugreg[i] = breakpoints.list[i].gva;
        debug.arch.debugreg[DR_CONTROL] |= UINT64_C(1)
                                           << (DR_LOCAL_ENABLE_SHIFT + DR_ENABLE_SIZE * i);
    }
    host_vcpu(KVM_SET_GUEST_DEBUG, &debug);
}

/* What is tried, in the first pages of RAM: code, and page tables that map it for ring 3, too. */
struct trial {
    uint64_t code[512], pml4[512], pdpt[512], pd[512];
};

/* Long mode in this ring, at gva 0. */
static void trial_enter(struct trial *trial, unsigned ring) {
    static const uint8_t code[] = {0x90, 0x90, 0xe6, 0}; /* nop; nop; out 0, al */
    struct kvm_regs regs = {.rflags = X86_EFLAGS_FIXED | X86_EFLAGS_IOPL};
    struct kvm_sregs sregs = host_run()->s.regs.sregs;
    const uint64_t permits = PTE_PRESENT | PTE_WRITABLE | PTE_USER;
    *trial = (struct trial){.pml4[0] = offsetof(struct trial, pdpt) | permits,
                            .pdpt[0] = offsetof(struct trial, pd) | permits,
                            .pd[0] = PTE_LARGE | permits};
    memcpy(trial->code, code, sizeof code);
    sregs.cs.l = 1;
    sregs.cs.db = 0;
    sregs.cs.dpl = sregs.ss.dpl = (uint8_t)ring;
    sregs.cs.selector |= (uint16_t)ring;
    sregs.ss.selector |= (uint16_t)ring;
    sregs.cr3 = offsetof(struct trial, pml4);
    sregs.cr4 = X86_CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs.cr0 |= X86_CR0_PG;
    if (!regs_set(&regs, &sregs))
        die(STATUS_HOST, "KVM refuses the registers to try breakpoints with: %s", strerror(errno));
}

/* Does the guest stop before the second of these instructions? */
static bool trial_stops(struct trial *trial, unsigned ring, bool is_step) {
    struct kvm_run *run = host_run();
    unsigned tries = 0;
    int result;
    trial_enter(trial, ring);
    do {
        debug_set(is_step);
        result = ioctl(vcpu_fd(), KVM_RUN, NULL);
    } while (!result && run->exit_reason == KVM_EXIT_DEBUG && !run->s.regs.regs.rip &&
             ++tries < STEPS_IN_VAIN);
    bool stops = !result && run->exit_reason == KVM_EXIT_DEBUG && run->s.regs.regs.rip == 1;
    run->immediate_exit = 1; /* what the OUT has left to be done */
    (void)ioctl(vcpu_fd(), KVM_RUN, NULL);
    run->immediate_exit = 0;
    return stops;
}

/* Find out what this engine can, in the guest's RAM and with its vCPU, as long as it has not begun. */
static void debug_try(void) {
    static struct trial saved;
    struct kvm_run *run = host_run();
    struct kvm_sync_regs before = run->s.regs;
    struct trial *trial = memory_at(0, sizeof *trial);
    saved = *trial;
    breakpoints.list[0].gva = 1;
    breakpoints.count = 1;
    breakpoints.cpu_has_them = trial_stops(trial, 0, false);
    breakpoints.count = 0;
    (void)regs_set(&before.regs, &before.sregs);
    breakpoints.steps_in_ring3 = trial_stops(trial, 3, true);
    *trial = saved;
    (void)regs_set(&before.regs, &before.sregs);
    run->s.regs.events = before.events;
    run->kvm_dirty_regs = KVM_SYNC_X86_EVENTS;
}

/* ---- packets ---- */

/* A hexadecimal number at *text, which must end with one of these characters; *text is then behind it. With "" it
 * is the packet's end. */
static bool number_take(const char **text, const char *ends, uint64_t *number) {
    const char *c = *text;
    *number = 0;
    for (; hex_digit(*c) >= 0 && *number >> 60 == 0; c++)
        *number = *number << 4 | (uint64_t)hex_digit(*c);
    bool is_one = c > *text && (*c ? strchr(ends, *c) != NULL : *ends == '\0');
    *text = *c ? c + 1 : c;
    return is_one;
}

static void answer_error(int number) { answer_add("E%02x", number); }

static void answer_ok_or_error(bool is_ok) {
    if (is_ok)
        answer_add("OK");
    else
        answer_error(EINVAL);
}

/* m: as much as there is, from this address on. */
static void packet_memory_read(const char *text) {
    uint64_t gva, size;
    if (!number_take(&text, ",", &gva) || !number_take(&text, "", &size)) {
        answer_error(EINVAL);
        return;
    }
    for (uint64_t i = 0; i < size && i < PACKET_SIZE / 2; i++) {
        const uint8_t *byte = byte_at(gva + i);
        if (!byte)
            break;
        answer_add_hex(byte, 1);
    }
    if (size > 0 && answer.length == 0)
        answer_error(EPERM);
}

/* M: all of it or nothing. */
static void packet_memory_write(const char *text) {
    uint64_t gva, size;
    bool is_good = number_take(&text, ",", &gva) && number_take(&text, ":", &size) &&
                   strlen(text) % 2 == 0 && size == strlen(text) / 2;
    for (uint64_t i = 0; is_good && i < size; i++)
        is_good = hex_byte(text + 2 * i) >= 0 && byte_at(gva + i);
    for (uint64_t i = 0; is_good && i < size; i++) {
        uint8_t *byte = byte_at(gva + i);
        if (byte)
            *byte = (uint8_t)hex_byte(text + 2 * i);
    }
    answer_ok_or_error(is_good);
}

static void packet_registers_read(const char *text) {
    (void)text;
    for (unsigned i = 0; i < LENGTH(reg_table); i++)
        reg_read(&reg_table[i]);
}

static void packet_registers_write(const char *text) {
    for (unsigned i = 0; i < LENGTH(reg_table) && text; i++)
        text = reg_write(&reg_table[i], text);
    if (!text || *text) {
        gdb.state = host_run()->s.regs;
        answer_error(EINVAL);
        return;
    }
    answer_ok_or_error(regs_commit());
}

static void packet_register_read(const char *text) {
    uint64_t number;
    if (!number_take(&text, "", &number) || number >= LENGTH(reg_table))
        answer_error(EINVAL);
    else
        reg_read(&reg_table[number]);
}

static void packet_register_write(const char *text) {
    uint64_t number;
    if (!number_take(&text, "=", &number) || number >= LENGTH(reg_table) ||
        !(text = reg_write(&reg_table[number], text)) || *text)
        answer_error(EINVAL);
    else
        answer_ok_or_error(regs_commit());
}

/* Z and z: kind, address, length of an instruction, which does not matter here. */
static void packet_breakpoint(const char *packet) {
    const char *text = packet + 3;
    uint64_t gva, length;
    if (packet[1] != '0' && packet[1] != '1') /* watchpoints: make debug has gdb go step by step */
        return;
    if (packet[2] != ',' || !number_take(&text, ",", &gva) || !number_take(&text, "", &length)) {
        answer_error(EINVAL);
    } else if (packet[0] == 'Z') {
        answer_ok_or_error(breakpoint_insert(packet[1], gva));
    } else {
        breakpoint_remove(packet[1], gva);
        answer_add("OK");
    }
}

static void packet_stop_reason(void) { answer_add("T%02xthread:1;", gdb.signal); }

/* What follows "qXfer:features:read:target.xml:". */
static void packet_features(const char *text) {
    uint64_t offset, size;
    if (!number_take(&text, ",", &offset) || !number_take(&text, "", &size)) {
        answer_error(EINVAL);
        return;
    }
    size_t length = strlen(target_xml);
    if (offset > length)
        offset = length;
    if (size > PACKET_SIZE - 1)
        size = PACKET_SIZE - 1;
    answer_add("%c%.*s", length - offset > size ? 'm' : 'l', (int)size, target_xml + offset);
}

static const char *behind(const char *text, const char *beginning) {
    size_t length = strlen(beginning);
    return strncmp(text, beginning, length) ? NULL : text + length;
}

static void packet_query(const char *packet) {
    const char *text;
    if (behind(packet, "qSupported"))
        answer_add("PacketSize=%x;qXfer:features:read+;QStartNoAckMode+;vContSupported+",
                   PACKET_SIZE);
    else if ((text = behind(packet, "qXfer:features:read:target.xml:")))
        packet_features(text);
    else if (!strcmp(packet, "qC"))
        answer_add("QC1");
    else if (!strcmp(packet, "qfThreadInfo"))
        answer_add("m1");
    else if (!strcmp(packet, "qsThreadInfo"))
        answer_add("l");
    else if (!strcmp(packet, "qAttached")) /* 0: when gdb leaves, it ends the guest */
        answer_add("0");
    else if (!strcmp(packet, "QStartNoAckMode")) {
        gdb.no_ack = true;
        answer_add("OK");
    }
}

/* ---- the conversation ---- */

/* What the guest does until it stops again. */
static struct {
    bool one_step;          /* gdb wants one instruction */
    bool is_finishing;      /* the exit of an access came first: KVM has it to finish yet */
    unsigned in_vain;       /* steps after which nothing has changed */
    struct kvm_regs before; /* the registers before the last instruction */
} going;

static void go_on(bool one_step) {
    gdb.has_word = false;
    going.one_step = one_step;
    going.is_finishing = false;
    going.in_vain = 0;
    if (!one_step || gdb.is_past || !(gdb.state.sregs.cs.dpl) || breakpoints.steps_in_ring3)
        return;
    gdb_say("vmm: this machine's KVM cannot step through ring 3 (tests/deviations.toml): let it "
            "run to a breakpoint");
    gdb.has_word = true;
    answer_begin();
    packet_stop_reason();
}

static void packet_detach(const char *text) {
    (void)text;
    answer_add("OK");
    answer_send();
    line_close();
    breakpoints.count = 0;
    run_limit_start();
}

static void packet_kill(bool is_answered) {
    if (is_answered) {
        answer_add("OK");
        answer_send();
    }
    line_close();
    run_stop((enum status)(STATUS_SIGNALLED + SIGKILL), "killed by gdb");
}

/* vCont: of the actions only the first can be meant for the one thread there is. A signal that goes with it is
 * none that a guest could get. */
static void packet_verbose(const char *packet) {
    const char *action = behind(packet, "vCont;");
    if (!strcmp(packet, "vCont?"))
        answer_add("vCont;c;C;s;S");
    else if (action && strchr("cCsS", *action) && *action)
        go_on(*action == 's' || *action == 'S');
    else if (behind(packet, "vKill"))
        packet_kill(true);
}

static void packet_answer(const char *packet) {
    switch (packet[0]) {
    case '?': packet_stop_reason(); break;
    case 'g': packet_registers_read(packet + 1); break;
    case 'G': packet_registers_write(packet + 1); break;
    case 'p': packet_register_read(packet + 1); break;
    case 'P': packet_register_write(packet + 1); break;
    case 'm': packet_memory_read(packet + 1); break;
    case 'M': packet_memory_write(packet + 1); break;
    case 'Z':
    case 'z': packet_breakpoint(packet); break;
    case 'c':
    case 'C': go_on(false); break;
    case 's':
    case 'S': go_on(true); break;
    case 'D': packet_detach(packet + 1); break;
    case 'k': packet_kill(false); break;
    case 'H':
    case 'T': answer_add("OK"); break;
    case 'q':
    case 'Q': packet_query(packet); break;
    case 'v': packet_verbose(packet); break;
    default: /* the empty answer: no such packet here */ break;
    }
}

/* Until the guest is to go on, or there is nobody any more who could say so. */
static void converse(void) {
    static char packet[PACKET_SIZE + 1];
    gdb.has_word = true;
    while (gdb.has_word && packet_receive(packet)) {
        answer_begin();
        packet_answer(packet);
        if (gdb.has_word)
            answer_send();
    }
    gdb.has_word = false;
    if (input.next < input.end && input.bytes[input.next] == CTRL_C) { /* came with the packet */
        input.next++;
        gdb.interrupted = true;
    }
    if (gdb.interrupted)
        vcpu_return_at_once();
}

void gdb_stop(int signal_number, const struct kvm_regs *regs, const char *format, ...) {
    char why[256];
    va_list arguments;
    if (gdb.socket < 0)
        return;
    fflush(stdout);
    gdb.signal = signal_number;
    gdb.interrupted = false;
    gdb.state = host_run()->s.regs;
    gdb.is_past = regs != NULL;
    if (regs)
        gdb.state.regs = *regs;
    if (format) {
        va_start(arguments, format);
        vsnprintf(why, sizeof why, format, arguments);
        va_end(arguments);
        gdb_say(why);
    }
    answer_begin();
    packet_stop_reason();
    answer_send();
    converse();
    gdb.is_past = false;
}

/* ---- the run ---- */

/* gdb_start() has been called: there is a gdb, or there was one. */
static bool is_used;

/* In the thread for input, while the guest runs. */
static void interrupt_receive(void *unused) {
    char bytes[64];
    (void)unused;
    ssize_t size = gdb.socket < 0 ? -1 : recv(gdb.socket, bytes, sizeof bytes, MSG_DONTWAIT);
    if (size == 0)
        line_lose();
    else if (size < 0 || !memchr(bytes, CTRL_C, (size_t)size))
        return;
    gdb.interrupted = true;
    vcpu_kick();
}

bool gdb_has_interrupted(void) { return gdb.interrupted; }

static int listener_open(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die(STATUS_USAGE, "--gdb=%s: the path of a socket has less than %zu bytes", path,
            sizeof address.sun_path);
    memcpy(address.sun_path, path, strlen(path));
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(listener, 1) < 0)
        die(STATUS_HOST, "cannot wait for gdb at %s: %s", path, strerror(errno));
    return listener;
}

void gdb_start(const char *path) {
    int listener = listener_open(path);
    is_used = true;
    xml_make();
    debug_try();
    fprintf(stderr, "vmm: waiting for gdb: target remote %s\n", path);
    if (line_wait(listener))
        gdb.socket = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    unlink(path);
    close(listener);
    if (gdb.socket < 0)
        return;
    line_source = io_watch(gdb.socket, false, interrupt_receive, NULL);
    gdb.signal = SIGTRAP;
    gdb.state = host_run()->s.regs;
    converse();
}

bool gdb_before_entry(void) {
    bool is_step = going.one_step || breakpoints_need_steps();
    if (!is_used)
        return false;
    if (!going.is_finishing)
        going.before = host_run()->s.regs.regs;
    debug_set(is_step);
    return is_step;
}

/* A trap flag that nobody has asked for. */
static void trap_flag_drop(void) {
    struct kvm_sync_regs state = host_run()->s.regs;
    state.regs.rflags &= ~(uint64_t)X86_EFLAGS_TF;
    (void)regs_set(&state.regs, &state.sregs);
}

void gdb_after_exit(void) {
    const struct kvm_run *run = host_run();
    uint32_t reason = run->exit_reason;
    bool is_step = going.one_step || breakpoints_need_steps();
    if (!is_used)
        return;
    if ((is_step || gdb.interrupted) &&
        (reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO || reason == KVM_EXIT_HLT)) {
        going.is_finishing = true;
        vcpu_return_at_once();
        return;
    }
    bool has_moved = memcmp(&going.before, &run->s.regs.regs, sizeof going.before) != 0;
    bool has_arrived = reason == KVM_EXIT_DEBUG || (going.is_finishing && reason == KVM_EXIT_INTR);
    going.is_finishing = false;
    if (gdb.interrupted)
        gdb_stop(SIGINT, NULL, NULL);
    else if (has_arrived && ((going.one_step && (has_moved || ++going.in_vain == STEPS_IN_VAIN)) ||
                             ((has_moved || !is_step) && breakpoint_is_at(run->s.regs.regs.rip))))
        gdb_stop(SIGTRAP, NULL, NULL);
    else if (reason == KVM_EXIT_DEBUG && !is_step)
        trap_flag_drop();
}

void gdb_end(enum status status) {
    if (gdb.socket < 0)
        return;
    answer_begin();
    if (status > STATUS_SIGNALLED)
        answer_add("X%02x", status - STATUS_SIGNALLED);
    else
        answer_add("W%02x", status);
    answer_send();
    line_close();
}
