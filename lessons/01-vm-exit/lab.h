/* What the two halves of lesson 1 agree on: the lab device, as its data sheet would put it. */
#pragma once

/*
 * LAB_REGISTERS: eight ports, each one byte of storage. A wider access reaches the ports that
 * follow, least significant byte first: 16 bits written to port 0x502 are the bytes at 0x502 and
 * 0x503.
 */
#define LAB_REGISTERS 0x500
#define LAB_REGISTER_COUNT 8

/*
 * LAB_FIFO: one port behind which bytes queue up. A write of 1, 2 or 4 bytes appends them, least
 * significant first; a read takes the next 1, 2 or 4. It occupies four ports, so that all widths
 * fit, and is always accessed at the first.
 */
#define LAB_FIFO 0x510
#define LAB_FIFO_PORTS 4

/*
 * LAB_CHALLENGE: two 32-bit registers in memory. Reading the first gives a nonce; the second wants
 * the nonce rotated left by 8 bits, xor EBX of CPUID leaf 0x40000000.
 */
#define LAB_CHALLENGE 0xd0000000
#define LAB_CHALLENGE_NONCE (LAB_CHALLENGE + 0)
#define LAB_CHALLENGE_ANSWER (LAB_CHALLENGE + 4)

/* Streams of random.h that the seed is turned into. */
enum { STREAM_NONCE = 1, STREAM_FIFO = 2, STREAM_GUEST = 3, STREAM_BATCH = 4 };
