/* Lesson 1, host half: the lab device, and the exits that reach it. */
#include <string.h>

#include "host.h"
#include "lab.h"
#include "random.h"

#define FIFO_SIZE 1024

static struct {
    uint8_t registers[LAB_REGISTER_COUNT];
    uint8_t pushed[FIFO_SIZE]; /* what the guest wrote to the FIFO */
    uint32_t pushed_size;
    struct random pops; /* what the guest will read from it */
    uint32_t nonce;
} lab;

/* The guest wrote size bytes to the FIFO. */
static void fifo_push(const uint8_t *bytes, uint32_t size) {
    for (uint32_t i = 0; i < size && lab.pushed_size < FIFO_SIZE; i++)
        lab.pushed[lab.pushed_size++] = bytes[i];
}

/* The guest reads size bytes from the FIFO. */
static void fifo_pop(uint8_t *bytes, uint32_t size) {
    for (uint32_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)random_next(&lab.pops);
}

/*
 * The guest touched a port of the lab device, and KVM_RUN has returned with KVM_EXIT_IO. Serve it:
 * access->address is the port, is_write the direction, and data holds count elements of size bytes
 * each, one after the other. All of them go to the same port. lab.h says what the ports do.
 *
 * The bus lets through only what lies wholly inside the registers or wholly inside the FIFO.
 */
static void lab_access(struct access *access) {
    /* BEGIN SOLUTION */
    for (uint32_t i = 0; i < access->count; i++) {
        uint8_t *element = access->data + (size_t)i * access->size;
        bool is_fifo = access->address >= LAB_FIFO;
        uint8_t *bytes = is_fifo ? NULL : lab.registers + (access->address - LAB_REGISTERS);
        if (is_fifo && access->is_write)
            fifo_push(element, access->size);
        else if (is_fifo)
            fifo_pop(element, access->size);
        else if (access->is_write)
            memcpy(bytes, element, access->size);
        else
            memcpy(element, bytes, access->size);
    }
    /* STUB
    (void)fifo_push; // (void): the compiler need not complain of what is not used yet
    (void)fifo_pop;
    (void)access;
    HOST_TODO("serve the access to the lab device: registers and FIFO, any width, any count");
    END SOLUTION */
}

/* A device in memory: reads of the nonce, writes of the answer. */
static void challenge_access(struct access *access) {
    bool is_nonce = access->address == LAB_CHALLENGE_NONCE;
    if (access->is_write)
        return; /* the record has it */
    memset(access->data, 0, access->size);
    if (is_nonce && access->size == sizeof lab.nonce)
        memcpy(access->data, &lab.nonce, sizeof lab.nonce);
}

static void lab_setup(void) {
    struct random nonces = random_stream(host_seed(), STREAM_NONCE);
    lab.nonce = (uint32_t)random_next(&nonces);
    lab.pops = random_stream(host_seed(), STREAM_FIFO);
    host_claim_pio(LAB_REGISTERS, LAB_REGISTER_COUNT, "lab registers", lab_access);
    host_claim_pio(LAB_FIFO, LAB_FIFO_PORTS, "lab fifo", lab_access);
    host_claim_mmio(LAB_CHALLENGE, 8, "lab challenge", challenge_access);
}

/* KVM's emulator hands over `rep outs` one element at a time, so a run need not show any write with
 * count > 1. The interface allows it all the same: here is one such write, made up. */
static void lab_batch(void) {
    struct random random = random_stream(host_seed(), STREAM_BATCH);
    uint8_t data[6];
    uint32_t before = lab.pushed_size;
    for (uint32_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)random_next(&random);
    lab_access(&(struct access){
        .address = LAB_FIFO, .size = 2, .count = sizeof data / 2, .is_write = true, .data = data});
    event_begin("batch");
    event_bytes("sent", data, sizeof data);
    event_bytes("pushed", lab.pushed + before, lab.pushed_size - before);
    event_end();
}

/* What the device holds in the end is evidence for the checks. */
static void lab_end(void) {
    event_begin("lab");
    event_bytes("registers", lab.registers, sizeof lab.registers);
    event_bytes("pushed", lab.pushed, lab.pushed_size);
    event_end();
    if (lab.pushed_size > 0) /* the FIFO is written */
        lab_batch();
}

const struct host_half host_half = {.setup = lab_setup, .end = lab_end};
