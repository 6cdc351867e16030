/* Lesson 6, host half: the VMM raises exceptions in the guest. */
#include <string.h>
#include <sys/mman.h>

#include "host.h"
#include "lab.h"

/* ---- what you write ---- */

/*
 * The word that tells the CPU what to deliver with the next VM entry: SDM 3C "VM-Entry Controls for
 * Event Injection". For an exception of this vector: the vector itself in bits 7:0, its type in bits
 * 10:8 (3: hardware exception; 6: software exception, which #BP and #OF are), bit 11 if it delivers
 * an error code, and bit 31, which makes the word valid.
 */
static uint32_t interruption_information(uint8_t vector) {
    /* BEGIN SOLUTION */
    bool is_software = vector == VECTOR_BP || vector == VECTOR_OF;
    uint32_t has_error_code = VECTORS_WITH_ERROR_CODE >> vector & 1;
    return vector | (is_software ? 6u : 3u) << 8 | has_error_code << 11 | 1u << 31;
    /* STUB
    (void)vector;
    HOST_TODO("interruption_information: the word for an exception of this vector");
    END SOLUTION */
}

/*
 * Let KVM deliver this exception with the next entry, as if the instruction at rip had raised it:
 * KVM_SET_VCPU_EVENTS, with exception.injected, nr, has_error_code and error_code.
 *
 * That ioctl sets all there is to set: ask for what is there first (KVM_GET_VCPU_EVENTS), and change
 * only the exception. A #PF also leaves its address in CR2 (KVM_SET_SREGS, starting from
 * *host_sregs()), a #DB its reason in DR6 (KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS: the CPU adds bits
 * there and clears none). Nobody else does that for you.
 */
static void exception_inject(const struct order *order) {
    /* BEGIN SOLUTION */
    struct kvm_vcpu_events all = {0};
    host_vcpu(KVM_GET_VCPU_EVENTS, &all);
    all.exception.injected = 1;
    all.exception.nr = order->vector;
    all.exception.has_error_code = VECTORS_WITH_ERROR_CODE >> order->vector & 1;
    all.exception.error_code = all.exception.has_error_code ? order->error_code : 0;
    host_vcpu(KVM_SET_VCPU_EVENTS, &all);
    if (order->vector == VECTOR_PF) {
        struct kvm_sregs sregs = *host_sregs();
        sregs.cr2 = order->payload;
        host_vcpu(KVM_SET_SREGS, &sregs);
    } else if (order->vector == VECTOR_DB) {
        struct kvm_debugregs debug = {0};
        host_vcpu(KVM_GET_DEBUGREGS, &debug);
        debug.dr6 |= order->payload;
        host_vcpu(KVM_SET_DEBUGREGS, &debug);
    }
    /* STUB
    (void)order;
    HOST_TODO("exception_inject: hand this exception to KVM, and what comes with it to the guest");
    END SOLUTION */
}

/*
 * While the CPU delivers the first exception, a second one comes up. What becomes of the two? SDM 3A
 * "Interrupt 8—Double Fault Exception (#DF)" has the table. The first one may itself be #DF.
 */
static enum outcome exceptions_combine(uint8_t first, uint8_t second) {
    /* BEGIN SOLUTION */
    const uint32_t contributory =
        1u << VECTOR_DE | 1u << VECTOR_TS | 1u << VECTOR_NP | 1u << VECTOR_SS | 1u << VECTOR_GP;
    bool second_is_contributory = contributory >> second & 1;
    bool second_is_serious = second_is_contributory || second == VECTOR_PF;
    if (first == VECTOR_DF)
        return second_is_serious ? OUTCOME_TRIPLE_FAULT : OUTCOME_SECOND;
    if (first == VECTOR_PF)
        return second_is_serious ? OUTCOME_DOUBLE_FAULT : OUTCOME_SECOND;
    bool first_is_contributory = contributory >> first & 1;
    return first_is_contributory && second_is_contributory ? OUTCOME_DOUBLE_FAULT : OUTCOME_SECOND;
    /* STUB
    (void)first, (void)second;
    HOST_TODO("exceptions_combine: the second exception, a double fault or a triple fault");
    END SOLUTION */
}

/* ---- the rounds ---- */

static struct {
    struct plan plan;
    unsigned begun;     /* rounds */
    bool is_ordered;    /* the guest will halt, and wants its exception then */
    bool is_nmi_wanted; /* before the next entry */
} lab;

static void plan_record(unsigned number, const struct round *round) {
    event_begin("plan");
    event_number("round", number);
    event_number("stage", round->stage);
    event_number("vector", round->order.vector);
    event_hex("error_code", round->order.error_code);
    event_hex("payload", round->order.payload);
    event_number("second", round->second.vector);
    event_hex("second_error_code", round->second.error_code);
    event_hex("second_payload", round->second.payload);
    event_number("remedy", round->remedy);
    event_hex("addend", round->addend);
    event_hex("stack", round->stack_gpa + PAGE_SIZE);
    event_end();
}

/* The words of all exceptions, also of those that no round injects. */
static void words_record(void) {
    for (unsigned vector = 0; vector < 20; vector++) {
        uint32_t word = interruption_information((uint8_t)vector);
        event_begin("word");
        event_number("vector", vector);
        event_hex("information", word);
        event_end();
    }
}

static const char *outcome_name(enum outcome outcome) {
    switch (outcome) {
    case OUTCOME_SECOND: return "second";
    case OUTCOME_DOUBLE_FAULT: return "double fault";
    case OUTCOME_TRIPLE_FAULT: return "triple fault";
    }
    return "?";
}

/* All that can meet: a row for each first exception, a letter for each second. */
static void table_record(void) {
    for (unsigned first = 0; first < 20; first++) {
        char row[21] = "";
        for (unsigned second = 0; second < 20; second++)
            row[second] = outcome_name(exceptions_combine((uint8_t)first, (uint8_t)second))[0];
        event_begin("table");
        event_number("first", first);
        event_string("row", row);
        event_end();
    }
}

static void order_record(const struct order *order) {
    uint32_t word = interruption_information(order->vector);
    bool has_error_code = VECTORS_WITH_ERROR_CODE >> order->vector & 1;
    event_begin("order");
    event_number("round", lab.begun - 1);
    event_number("vector", order->vector);
    event_hex("error_code", order->error_code);
    event_hex("payload", order->payload);
    event_hex("information", word);
    /* AMD's EVENTINJ: the same bits for a hardware exception, and the error code above. */
    event_hex("eventinj", word | (has_error_code ? (uint64_t)order->error_code << 32 : 0));
    event_end();
}

/* What Intel's CPUs refuse to enter with (SDM 3C "VM-Entry Control Fields"), and others take as it is. */
static const char *exception_refusal(const struct kvm_vcpu_events *events) {
    bool has_error_code = VECTORS_WITH_ERROR_CODE >> (events->exception.nr & 31) & 1;
    if (events->exception.has_error_code && !has_error_code)
        return "this vector has no error code";
    if (!events->exception.has_error_code && has_error_code)
        return "this vector has an error code";
    if (events->exception.has_error_code && events->exception.error_code > 0x7fff)
        return "the error code has more than 15 bits";
    if (events->exception.nr == VECTOR_BP || events->exception.nr == VECTOR_OF)
        return "a software exception needs the length of its instruction";
    return NULL;
}

/* Look at what KVM has been told. What a CPU would refuse is taken back, and recorded. */
static void exception_verify(void) {
    struct kvm_vcpu_events events = {0};
    host_vcpu(KVM_GET_VCPU_EVENTS, &events);
    const char *refusal = events.exception.injected ? exception_refusal(&events) : NULL;
    if (!refusal)
        return;
    event_begin("refused");
    event_number("round", lab.begun - 1);
    event_number("vector", events.exception.nr);
    event_string("why", refusal);
    event_end();
    events.exception.injected = 0;
    host_vcpu(KVM_SET_VCPU_EVENTS, &events);
}

static void order_give(const struct order *order) {
    order_record(order);
    exception_inject(order);
    exception_verify();
}

static enum outcome pair_record(uint8_t first, uint8_t second) {
    enum outcome outcome = exceptions_combine(first, second);
    event_begin("pair");
    event_number("round", lab.begun - 1);
    event_number("first", first);
    event_number("second", second);
    event_string("becomes", outcome_name(outcome));
    event_end();
    return outcome;
}

/* The VMM has two exceptions, and can inject one. */
static void pair_give(const struct round *round) {
    struct order double_fault = {.vector = VECTOR_DF};
    switch (pair_record(round->order.vector, round->second.vector)) {
    case OUTCOME_SECOND: order_give(&round->second); break;
    case OUTCOME_DOUBLE_FAULT: order_give(&double_fault); break;
    case OUTCOME_TRIPLE_FAULT: break; /* nothing is injected: the guest stays halted */
    }
}

/* Take the page of the stack away, as Linux may do with any page of a guest. So the CPU cannot push
 * the frame: the delivery ends in an EPT violation, KVM maps a page, and injects again. */
static void stack_take(const struct round *round) {
    void *page = host_memory(round->stack_gpa, PAGE_SIZE);
    if (page)
        madvise(page, PAGE_SIZE, MADV_DONTNEED);
}

static void round_give(const struct round *round) {
    stack_take(round);
    switch (round->stage) {
    case STAGE_PAIR: pair_give(round); break;
    case STAGE_BROKEN:
        pair_record(round->order.vector, round->second.vector);
        order_give(&round->order);
        break;
    case STAGE_SINGLE:
    case STAGE_IN_NMI:
    case STAGE_LAST: order_give(&round->order); break;
    }
}

static void lab_before_entry(void) {
    if (lab.is_nmi_wanted)
        host_vcpu_number(KVM_NMI, 0);
    lab.is_nmi_wanted = false;
    if (!lab.is_ordered || host_run()->exit_reason != KVM_EXIT_HLT)
        return;
    lab.is_ordered = false;
    round_give(&lab.plan.rounds[lab.begun - 1]);
}

/* The guest says what it likes: rounds begin in their order, and only once. */
static void round_begin(uint32_t number) {
    if (number != lab.begun || number >= ROUNDS)
        return;
    if (lab.begun++ == 0)
        words_record();
    if (number == SINGLES + 1)
        table_record();
    lab.is_ordered = true;
}

/* The CPU has pushed a frame, and no handler has changed it yet. */
static void frame_record(gpa_t frame_gpa) {
    const struct trap_frame *frame = host_memory(frame_gpa, sizeof *frame);
    struct kvm_debugregs registers = {0};
    if (!frame || lab.begun == 0)
        return;
    host_vcpu(KVM_GET_DEBUGREGS, &registers);
    event_begin("frame");
    event_number("round", lab.begun - 1);
    event_hex("gpa", frame_gpa);
    event_number("vector", frame->vector);
    event_hex("error_code", frame->error_code);
    event_hex("rip", frame->rip);
    event_hex("rsp", frame->rsp);
    event_hex("cr2", host_sregs()->cr2);
    event_hex("dr6", registers.dr6);
    event_end();
}

static void round_end(uint32_t number) {
    if (lab.begun == 0 || number != lab.begun - 1)
        return;
    uint64_t cell = 0;
    const void *in_guest = host_memory(lab.plan.rounds[number].cell_gpa, sizeof cell);
    if (in_guest)
        memcpy(&cell, in_guest, sizeof cell);
    event_begin("done");
    event_number("round", number);
    event_hex("cell", cell);
    event_end();
}

static void lab_access(struct access *access) {
    uint32_t value;
    if (!access->is_write || access->size != sizeof value || access->count != 1)
        return;
    memcpy(&value, access->data, sizeof value);
    switch (access->address) {
    case LAB_ROUND: round_begin(value); break;
    case LAB_CAUGHT: frame_record(value); break;
    case LAB_DONE: round_end(value); break;
    case LAB_NMI: lab.is_nmi_wanted = true; break;
    }
}

static void lab_setup(void) {
    lab.plan = plan_make(host_seed());
    for (unsigned i = 0; i < ROUNDS; i++)
        plan_record(i, &lab.plan.rounds[i]);
    host_claim_pio(LAB_ROUND, 4 * 4, "lab", lab_access);
}

const struct host_half host_half = {.setup = lab_setup, .before_entry = lab_before_entry};
