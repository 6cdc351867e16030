/*
 * The pseudo-random numbers that the seed becomes: every value a lesson expects comes from here.
 * The guest, the host half and the tests (tools/kvmlab/random.py) compute the same sequence, so a
 * test can know what a guest was asked for without asking the guest.
 *
 * SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
 */
#pragma once

#include <stdint.h>

struct random {
    uint64_t state;
};

static inline uint64_t random_next(struct random *random) {
    uint64_t z = random->state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/* An independent sequence for each purpose that a seed serves; stream numbers are the caller's. */
static inline struct random random_stream(uint64_t seed, uint64_t stream) {
    struct random of_stream = {stream};
    return (struct random){seed ^ random_next(&of_stream)};
}

/* A number from 0 to bound - 1. bound is not 0; its bias of at most bound / 2^64 is accepted. */
static inline uint64_t random_below(struct random *random, uint64_t bound) {
    return random_next(random) % bound;
}
