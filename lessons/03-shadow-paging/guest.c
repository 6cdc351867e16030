/* Lesson 3, guest half: a hypervisor without EPT. It runs an inner machine in ring 3, whose page tables
 * the CPU never sees: what is in CR3 is a shadow of them that the hypervisor makes. */
#include "guest.h"
#include "plan.h"

MACHINE(.memory_mib = MEMORY_MIB, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/* ---- the inner machine, and what the hypervisor keeps of it ---- */

#define PERMISSIONS (PTE_WRITABLE | PTE_USER | PTE_NO_EXECUTE)
#define SHADOWS_MAX 64
#define MAPPINGS_MAX 4 /* no inner page is mapped at more places at once */

/* The shadow of an inner table. Entry i of the one stands for entry i of the other. */
struct shadow {
    uint64_t gpa;
    unsigned level; /* at which it is used. 4: a PML4, ... 1: a page table */
};

/* A page of the inner machine's memory. */
struct page {
    uint64_t gpa;   /* where it really is */
    bool is_table;  /* one of the inner page tables: shadowed, and protected from writes */
    bool is_unsync; /* a table that is not protected at present: its shadow may be out of date */
    struct shadow *shadow[5]; /* of the table that it is, for each level it is used at; or NULL */
    uint64_t *mapped_by[MAPPINGS_MAX]; /* leaf entries of shadows that point to it, or NULL */
};

static struct plan plan;
static enum policy policy;
static uint64_t inner_cr3; /* an inner gpa */
static struct page pages[INNER_PAGES];
static struct page *owner[FRAMES]; /* of each frame from FRAMES_GPA on, if it has one */
static struct shadow shadows[SHADOWS_MAX];
static unsigned shadows_count;

/* The page at this inner gpa (an address, without the flags of an entry); NULL if the inner machine has
 * no memory there. */
static struct page *page_at(uint64_t inner_gpa) {
    return inner_gpa / PAGE_SIZE < INNER_PAGES ? &pages[inner_gpa / PAGE_SIZE] : NULL;
}

/* A new shadow, empty. The first slot of a PML4 is the hypervisor's own: it must be there to serve the
 * faults of the inner program, whatever space that is in. */
static struct shadow *shadow_add(unsigned level) {
    if (shadows_count == SHADOWS_MAX)
        PANIC("shadow_add: there are more shadows than inner tables");
    struct shadow *shadow = &shadows[shadows_count++];
    *shadow = (struct shadow){level == 4 ? address_space_create() : page_alloc(), level};
    return shadow;
}

/* The place in mapped_by that has this entry, NULL for a free one; NULL if there is none. */
static uint64_t **mapping_find(struct page *page, const uint64_t *entry) {
    for (unsigned i = 0; i < MAPPINGS_MAX; i++)
        if (page->mapped_by[i] == entry)
            return &page->mapped_by[i];
    return NULL;
}

/* Empty an entry of a shadow, of any level. If it maps a page, the page must not know it any more. */
static void entry_drop(const struct shadow *shadow, unsigned index) {
    uint64_t *entry = &page_table(shadow->gpa)[index];
    uint64_t frame = ((*entry & PTE_ADDRESS) - FRAMES_GPA) / PAGE_SIZE;
    if (shadow->level == 4 && index == 0)
        return; /* the hypervisor lives there */
    if (shadow->level == 1 && *entry && frame < FRAMES && owner[frame]) {
        uint64_t **mapping = mapping_find(owner[frame], entry);
        if (mapping)
            *mapping = NULL;
    }
    *entry = 0;
}

/* Let an entry of a page table's shadow point to this page. */
static void leaf_set(const struct shadow *shadow, unsigned index, struct page *page,
                     uint64_t permissions) {
    uint64_t *entry = &page_table(shadow->gpa)[index];
    entry_drop(shadow, index);
    uint64_t **free = page ? mapping_find(page, NULL) : NULL;
    if (page && free) {
        *free = entry;
        *entry = page->gpa | permissions | PTE_PRESENT;
    } else {
        PANIC(page ? "leaf_set: more shadow entries point to this page than inner entries do; is a "
                     "new shadow made where there is one?"
                   : "leaf_set: there is no page to map; has inner_walk() set walk.page?");
    }
}

/* Forget all shadows. The tables in them are not given back: there are enough. */
static void shadows_forget(void) {
    shadows_count = 0;
    for (unsigned i = 0; i < INNER_PAGES; i++)
        pages[i] = (struct page){.gpa = pages[i].gpa};
}

/* Make the CPU forget all translations of the current space. */
static void tlb_flush(void) { cr3_write(cr3_read()); }

/* ---- what you write: shadows and their tables ---- */

/* Wherever this page is mapped now, a write to it by the inner program is to fault. (What is mapped later
 * is shadow_fill's business.) */
static void page_protect(struct page *page) {
    /* BEGIN SOLUTION */
    for (unsigned at = 0; at < MAPPINGS_MAX; at++)
        if (page->mapped_by[at])
            *page->mapped_by[at] &= ~PTE_WRITABLE;
    tlb_flush();
    /* STUB
    (void)page, (void)tlb_flush;
    TODO("page_protect: take the write permission out of all shadow entries that map the page");
    END SOLUTION */
}

/* The shadow that the inner table at inner_gpa has for this level. If it has none, make one (shadow_add).
 * Its page is a table from then on (is_table), and protected, so that no write to it goes unseen. Inner
 * memory is there: page_at() is not NULL. */
static struct shadow *shadow_of(uint64_t inner_gpa, unsigned level) {
    /* BEGIN SOLUTION */
    struct page *table = page_at(inner_gpa);
    if (!table->shadow[level]) {
        table->is_table = true;
        page_protect(table);
        table->shadow[level] = shadow_add(level);
    }
    return table->shadow[level];
    /* STUB
    (void)inner_gpa, (void)level, (void)page_at, (void)shadow_add, (void)page_protect;
    TODO("shadow_of: find the shadow of this inner table, or make one and protect the table");
    END SOLUTION */
}

/* ---- what you write: page faults ---- */

/*
 * Where a walk of the inner tables has led. entry has the inner entries that were read, by level, 4 to 1;
 * the one that ended the walk is among them, and those that it did not come to are NULL. permits has
 * PTE_WRITABLE and PTE_USER if all entries of the path do, and PTE_NO_EXECUTE if one does.
 */
struct walk {
    enum { WALK_MAPPED, WALK_NOT_PRESENT, WALK_BEYOND_MEMORY } end;
    uint64_t *entry[5];
    uint64_t permits;
    struct page *page; /* what the leaf points to, if WALK_MAPPED */
};

/* Translate gva as the inner CPU would, from the table at inner_cr3 down to the leaf. Each address in
 * an inner entry is an inner gpa: page_at() says where that really is, if anywhere. */
static struct walk inner_walk(uint64_t gva) {
    /* BEGIN SOLUTION */
    struct walk walk = {.permits = PTE_WRITABLE | PTE_USER, .end = WALK_NOT_PRESENT};
    struct page *page = page_at(inner_cr3);
    for (unsigned level = 4; page && level >= 1; level--) {
        uint64_t *entry = &page_table(page->gpa)[page_index(gva, level)];
        walk.entry[level] = entry;
        if (!(*entry & PTE_PRESENT))
            return walk;
        walk.permits &= *entry | PTE_NO_EXECUTE;
        walk.permits |= *entry & PTE_NO_EXECUTE;
        page = page_at(*entry & PTE_ADDRESS);
    }
    walk.end = page ? WALK_MAPPED : WALK_BEYOND_MEMORY;
    walk.page = page;
    return walk;
    /* STUB
    (void)gva;
    TODO("inner_walk: follow the inner tables, level by level, from inner_cr3");
    END SOLUTION */
}

/*
 * The CPU has faulted on the shadow, with this error code. Would the inner CPU have faulted on the
 * inner tables? If not: 0, for this is a shadow miss, of which the inner program must not know. If so:
 * the error code that it must see. What was attempted (PF_ERROR_WRITE, _USER, _FETCH) is the same for
 * both. PF_ERROR_PRESENT and PF_ERROR_RESERVED say something of the tables, and must be said of the
 * inner ones. An entry that points beyond the inner memory has a reserved bit set, and is present.
 */
static uint64_t inner_error(const struct walk *walk, uint64_t error_code) {
    /* BEGIN SOLUTION */
    uint64_t attempt = error_code & (PF_ERROR_WRITE | PF_ERROR_USER | PF_ERROR_FETCH);
    if (walk->end == WALK_NOT_PRESENT)
        return attempt;
    if (walk->end == WALK_BEYOND_MEMORY)
        return attempt | PF_ERROR_PRESENT | PF_ERROR_RESERVED;
    bool is_forbidden = !(walk->permits & PTE_USER) ||
                        ((attempt & PF_ERROR_WRITE) && !(walk->permits & PTE_WRITABLE)) ||
                        ((attempt & PF_ERROR_FETCH) && (walk->permits & PTE_NO_EXECUTE));
    return is_forbidden ? attempt | PF_ERROR_PRESENT : 0;
    /* STUB
    (void)walk, (void)error_code;
    TODO("inner_error: 0 for a shadow miss, else the error code of the inner machine's own fault");
    END SOLUTION */
}

/* The inner CPU makes this access: set the accessed bits of the path, and for a write the dirty bit of
 * the leaf. The real CPU does so in the shadow, where the inner program does not look. */
static void accessed_dirty_set(const struct walk *walk, bool is_write) {
    /* BEGIN SOLUTION */
    for (unsigned level = 1; level <= 4; level++)
        *walk->entry[level] |= PTE_ACCESSED;
    if (is_write)
        *walk->entry[1] |= PTE_DIRTY;
    /* STUB
    (void)walk, (void)is_write;
    TODO("accessed_dirty_set: set in the inner entries what a CPU sets when it uses them");
    END SOLUTION */
}

/*
 * A shadow miss: give the shadow what the CPU needs for this access. An entry above the leaf points to
 * the shadow of the table that the inner entry points to. The leaf points to the page itself (leaf_set).
 * Each entry has the permissions of its inner one. But two things keep a leaf from being writable for
 * now: the inner leaf is not dirty, so that the first write must be seen; or the page is an inner table,
 * and not one that is out of sync.
 */
static void shadow_fill(uint64_t gva, const struct walk *walk) {
    /* BEGIN SOLUTION */
    struct shadow *shadow = shadow_of(inner_cr3, 4);
    for (unsigned level = 4; level > 1; level--) {
        uint64_t inner = *walk->entry[level];
        struct shadow *next = shadow_of(inner & PTE_ADDRESS, level - 1);
        page_table(shadow->gpa)[page_index(gva, level)] =
            next->gpa | (inner & PERMISSIONS) | PTE_PRESENT;
        shadow = next;
    }
    uint64_t permissions = *walk->entry[1] & PERMISSIONS;
    if (!(*walk->entry[1] & PTE_DIRTY) || (walk->page->is_table && !walk->page->is_unsync))
        permissions &= ~PTE_WRITABLE;
    leaf_set(shadow, page_index(gva, 1), walk->page, permissions);
    /* STUB
    (void)gva, (void)walk, (void)leaf_set;
    TODO("shadow_fill: link the shadows from the top down, and let the leaf point to the page");
    END SOLUTION */
}

/* ---- what you write: changes of the inner tables ---- */

/* The inner program writes to a table, which is protected. Do the write in its place. No shadow of the
 * table may go on saying what the old entry said. */
static void table_write(struct page *table, unsigned index, uint64_t value) {
    /* BEGIN SOLUTION */
    page_table(table->gpa)[index] = value;
    for (unsigned level = 1; level <= 4; level++)
        if (table->shadow[level])
            entry_drop(table->shadow[level], index);
    tlb_flush();
    /* STUB
    (void)table, (void)index, (void)value, (void)entry_drop;
    TODO("table_write: change the inner entry, and drop what its shadows made of the old one");
    END SOLUTION */
}

/* The inner program executes INVLPG. Its page table may be out of sync: what the shadow of that table
 * has for this page must be gone, and what the TLB has. All other pages keep theirs. (Where all tables
 * are in sync this drops what was right. That is allowed, and the same under every policy.) */
static void inner_invlpg(uint64_t gva) {
    /* BEGIN SOLUTION */
    struct walk inner = inner_walk(gva);
    if (inner.entry[1])
        entry_drop(shadow_of(*inner.entry[2] & PTE_ADDRESS, 1), page_index(gva, 1));
    invlpg(gva);
    /* STUB
    (void)gva;
    TODO("inner_invlpg: drop the leaf entry of this page, if there is a page table for it");
    END SOLUTION */
}

/* POLICY_RESYNC: bring a page table that is out of sync back into it. Any entry may have changed, so its
 * shadow loses them all. Then it is in sync (is_unsync), and writes to it must be seen again. */
static void table_resync(struct page *table) {
    /* BEGIN SOLUTION */
    for (unsigned index = 0; index < 512; index++)
        if (page_table(table->shadow[1]->gpa)[index])
            entry_drop(table->shadow[1], index);
    table->is_unsync = false;
    page_protect(table);
    /* STUB
    (void)table;
    TODO("table_resync: empty the shadow of this table, and protect it again");
    END SOLUTION */
}

/* The inner program loads CR3. The policy says what becomes of the shadows: POLICY_DROP forgets them
 * all (shadows_forget), POLICY_CACHE keeps them, POLICY_RESYNC keeps them, but no table may stay out of
 * sync. Then the CPU must use the shadow of the new root. */
static void inner_cr3_load(uint64_t root) {
    /* BEGIN SOLUTION */
    if (policy == POLICY_DROP)
        shadows_forget();
    for (struct page *page = pages; page < pages + INNER_PAGES; page++)
        if (page->is_unsync)
            table_resync(page);
    inner_cr3 = root;
    cr3_write(shadow_of(root, 4)->gpa);
    /* STUB
    (void)root, (void)shadows_forget, (void)table_resync;
    TODO("inner_cr3_load: do with the shadows what the policy says, then use those of the new root");
    END SOLUTION */
}

/* ---- traps of the inner program ---- */

static const char *const policy_names[POLICIES] = {"drop", "cache", "resync"};

/* What the inner program cost so far, by what was done about it. */
static unsigned cost[SERVED_CR3 + 1];

/* A page fault that comes back at once, and again, has not been served. */
static void progress_check(const struct trap *trap) {
    static struct trap last;
    static unsigned times;
    bool is_same = trap->cr2 == last.cr2 && trap->error_code == last.error_code;
    times = trap->vector == VECTOR_PF && is_same ? times + 1 : 0;
    last = *trap;
    if (times < 8)
        return;
    if (trap->served == SERVED_REFLECTED)
        PANIC("the same page fault again and again: it was reflected, but is none of the inner "
              "program's own");
    PANIC(
        "the same page fault again and again: the shadow was filled, and still does not permit the "
        "access");
}

/* Count a trap, and tell the host half that it has been served. */
static void trap_report(const struct trap_frame *frame, enum served served) {
    static struct trap trap;
    uint64_t cr2 = frame->vector == VECTOR_PF ? cr2_read() : 0;
    cost[served]++;
    trap = (struct trap){frame->vector, frame->error_code, cr2, served};
    out32(LAB_TRAP, (uint32_t)(uintptr_t)&trap);
    progress_check(&trap);
}

/* The inner CPU takes a page fault. It is a simple one: it goes on where rdx points, with CR2 in rsi and
 * the error code in rcx. */
static void fault_reflect(struct trap_frame *frame, uint64_t gva, uint64_t error_code) {
    frame->rip = frame->rdx;
    frame->rsi = gva;
    frame->rcx = error_code;
}

/* A table of level 1, and of no other. */
static bool is_page_table(const struct page *page) {
    return page->shadow[1] && !page->shadow[2] && !page->shadow[3] && !page->shadow[4];
}

#define STORE_SIZE 3 /* bytes of the inner program's only store to tables: mov %rax, (%rsi) */

/* A page fault in ring 3: what your functions are for. */
static enum served inner_fault(struct trap_frame *frame, uint64_t gva) {
    bool is_write = frame->error_code & PF_ERROR_WRITE;
    struct walk walk = inner_walk(gva);
    uint64_t error = inner_error(&walk, frame->error_code);
    if (error) {
        fault_reflect(frame, gva, error);
        return SERVED_REFLECTED;
    }
    accessed_dirty_set(&walk, is_write);
    if (!is_write || !walk.page->is_table || walk.page->is_unsync) {
        shadow_fill(gva, &walk);
        return SERVED_MISS;
    }
    if (policy == POLICY_RESYNC && is_page_table(walk.page)) {
        walk.page->is_unsync = true;
        shadow_fill(gva, &walk); /* the program itself does the write, and those that follow */
        return SERVED_UNSYNC;
    }
    table_write(walk.page, gva / sizeof(uint64_t) % 512, frame->rax);
    frame->rip += STORE_SIZE;
    return SERVED_WRITE;
}

/* False: a fault of the hypervisor itself; or the inner program uses the slot where that one lives, which
 * this hypervisor cannot shadow. */
static bool page_fault(struct trap_frame *frame) {
    if (!(frame->error_code & PF_ERROR_USER) || page_index(cr2_read(), 4) == 0)
        return false;
    trap_report(frame, inner_fault(frame, cr2_read()));
    return true;
}

/* The inner program is its own kernel, but runs in ring 3, where its privileged instructions raise #GP:
 * the hypervisor executes them for it. It has two: mov %rax, %cr3, and invlpg (%rsi). */
static bool general_protection(struct trap_frame *frame) {
    static const uint8_t load_cr3[3] = {0x0f, 0x22, 0xd8};
    static const uint8_t invlpg_rsi[3] = {0x0f, 0x01, 0x3e};
    uint64_t offset = frame->rip - shared_gva(&plan, ROLE_CODE);
    const uint8_t *code = (const uint8_t *)page_at(plan.inner_gpa[ROLE_CODE])->gpa + offset;
    if (offset > PAGE_SIZE - sizeof load_cr3)
        return false;
    bool is_load = !memcmp(code, load_cr3, sizeof load_cr3) && page_at(frame->rax);
    bool is_invlpg = !memcmp(code, invlpg_rsi, sizeof invlpg_rsi) && page_index(frame->rsi, 4) != 0;
    if (is_load)
        inner_cr3_load(frame->rax);
    else if (is_invlpg)
        inner_invlpg(frame->rsi);
    else
        return false;
    frame->rip += sizeof load_cr3;
    trap_report(frame, is_load ? SERVED_CR3 : SERVED_INVLPG);
    return true;
}

/* ---- the inner program ---- */

/* Before each of its accesses, rdx points behind it: there it goes on if the inner CPU faults. */
#define ACCESS(instructions) "lea 1f(%%rip), %%rdx; " instructions "; 1:"

USER_CODE static void inner_program(const struct script *script) {
    struct results *results = (struct results *)script->results_gva;
    for (const struct op *op = script->op;; op++) {
        uint64_t value = op->value;
        uint64_t gva = op->gva;
        uint64_t error = 0;
        if (op->kind == OP_READ)
            __asm__ volatile(ACCESS("mov (%%rsi), %%rax")
                             : "+a"(value), "+S"(gva), "+c"(error)
                             :
                             : "rdx", "memory");
        else if (op->kind == OP_WRITE)
            __asm__ volatile(ACCESS("mov %%rax, (%%rsi)")
                             : "+a"(value), "+S"(gva), "+c"(error)
                             :
                             : "rdx", "memory");
        else if (op->kind == OP_EXECUTE) /* a fault leaves the return address on the stack */
            __asm__ volatile("mov %%rsp, %%rdi; " ACCESS("call *%%rsi") " mov %%rdi, %%rsp"
                             : "+S"(gva), "+c"(error)
                             :
                             : "rdx", "rdi", "memory");
        else if (op->kind == OP_LOAD_CR3)
            __asm__ volatile("mov %0, %%cr3" : : "a"(gva) : "memory");
        else if (op->kind == OP_INVLPG)
            __asm__ volatile("invlpg (%0)" : : "S"(gva) : "memory");
        else
            USER_RETURN(0);
        results->of[results->done] = (struct result){value, error, error ? gva : 0};
        results->done++;
    }
}

static void inner_machine_run(void) {
    shadows_forget();
    out8(LAB_POLICY, policy); /* the host half writes the inner memory anew, */
    memcpy((void *)page_at(plan.inner_gpa[ROLE_CODE])->gpa, user_start, PAGE_SIZE);
    inner_cr3 = plan.inner_gpa[ROLE_ROOT];
    cr3_write(shadow_of(inner_cr3, 4)->gpa);
    memset(cost, 0, sizeof cost);
    uint64_t offset = (uint64_t)inner_program - (uint64_t)user_start;
    user_call(shared_gva(&plan, ROLE_CODE) + offset,
              shared_gva(&plan, ROLE_STACK) + PAGE_SIZE - sizeof(uint64_t),
              shared_gva(&plan, ROLE_SCRIPT));
    out8(LAB_OVER, policy);
    printf("%s: %u misses, %u table writes, %u faults reflected; %u INVLPG, %u CR3 loads\n",
           policy_names[policy], cost[SERVED_MISS], cost[SERVED_WRITE] + cost[SERVED_UNSYNC],
           cost[SERVED_REFLECTED], cost[SERVED_INVLPG], cost[SERVED_CR3]);
}

void guest_main(void) {
    plan = plan_make(guest_seed());
    printf("lesson 3: shadow paging\n");
    if (user_end - user_start != PAGE_SIZE)
        PANIC("the inner program has grown beyond its page");
    for (unsigned i = 0; i < INNER_PAGES; i++) {
        pages[i].gpa = plan.frame_gpa[i];
        owner[(plan.frame_gpa[i] - FRAMES_GPA) / PAGE_SIZE] = &pages[i];
    }
    trap_handle(VECTOR_PF, page_fault);
    trap_handle(VECTOR_GP, general_protection);
    for (policy = 0; policy < POLICIES; policy++)
        inner_machine_run();
}
