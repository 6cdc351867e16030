/*
 * Lesson 3, host half: nothing to write here. It lays out the inner machine's memory, with page tables
 * and a script for its program, each time that the guest asks for a new one. When the guest has served
 * a trap it looks at some addresses: what do the inner tables say, what does the shadow in CR3 say, and
 * what does KVM say?
 */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "host.h"
#include "plan.h"

/* What an inner entry permits if nothing speaks against it. */
#define ALL (PTE_PRESENT | PTE_WRITABLE | PTE_USER)

static struct {
    struct plan plan;
    struct random choices;       /* for the script and the memory */
    struct random probes;        /* where to look */
    uint64_t offset[DATA_PAGES]; /* of the word that the script uses in the page at each place */
    struct script script;
    uint64_t about[OPS_MAX]; /* of each operation, the gva whose translation it is about */
    unsigned ops;
    unsigned policy;
    unsigned results;   /* of this policy, recorded so far */
    uint64_t inner_cr3; /* as far as the script has come */
} lab;

/* ---- the inner machine's memory ---- */

/* The bytes of the inner page at this inner gpa; NULL if there is no memory. */
static uint8_t *page_at(uint64_t inner_gpa) {
    uint64_t number = inner_gpa / PAGE_SIZE;
    return number < INNER_PAGES ? host_memory(lab.plan.frame_gpa[number], PAGE_SIZE) : NULL;
}

static uint64_t word_at(uint64_t inner_gpa) {
    uint64_t word = 0;
    const uint8_t *page = page_at(inner_gpa);
    if (page)
        memcpy(&word, page + inner_gpa % PAGE_SIZE, sizeof word);
    return word;
}

/* inner_gpa comes from the plan. */
static void word_write(uint64_t inner_gpa, uint64_t word) {
    uint8_t *page = page_at(inner_gpa);
    if (page)
        memcpy(page + inner_gpa % PAGE_SIZE, &word, sizeof word);
}

/* The words of a data page: the tests compute them, too. */
static void page_fill(uint64_t page_inner_gpa) {
    for (uint64_t at = page_inner_gpa; at < page_inner_gpa + PAGE_SIZE; at += sizeof(uint64_t)) {
        struct random word = random_stream(host_seed() ^ at, 2);
        word_write(at, random_next(&word));
    }
}

static uint64_t entry_for(enum role role, uint64_t flags) {
    return lab.plan.inner_gpa[role] | flags;
}

/* The inner gpa of the entry for gva in the table of this role. */
static uint64_t entry_at(enum role table, uint64_t gva, unsigned level) {
    return lab.plan.inner_gpa[table] + page_index(gva, level) * sizeof(uint64_t);
}

/* One of the words that do not come from the seed alone. */
static void word_make(uint64_t inner_gpa, uint64_t word) {
    word_write(inner_gpa, word);
    if (lab.policy != 0) /* it was the same before */
        return;
    event_begin("word");
    event_hex("at", inner_gpa);
    event_hex("value", word);
    event_end();
}

static void entry_make(enum role table, uint64_t gva, unsigned level, uint64_t entry) {
    word_make(entry_at(table, gva, level), entry);
}

static uint64_t place_gva(enum place place) { return lab.plan.data_gva + place * PAGE_SIZE; }

static enum role place_role(unsigned space, enum place place) {
    return (enum role)(ROLE_DATA + space * DATA_PAGES + place);
}

static uint64_t place_entry(unsigned space, enum place place) {
    static const uint64_t flags[DATA_PAGES] = {
        [PLACE_A... PLACE_D] = ALL,
        [PLACE_READ_ONLY] = PTE_PRESENT | PTE_USER,
        [PLACE_SUPERVISOR] = PTE_PRESENT | PTE_WRITABLE,
        [PLACE_NO_EXECUTE] = ALL | PTE_NO_EXECUTE,
        [PLACE_CODE] = PTE_PRESENT | PTE_USER,
        [PLACE_BEYOND] = ALL | INNER_PAGES * PAGE_SIZE,
        [PLACE_MISSING] = 0,
    };
    if (place == PLACE_MISSING) /* what else stands in an entry that is not present means nothing */
        return random_next(&lab.choices) & ~PTE_PRESENT;
    if (place == PLACE_BEYOND)
        return flags[place] + random_below(&lab.choices, 1000) * PAGE_SIZE;
    return entry_for(place_role(space, place), flags[place]);
}

/* What can be called at this place: a RET. */
static void function_make(unsigned space, enum place place) {
    uint64_t at = lab.plan.inner_gpa[place_role(space, place)] + lab.offset[place];
    word_make(at, (word_at(at) & ~UINT64_C(0xff)) | 0xc3);
}

static void space_make(unsigned space) {
    uint64_t data_gva = lab.plan.data_gva;
    entry_make(ROLE_ROOT + space, lab.plan.shared_gva, 4, entry_for(ROLE_SHARED_PDPT, ALL));
    entry_make(ROLE_ROOT + space, data_gva, 4, entry_for(ROLE_PDPT + space, ALL));
    entry_make(ROLE_PDPT + space, data_gva, 3, entry_for(ROLE_PD + space, ALL));
    entry_make(ROLE_PD + space, data_gva, 2, entry_for(ROLE_PT + space, ALL));
    for (unsigned place = 0; place < DATA_PAGES; place++)
        entry_make(ROLE_PT + space, place_gva(place), 1, place_entry(space, place));
    function_make(space, PLACE_CODE);
    function_make(space,
                  PLACE_NO_EXECUTE); /* where a shadow lets it be called, that does no harm */
}

static void memory_make(void) {
    uint64_t shared = lab.plan.shared_gva;
    for (unsigned role = 0; role < ROLES; role++)
        memset(page_at(lab.plan.inner_gpa[role]), 0, PAGE_SIZE);
    for (unsigned role = ROLE_DATA; role < ROLES; role++)
        page_fill(lab.plan.inner_gpa[role]);
    entry_make(ROLE_SHARED_PDPT, shared, 3, entry_for(ROLE_SHARED_PD, ALL));
    entry_make(ROLE_SHARED_PD, shared, 2, entry_for(ROLE_SHARED_PT, ALL));
    for (unsigned role = 0; role < ROLE_DATA; role++)
        entry_make(ROLE_SHARED_PT, shared_gva(&lab.plan, role), 1, entry_for(role, ALL));
    for (unsigned space = 0; space < SPACES; space++)
        space_make(space);
}

/* ---- the script ---- */

static const char *const place_names[DATA_PAGES] = {
    "A", "B", "C", "D", "read-only", "supervisor", "no-execute", "code", "beyond", "missing"};
static const char *const op_names[] = {"reads",          "writes",      "executes",
                                       "loads CR3 with", "invalidates", "ends"};
static const char *scene;

/* on: what the operation is about, for the record. */
static void op_add(enum op_kind kind, const char *on, uint64_t gva, uint64_t value) {
    lab.script.op[lab.ops] = (struct op){kind, gva, value};
    lab.about[lab.ops] = kind == OP_LOAD_CR3 ? place_gva(PLACE_A) : gva;
    event_begin("op");
    event_number("op", lab.ops++);
    event_string("scene", scene);
    event_string("what", op_names[kind]);
    event_string("on", on);
    event_hex("gva", gva);
    event_hex("value", value);
    event_end();
}

static uint64_t data_at(enum place place) { return place_gva(place) + lab.offset[place]; }
static void op_read(enum place place) { op_add(OP_READ, place_names[place], data_at(place), 0); }
static void op_execute(enum place place) {
    op_add(OP_EXECUTE, place_names[place], data_at(place), 0);
}
static void op_write(enum place place) {
    op_add(OP_WRITE, place_names[place], data_at(place), random_next(&lab.choices));
}
static void op_load_cr3(unsigned space) {
    static const char *const names[SPACES] = {"space 0", "space 1", "space 2"};
    op_add(OP_LOAD_CR3, names[space], lab.plan.inner_gpa[ROLE_ROOT + space], 0);
}

/* On the entry for gva in a table, where the program sees it. */
static void op_on_entry(enum op_kind kind, enum role table, uint64_t gva, unsigned level,
                        uint64_t value) {
    char on[32];
    uint64_t place = (gva - lab.plan.data_gva) / PAGE_SIZE;
    snprintf(on, sizeof on, "level %u entry of %s", level,
             place < DATA_PAGES ? place_names[place] : "behind");
    op_add(kind, on, shared_gva(&lab.plan, table) + page_index(gva, level) * sizeof value, value);
    lab.about[lab.ops - 1] = gva;
}
static void op_read_entry(enum role table, enum place place, unsigned level) {
    op_on_entry(OP_READ, table, place_gva(place), level, 0);
}
static void op_write_entry(unsigned space, enum place place, uint64_t entry) {
    op_on_entry(OP_WRITE, ROLE_PT + space, place_gva(place), 1, entry);
}
/* As a kernel changes an entry that was present, of the space it is in. */
static void op_change_entry(enum place place, uint64_t entry) {
    op_write_entry(0, place, entry);
    op_add(OP_INVLPG, place_names[place], place_gva(place), 0);
}

static void scene_touch(void) {
    scene = "touch";
    op_read(PLACE_A);
    op_read(PLACE_B);
    op_read(PLACE_C);
    op_write(PLACE_A);
    op_read(PLACE_A);
    op_write(PLACE_B);
    op_execute(PLACE_CODE);
}

static void scene_fault(void) {
    scene = "fault";
    op_write(PLACE_READ_ONLY); /* never touched before: a miss, and a fault of the inner machine */
    op_read(PLACE_READ_ONLY);
    op_write(PLACE_READ_ONLY); /* in the shadow now, and a fault again */
    op_read(PLACE_SUPERVISOR);
    op_write(PLACE_MISSING);
    op_read(PLACE_BEYOND);
    op_execute(PLACE_NO_EXECUTE);
    op_read(PLACE_NO_EXECUTE);
}

static void scene_bits(void) {
    scene = "bits";
    op_read_entry(ROLE_PT, PLACE_A, 1); /* written */
    op_read_entry(ROLE_PT, PLACE_C, 1); /* read */
    op_read_entry(ROLE_PT, PLACE_D, 1); /* not touched */
    op_read_entry(ROLE_PD, PLACE_A, 2);
    op_read_entry(ROLE_PDPT, PLACE_A, 3);
    op_read_entry(ROLE_ROOT, PLACE_A, 4);
    op_change_entry(PLACE_A, entry_for(place_role(0, PLACE_A), ALL)); /* both bits cleared */
    op_read(PLACE_A);
    op_read_entry(ROLE_PT, PLACE_A, 1);
    op_write(PLACE_A);
    /* The page of the table has been written to, and is dirty itself. Its shadow comes anew. */
    op_add(OP_INVLPG, "the page table", shared_gva(&lab.plan, ROLE_PT), 0);
    op_read_entry(ROLE_PT, PLACE_A, 1);
}

static void scene_change(void) {
    scene = "change";
    op_change_entry(PLACE_C, entry_for(ROLE_EXTRA + 0, ALL));
    op_read(PLACE_C);
    scene = "kept";
    op_read(PLACE_A); /* its entry has not changed */
    scene = "change";
    op_write_entry(0, PLACE_MISSING, entry_for(ROLE_EXTRA + 1, ALL));
    op_read(PLACE_MISSING);
    op_write(PLACE_MISSING);
    op_change_entry(PLACE_READ_ONLY, entry_for(place_role(0, PLACE_READ_ONLY), ALL));
    op_write(PLACE_READ_ONLY);
    op_change_entry(PLACE_B, entry_for(place_role(0, PLACE_B), PTE_PRESENT | PTE_USER));
    op_write(PLACE_B);
    op_read(PLACE_B);
    op_read(PLACE_D);
    op_change_entry(PLACE_D, 0);
    op_read(PLACE_D);
}

/* A page that the program has written to, as data, becomes a page table. Its pages are read-only, but it
 * is the entry above that says so: their own entries are writable, and dirty already. */
static void scene_spare(void) {
    uint64_t gva = lab.plan.data_gva + LARGE_PAGE_SIZE;
    uint64_t word_gva = gva + lab.offset[PLACE_A];
    static const uint64_t used = ALL | PTE_ACCESSED | PTE_DIRTY;
    scene = "spare";
    op_on_entry(OP_WRITE, ROLE_SPARE_PT, gva, 1, entry_for(ROLE_EXTRA + 2, used));
    op_on_entry(OP_WRITE, ROLE_PD, gva, 2, entry_for(ROLE_SPARE_PT, PTE_PRESENT | PTE_USER));
    op_add(OP_READ, "behind", word_gva, 0);
    scene = "path";
    op_add(OP_WRITE, "behind", word_gva, 0);
    scene = "spare";
    op_on_entry(OP_WRITE, ROLE_SPARE_PT, gva, 1, entry_for(ROLE_EXTRA + 3, used));
    op_add(OP_INVLPG, "behind", gva, 0);
    op_add(OP_READ, "behind", word_gva, 0);
    scene = "redirect"; /* an entry above the leaf points to another table */
    op_on_entry(OP_WRITE, ROLE_PD, gva, 2, entry_for(ROLE_PT + 2, PTE_PRESENT | PTE_USER));
    op_add(OP_INVLPG, "behind", gva, 0);
    op_add(OP_READ, "behind", data_at(PLACE_A) + LARGE_PAGE_SIZE, 0);
}

static void scene_batch(void) {
    static const enum place places[] = {PLACE_A, PLACE_B, PLACE_C};
    scene = "batch";
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++)
        op_change_entry(places[i], entry_for(ROLE_EXTRA + 4 - i, ALL));
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++)
        op_read(places[i]);
}

/* The entries of a table change while its space is not loaded, while it is, and again after that. */
static void scene_spaces(void) {
    scene = "spaces";
    op_load_cr3(1);
    op_read(PLACE_A);
    op_write(PLACE_B);
    op_load_cr3(2);
    op_read(PLACE_A);
    op_read(PLACE_C);
    op_load_cr3(0);
    op_read(PLACE_A);
    op_write_entry(1, PLACE_A, entry_for(ROLE_EXTRA + 5, ALL)); /* of a space that is not loaded */
    scene = "again";
    op_change_entry(PLACE_A, entry_for(ROLE_EXTRA + 6, ALL));
    op_read(PLACE_A);
    scene = "spaces";
    op_load_cr3(1);
    op_read(PLACE_A);
    scene = "synced";
    op_write_entry(1, PLACE_A, entry_for(ROLE_EXTRA + 7, ALL));
    op_add(OP_INVLPG, "A", place_gva(PLACE_A), 0);
    op_read(PLACE_A);
}

/* Nothing has changed since the program was in these spaces, and it does nothing new there. */
static void scene_return(void) {
    scene = "return";
    op_load_cr3(0);
    op_read(PLACE_A);
    op_load_cr3(1);
    op_read(PLACE_A);
    scene = "return again";
    op_load_cr3(0);
    op_read(PLACE_A);
}

static void script_make(void) {
    lab.script.results_gva = shared_gva(&lab.plan, ROLE_RESULTS);
    scene_touch();
    scene_fault();
    scene_bits();
    scene_change();
    scene_spare();
    scene_batch();
    scene_spaces();
    scene_return();
    scene = "end";
    op_add(OP_END, "", 0, 0);
}

/* ---- what the machine looks like ---- */

/* One step of a walk of the inner tables: the entry for gva in the table at *inner_gpa, which becomes
 * what the entry points to. False if the walk ends here; every number may be what the program wrote. */
static bool tables_step(struct walk *walk, uint64_t *inner_gpa, uint64_t gva, unsigned level) {
    uint64_t at = *inner_gpa + page_index(gva, level) * sizeof(uint64_t);
    if (!page_at(at))
        return false;
    uint64_t entry = word_at(at);
    walk->entry[walk->steps].gpa = at;
    walk->entry[walk->steps++].value = entry;
    walk->permits =
        (walk->permits & entry & ~PTE_NO_EXECUTE) | ((walk->permits | entry) & PTE_NO_EXECUTE);
    *inner_gpa = entry & PTE_ADDRESS;
    return entry & PTE_PRESENT;
}

/* The inner tables, as the host half reads them; the entries' places are inner gpas. */
static struct walk tables_walk(uint64_t gva) {
    struct walk walk = {.end = WALK_NOT_PRESENT, .permits = PTE_WRITABLE | PTE_USER};
    uint64_t inner_gpa = lab.inner_cr3;
    unsigned level = 4;
    while (level > 0 && tables_step(&walk, &inner_gpa, gva, level))
        level--;
    if (level > 0 || !page_at(inner_gpa))
        return walk;
    walk.end = WALK_MAPPED;
    walk.gpa = lab.plan.frame_gpa[inner_gpa / PAGE_SIZE] + gva % PAGE_SIZE;
    return walk;
}

/* What one of the two says of an address, with the gpa where that lies. */
static void walk_record(const char *whose, const struct walk *walk) {
    static const char *const members[] = {"mapped", "writable", "user", "executable"};
    bool is_mapped = walk->end == WALK_MAPPED;
    bool values[] = {is_mapped, is_mapped && (walk->permits & PTE_WRITABLE),
                     is_mapped && (walk->permits & PTE_USER),
                     is_mapped && !(walk->permits & PTE_NO_EXECUTE)};
    char name[32];
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++) {
        snprintf(name, sizeof name, "%s_%s", whose, members[i]);
        event_number(name, values[i]);
    }
    snprintf(name, sizeof name, "%s_gpa", whose);
    event_hex(name, walk->gpa);
}

/* One address, in the inner tables and in the shadow. */
static void probe(uint64_t gva) {
    struct walk inner = tables_walk(gva);
    struct walk shadow = host_walk(host_sregs()->cr3, gva); /* first: KVM's walk marks accessed */
    struct kvm_translation kvm = host_translate(gva);
    bool is_mapped = inner.end == WALK_MAPPED;
    bool is_accessed = is_mapped;
    for (unsigned i = 0; i < inner.steps; i++)
        is_accessed &= (inner.entry[i].value & PTE_ACCESSED) != 0;
    event_begin("probe");
    event_hex("gva", gva);
    walk_record("inner", &inner);
    event_number("inner_accessed", is_accessed);
    event_number("inner_dirty", is_mapped && (inner.entry[3].value & PTE_DIRTY));
    walk_record("shadow", &shadow);
    event_number("kvm_valid", kvm.valid);
    event_hex("kvm_gpa", kvm.physical_address);
    event_end();
}

/* An address anywhere in a page of the data region, or behind it, or in one of the shared region. */
static uint64_t gva_draw(void) {
    uint64_t offset = random_below(&lab.probes, PAGE_SIZE);
    if (random_below(&lab.probes, 3) == 0)
        return shared_gva(&lab.plan, random_below(&lab.probes, ROLE_DATA)) + offset;
    return place_gva(random_below(&lab.probes, DATA_PAGES + 1)) + offset;
}

/* The operations that the program says it has done; its number, too, is only what it says. */
static unsigned ops_done(void) {
    uint64_t done = word_at(lab.plan.inner_gpa[ROLE_RESULTS] + offsetof(struct results, done));
    return done < lab.ops ? (unsigned)done : lab.ops;
}

/* Those results that are new. */
static void results_record(void) {
    uint64_t results = lab.plan.inner_gpa[ROLE_RESULTS] + offsetof(struct results, of);
    for (; lab.results < ops_done(); lab.results++) {
        uint64_t at = results + lab.results * sizeof(struct result);
        event_begin("result");
        event_number("policy", lab.policy);
        event_number("op", lab.results);
        event_hex("value", word_at(at + offsetof(struct result, value)));
        event_hex("error", word_at(at + offsetof(struct result, error)));
        event_hex("cr2", word_at(at + offsetof(struct result, cr2)));
        event_end();
    }
}

/* ---- what the guest says ---- */

static void policy_begin(unsigned policy) {
    lab.policy = policy;
    lab.results = 0;
    lab.inner_cr3 = lab.plan.inner_gpa[ROLE_ROOT];
    lab.choices = random_stream(host_seed(), 3);
    for (unsigned place = 0; place < DATA_PAGES; place++)
        lab.offset[place] = random_below(&lab.choices, PAGE_SIZE / 8) * 8;
    memory_make();
    if (policy == 0)
        script_make();
    memcpy(page_at(lab.plan.inner_gpa[ROLE_SCRIPT]), &lab.script, sizeof lab.script);
    event_begin("policy");
    event_number("policy", policy);
    event_end();
}

/* What the inner program was about to do when it trapped; OP_END if it is done. */
static struct op op_under_way(void) {
    return ops_done() < lab.ops ? lab.script.op[ops_done()] : (struct op){.kind = OP_END};
}

static const char *const served_names[] = {
    [SERVED_MISS] = "miss",         [SERVED_REFLECTED] = "reflected",
    [SERVED_WRITE] = "table write", [SERVED_UNSYNC] = "out of sync",
    [SERVED_INVLPG] = "INVLPG",     [SERVED_CR3] = "CR3 load"};

static void trap_served(gpa_t trap_gpa) {
    struct trap trap;
    const void *memory = host_memory(trap_gpa, sizeof trap);
    struct op op = op_under_way();
    if (!memory)
        return;
    memcpy(&trap, memory, sizeof trap);
    results_record();
    if (trap.vector == VECTOR_GP && op.kind == OP_LOAD_CR3)
        lab.inner_cr3 = op.gva;
    event_begin("trap");
    event_number("policy", lab.policy);
    event_number("op", ops_done());
    event_number("vector", trap.vector);
    event_hex("error_code", trap.error_code);
    event_hex("cr2", trap.cr2);
    event_hex("cr3", host_sregs()->cr3);
    event_string("served", trap.served <= SERVED_CR3 ? served_names[trap.served] : "?");
    event_end();
    if (trap.vector == VECTOR_PF)
        probe(trap.cr2);
    if (ops_done() < lab.ops)
        probe(lab.about[ops_done()]);
    for (unsigned i = 0; i < 3; i++)
        probe(gva_draw());
}

/* The program has come to its end: all there is to see, once more. */
static void policy_end(void) {
    results_record();
    event_begin("over");
    event_number("policy", lab.policy);
    event_end();
    for (unsigned place = 0; place <= DATA_PAGES; place++)
        probe(place_gva(place));
    for (unsigned role = 0; role < ROLE_DATA; role++)
        probe(shared_gva(&lab.plan, role));
}

static void policy_access(struct access *access) {
    if (access->is_write && access->data[0] < POLICIES)
        policy_begin(access->data[0]);
}

static void trap_access(struct access *access) {
    uint32_t gpa;
    if (!access->is_write || access->size != sizeof gpa || access->count != 1)
        return;
    memcpy(&gpa, access->data, sizeof gpa);
    trap_served(gpa);
}

static void over_access(struct access *access) {
    if (access->is_write)
        policy_end();
}

static void plan_record(void) {
    event_begin("plan");
    event_hex("shared_gva", lab.plan.shared_gva);
    event_hex("data_gva", lab.plan.data_gva);
    for (unsigned role = 0; role < ROLES; role++) {
        char name[16];
        snprintf(name, sizeof name, "page_%02u", role);
        event_hex(name, lab.plan.inner_gpa[role]);
    }
    event_end();
}

static void lab_setup(void) {
    lab.plan = plan_make(host_seed());
    lab.probes = random_stream(host_seed(), 4);
    if (!host_memory(FRAMES_GPA, FRAMES * PAGE_SIZE))
        host_cannot("it has less memory than the inner machine's frames take: 20 MiB");
    plan_record();
    host_claim_pio(LAB_POLICY, 1, "lab policy", policy_access);
    host_claim_pio(LAB_TRAP, 4, "lab trap", trap_access);
    host_claim_pio(LAB_OVER, 1, "lab over", over_access);
}

const struct host_half host_half = {.setup = lab_setup, .end = results_record};
