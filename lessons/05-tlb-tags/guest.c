/* Lesson 5, guest half: address spaces with PCIDs, global pages, and what to drop when one changes. */
#include "guest.h"
#include "mmu.h"
#include "plan.h"
#include "trials.h"

MACHINE(.memory_mib = MEMORY_MIB, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

static struct plan plan;

/* An address space. pcid: what its TLB entries are tagged with; 0: it has none at the moment, so none of
 * them is its own. (PCID 0 itself is the boot space's.) Only pcid_assign() gives PCIDs and takes them
 * away. */
struct space {
    uint64_t root;
    uint16_t pcid;
};
static struct space spaces[SPACES];
static struct space *current; /* the one that CR3 points to; NULL: the boot space */

/* ---- what you write: with the functions of mmu.h, for what is not noted does not count ---- */

/*
 * Switch on global pages and PCIDs: CR4.PGE and CR4.PCIDE. PCIDE can be set only while CR3[11:0] is 0,
 * and whoever loaded this kernel has left something there.
 */
static void pcid_enable(void) {
    /* BEGIN SOLUTION */
    mmu_cr3_write(cr3_read() & ~CR3_PCID);
    mmu_cr4_write(mmu_cr4_read() | X86_CR4_PGE | X86_CR4_PCIDE);
    /* STUB
    TODO("pcid_enable: clear CR3[11:0], then set CR4.PGE and CR4.PCIDE");
    END SOLUTION */
}

/* What to load into CR3 for these tables and this PCID. keep: what the TLB holds for the PCID is
 * right, and need not be dropped. */
static uint64_t cr3_value(uint64_t root, uint16_t pcid, bool keep) {
    /* BEGIN SOLUTION */
    return root | pcid | (keep ? CR3_KEEP : 0);
    /* STUB
    (void)root, (void)pcid, (void)keep;
    TODO("cr3_value: root, PCID and bit 63 in one number");
    END SOLUTION */
}

/* For pcid_assign(). Which space has plan.pcid[i]? NULL: nobody has had it yet. */
static struct space *owner[PCIDS];
static unsigned next_pcid; /* not a PCID: how many were given away; modulo PCIDS: which i is next */

/*
 * The space is about to run: see to it that it has a PCID. One that has a PCID keeps it. Else it gets
 * the next in turn; whoever had that one until now has none any more, and learns it from the `pcid` in
 * its struct space.
 *
 * True: all that the TLB may hold with this PCID is of this space.
 */
static bool pcid_assign(struct space *space) {
    /* BEGIN SOLUTION */
    if (space->pcid)
        return true;
    unsigned i = next_pcid++ % PCIDS;
    if (owner[i])
        owner[i]->pcid = 0;
    owner[i] = space;
    space->pcid = plan.pcid[i];
    return false;
    /* STUB
    (void)space, (void)owner, (void)next_pcid;
    TODO("pcid_assign: the PCID that the space has, or the next in turn");
    END SOLUTION */
}

/* The page at gva of this space, which may be the current one or not, gets another frame. Its entry is
 * present and writable, as before, and has no other flag. Nothing else that the TLB holds is to be
 * dropped. */
static void page_remap(struct space *space, uint64_t gva, uint64_t gpa) {
    /* BEGIN SOLUTION */
    mmu_entry_write(space->root, gva, gpa | PTE_PRESENT | PTE_WRITABLE);
    if (space == current)
        mmu_invlpg(gva);
    else if (space->pcid)
        mmu_invpcid(INVPCID_ADDRESS, space->pcid, gva);
    /* STUB
    (void)space, (void)gva, (void)gpa;
    TODO("page_remap: change the entry, then drop what the TLB may hold of the old one");
    END SOLUTION */
}

/* All pages of this space have just got other frames; it may be the current one or not. Drop all that
 * the TLB may hold of it, at once, and nothing of another space. */
static void space_forget(struct space *space) {
    /* BEGIN SOLUTION */
    if (space->pcid)
        mmu_invpcid(INVPCID_CONTEXT, space->pcid, 0);
    /* STUB
    (void)space;
    TODO("space_forget: drop all that the TLB may hold of this space");
    END SOLUTION */
}

/*
 * The page at gva belongs to the kernel: all spaces share the table that its entry is in (the way there may
 * begin at any space's root), so it is the same in all of them, and its TLB entry is to serve all of them.
 * Let it point to this frame, present and writable. It may have pointed to another one before.
 */
static void kernel_page_map(uint64_t gva, uint64_t gpa) {
    /* BEGIN SOLUTION */
    mmu_entry_write(current->root, gva, gpa | PTE_PRESENT | PTE_WRITABLE | PTE_GLOBAL);
    mmu_invlpg(gva);
    /* STUB
    (void)gva, (void)gpa;
    TODO("kernel_page_map: a global page; then drop what the TLB may hold of the old entry");
    END SOLUTION */
}

/* All pages of the kernel have just got other frames. Drop all that the TLB may hold of them, at once;
 * whatever goes with them may go. */
static void kernel_forget(void) {
    /* BEGIN SOLUTION */
    mmu_invpcid(INVPCID_ALL_AND_GLOBALS, 0, 0);
    /* STUB
    TODO("kernel_forget: drop the global entries, too");
    END SOLUTION */
}

/* ---- the stages that put it to use ---- */

static void space_switch(struct space *space) {
    bool keep = pcid_assign(space);
    mmu_cr3_write(cr3_value(space->root, space->pcid, keep));
    current = space;
}

/* The kernel's part of each space: one slot of the top-level table, and behind it the same tables. */
static uint64_t kernel_tables;

static uint64_t space_create(void) {
    uint64_t root = address_space_create();
    page_table(root)[page_index(plan.kernel_gva, 4)] = kernel_tables | PTE_PRESENT | PTE_WRITABLE;
    return root;
}

static void spaces_create(void) {
    kernel_tables = page_alloc();
    for (unsigned i = 0; i < SPACES; i++) {
        spaces[i].root = space_create();
        mmu_note(NOTE_SPACE, i, spaces[i].root, 0, 0);
        for (unsigned page = 0; page < PAGES; page++)
            mmu_entry_write(spaces[i].root, plan.page_gva[page],
                            (plan.first_gpa[i] + page * PAGE_SIZE) | PTE_PRESENT | PTE_WRITABLE);
    }
}

static void look_around(void) {
    for (unsigned page = 0; page < PAGES; page++)
        mmu_look(plan.page_gva[page]);
    for (unsigned page = 0; page < KERNEL_PAGES; page++)
        if (*mmu_entry(current->root, kernel_page_gva(&plan, page)) & PTE_PRESENT)
            mmu_look(kernel_page_gva(&plan, page));
}

static void pages_replace(struct space *space, uint64_t frame_gpa) {
    for (unsigned page = 0; page < PAGES; page++)
        mmu_entry_write(space->root, plan.page_gva[page],
                        (frame_gpa + page * PAGE_SIZE) | PTE_PRESENT | PTE_WRITABLE);
}

/* Only their frames: whether they are global is what kernel_page_map() has made of them. */
static void kernel_pages_replace(uint64_t frame_gpa) {
    for (unsigned page = 0; page < KERNEL_PAGES; page++) {
        uint64_t gva = kernel_page_gva(&plan, page);
        uint64_t entry = *mmu_entry(current->root, gva);
        if (entry & PTE_PRESENT)
            mmu_entry_write(current->root, gva,
                            (entry & ~PTE_ADDRESS) | (frame_gpa + page * PAGE_SIZE));
    }
}

static const char *const stage_names[] = {
    [STAGE_ENABLE] = "enable: PCIDs and global pages are on",
    [STAGE_SWITCH] = "switch: 6 spaces, 3 PCIDs",
    [STAGE_REMAP] = "remap: single pages of a space",
    [STAGE_FORGET] = "forget: all pages of a space",
    [STAGE_KERNEL] = "kernel: single pages of all spaces",
    [STAGE_KERNEL_ALL] = "kernel: all its pages",
    [STAGE_MIXED] = "mixed: all of it, in any order",
};

static void stage_end(enum stage stage) {
    out8(LAB_STAGE, (uint8_t)stage);
    printf("%s\n", stage_names[stage]);
}

static void step_take(const struct step *step) {
    struct space *space = &spaces[step->space];
    switch (step->kind) {
    case STEP_SWITCH: space_switch(space); break;
    case STEP_LOOK: look_around(); break;
    case STEP_REMAP: page_remap(space, plan.page_gva[step->page], step->frame_gpa); break;
    case STEP_FORGET:
        pages_replace(space, step->frame_gpa);
        space_forget(space);
        break;
    case STEP_KERNEL: kernel_page_map(kernel_page_gva(&plan, step->page), step->frame_gpa); break;
    case STEP_KERNEL_ALL:
        kernel_pages_replace(step->frame_gpa);
        kernel_forget();
        break;
    case STEP_END: stage_end(step->stage); break;
    }
}

/* ---- trials: an entry is changed, and then too little happens, or just enough ---- */

static uint64_t trial_root[2];

static uint64_t trial_cr3(unsigned space, bool keep) {
    return trial_root[space] | plan.trial_pcid[space] | (keep ? CR3_KEEP : 0);
}

static void trial_act(enum trial_act act, uint64_t gva) {
    uint16_t own = plan.trial_pcid[0];
    uint16_t other = plan.trial_pcid[1];
    uint16_t none = 0;
    uint64_t cr4 = mmu_cr4_read();
    switch (act) {
    case ACT_NOTHING: break;
    case ACT_INVLPG: mmu_invlpg(gva); break;
    case ACT_INVLPG_BESIDE: mmu_invlpg(gva + PAGE_SIZE); break;
    case ACT_ADDRESS: mmu_invpcid(INVPCID_ADDRESS, own, gva); break;
    case ACT_ADDRESS_OTHER: mmu_invpcid(INVPCID_ADDRESS, other, gva); break;
    case ACT_CONTEXT: mmu_invpcid(INVPCID_CONTEXT, own, 0); break;
    case ACT_CONTEXT_OTHER: mmu_invpcid(INVPCID_CONTEXT, other, 0); break;
    case ACT_ALL: mmu_invpcid(INVPCID_ALL, none, 0); break;
    case ACT_ALL_AND_GLOBALS: mmu_invpcid(INVPCID_ALL_AND_GLOBALS, none, 0); break;
    case ACT_CR3_KEEP: mmu_cr3_write(trial_cr3(0, true)); break;
    case ACT_CR3: mmu_cr3_write(trial_cr3(0, false)); break;
    case ACT_AWAY:
        mmu_cr3_write(trial_cr3(1, false));
        mmu_cr3_write(trial_cr3(0, true));
        break;
    case ACT_INVLPG_AWAY:
        mmu_cr3_write(trial_cr3(1, true));
        mmu_invlpg(gva);
        mmu_cr3_write(trial_cr3(0, true));
        break;
    case ACT_PGE:
        mmu_cr4_write(cr4 ^ X86_CR4_PGE);
        mmu_cr4_write(cr4);
        break;
    }
}

/* The word that was seen after the change. Then the change is made good. */
static uint64_t trial_try(const struct trial *trial) {
    uint64_t gva = trial->is_global ? plan.global_gva : plan.trial_gva;
    uint64_t flags = PTE_PRESENT | PTE_WRITABLE | (trial->is_global ? PTE_GLOBAL : 0);
    mmu_entry_write(trial_root[0], gva, plan.trial_gpa[0] | flags);
    mmu_invlpg(gva);
    mmu_look(gva);
    mmu_note(NOTE_TRIAL, (uint32_t)(trial - trials), 0, gva, 0);
    mmu_entry_write(trial_root[0], gva, plan.trial_gpa[1] | flags);
    trial_act(trial->act, gva);
    uint64_t seen = *(volatile uint64_t *)gva;
    mmu_note(NOTE_TRY, (uint32_t)(trial - trials), 0, gva, seen);
    mmu_invlpg(gva);
    mmu_look(gva);
    return seen;
}

static void stage_trials(void) {
    static bool is_old[TRIALS];
    for (unsigned i = 0; i < 2; i++)
        trial_root[i] = space_create();
    for (unsigned i = 0; i < 2; i++)
        mmu_cr3_write(trial_cr3(1 - i, false));
    uint64_t old = *(uint64_t *)plan.trial_gpa[0];
    for (unsigned i = 0; i < TRIALS; i++)
        for (unsigned again = 0; again < TRIES; again++)
            is_old[i] |= trial_try(&trials[i]) == old;
    out8(LAB_STAGE, STAGE_TRIALS);
    printf("trials: a page gets another frame, and then\n");
    for (unsigned i = 0; i < TRIALS; i++) {
        out8(LAB_VERDICT, (uint8_t)i);
        printf("  %s: %s (permitted: %s)\n", trials[i].name, is_old[i] ? "old" : "new",
               in8(LAB_VERDICT) ? "new" : "old or new");
    }
}

static void tags_require(void) {
    if (!(cpuid(1, 0).ecx & CPUID_1_ECX_PCID))
        CANNOT("its CPU has no PCID");
    if (cpuid(0, 0).eax < 7 || !(cpuid(7, 0).ebx & CPUID_7_EBX_INVPCID))
        CANNOT("its CPU has no INVPCID");
}

/* Touch the log first: its pages shall not cause exits later, when KVM has to find memory for them. */
static void log_prepare(void) {
    memset(&mmu_log, 0, sizeof mmu_log);
    out32(LAB_LOG, (uint32_t)(uintptr_t)&mmu_log);
}

void guest_main(void) {
    tags_require();
    printf("lesson 5: TLB tags\n");
    plan_make(&plan, guest_seed());
    log_prepare();
    cr3_write(cr3_read() | plan.cr3_caching);
    pcid_enable();
    spaces_create();
    for (unsigned i = 0; i < plan.steps; i++) {
        mmu_note(NOTE_STEP, i, 0, 0, 0);
        step_take(&plan.step[i]);
    }
    stage_trials();
}
