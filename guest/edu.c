/*
 * The driver of the edu device. It asks the device to do something by writing to a register that acts
 * (edu_registers.h), and waits: a device takes its time.
 */
#include "edu.h"
#include "apic.h"

/* ================================ Waiting ================================ */

#define PATIENCE 24 /* moments: about two seconds */
#define SPURIOUS 0xff
#define UNDIVIDED LAPIC_TIMER_DIVIDE_BY_1 /* so KVM's timer counts nanoseconds */
#define MOMENT_NS 1000000u
#define MOMENT_DOUBLES 7 /* times */
#define TURNS 200        /* of a loop: a device that is quick needs no sleep and no timer */

static bool on_timer(struct trap_frame *frame) {
    (void)frame;
    lapic_eoi();
    return true;
}

static bool on_spurious(struct trap_frame *frame) {
    (void)frame;
    return true;
}

void edu_driver_begin(uint8_t timer_vector) {
    trap_handle(timer_vector, on_timer);
    trap_handle(SPURIOUS, on_spurious);
    lapic_write(LAPIC_SVR, LAPIC_SVR_ENABLE | SPURIOUS);
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_TIMER_DIVIDE, UNDIVIDED);
    lapic_write(LAPIC_LVT_TIMER, timer_vector); /* one-shot */
}

/*
 * Let a moment pass, with interrupts on: up to the device's next one, or about a millisecond; longer,
 * if some have passed in vain already. Who sleeps lets others have the CPU, on a machine with one.
 * The timer wakes us if nobody else does.
 */
static void moment_pass(const struct edu *edu, unsigned passed) {
    unsigned before = edu->interrupts;
    sti();
    for (unsigned turn = 0; turn < TURNS && edu->interrupts == before; turn++)
        pause();
    cli();
    if (edu->interrupts != before)
        return;
    lapic_write(LAPIC_TIMER_INITIAL,
                MOMENT_NS << (passed < MOMENT_DOUBLES ? passed : MOMENT_DOUBLES));
    sti_halt();
    cli();
}

/* Wait until the bits of mask in this register are as in value. False: that does not happen. */
static bool edu_await(const struct edu *edu, unsigned offset, uint32_t mask, uint32_t value) {
    for (unsigned i = 0; i < PATIENCE; i++) {
        if ((edu_read(edu, offset) & mask) == value)
            return true;
        moment_pass(edu, i);
    }
    return false;
}

/* Wait until it has interrupted for this cause, and has taken note of the acknowledgement. */
bool edu_await_interrupt(struct edu *edu, uint32_t cause) {
    for (unsigned i = 0; i < PATIENCE; i++) {
        if ((edu->causes & cause) == cause) {
            edu->causes &= ~cause;
            return edu_await(edu, EDU_INTERRUPT_STATUS, cause, 0);
        }
        moment_pass(edu, i);
    }
    return false;
}

/*
 * For a register that acts (edu_registers.h): write the value to it. Then, so that a device which does not
 * see writes learns of this one, too, write the offset of the register to EDU_DOORBELL.
 */
void edu_command(const struct edu *edu, unsigned offset, uint32_t value) {
    /* BEGIN SOLUTION */
    edu_write(edu, offset, value);
    edu_write(edu, EDU_DOORBELL, offset);
    /* STUB
    (void)edu, (void)offset, (void)value;
    TODO("edu_command: write to a register, and ring its doorbell");
    END SOLUTION */
}

/* Is it an edu device (EDU_ID_MASK of its id is EDU_ID_VALUE), and does it live? It does if the
 * register EDU_LIVENESS, some time after it was given this number, reads as its complement. */
bool edu_probe(const struct edu *edu, uint32_t number) {
    /* BEGIN SOLUTION */
    if ((edu_read(edu, EDU_ID) & EDU_ID_MASK) != EDU_ID_VALUE)
        return false;
    edu_command(edu, EDU_LIVENESS, number);
    return edu_await(edu, EDU_LIVENESS, 0xffffffff, ~number);
    /* STUB
    (void)edu, (void)number;
    TODO("edu_probe: is it one, and does it live?");
    END SOLUTION */
}

/* It has interrupted. The interrupt status says what for: acknowledge all of that, and no more, and
 * put it into edu->causes, where there may be others already. */
static void edu_interrupt(struct edu *edu) {
    /* BEGIN SOLUTION */
    uint32_t cause = edu_read(edu, EDU_INTERRUPT_STATUS);
    edu_command(edu, EDU_INTERRUPT_ACKNOWLEDGE, cause);
    edu->causes |= cause;
    /* STUB
    (void)edu;
    TODO("edu_interrupt: what has it interrupted for? acknowledge it");
    END SOLUTION */
}

/* Let it compute a factorial, and interrupt (EDU_STATUS_INTERRUPT) when it is done:
 * EDU_INTERRUPT_FACTORIAL. Only then is the result there. False: the interrupt does not come. */
bool edu_factorial(struct edu *edu, uint32_t number, uint32_t *result) {
    /* BEGIN SOLUTION */
    edu_write(edu, EDU_STATUS, EDU_STATUS_INTERRUPT);
    edu_command(edu, EDU_FACTORIAL, number);
    if (!edu_await_interrupt(edu, EDU_INTERRUPT_FACTORIAL))
        return false;
    *result = edu_read(edu, EDU_FACTORIAL);
    return true;
    /* STUB
    (void)edu, (void)number, (void)result;
    TODO("edu_factorial: let it compute, wait for its interrupt, fetch the result");
    END SOLUTION */
}

/*
 * Let it move count bytes from one address to another. One of the two is an address of DMA, the
 * other one of its buffer (EDU_BUFFER and up); is_to_ram says which. It interrupts when it is done:
 * EDU_INTERRUPT_DMA. Start nothing before it has all that it needs to know. False: the interrupt
 * does not come.
 */
bool edu_transfer(struct edu *edu, uint32_t from, uint32_t to, uint32_t count, bool is_to_ram) {
    /* BEGIN SOLUTION */
    edu_write(edu, EDU_DMA_SOURCE, from);
    edu_write(edu, EDU_DMA_DESTINATION, to);
    edu_write(edu, EDU_DMA_COUNT, count);
    edu_command(edu, EDU_DMA_COMMAND,
                EDU_DMA_START | EDU_DMA_INTERRUPT | (is_to_ram ? EDU_DMA_TO_RAM : 0));
    return edu_await_interrupt(edu, EDU_INTERRUPT_DMA);
    /* STUB
    (void)edu, (void)from, (void)to, (void)count, (void)is_to_ram;
    TODO("edu_transfer: program a transfer, start it, wait for its interrupt");
    END SOLUTION */
}

void edu_interrupted(struct edu *edu) {
    edu_interrupt(edu);
    edu->interrupts++;
}
