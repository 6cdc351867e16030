/* A host half that claims ranges, well or badly: which ones, the seed says. */
#include "host.h"

#define RANGES_MAX 32 /* of the bus; four are the machine's own */

static void ignore(struct access *access) { (void)access; }

static void pio(uint16_t first, uint32_t ports) { host_claim_pio(first, ports, "mine", ignore); }
static void mmio(gpa_t first, uint64_t bytes) { host_claim_mmio(first, bytes, "mine", ignore); }

static void setup(void) {
    switch (host_seed()) {
    case 0: pio(0x500, 8), pio(0x508, 1), pio(0x4ff, 1), pio(0xffff, 1); break;
    case 1: mmio(0x1000000, 1), mmio(0xd0000000, 8), mmio(UINT64_MAX, 1); break;
    case 2: pio(0x3ff, 1); break;
    case 3: pio(0xf0, 8); break;
    case 4: pio(0, 0x10000); break;
    case 5: mmio(0xd0000000, 0x1000), mmio(0xd0000fff, 1); break;
    case 6: pio(0x500, 0); break;
    case 7: pio(0xffff, 2); break;
    case 8: mmio(UINT64_MAX - 7, 9); break;
    case 9: mmio((UINT64_C(16) << 20) - 1, 2); break; /* the last byte of memory */
    case 10: mmio(0xfee00000, 0), pio(0, 0); break;
    case 11:
        for (;;)
            ;
    case 12:
        for (uint16_t i = 0; i < RANGES_MAX; i++)
            pio((uint16_t)(0x1000 + i), 1);
    }
}

const struct host_half host_half = {.setup = setup};
