/* Lesson 1, guest half: five ways out of a virtual machine. */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/*
 * Prove that you can talk to a device in memory: read the nonce, once, and write the answer that
 * lab.h asks for. CPUID exits, too, but not to the VMM: KVM answers it inside the kernel.
 */
static void challenge_answer(void) {
    /* BEGIN SOLUTION */
    uint32_t nonce = mmio_read32(LAB_CHALLENGE_NONCE);
    uint32_t name = cpuid(0x40000000, 0).ebx;
    mmio_write32(LAB_CHALLENGE_ANSWER, (nonce << 8 | nonce >> 24) ^ name);
    /* STUB
    TODO("answer the challenge: read the nonce, write back what lab.h asks for");
    END SOLUTION */
}

/* One write and one read of the register bank, of the same width, at ports of their own. */
static void registers_access(struct random *random) {
    uint32_t value = (uint32_t)random_next(random);
    unsigned shift = (unsigned)random_below(random, 3);
    unsigned places = LAB_REGISTER_COUNT >> shift;
    uint16_t to = (uint16_t)(LAB_REGISTERS + (random_below(random, places) << shift));
    uint16_t from = (uint16_t)(LAB_REGISTERS + (random_below(random, places) << shift));
    switch (1 << shift) {
    case 1:
        out8(to, (uint8_t)value);
        in8(from);
        break;
    case 2:
        out16(to, (uint16_t)value);
        in16(from);
        break;
    default:
        out32(to, value);
        in32(from);
        break;
    }
}

/* Send count bytes as bytes, as words and as double words; count is a multiple of 4. */
static void fifo_send(const uint8_t *bytes, uint64_t count) {
    out8_string(LAB_FIFO, bytes, count);
    out16_string(LAB_FIFO, bytes, count / 2);
    out32_string(LAB_FIFO, bytes, count / 4);
}

static void fifo_receive(uint8_t *bytes, uint64_t count) {
    in8_string(LAB_FIFO, bytes, count);
    in16_string(LAB_FIFO, bytes + count, count / 2);
    in32_string(LAB_FIFO, bytes + 2 * count, count / 4);
}

void guest_main(void) {
    static uint8_t sent[32];
    static uint8_t received[3 * sizeof sent];
    struct random random = random_stream(guest_seed(), STREAM_GUEST);
    uint64_t count = 8 + 4 * random_below(&random, 7);

    printf("lesson 1: what a VM exit is\n");
    challenge_answer();
    printf("challenge: answered by MMIO\n");
    for (unsigned i = 0; i < 24; i++)
        registers_access(&random);
    printf("registers: 24 writes and 24 reads by port I/O\n");
    for (uint64_t i = 0; i < count; i++)
        sent[i] = (uint8_t)random_next(&random);
    fifo_send(sent, count);
    fifo_receive(received, count);
    out8_string(LAB_FIFO, received, 3 * count);
    printf("fifo: %lu bytes each way by string I/O\n", 3 * count);
    printf("halt: nothing left to do\n");
    halt();
}
