/*
 * Lesson 9, host half: devices that interrupt, and what connects them to the interrupt controller in
 * the kernel. The same devices run on two other machines: with the I/O APIC in the VMM
 * (--irqchip=split), and with the whole controller there (--irqchip=none).
 */
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>

#include "apic_registers.h"
#include "controller.h"
#include "host.h"
#include "lab.h"

enum route { ROUTE_EDGE, ROUTE_LEVEL, ROUTE_BELL, ROUTES };

static struct {
    struct plan plan;
    struct random words; /* what the devices have to be taken */
    uint32_t requests;   /* of the level device: it drives its line while there are any */
    bool is_served;      /* since it last drove its line high */
    unsigned assertions; /* of that line */
    bool is_connected;
    int line_fd, resample_fd; /* of the level line */
    int bell_fd;
} lab;

static void level_assert(void);

/* ---- what you write ---- */

/*
 * A message that interrupts: one write of data to address. To the CPUs with this logical destination,
 * with this delivery mode (APIC_DELIVERY_*) and this vector; edge-triggered, or, if is_level,
 * level-triggered and asserted.
 */
static struct kvm_msi message_make(uint8_t destination, uint32_t delivery, uint8_t vector,
                                   bool is_level) {
    /* BEGIN SOLUTION */
    return (struct kvm_msi){
        .address_lo = MSI_ADDRESS | MSI_ADDRESS_LOGICAL |
                      (uint32_t)destination << MSI_ADDRESS_DESTINATION_SHIFT,
        .data = vector | delivery | (is_level ? MSI_DATA_LEVEL | MSI_DATA_ASSERT : 0),
    };
    /* STUB
    (void)destination, (void)delivery, (void)vector, (void)is_level;
    HOST_TODO("make the address and the data of a message");
    END SOLUTION */
}

/*
 * KVM's interrupt routing: what a GSI stands for. plan->edge_gsi and plan->level_gsi stand for the pins
 * plan->edge_pin and plan->level_pin of the I/O APIC in the kernel; plan->bell_gsi for a message to
 * plan->logical_id, with the vector of DEVICE_BELL.
 */
static void routes_make(struct kvm_irq_routing_entry routes[ROUTES], const struct plan *plan) {
    /* BEGIN SOLUTION */
    struct kvm_msi bell =
        message_make(plan->logical_id, APIC_DELIVERY_FIXED, plan->vector[DEVICE_BELL], false);
    routes[ROUTE_EDGE] = (struct kvm_irq_routing_entry){
        .gsi = plan->edge_gsi,
        .type = KVM_IRQ_ROUTING_IRQCHIP,
        .u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = plan->edge_pin}};
    routes[ROUTE_LEVEL] = (struct kvm_irq_routing_entry){
        .gsi = plan->level_gsi,
        .type = KVM_IRQ_ROUTING_IRQCHIP,
        .u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = plan->level_pin}};
    routes[ROUTE_BELL] =
        (struct kvm_irq_routing_entry){.gsi = plan->bell_gsi,
                                       .type = KVM_IRQ_ROUTING_MSI,
                                       .u.msi = {.address_lo = bell.address_lo, .data = bell.data}};
    /* STUB
    (void)routes, (void)plan;
    HOST_TODO("make the three entries of KVM's interrupt routing");
    END SOLUTION */
}

/* One interrupt by an edge-triggered line: a pulse on this GSI. */
static void edge_pulse(uint32_t gsi) {
    /* BEGIN SOLUTION */
    struct kvm_irq_level pulse = {.irq = gsi, .level = 1};
    host_vm(KVM_IRQ_LINE, &pulse);
    pulse.level = 0;
    host_vm(KVM_IRQ_LINE, &pulse);
    /* STUB
    (void)gsi;
    HOST_TODO("raise the line, and lower it again");
    END SOLUTION */
}

/*
 * Let every write to the eventfd fd interrupt by this GSI. If resample_fd is not -1, the GSI is of a
 * level-triggered line: a write to fd drives it high, and when the guest has ended the interrupt, KVM
 * drives it low and writes to resample_fd.
 */
static void irqfd_connect(int fd, uint32_t gsi, int resample_fd) {
    /* BEGIN SOLUTION */
    struct kvm_irqfd irqfd = {.fd = (uint32_t)fd, .gsi = gsi};
    if (resample_fd != -1) {
        irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
        irqfd.resamplefd = (uint32_t)resample_fd;
    }
    host_vm(KVM_IRQFD, &irqfd);
    /* STUB
    (void)fd, (void)gsi, (void)resample_fd;
    HOST_TODO("connect the eventfd to the GSI");
    END SOLUTION */
}

/*
 * The guest has ended the interrupt of the level line, and the line is low. lab.requests says how much
 * the device still has to be taken; level_assert() drives the line high.
 */
static void level_acknowledged(void) {
    /* BEGIN SOLUTION */
    if (lab.requests > 0)
        level_assert();
    /* STUB
    HOST_TODO("the interrupt has been ended: must the line go high again?");
    END SOLUTION */
}

/* ---- messages ---- */

/* KVM's answer: how many local APICs have accepted it. */
static void message_send(const char *from, struct kvm_msi message) {
    bool is_accepted = irqchip_is(MACHINE_IRQCHIP_NONE) ? lapic_accept(message)
                                                        : host_vm(KVM_SIGNAL_MSI, &message) > 0;
    event_begin("message");
    event_string("from", from);
    event_hex("address", message.address_lo);
    event_hex("data", message.data);
    event_number("accepted", is_accepted);
    event_end();
}

/* ---- what the controller's state is, as KVM has it ---- */

static struct kvm_lapic_state lapic_state(void) {
    struct kvm_lapic_state state = lapic;
    if (!irqchip_is(MACHINE_IRQCHIP_NONE))
        host_vcpu(KVM_GET_LAPIC, &state);
    return state;
}

/* The vectors whose bits are set in ISR, TMR or IRR. */
static unsigned lapic_vectors(const struct kvm_lapic_state *state, unsigned offset,
                              uint8_t vectors[VECTORS]) {
    unsigned count = 0;
    for (unsigned vector = 0; vector < VECTORS; vector++)
        if (lapic_bit(state, offset, vector))
            vectors[count++] = (uint8_t)vector;
    return count;
}

static void record_vectors(const struct kvm_lapic_state *state, const char *name, unsigned offset) {
    uint8_t vectors[VECTORS];
    unsigned count = lapic_vectors(state, offset, vectors);
    event_bytes(name, vectors, count);
}

static void record_lapic(void) {
    struct kvm_lapic_state state = lapic_state();
    record_vectors(&state, "in_service", LAPIC_ISR);
    record_vectors(&state, "requested", LAPIC_IRR);
    record_vectors(&state, "level_triggered", LAPIC_TMR);
    event_hex("task_priority", lapic_register(&state, LAPIC_TPR));
}

/* The redirection entry of a pin, and whether its line is high. */
struct pin_state {
    uint64_t entry;
    bool is_high;
};

static struct pin_state pin_state(unsigned pin) {
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_IOAPIC};
    if (!irqchip_is(MACHINE_IRQCHIP_KERNEL))
        return (struct pin_state){ioapic.entry[pin], ioapic.is_high[pin]};
    host_vm(KVM_GET_IRQCHIP, &chip);
    return (struct pin_state){chip.chip.ioapic.redirtbl[pin].bits, chip.chip.ioapic.irr >> pin & 1};
}

static void record_ioapic(void) {
    struct pin_state edge = pin_state(lab.plan.edge_pin);
    struct pin_state level = pin_state(lab.plan.level_pin);
    event_hex("edge_entry", edge.entry);
    event_number("edge_is_high", edge.is_high);
    event_hex("level_entry", level.entry);
    event_number("level_is_high", level.is_high);
}

/* ---- the devices ---- */

/* Write to an eventfd, and give its effect the time it takes: the line is high, or the vector requested.
 * KVM may drive an I/O APIC's line from a kernel thread. So two runs of one seed do the same. */
static void eventfd_signal(int fd, uint8_t vector) {
    eventfd_write(fd, 1);
    for (unsigned ms = 0; ms < 100; ms++) {
        struct kvm_lapic_state state = lapic_state();
        if (pin_state(lab.plan.level_pin).is_high || lapic_bit(&state, LAPIC_IRR, vector))
            return;
        poll(NULL, 0, 1);
    }
}

/* Drive the level line high. A wrong solution does so for ever: it must end some time. */
static void level_assert(void) {
    if (lab.assertions > 2u * lab.plan.requests + 2)
        return;
    event_begin("line");
    event_number("assertion", ++lab.assertions);
    event_number("requests", lab.requests);
    event_end();
    lab.is_served = false;
    if (irqchip_is(MACHINE_IRQCHIP_KERNEL))
        eventfd_signal(lab.line_fd, lab.plan.vector[DEVICE_LEVEL]);
    else
        ioapic_line(lab.plan.level_pin, true);
}

/*
 * Has the guest ended the interrupt of the level line? Then the line is low now.
 *
 * On the split machine, a KVM that ends interrupts when it injects them (tests/deviations.toml) may say
 * so before the device has been served. That would be one interrupt too many: wait for it.
 */
static bool level_is_acknowledged(void) {
    const struct kvm_run *run = host_run();
    eventfd_t count;
    if (irqchip_is(MACHINE_IRQCHIP_KERNEL))
        return eventfd_read(lab.resample_fd, &count) == 0;
    if (run->exit_reason == KVM_EXIT_IOAPIC_EOI)
        lapic_ended = run->eoi.vector;
    if (!lapic_ended || !lab.is_served)
        return false;
    uint8_t vector = lapic_ended;
    lapic_ended = 0;
    return ioapic_end(lab.plan.level_pin, vector);
}

static void edge_start(void) {
    if (irqchip_is(MACHINE_IRQCHIP_KERNEL)) {
        edge_pulse(lab.plan.edge_gsi);
    } else {
        ioapic_line(lab.plan.edge_pin, true);
        ioapic_line(lab.plan.edge_pin, false);
    }
}

static void device_start(enum device device) {
    const struct plan *plan = &lab.plan;
    switch (device) {
    case DEVICE_LOW:
    case DEVICE_HIGH:
        message_send("device", message_make(plan->logical_id, APIC_DELIVERY_FIXED,
                                            plan->vector[device], false));
        break;
    case DEVICE_NMI:
        message_send("device", message_make(plan->logical_id, APIC_DELIVERY_NMI,
                                            plan->vector[device], false));
        break;
    case DEVICE_EDGE: edge_start(); break;
    case DEVICE_LEVEL:
        lab.requests = lab.assertions ? 1 : plan->requests;
        level_assert();
        break;
    default: break;
    }
}

/* ---- ports ---- */

static void start_access(struct access *access) {
    if (access->is_write)
        device_start((enum device)access->data[0]);
}

static void take_access(struct access *access) {
    enum device device = (enum device)((access->address - LAB_TAKE) / 4);
    bool has_nothing = device == DEVICE_LEVEL && lab.requests == 0;
    uint32_t word = has_nothing ? 0 : (uint32_t)random_next(&lab.words);
    if (access->is_write || access->size != sizeof word)
        return;
    memcpy(access->data, &word, sizeof word);
    event_begin("taken");
    event_number("device", device);
    event_hex("vector", lab.plan.vector[device]);
    event_hex("word", word);
    event_number("has_nothing", has_nothing);
    record_lapic();
    event_end();
    if (device != DEVICE_LEVEL)
        return;
    lab.is_served = true;
    lab.requests -= lab.requests > 0;
}

/* The guest has reached a stage. At the last one the bell rings once more, with interrupts off: what its
 * irqfd does shows in IRR. */
static void stage_access(struct access *access) {
    if (access->data[0] == STAGE_END && !irqchip_is(MACHINE_IRQCHIP_NONE))
        eventfd_signal(lab.bell_fd, lab.plan.vector[DEVICE_BELL]);
    event_begin("stage");
    event_number("stage", access->data[0]);
    record_lapic();
    record_ioapic();
    event_end();
}

/* Where the local APIC is in the kernel: the bell, rung and heard without the VMM. */
static void bell_connect(void) {
    struct kvm_ioeventfd fast_bell = {
        .addr = LAB_FAST_BELL, .len = 1, .fd = lab.bell_fd, .flags = KVM_IOEVENTFD_FLAG_PIO};
    irqfd_connect(lab.bell_fd, lab.plan.bell_gsi, -1);
    host_vm(KVM_IOEVENTFD, &fast_bell);
}

static void connect_access(struct access *access) {
    struct {
        struct kvm_irq_routing header;
        struct kvm_irq_routing_entry entries[ROUTES];
    } table = {.header.nr = ROUTES};
    (void)access;
    if (lab.is_connected)
        return;
    lab.is_connected = true;
    routes_make(table.entries, &lab.plan);
    ioapic.bell = table.entries[ROUTE_BELL];
    if (irqchip_is(MACHINE_IRQCHIP_KERNEL)) {
        host_vm(KVM_SET_GSI_ROUTING, &table.header);
        irqfd_connect(lab.line_fd, lab.plan.level_gsi, lab.resample_fd);
    } else {
        ioapic_route();
    }
    if (!irqchip_is(MACHINE_IRQCHIP_NONE))
        bell_connect();
}

static void bell_access(struct access *access) {
    const struct plan *plan = &lab.plan;
    (void)access;
    message_send("bell", message_make(plan->logical_id, APIC_DELIVERY_FIXED,
                                      plan->vector[DEVICE_BELL], false));
}

/* Time is real here: wait until the timer has run down, but not for ever. The kernel acts on it at about
 * that time, and has done so a millisecond later. */
static void expiry_access(struct access *access) {
    struct kvm_lapic_state state = lapic_state();
    (void)access;
    for (unsigned ms = 0; ms < 100 && lapic_register(&state, LAPIC_TIMER_CURRENT) > 0; ms++) {
        poll(NULL, 0, 1);
        state = lapic_state();
    }
    poll(NULL, 0, 1);
    event_begin("timer");
    event_hex("lvt", lapic_register(&state, LAPIC_LVT_TIMER));
    event_hex("initial", lapic_register(&state, LAPIC_TIMER_INITIAL));
    event_hex("divide", lapic_register(&state, LAPIC_TIMER_DIVIDE));
    event_end();
}

/* How often the guest has heard the bell. */
static void heard_access(struct access *access) {
    uint32_t count = 0;
    if (!access->is_write || access->size != sizeof count)
        return;
    memcpy(&count, access->data, sizeof count);
    event_begin("heard");
    event_number("count", count);
    event_end();
}

static void stray_access(struct access *access) {
    event_begin("stray");
    event_hex("vector", access->data[0]);
    event_end();
}

static void machine_access(struct access *access) {
    memset(access->data, 0, access->size);
    access->data[0] = (uint8_t)host_machine()->irqchip;
}

/* Nothing to do: level_is_acknowledged() looks before each entry. */
static void wait_access(struct access *access) { (void)access; }

static void plan_record(const struct plan *plan) {
    event_begin("plan");
    event_bytes("vectors", plan->vector, sizeof plan->vector);
    event_hex("logical_id", plan->logical_id);
    event_number("edge_pin", plan->edge_pin);
    event_number("level_pin", plan->level_pin);
    event_number("edge_gsi", plan->edge_gsi);
    event_number("level_gsi", plan->level_gsi);
    event_number("bell_gsi", plan->bell_gsi);
    event_number("edges", plan->edges);
    event_number("messages", plan->messages);
    event_number("requests", plan->requests);
    event_number("timer_count", plan->timer_count);
    event_end();
}

static void lab_setup(void) {
    lab.plan = plan_make(host_seed());
    lab.words = random_stream(host_seed(), 2);
    lab.line_fd = eventfd(0, EFD_CLOEXEC);
    lab.resample_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    lab.bell_fd = eventfd(0, EFD_CLOEXEC);
    ioapic_reset();
    plan_record(&lab.plan);
    host_claim_pio(LAB_MACHINE, 1, "lab machine", machine_access);
    host_claim_pio(LAB_STAGE, 1, "lab stage", stage_access);
    host_claim_pio(LAB_CONNECT, 1, "lab connect", connect_access);
    host_claim_pio(LAB_START, 1, "lab start", start_access);
    host_claim_pio(LAB_WAIT, 1, "lab wait", wait_access);
    host_claim_pio(LAB_EXPIRY, 1, "lab expiry", expiry_access);
    host_claim_pio(LAB_BELL, 1, "lab bell", bell_access);
    host_claim_pio(LAB_FAST_BELL, 1, "lab fast bell", bell_access);
    host_claim_pio(LAB_HEARD, 4, "lab heard", heard_access);
    host_claim_pio(LAB_STRAY, 1, "lab stray", stray_access);
    host_claim_pio(LAB_TAKE, 4 * DEVICES, "lab take", take_access);
    host_claim_mmio(LAPIC_GPA, PAGE_SIZE, "local APIC", lapic_access);
    host_claim_mmio(IOAPIC_GPA, 0x20, "I/O APIC", ioapic_access);
}

static void lab_before_entry(void) {
    if (level_is_acknowledged())
        level_acknowledged();
    if (irqchip_is(MACHINE_IRQCHIP_NONE))
        lapic_prepare_entry();
}

const struct host_half host_half = {.setup = lab_setup, .before_entry = lab_before_entry};
