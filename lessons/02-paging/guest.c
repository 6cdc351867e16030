/* Lesson 2, guest half: page tables, from the first mapping to two address spaces. */
#include "guest.h"
#include "plan.h"

MACHINE(.memory_mib = MEMORY_MIB, .irqchip = MACHINE_IRQCHIP_NONE, .devices = MACHINE_DEVICE_COM1);

/* ---- what you write ---- */

/*
 * The entry that decides about gva at this level (4: PML4, 3: PDPT, 2: PD, 1: page table), starting
 * from the PML4 at root. A table that is missing on the way is allocated (page_alloc) and linked in.
 *
 * An entry above the leaf must not forbid what a leaf below may allow: the CPU permits a write, or
 * an access from ring 3, only if every entry on the path does.
 */
static uint64_t *entry_at(uint64_t root, uint64_t gva, unsigned level) {
    /* BEGIN SOLUTION */
    uint64_t *entry = &page_table(root)[page_index(gva, 4)];
    for (unsigned at = 4; at > level; at--) {
        if (!(*entry & PTE_PRESENT))
            *entry = page_alloc() | PTE_PRESENT | PTE_WRITABLE | PTE_USER;
        entry = &page_table(*entry)[page_index(gva, at - 1)];
    }
    return entry;
    /* STUB
    (void)root, (void)gva, (void)level;
    TODO("entry_at: walk from the root to the entry of this level, adding missing tables");
    END SOLUTION */
}

/* Map the 4 KiB page at gva to the frame at gpa. permissions: any of PTE_WRITABLE, PTE_USER and
 * PTE_NO_EXECUTE. The page was not mapped before, so no TLB knows it. */
static void map_page(uint64_t root, uint64_t gva, uint64_t gpa, uint64_t permissions) {
    /* BEGIN SOLUTION */
    *entry_at(root, gva, 1) = gpa | permissions | PTE_PRESENT;
    /* STUB
    (void)root, (void)gva, (void)gpa, (void)permissions, (void)entry_at;
    TODO("map_page: point the page-table entry of gva at the frame");
    END SOLUTION */
}

/* The same for 2 MiB: one PD entry, no page table. */
static void map_large_page(uint64_t root, uint64_t gva, uint64_t gpa, uint64_t permissions) {
    /* BEGIN SOLUTION */
    *entry_at(root, gva, 2) = gpa | permissions | PTE_LARGE | PTE_PRESENT;
    /* STUB
    (void)root, (void)gva, (void)gpa, (void)permissions;
    TODO("map_large_page: a PD entry that maps 2 MiB by itself");
    END SOLUTION */
}

/* Replace the 2 MiB page around gva by 512 pages of 4 KiB that translate every address as before,
 * with the same permissions. The new table must be complete before the PD entry points to it. */
static void split_large_page(uint64_t root, uint64_t gva) {
    /* BEGIN SOLUTION */
    uint64_t *large = entry_at(root, gva, 2);
    uint64_t table = page_alloc();
    for (uint64_t i = 0; i < 512; i++)
        page_table(table)[i] = (*large & ~PTE_LARGE) + i * PAGE_SIZE;
    *large = table | PTE_PRESENT | PTE_WRITABLE | PTE_USER;
    invlpg(gva);
    /* STUB
    (void)root, (void)gva;
    TODO("split_large_page: a page table in place of the large page, nothing else changed");
    END SOLUTION */
}

/* Let the 4 KiB page at gva, mapped already, point to another frame from now on. The CPU may have
 * the old translation in its TLB. */
static void remap_page(uint64_t root, uint64_t gva, uint64_t gpa) {
    /* BEGIN SOLUTION */
    uint64_t *entry = entry_at(root, gva, 1);
    *entry = (*entry & ~PTE_ADDRESS) | gpa;
    invlpg(gva);
    /* STUB
    (void)root, (void)gva, (void)gpa;
    TODO("remap_page: change the frame, then make the CPU forget the old one");
    END SOLUTION */
}

/* Give the 4 KiB page at gva these permissions and no others; its frame stays. */
static void protect_page(uint64_t root, uint64_t gva, uint64_t permissions) {
    /* BEGIN SOLUTION */
    uint64_t *entry = entry_at(root, gva, 1);
    *entry = (*entry & PTE_ADDRESS) | permissions | PTE_PRESENT;
    invlpg(gva);
    /* STUB
    (void)root, (void)gva, (void)permissions;
    TODO("protect_page: the same frame, other permissions");
    END SOLUTION */
}

/* What a page fault's error code says. */
struct fault {
    bool present; /* the page was there, but did not permit the access */
    bool write;
    bool user;  /* the access came from ring 3 */
    bool fetch; /* of an instruction */
};

static struct fault fault_decode(uint64_t error_code) {
    /* BEGIN SOLUTION */
    return (struct fault){.present = error_code & PF_ERROR_PRESENT,
                          .write = error_code & PF_ERROR_WRITE,
                          .user = error_code & PF_ERROR_USER,
                          .fetch = error_code & PF_ERROR_FETCH};
    /* STUB
    (void)error_code;
    TODO("fault_decode: the four questions that a page fault's error code answers");
    END SOLUTION */
}

/* A page fault at gva. Pages of the lazy region [lazy_start, lazy_start + LAZY_PAGES pages) come
 * into being when they are first touched: map a fresh page there (page_alloc), writable, and return
 * true. Any other fault is not yours: false. */
static bool lazy_fault(uint64_t root, uint64_t lazy_start, uint64_t gva, struct fault fault) {
    /* BEGIN SOLUTION */
    if (fault.present || gva < lazy_start || gva >= lazy_start + LAZY_PAGES * PAGE_SIZE)
        return false;
    map_page(root, gva & ~(PAGE_SIZE - 1), page_alloc(), PTE_WRITABLE);
    return true;
    /* STUB
    (void)root, (void)lazy_start, (void)gva, (void)fault;
    return false; // TODO: until this is written, the run ends with the first lazy page
    END SOLUTION */
}

/* Which of the pages [gva, gva + pages) were read or written since the last harvest (*accessed, bit
 * i for page i), and which were written (*dirty)? The next harvest starts from a clean slate: the
 * CPU sets a bit only when it loads the entry into the TLB or writes through it for the first time. */
static void harvest(uint64_t root, uint64_t gva, unsigned pages, uint64_t *accessed,
                    uint64_t *dirty) {
    /* BEGIN SOLUTION */
    *accessed = 0;
    *dirty = 0;
    for (unsigned i = 0; i < pages; i++) {
        uint64_t *entry = entry_at(root, gva + i * PAGE_SIZE, 1);
        *accessed |= (uint64_t)((*entry & PTE_ACCESSED) != 0) << i;
        *dirty |= (uint64_t)((*entry & PTE_DIRTY) != 0) << i;
        *entry &= ~(PTE_ACCESSED | PTE_DIRTY);
        invlpg(gva + i * PAGE_SIZE);
    }
    /* STUB
    (void)root, (void)gva, (void)pages, (void)accessed, (void)dirty;
    TODO("harvest: collect the accessed and dirty bits, and clear them for the next time");
    END SOLUTION */
}

/* ---- the stages that put it to use ---- */

static struct plan plan;
static uint64_t root; /* the current address space */

static void checkpoint(enum checkpoint number) { out8(LAB_CHECKPOINT, (uint8_t)number); }

static void report(enum report what, uint64_t value) {
    uint32_t words[3] = {what, (uint32_t)value, (uint32_t)(value >> 32)};
    out32_string(LAB_REPORT, words, 3);
}

static uint64_t word_at(uint64_t gva) { return *(volatile uint64_t *)gva; }
static void read_at(uint64_t gva) { word_at(gva); }
static void write_at(uint64_t gva) { *(volatile uint8_t *)gva = 1; }
static void execute_at(uint64_t gva) { ((void (*)(void))gva)(); }

USER_CODE static void user_read(uint64_t gva) { USER_RETURN(*(volatile uint8_t *)gva); }
USER_CODE static void user_write(uint64_t gva) {
    *(volatile uint8_t *)gva = 1;
    USER_RETURN(0);
}

/* Run one of the two above in ring 3, where plan.user_code_gva maps it. */
static void in_ring_3(void (*function)(uint64_t), uint64_t gva) {
    uint64_t offset = (uint64_t)function - (uint64_t)user_start;
    user_call(plan.user_code_gva + offset, plan.user_stack_gva + PAGE_SIZE, gva);
}
static void user_read_at(uint64_t gva) { in_ring_3(user_read, gva); }
static void user_write_at(uint64_t gva) { in_ring_3(user_write, gva); }

/* A handler that says "go on" but has not mapped the page would fault for ever. */
static void watch_for_a_loop(uint64_t gva) {
    static uint64_t last_gva;
    static unsigned times;
    times = gva == last_gva ? times + 1 : 0;
    last_gva = gva;
    if (times == 8)
        PANIC("the same address faults again and again: lazy_fault returned true, but the page is "
              "not mapped, or still forbids the access");
}

static bool page_fault(struct trap_frame *frame) {
    uint64_t gva = cr2_read();
    struct fault fault = fault_decode(frame->error_code);
    report(REPORT_FAULT_ADDRESS, gva);
    report(REPORT_FAULT_CODE, frame->error_code);
    report(REPORT_FAULT_DECODED,
           (fault.present ? DECODED_PRESENT : 0) | (fault.write ? DECODED_WRITE : 0) |
               (fault.user ? DECODED_USER : 0) | (fault.fetch ? DECODED_FETCH : 0));
    watch_for_a_loop(gva);
    return lazy_fault(root, plan.lazy_gva, gva, fault);
}

static void stage_map(void) {
    for (unsigned i = 0; i < SMALL_PAGES; i++)
        map_page(root, plan.small_gva[i], plan.small_gpa[i], PTE_WRITABLE);
    for (unsigned i = 0; i < SMALL_PAGES; i++)
        report(REPORT_SMALL_WORD, word_at(plan.small_gva[i]));
    checkpoint(CHECKPOINT_SMALL);
    printf("map: %d pages of 4 KiB\n", SMALL_PAGES);
}

static void stage_large(void) {
    uint64_t inside = plan.large_gva + plan.replaced_page * PAGE_SIZE;
    map_large_page(root, plan.large_gva, plan.large_gpa, PTE_WRITABLE);
    report(REPORT_LARGE_WORD, word_at(inside));
    checkpoint(CHECKPOINT_LARGE);
    split_large_page(root, plan.large_gva);
    report(REPORT_SPLIT_WORD, word_at(inside));
    checkpoint(CHECKPOINT_SPLIT);
    remap_page(root, inside, plan.replaced_gpa);
    report(REPORT_SPLIT_WORD, word_at(inside));
    checkpoint(CHECKPOINT_REPLACED);
    printf("large: 2 MiB mapped, split, page %lu replaced\n", plan.replaced_page);
}

/* Try an access; 1 if it faults. */
static unsigned attempt(void (*access)(uint64_t), uint64_t gva) {
    struct trap_frame caught;
    bool faulted = trap_try(access, gva, &caught);
    report(REPORT_ATTEMPT, faulted);
    return faulted;
}

static void stage_permissions(void) {
    map_page(root, plan.user_code_gva, (uint64_t)user_start, PTE_USER);
    map_page(root, plan.user_stack_gva, page_alloc(), PTE_USER | PTE_WRITABLE | PTE_NO_EXECUTE);
    map_page(root, plan.read_only_gva, plan.read_only_gpa, PTE_WRITABLE);
    map_page(root, plan.no_execute_gva, plan.no_execute_gpa, PTE_WRITABLE);
    map_page(root, plan.kernel_gva, plan.kernel_gpa, PTE_WRITABLE | PTE_USER);
    map_page(root, plan.user_gva, plan.user_gpa, PTE_WRITABLE);
    write_at(plan.read_only_gva); /* now the TLB may hold it, as writable */
    protect_page(root, plan.read_only_gva, 0);
    protect_page(root, plan.no_execute_gva, PTE_WRITABLE | PTE_NO_EXECUTE);
    protect_page(root, plan.kernel_gva, PTE_WRITABLE);
    protect_page(root, plan.user_gva, PTE_WRITABLE | PTE_USER);
    checkpoint(CHECKPOINT_PROTECTED);
    unsigned faults = 0;
    faults += attempt(read_at, plan.read_only_gva);
    faults += attempt(write_at, plan.read_only_gva);
    faults += attempt(read_at, plan.no_execute_gva);
    faults += attempt(execute_at, plan.no_execute_gva);
    faults += attempt(user_read_at, plan.user_gva);
    faults += attempt(user_write_at, plan.user_gva);
    faults += attempt(user_read_at, plan.kernel_gva);
    faults += attempt(user_write_at, plan.kernel_gva);
    faults += attempt(read_at, plan.kernel_gva + PAGE_SIZE);
    faults += attempt(user_write_at, plan.kernel_gva + PAGE_SIZE);
    printf("permissions: %u of 10 accesses fault\n", faults);
}

static void stage_lazy(void) {
    struct trap_frame caught;
    for (unsigned i = 0; i < LAZY_TOUCHES; i++)
        write_at(plan.lazy_gva + plan.lazy_touch[i] * PAGE_SIZE + i);
    report(REPORT_STRAY, trap_try(read_at, plan.lazy_gva + LAZY_PAGES * PAGE_SIZE, &caught));
    report(REPORT_STRAY, trap_try(read_at, plan.lazy_gva - sizeof(uint64_t), &caught));
    checkpoint(CHECKPOINT_LAZY);
    report(REPORT_STRAY,
           trap_try(user_read_at, plan.lazy_gva + plan.lazy_touch[0] * PAGE_SIZE, &caught));
    printf("lazy: %d writes to pages that were not there\n", LAZY_TOUCHES);
}

static void stage_harvest(void) {
    uint64_t accessed;
    uint64_t dirty;
    for (unsigned i = 0; i < HARVEST_PAGES; i++)
        map_page(root, plan.harvest_gva + i * PAGE_SIZE, plan.harvest_gpa + i * PAGE_SIZE,
                 PTE_WRITABLE);
    for (unsigned round = 0; round < HARVEST_ROUNDS; round++) {
        for (unsigned i = 0; i < HARVEST_PAGES; i++) {
            if (plan.read_set[round] >> i & 1)
                read_at(plan.harvest_gva + i * PAGE_SIZE);
            if (plan.write_set[round] >> i & 1)
                write_at(plan.harvest_gva + i * PAGE_SIZE);
        }
        harvest(root, plan.harvest_gva, HARVEST_PAGES, &accessed, &dirty);
        report(REPORT_ACCESSED, accessed);
        report(REPORT_DIRTY, dirty);
    }
    checkpoint(CHECKPOINT_CLEAN);
    printf("harvest: last round read or wrote %04lx, wrote %04lx\n", accessed, dirty);
}

static void stage_remap(void) {
    map_page(root, plan.remap_gva, plan.remap_gpa[0], PTE_WRITABLE);
    report(REPORT_BEFORE_REMAP, word_at(plan.remap_gva));
    remap_page(root, plan.remap_gva, plan.remap_gpa[1]);
    report(REPORT_AFTER_REMAP, word_at(plan.remap_gva));
    checkpoint(CHECKPOINT_REMAPPED);
    printf("remap: one page, one new frame\n");
}

static void stage_spaces(void) {
    uint64_t space_a = address_space_create();
    uint64_t space_b = address_space_create();
    map_page(space_a, plan.shared_gva, plan.shared_gpa[0], PTE_WRITABLE);
    map_page(space_b, plan.shared_gva, plan.shared_gpa[1], PTE_WRITABLE);
    cr3_write(space_a);
    report(REPORT_SPACE_A_WORD, word_at(plan.shared_gva));
    checkpoint(CHECKPOINT_SPACE_A);
    cr3_write(space_b);
    report(REPORT_SPACE_B_WORD, word_at(plan.shared_gva));
    checkpoint(CHECKPOINT_SPACE_B);
    cr3_write(root);
    printf("spaces: one gva, two gpas\n");
}

void guest_main(void) {
    plan = plan_make(guest_seed());
    printf("lesson 2: from gva to gpa\n");
    root = address_space_create();
    cr3_write(root);
    trap_handle(VECTOR_PF, page_fault);
    stage_map();
    stage_large();
    stage_permissions();
    stage_lazy();
    stage_harvest();
    stage_remap();
    stage_spaces();
}
