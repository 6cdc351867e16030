/* Lesson 8, host half: what is put into the guest at each VM entry, and what has to wait. */
#include <string.h>

#include "host.h"
#include "machine.h"
#include "plan.h"

/* What the lab's devices have raised and KVM has not been given yet. */
static struct {
    unsigned nmis;
    bool interrupts[VECTORS];
} waiting;

/* Does any interrupt wait? */
static bool interrupt_waits(void) {
    for (unsigned vector = 0; vector < VECTORS; vector++)
        if (waiting.interrupts[vector])
            return true;
    return false;
}

/* Take the interrupt of the highest priority; -1 if none waits. What is taken waits no longer. */
static int interrupt_take(void) {
    for (int vector = VECTORS - 1; vector >= 0; vector--)
        if (waiting.interrupts[vector]) {
            waiting.interrupts[vector] = false;
            return vector;
        }
    return -1;
}

/* All that the decision depends on, just before a VM entry. */
struct situation {
    struct kvm_vcpu_events events; /* what KVM holds: KVM_GET_VCPU_EVENTS */
    bool nmi_waits;                /* raised, but KVM has not been given it yet */
    bool interrupt_waits;
    bool ready; /* kvm_run's ready_for_interrupt_injection */
};

/* What goes into the guest with this VM entry. There is room for one event. */
enum decision { NOTHING, NMI_AGAIN, INTERRUPT_AGAIN, NMI_NEW, INTERRUPT_NEW };

/*
 * Decide as KVM does, in arch/x86/kvm/x86.c: kvm_check_and_inject_events(), which was called
 * inject_pending_event() before Linux 6.1.
 *
 * An event that was injected before and not delivered goes in again: an NMI, or else an interrupt.
 * Else an NMI, if there is one and NMIs are not blocked; it may wait here, or be pending in KVM. Else
 * an interrupt, if one waits and can be taken. Else nothing.
 */
static enum decision injection_decide(const struct situation *now) {
    /* BEGIN SOLUTION */
    if (now->events.nmi.injected)
        return NMI_AGAIN;
    if (now->events.interrupt.injected)
        return INTERRUPT_AGAIN;
    if ((now->nmi_waits || now->events.nmi.pending) && !now->events.nmi.masked)
        return NMI_NEW;
    if (now->interrupt_waits && now->ready)
        return INTERRUPT_NEW;
    return NOTHING;
    /* STUB
    (void)now;
    HOST_TODO("decide what goes into the guest with this VM entry");
    END SOLUTION */
}

/*
 * NMIs wait, waiting.nmis of them: called before each entry at which this is so. KVM needs no window
 * from us: it holds an NMI until the guest can take it. Give it one with KVM_NMI, unless it holds one
 * already: all that wait are one, as in the CPU, which has a single latch for them.
 */
static void nmi_hand_over(const struct situation *now) {
    /* BEGIN SOLUTION */
    if (!now->events.nmi.pending)
        (void)host_vcpu_number(KVM_NMI, 0);
    waiting.nmis = 0;
    /* STUB
    (void)now;
    HOST_TODO("give KVM the NMI that waits, once");
    END SOLUTION */
}

/*
 * Interrupts wait, or did so at the last entry. If the decision is INTERRUPT_NEW, give KVM the one of
 * the highest priority with KVM_INTERRUPT. As long as one still waits, and only then, ask for an
 * interrupt window: without it the guest need not exit when it can take the next.
 */
static void interrupt_hand_over(enum decision decision) {
    /* BEGIN SOLUTION */
    if (decision == INTERRUPT_NEW)
        host_vcpu(KVM_INTERRUPT, &(struct kvm_interrupt){.irq = (uint32_t)interrupt_take()});
    host_run()->request_interrupt_window = interrupt_waits();
    /* STUB
    (void)decision;
    (void)interrupt_take;
    HOST_TODO("give KVM an interrupt, or ask for a window");
    END SOLUTION */
}

/* ---- the rest is given: the lab that raises, and the record ---- */

#define WINDOWS_MAX 20 /* of one scene: more, and they never end */

static struct {
    struct plan plan;
    const struct scene *scene; /* NULL between two */
    unsigned number;           /* of the scene */
    bool is_raised[WHENS];
    unsigned interrupts; /* raised in this scene */
    unsigned windows;    /* exits in this scene because one was open */
    bool is_kicked;      /* the last entry was */
    gpa_t frame_gpa;     /* of the first NMI in this scene; gva = gpa. 0: none yet */
    uint64_t frame_rip;  /* what was in it */
} lab;

static const char *const decision_names[] = {
    [NOTHING] = "nothing",
    [NMI_AGAIN] = "the NMI again",
    [INTERRUPT_AGAIN] = "the interrupt again",
    [NMI_NEW] = "an NMI",
    [INTERRUPT_NEW] = "an interrupt",
};

static const char *decision_name(enum decision decision) {
    bool is_known = (unsigned)decision < sizeof decision_names / sizeof *decision_names;
    return is_known ? decision_names[decision] : "?";
}

static void decision_record(const char *kind, const struct situation *now, enum decision decision) {
    event_begin(kind);
    event_string("decision", decision_name(decision));
    event_number("nmi_injected", now->events.nmi.injected);
    event_number("interrupt_injected", now->events.interrupt.injected);
    event_number("nmi_waits", now->nmi_waits);
    event_number("nmi_pending", now->events.nmi.pending);
    event_number("nmi_masked", now->events.nmi.masked);
    event_number("interrupt_waits", now->interrupt_waits);
    event_number("ready", now->ready);
    event_end();
}

/* A run shows few of the situations there can be. Here are all. */
static void situations_record(void) {
    for (unsigned bits = 0; bits < 1 << 7; bits++) {
        struct situation now = {
            .nmi_waits = bits & 1, .interrupt_waits = bits >> 1 & 1, .ready = bits >> 2 & 1};
        now.events.nmi.pending = bits >> 3 & 1;
        now.events.nmi.masked = bits >> 4 & 1;
        now.events.interrupt.injected = bits >> 5 & 1;
        now.events.nmi.injected = bits >> 6 & 1;
        decision_record("situation", &now, injection_decide(&now));
    }
}

static void interrupt_raise(void) {
    uint8_t vector = lab.plan.vectors[lab.number][lab.interrupts++ % INTERRUPTS_MAX];
    waiting.interrupts[vector] = true;
    event_begin("raise");
    event_string("scene", lab.scene->name);
    event_string("type", "interrupt");
    event_number("vector", vector);
    event_end();
}

static void nmis_raise(unsigned count) {
    waiting.nmis += count;
    event_begin("raise");
    event_string("scene", lab.scene->name);
    event_string("type", "nmi");
    event_number("count", count);
    event_end();
}

/* The devices of the lab: this moment has come, and the scene may want something raised. */
static void lab_raise(enum when when) {
    if (!lab.scene || lab.is_raised[when])
        return;
    lab.is_raised[when] = true;
    unsigned nmis = lab.scene->raise[when].nmis;
    if (nmis)
        nmis_raise(nmis == SOME ? lab.plan.some[lab.number] : nmis);
    for (unsigned i = 0; i < lab.scene->raise[when].interrupts; i++)
        interrupt_raise();
}

/*
 * Let the next KVM_RUN return before it enters the guest. In a real VMM a signal for the vCPU's thread
 * does that at any time, and what has been injected then stays in KVM: injected, not delivered.
 */
static void kick_prepare(void) {
    bool is_time = lab.scene && lab.scene->kicked && lab.is_raised[AT_SCENE];
    if (!is_time || lab.is_raised[AT_KICK])
        return;
    host_run()->immediate_exit = 1;
    lab.is_kicked = true;
}

static void kick_end(void) {
    if (!lab.is_kicked)
        return;
    host_run()->immediate_exit = 0;
    lab.is_kicked = false;
    lab_raise(AT_KICK);
}

static void waiting_record(void) {
    unsigned interrupts = 0;
    for (unsigned vector = 0; vector < VECTORS; vector++)
        interrupts += waiting.interrupts[vector];
    event_begin("waiting");
    event_number("nmis", waiting.nmis);
    event_number("interrupts", interrupts);
    event_end();
}

/* An open window exits before the guest has done anything. Who does nothing either and asks for it
 * again would go round and round. */
static void window_close(void) {
    memset(waiting.interrupts, 0, sizeof waiting.interrupts);
    host_run()->request_interrupt_window = 0;
}

/* NMIs still wait, as the record says now. If KVM has one of them, the same would go in without end. */
static void nmis_forget(void) {
    struct kvm_vcpu_events events = {0};
    host_vcpu(KVM_GET_VCPU_EVENTS, &events);
    if (events.nmi.pending)
        waiting.nmis = 0;
}

static void window_opened(void) {
    lab.windows++;
    lab_raise(AT_WINDOW);
}

static void lab_before_entry(void) {
    struct kvm_run *run = host_run();
    kick_end();
    if (run->exit_reason == KVM_EXIT_IRQ_WINDOW_OPEN)
        window_opened();
    if (run->exit_reason == KVM_EXIT_HLT)
        lab_raise(AT_HALT);
    struct situation now = {.nmi_waits = waiting.nmis > 0,
                            .interrupt_waits = interrupt_waits(),
                            .ready = run->ready_for_interrupt_injection};
    host_vcpu(KVM_GET_VCPU_EVENTS, &now.events);
    enum decision decision = injection_decide(&now);
    if (lab.scene)
        decision_record("decision", &now, decision);
    bool is_window_asked_for = run->request_interrupt_window;
    if (now.nmi_waits)
        nmi_hand_over(&now);
    if (now.interrupt_waits || is_window_asked_for)
        interrupt_hand_over(decision);
    if (lab.windows > WINDOWS_MAX)
        window_close();
    if (lab.scene)
        waiting_record();
    if (waiting.nmis > 0)
        nmis_forget();
    kick_prepare();
}

static void scene_begin(unsigned number) {
    if (number >= SCENES)
        return;
    lab.scene = &scenes[number];
    lab.number = number;
    memset(lab.is_raised, 0, sizeof lab.is_raised);
    lab.interrupts = lab.windows = 0;
    lab.frame_gpa = 0;
    event_begin("scene");
    event_string("name", lab.scene->name);
    event_end();
    lab_raise(AT_SCENE);
}

static void scene_end(void) {
    if (!lab.scene)
        return;
    event_begin("over");
    event_string("name", lab.scene->name);
    event_end();
    lab.scene = NULL;
    memset(&waiting, 0, sizeof waiting); /* what is lost is lost: the next scene is another story */
}

/* The first NMI of the scene: what is in its frame now? */
static void frame_record(bool is_first_look) {
    const struct trap_frame *frame = host_memory(lab.frame_gpa, sizeof *frame);
    if (!frame)
        return;
    if (is_first_look)
        lab.frame_rip = frame->rip;
    event_begin("frame");
    event_hex("gva", lab.frame_gpa);
    event_hex("rip_taken", lab.frame_rip);
    event_hex("rip", frame->rip);
    event_end();
}

static void frame_access(uint32_t frame_gva) {
    bool is_first = lab.scene && lab.scene->faults && !lab.frame_gpa;
    if (is_first) {
        lab.frame_gpa = frame_gva;
        frame_record(true);
    }
}

static void handler_begin(uint8_t vector) {
    lab_raise(vector == VECTOR_NMI ? AT_NMI_BEGIN : AT_INTERRUPT_BEGIN);
}

static void handler_end(uint8_t vector) {
    if (vector != VECTOR_NMI)
        return;
    if (lab.frame_gpa)
        frame_record(false);
    lab_raise(AT_NMI_END);
}

static void lab_access(struct access *access) {
    uint32_t value = 0;
    if (!access->is_write || access->size > sizeof value)
        return;
    memcpy(&value, access->data, access->size);
    switch (access->address) {
    case LAB_SCENE: scene_begin(value); break;
    case LAB_BEGIN: handler_begin((uint8_t)value); break;
    case LAB_FAULTED: lab_raise(AT_FAULTED); break;
    case LAB_END: handler_end((uint8_t)value); break;
    case LAB_FRAME: frame_access(value); break;
    case LAB_OVER: scene_end(); break;
    default: break;
    }
}

static void lab_setup(void) {
    lab.plan = plan_make(host_seed());
    host_claim_pio(LAB_SCENE, LAB_PORTS, "lab", lab_access);
    situations_record();
}

const struct host_half host_half = {.setup = lab_setup, .before_entry = lab_before_entry};
