/* Give the host half the command that command= names. Then write and read, from ring 3, in the page that
 * the host has taken away. (From ring 0, a KVM that interprets it takes the page for MMIO.) */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

#define USER_GVA (UINT64_C(1) << 39) /* three large pages: where the code is, a stack, the slot */
#define STACK_GVA (USER_GVA + LARGE_PAGE_SIZE)
#define SLOT_GVA (USER_GVA + 2 * LARGE_PAGE_SIZE)

USER_CODE static void user_touch(uint64_t gva) {
    volatile uint32_t *word = (volatile uint32_t *)gva;
    word[0] = 0x12345678;
    word[1] = word[0];
    USER_RETURN(word[1]);
}

static void map_large(uint64_t *table, uint64_t gva, uint64_t gpa) {
    table[page_index(gva, 2)] = gpa | PTE_PRESENT | PTE_WRITABLE | PTE_USER | PTE_LARGE;
}

static void tables_make(uint64_t root_gpa) {
    uint64_t *table = page_table(root_gpa);
    for (unsigned level = 4; level > 2; level--) {
        table[page_index(USER_GVA, level)] = page_alloc() | PTE_PRESENT | PTE_WRITABLE | PTE_USER;
        table = page_table(table[page_index(USER_GVA, level)]);
    }
    map_large(table, USER_GVA, (uint64_t)user_start & ~(LARGE_PAGE_SIZE - 1));
    map_large(table, STACK_GVA, PAGE_POOL_END);
    map_large(table, SLOT_GVA, LAB_SLOT);
}

void guest_main(void) {
    char command[4];
    uint64_t root_gpa = address_space_create();
    tables_make(root_gpa);
    cr3_write(root_gpa);
    guest_parameter("command", command, sizeof command);
    out8(LAB_COMMAND, (uint8_t)(command[0] - '0'));
    uint64_t entry_gva = USER_GVA + ((uint64_t)user_touch & (LARGE_PAGE_SIZE - 1));
    printf("read %lx\n", user_call(entry_gva, STACK_GVA + PAGE_SIZE, SLOT_GVA + PAGE_SIZE));
}
