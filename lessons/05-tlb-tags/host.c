/*
 * Lesson 5, host half: which TLB entries an instruction drops. The rest of it reads the guest's notes,
 * and looks for itself at page tables and control registers.
 */
#include <asm/processor-flags.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "host.h"
#include "plan.h"
#include "trials.h"

/* What a TLB entry is tagged with, as far as the guest has a say in it: the page it translates, the
 * PCID that was in CR3, and the bit G of the page-table entry that it was made from. */
struct tag {
    gva_t gva; /* the first of the page */
    uint16_t pcid;
    bool is_global;
};

/* An instruction that drops entries. What its kind does not have is 0. */
struct operation {
    enum { INVLPG, INVPCID, MOV_TO_CR3, MOV_TO_CR4 } kind;
    uint16_t current_pcid; /* in CR3 before it */
    uint32_t type;         /* INVPCID: 0 to 3, as in mmu.h */
    uint16_t pcid;         /* INVPCID: of the descriptor; MOV to CR3: of the value that is loaded */
    gva_t gva;             /* INVLPG; INVPCID: of the descriptor. Anywhere in the page it means */
    bool keep;             /* MOV to CR3: bit 63 */
    bool changes_pge;      /* MOV to CR4 */
};

/*
 * Must this operation drop the entry with this tag? When the entry was made, CR4.PGE and CR4.PCIDE were
 * 1; PCIDE stays 1. (A CPU may drop more at any time; the question is what one can rely on.)
 */
static bool operation_drops(const struct operation *operation, const struct tag *tag) {
    /* BEGIN SOLUTION */
    bool is_page = operation->gva / PAGE_SIZE == tag->gva / PAGE_SIZE;
    bool is_context = operation->pcid == tag->pcid && !tag->is_global;
    switch (operation->kind) {
    case INVLPG: return is_page && (tag->is_global || tag->pcid == operation->current_pcid);
    case MOV_TO_CR3: return is_context && !operation->keep;
    case MOV_TO_CR4: return operation->changes_pge;
    case INVPCID: break;
    }
    switch (operation->type) {
    case 0: return is_context && is_page;
    case 1: return is_context;
    case 2: return true;
    default: return !tag->is_global;
    }
    /* STUB
    (void)operation, (void)tag;
    HOST_TODO("operation_drops: which tags INVLPG, INVPCID, MOV to CR3 and MOV to CR4 ask for");
    END SOLUTION */
}

/* ---- the rest is given ---- */

#define CR3_KEEP (UINT64_C(1) << 63)
#define CR3_PCID UINT64_C(0xfff)

static struct {
    struct plan plan;
    struct random probes;   /* where inside a page to look */
    uint64_t words[FRAMES]; /* what each frame for data begins with */
    gpa_t log_gpa;
    uint64_t notes_read;
    gpa_t space_root[SPACES]; /* 0: not there yet */
    uint64_t cr3, cr4;        /* as the notes have them */
    struct {
        bool is_old, is_neither, drops;
    } trial[TRIALS];
    unsigned trial_now; /* TRIALS: none */
    uint8_t verdict;
} lab;

static uint64_t frame_word(gpa_t gpa) { return lab.words[(gpa - FRAMES_GPA) / PAGE_SIZE]; }

static void frames_fill(void) {
    struct random words = random_stream(host_seed(), 2);
    for (unsigned i = 0; i < FRAMES; i++) {
        lab.words[i] = random_next(&words);
        void *frame = host_memory(FRAMES_GPA + i * PAGE_SIZE, sizeof lab.words[i]);
        if (frame)
            memcpy(frame, &lab.words[i], sizeof lab.words[i]);
    }
}

/* ---- the record of what is planned ---- */

static const char *const step_names[] = {
    [STEP_SWITCH] = "switch", [STEP_LOOK] = "look",          [STEP_REMAP] = "remap",
    [STEP_FORGET] = "forget", [STEP_KERNEL] = "kernel page", [STEP_KERNEL_ALL] = "kernel all",
    [STEP_END] = "end",
};

static void event_numbered(const char *name, unsigned number, uint64_t value) {
    char member[32];
    snprintf(member, sizeof member, "%s_%u", name, number);
    event_hex(member, value);
}

static void plan_record(const struct plan *plan) {
    event_begin("plan");
    for (unsigned i = 0; i < PCIDS; i++)
        event_numbered("pcid", i, plan->pcid[i]);
    for (unsigned i = 0; i < 2; i++)
        event_numbered("trial_pcid", i, plan->trial_pcid[i]);
    for (unsigned i = 0; i < PAGES; i++)
        event_numbered("page_gva", i, plan->page_gva[i]);
    for (unsigned i = 0; i < KERNEL_PAGES; i++)
        event_numbered("kernel_gva", i, kernel_page_gva(plan, i));
    event_hex("trial_gva", plan->trial_gva);
    event_hex("global_gva", plan->global_gva);
    for (unsigned i = 0; i < SPACES; i++)
        event_numbered("first_gpa", i, plan->first_gpa[i]);
    event_end();
}

static void steps_record(const struct plan *plan) {
    for (unsigned i = 0; i < plan->steps; i++) {
        const struct step *step = &plan->step[i];
        event_begin("planned");
        event_number("step", i);
        event_number("stage", step->stage);
        event_string("what", step_names[step->kind]);
        event_number("space", step->space);
        event_number("page", step->page);
        event_hex("frame_gpa", step->frame_gpa);
        event_end();
    }
}

/* What this machine's KVM was told about tags: sysfs has the parameters of its modules. */
static void parameter_record(const char *name, const char *path) {
    char text[8] = "";
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    if (fgets(text, sizeof text, file))
        text[strcspn(text, "\n")] = '\0';
    fclose(file);
    event_string(name, text);
}

static void parameters_record(void) {
    event_begin("parameters");
    parameter_record("ept", "/sys/module/kvm_intel/parameters/ept");
    parameter_record("vpid", "/sys/module/kvm_intel/parameters/vpid");
    parameter_record("npt", "/sys/module/kvm_amd/parameters/npt");
    event_end();
}

/* ---- the record of what the student's function says ---- */

static const char *const operation_names[] = {
    [INVLPG] = "INVLPG",
    [INVPCID] = "INVPCID",
    [MOV_TO_CR3] = "MOV to CR3",
    [MOV_TO_CR4] = "MOV to CR4",
};

static void situation_record(const struct operation *operation, const struct tag *tag) {
    event_begin("situation");
    event_string("operation", operation_names[operation->kind]);
    event_number("current_pcid", operation->current_pcid);
    event_number("type", operation->type);
    event_number("pcid", operation->pcid);
    event_hex("gva", operation->gva);
    event_number("keep", operation->keep);
    event_number("changes_pge", operation->changes_pge);
    event_number("tag_pcid", tag->pcid);
    event_hex("tag_gva", tag->gva);
    event_number("tag_is_global", tag->is_global);
    event_number("drops", operation_drops(operation, tag));
    event_end();
}

/* A run shows few of the situations there can be. These are all, with one page and one PCID against
 * another: each operation, and what can differ from one such situation to the next. */
enum {
    GLOBAL = 1,
    OTHER_CURRENT = 2,
    OTHER_PCID = 4,
    OTHER_GVA = 8,
    BIT_63 = 16,
    PGE = 32,
    ALL = 63
};

static void situation_make(int kind, uint32_t type, uint32_t differs, unsigned bits) {
    const uint16_t *pcid = lab.plan.trial_pcid;
    bool has_pcid = differs & OTHER_PCID;
    bool has_gva = differs & OTHER_GVA;
    gva_t inside = random_below(&lab.probes, PAGE_SIZE);
    struct tag tag = {lab.plan.trial_gva, pcid[0], bits & GLOBAL};
    struct operation operation = {
        .kind = kind,
        .current_pcid = pcid[(bits & OTHER_CURRENT) != 0],
        .type = type,
        .pcid = has_pcid ? pcid[(bits & OTHER_PCID) != 0] : 0,
        .gva = has_gva ? tag.gva + (bits & OTHER_GVA ? PAGE_SIZE : 0) + inside : 0,
        .keep = bits & BIT_63,
        .changes_pge = bits & PGE,
    };
    situation_record(&operation, &tag);
}

static void situations_record(void) {
    static const struct {
        int kind;
        uint32_t type, differs;
    } rows[] = {
        {INVLPG, 0, OTHER_GVA},   {INVPCID, 0, OTHER_PCID | OTHER_GVA},
        {INVPCID, 1, OTHER_PCID}, {INVPCID, 2, 0},
        {INVPCID, 3, 0},          {MOV_TO_CR3, 0, OTHER_PCID | BIT_63},
        {MOV_TO_CR4, 0, PGE},
    };
    for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++)
        for (unsigned bits = 0; bits <= ALL; bits++)
            if (!(bits & ~(rows[i].differs | OTHER_CURRENT | GLOBAL)))
                situation_make(rows[i].kind, rows[i].type, rows[i].differs, bits);
}

/* ---- the record of what the guest has noted ---- */

static void step_note(uint32_t number) {
    if (number >= lab.plan.steps)
        return;
    event_begin("step");
    event_number("step", number);
    event_string("what", step_names[lab.plan.step[number].kind]);
    event_end();
}

static void space_note(uint32_t number, uint64_t root) {
    if (number >= SPACES)
        return;
    lab.space_root[number] = root;
    event_begin("space");
    event_number("space", number);
    event_hex("root", root);
    event_end();
}

static gva_t trial_gva(uint32_t number) {
    return trials[number].is_global ? lab.plan.global_gva : lab.plan.trial_gva;
}

/* A trial's entry has been changed: from here to the look, what drops it? */
static void trial_note(uint32_t number) {
    if (number >= TRIALS)
        return;
    lab.trial_now = number;
    lab.trial[number].drops = false;
    event_begin("trial");
    event_number("trial", number);
    event_string("name", trials[number].name);
    event_hex("gva", trial_gva(number));
    event_end();
}

/* It has been looked at. Which word was seen goes into the record when all tries are over: see TRIES. */
static void try_note(uint64_t value) {
    if (lab.trial_now >= TRIALS)
        return;
    bool is_old = value == frame_word(lab.plan.trial_gpa[0]);
    bool is_new = value == frame_word(lab.plan.trial_gpa[1]);
    lab.trial[lab.trial_now].is_old |= is_old;
    lab.trial[lab.trial_now].is_neither |= !is_old && !is_new;
    lab.trial_now = TRIALS;
    event_begin("try");
    event_end();
}

static void trial_drop(const struct operation *operation) {
    if (lab.trial_now >= TRIALS)
        return;
    struct tag tag = {.gva = trial_gva(lab.trial_now),
                      .pcid = lab.plan.trial_pcid[0],
                      .is_global = trials[lab.trial_now].is_global};
    lab.trial[lab.trial_now].drops |= operation_drops(operation, &tag);
}

static void operation_record(const struct operation *executed) {
    event_begin("operation");
    event_string("operation", operation_names[executed->kind]);
    switch (executed->kind) {
    case INVLPG: event_hex("gva", executed->gva); break;
    case INVPCID:
        event_number("type", executed->type);
        event_number("pcid", executed->pcid);
        event_hex("gva", executed->gva);
        break;
    case MOV_TO_CR3:
        event_hex("root", lab.cr3 & PTE_ADDRESS);
        event_number("pcid", executed->pcid);
        event_number("keep", executed->keep);
        break;
    case MOV_TO_CR4:
        event_hex("cr4", lab.cr4);
        event_number("changes_pge", executed->changes_pge);
        break;
    }
    event_end();
}

static struct operation operation_of(const struct note *note) {
    struct operation operation = {.current_pcid = (uint16_t)(lab.cr3 & CR3_PCID)};
    switch (note->kind) {
    case NOTE_INVPCID:
        operation.kind = INVPCID;
        operation.type = note->detail;
        operation.pcid = (uint16_t)note->value;
        operation.gva = note->gva;
        break;
    case NOTE_CR3:
        operation.kind = MOV_TO_CR3;
        operation.pcid = (uint16_t)(note->value & CR3_PCID);
        operation.keep = note->value & CR3_KEEP;
        lab.cr3 = note->value;
        break;
    case NOTE_CR4:
        operation.kind = MOV_TO_CR4;
        operation.changes_pge = (lab.cr4 ^ note->value) & X86_CR4_PGE;
        lab.cr4 = note->value;
        break;
    default: operation.kind = INVLPG; operation.gva = note->gva;
    }
    return operation;
}

static void operation_note(const struct note *note) {
    struct operation operation = operation_of(note);
    operation_record(&operation);
    trial_drop(&operation);
}

static void entry_note(const struct note *note) {
    event_begin("entry");
    event_hex("root", note->root);
    event_hex("gva", note->gva);
    event_hex("value", note->value);
    event_end();
}

/* With the frame that the word stands in. None: it stands in no frame of the lab's. */
static void look_note(const struct note *note) {
    event_begin("look");
    event_hex("gva", note->gva);
    event_hex("value", note->value);
    for (unsigned i = 0; i < FRAMES; i++)
        if (lab.words[i] == note->value)
            event_hex("frame_gpa", FRAMES_GPA + i * PAGE_SIZE);
    event_end();
}

static void note_read(const struct note *note) {
    switch (note->kind) {
    case NOTE_STEP: step_note(note->detail); break;
    case NOTE_SPACE: space_note(note->detail, note->root); break;
    case NOTE_ENTRY: entry_note(note); break;
    case NOTE_LOOK: look_note(note); break;
    case NOTE_TRIAL: trial_note(note->detail); break;
    case NOTE_TRY: try_note(note->value); break;
    case NOTE_INVLPG:
    case NOTE_INVPCID:
    case NOTE_CR3:
    case NOTE_CR4: operation_note(note); break;
    default: break;
    }
}

/* The guest's memory says how many notes there are: believe it as far as the log reaches. */
static void notes_read(void) {
    uint64_t count = 0;
    const void *at = host_memory(lab.log_gpa + offsetof(struct log, count), sizeof count);
    if (at)
        memcpy(&count, at, sizeof count);
    for (; lab.notes_read < count && lab.notes_read < LOG_NOTES; lab.notes_read++) {
        struct note note;
        gpa_t gpa = lab.log_gpa + offsetof(struct log, notes) + lab.notes_read * sizeof note;
        const void *bytes = host_memory(gpa, sizeof note);
        if (!bytes)
            return;
        memcpy(&note, bytes, sizeof note);
        note_read(&note);
    }
}

/* ---- what the host half sees for itself ---- */

/* One address of a space: by a walk of its tables, and by KVM's own, if the space is the current one. */
static void probe_page(unsigned space, const char *what, gva_t page_gva) {
    gva_t gva = page_gva + random_below(&lab.probes, PAGE_SIZE);
    gpa_t root = lab.space_root[space];
    struct walk walk = host_walk(root, gva);
    uint64_t leaf = walk.steps ? walk.entry[walk.steps - 1].value : 0;
    event_begin("probe");
    event_number("space", space);
    event_string("what", what);
    event_hex("gva", gva);
    event_number("mapped", walk.end == WALK_MAPPED);
    event_hex("gpa", walk.gpa);
    event_hex("entry", leaf & ~(PTE_ACCESSED | PTE_DIRTY)); /* without what the CPU sets */
    if ((host_sregs()->cr3 & PTE_ADDRESS) == root)
        event_hex("kvm_gpa", host_translate(gva).physical_address);
    event_end();
}

static void probe_spaces(void) {
    for (unsigned space = 0; space < SPACES; space++) {
        if (!lab.space_root[space])
            continue;
        for (unsigned page = 0; page < PAGES; page++)
            probe_page(space, "page", lab.plan.page_gva[page]);
        for (unsigned page = 0; page < KERNEL_PAGES; page++)
            probe_page(space, "kernel page", kernel_page_gva(&lab.plan, page));
    }
}

static void trials_record(void) {
    for (unsigned i = 0; i < TRIALS; i++) {
        event_begin("tried");
        event_number("trial", i);
        event_string("name", trials[i].name);
        event_number("is_old", lab.trial[i].is_old);
        event_number("is_neither", lab.trial[i].is_neither);
        event_number("drops", lab.trial[i].drops);
        event_end();
    }
}

static void stage_end(uint8_t stage) {
    if (stage < STAGE_ENABLE || stage > STAGE_TRIALS)
        return;
    notes_read();
    event_begin("stage");
    event_number("stage", stage);
    event_hex("cr3", host_sregs()->cr3);
    event_hex("cr4", host_sregs()->cr4);
    event_end();
    probe_spaces();
    if (stage != STAGE_TRIALS)
        return;
    trials_record();
    situations_record();
}

static void verdict_access(struct access *access) {
    if (access->is_write)
        lab.verdict = access->data[0];
    else
        access->data[0] = lab.verdict < TRIALS && lab.trial[lab.verdict].drops;
}

static void log_access(const struct access *access) {
    uint32_t gpa = 0;
    if (!access->is_write || access->size != sizeof gpa)
        return;
    memcpy(&gpa, access->data, sizeof gpa);
    lab.log_gpa = gpa;
    lab.cr3 = host_sregs()->cr3;
    lab.cr4 = host_sregs()->cr4;
}

static void lab_access(struct access *access) {
    switch (access->address) {
    case LAB_LOG: log_access(access); break;
    case LAB_STAGE:
        if (access->is_write)
            stage_end(access->data[0]);
        break;
    case LAB_VERDICT: verdict_access(access); break;
    default: break;
    }
}

static void lab_setup(void) {
    plan_make(&lab.plan, host_seed());
    lab.probes = random_stream(host_seed(), 3);
    lab.trial_now = TRIALS;
    frames_fill();
    parameters_record();
    plan_record(&lab.plan);
    steps_record(&lab.plan);
    host_claim_pio(LAB_LOG, LAB_PORTS, "lab", lab_access);
}

const struct host_half host_half = {.setup = lab_setup};
