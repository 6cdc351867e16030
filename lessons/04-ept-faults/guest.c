/* Lesson 4, guest half: nothing to write here. It reads and writes where the plan says, and keeps what it
 * has read for the host half. The guest cannot tell who put the memory there. */
#include "guest.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/*
 * The accesses are made in ring 3, where even a KVM that interprets the guest's kernel lets the CPU
 * execute them. Ring 3 sees the gpas of the regions at gva = gpa + WINDOW, and these pages:
 */
#define WINDOW (UINT64_C(1) << 39) /* the second slot of the PML4 */
#define USER_GVA (UINT64_C(2) << 39)
#define STACK_GVA (USER_GVA + 16 * PAGE_SIZE)
#define SCRIPT_GVA (USER_GVA + 32 * PAGE_SIZE)

static struct plan plan;
static struct step *script; /* one page */
_Static_assert(sizeof plan.step[0] + sizeof *script <= PAGE_SIZE, "a stage fits, and its end");

/* ---- page tables: lesson 2 explains them ---- */

enum { WINDOW_PDPT, WINDOW_PD, USER_PDPT, USER_PD, USER_PT, TABLES };
static uint64_t tables[TABLES][512] __attribute__((aligned(4096)));

#define FOR_USER (PTE_PRESENT | PTE_WRITABLE | PTE_USER)

static void user_map(uint64_t gva, uint64_t gpa) {
    tables[USER_PT][page_index(gva, 1)] = gpa | FOR_USER;
}

static void tables_make(uint64_t *root) {
    uint64_t window_gva = WINDOW + REGIONS_GPA;
    root[page_index(window_gva, 4)] = (uint64_t)tables[WINDOW_PDPT] | FOR_USER;
    tables[WINDOW_PDPT][page_index(window_gva, 3)] = (uint64_t)tables[WINDOW_PD] | FOR_USER;
    for (uint64_t i = 0; i < REGIONS_SIZE / LARGE_PAGE_SIZE; i++)
        tables[WINDOW_PD][i] = (REGIONS_GPA + i * LARGE_PAGE_SIZE) | FOR_USER | PTE_LARGE;
    root[page_index(USER_GVA, 4)] = (uint64_t)tables[USER_PDPT] | FOR_USER;
    tables[USER_PDPT][page_index(USER_GVA, 3)] = (uint64_t)tables[USER_PD] | FOR_USER;
    tables[USER_PD][page_index(USER_GVA, 2)] = (uint64_t)tables[USER_PT] | FOR_USER;
    for (uint64_t at = 0; at < (uint64_t)(user_end - user_start); at += PAGE_SIZE)
        user_map(USER_GVA + at, (uint64_t)user_start + at);
    user_map(STACK_GVA, page_alloc());
    user_map(SCRIPT_GVA, (uint64_t)script);
}

/* ---- the accesses ---- */

/* Steps up to one with gpa 0. Each access is one plain mov, which KVM can emulate if it must. */
USER_CODE static void script_play(uint64_t script_gva) {
    for (struct step *step = (struct step *)script_gva; step->gpa; step++) {
        uint64_t gva = WINDOW + step->gpa;
        if (step->is_write)
            __asm__ volatile("movq %0, (%1)" : : "r"(step->value), "r"(gva) : "memory");
        else
            __asm__ volatile("movq (%1), %0" : "=r"(step->value) : "r"(gva) : "memory");
    }
    USER_RETURN(0);
}

static void stage_play(enum stage stage) {
    unsigned steps = plan.steps[stage];
    memcpy(script, plan.step[stage], steps * sizeof *script);
    script[steps] = (struct step){0};
    out8(LAB_BEGIN, (uint8_t)stage);
    user_call(USER_GVA + ((uint64_t)script_play - (uint64_t)user_start), STACK_GVA + PAGE_SIZE,
              SCRIPT_GVA);
    out8(LAB_END, (uint8_t)stage);
    printf("%s: %u accesses\n", stage_names[stage], steps);
}

void guest_main(void) {
    plan_make(&plan, guest_seed());
    printf("lesson 4: EPT faults\n");
    script = (struct step *)page_alloc();
    uint64_t root_gpa = address_space_create();
    tables_make(page_table(root_gpa));
    cr3_write(root_gpa);
    out32(LAB_SCRIPT, (uint32_t)(uint64_t)script);
    for (unsigned stage = 0; stage < STAGES; stage++)
        stage_play(stage);
}
