/*
 * Lesson 2, host half: nothing to write here. It fills the frames with words the guest cannot see
 * but through its own mappings, and at each checkpoint asks both KVM (KVM_TRANSLATE) and the page
 * tables themselves about addresses of its own choice.
 */
#include <stdio.h>
#include <string.h>

#include "host.h"
#include "plan.h"

static struct {
    struct plan plan;
    struct random probes; /* where inside a page to look */
    uint32_t report[3];   /* the words of a report that have arrived */
    unsigned report_words;
} lab;

/* The first word of a frame: the tests compute it, too. */
static void frame_fill(uint64_t gpa) {
    struct random words = random_stream(host_seed() ^ gpa, 2);
    uint64_t word = random_next(&words);
    void *frame = host_memory(gpa, sizeof word);
    if (frame)
        memcpy(frame, &word, sizeof word);
}

static void frames_fill(const struct plan *plan) {
    for (unsigned i = 0; i < SMALL_PAGES; i++)
        frame_fill(plan->small_gpa[i]);
    for (unsigned i = 0; i < 512; i++)
        frame_fill(plan->large_gpa + i * PAGE_SIZE);
    for (unsigned i = 0; i < 2; i++) {
        frame_fill(plan->remap_gpa[i]);
        frame_fill(plan->shared_gpa[i]);
    }
    frame_fill(plan->replaced_gpa);
}

static void event_list(const char *name, const uint64_t *values, unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        char member[32];
        snprintf(member, sizeof member, "%s_%02u", name, i);
        event_hex(member, values[i]);
    }
}

static void plan_record(const struct plan *plan) {
    event_begin("plan");
    event_list("small_gva", plan->small_gva, SMALL_PAGES);
    event_list("small_gpa", plan->small_gpa, SMALL_PAGES);
    event_hex("large_gva", plan->large_gva);
    event_hex("large_gpa", plan->large_gpa);
    event_number("replaced_page", plan->replaced_page);
    event_hex("replaced_gpa", plan->replaced_gpa);
    event_hex("read_only_gva", plan->read_only_gva);
    event_hex("read_only_gpa", plan->read_only_gpa);
    event_hex("no_execute_gva", plan->no_execute_gva);
    event_hex("no_execute_gpa", plan->no_execute_gpa);
    event_hex("kernel_gva", plan->kernel_gva);
    event_hex("kernel_gpa", plan->kernel_gpa);
    event_hex("user_gva", plan->user_gva);
    event_hex("user_gpa", plan->user_gpa);
    event_hex("lazy_gva", plan->lazy_gva);
    event_list("lazy_touch", plan->lazy_touch, LAZY_TOUCHES);
    event_hex("harvest_gva", plan->harvest_gva);
    event_list("read_set", plan->read_set, HARVEST_ROUNDS);
    event_list("write_set", plan->write_set, HARVEST_ROUNDS);
    event_hex("remap_gva", plan->remap_gva);
    event_list("remap_gpa", plan->remap_gpa, 2);
    event_hex("shared_gva", plan->shared_gva);
    event_list("shared_gpa", plan->shared_gpa, 2);
    event_end();
}

/* One address, seen by KVM and by a walk of the tables. */
static void probe_at(enum checkpoint checkpoint, uint64_t gva) {
    struct walk walk = host_walk(host_sregs()->cr3, gva); /* first: KVM's walk marks accessed */
    struct kvm_translation kvm = host_translate(gva);
    uint64_t leaf = walk.steps ? walk.entry[walk.steps - 1].value : 0;
    event_begin("probe");
    event_number("checkpoint", checkpoint);
    event_hex("gva", gva);
    event_number("kvm_valid", kvm.valid);
    event_hex("kvm_gpa", kvm.physical_address);
    event_number("mapped", walk.end == WALK_MAPPED);
    event_hex("gpa", walk.gpa);
    event_number("page_size", walk.page_size);
    event_hex("entry", leaf);
    event_number("writable", (walk.permits & PTE_WRITABLE) != 0);
    event_number("user", (walk.permits & PTE_USER) != 0);
    event_number("executable", !(walk.permits & PTE_NO_EXECUTE));
    event_number("accessed", (leaf & PTE_ACCESSED) != 0);
    event_number("dirty", (leaf & PTE_DIRTY) != 0);
    event_end();
}

/* An address anywhere in the page, where the guest did not look. */
static void probe_page(enum checkpoint checkpoint, uint64_t gva) {
    probe_at(checkpoint, gva + random_below(&lab.probes, PAGE_SIZE));
}

static void probe_large(enum checkpoint checkpoint, const struct plan *plan) {
    probe_page(checkpoint, plan->large_gva);
    probe_page(checkpoint, plan->large_gva + 511 * PAGE_SIZE);
    probe_page(checkpoint, plan->large_gva + plan->replaced_page * PAGE_SIZE);
    for (unsigned i = 0; i < 16; i++)
        probe_page(checkpoint, plan->large_gva + random_below(&lab.probes, 512) * PAGE_SIZE);
    probe_page(checkpoint, plan->large_gva + LARGE_PAGE_SIZE);
}

static void probe_checkpoint(enum checkpoint checkpoint, const struct plan *plan) {
    switch (checkpoint) {
    case CHECKPOINT_SMALL:
        for (unsigned i = 0; i < SMALL_PAGES; i++) {
            probe_page(checkpoint, plan->small_gva[i]);
            probe_page(checkpoint, plan->small_gva[i] + (i == 0 ? 2 : 1) * PAGE_SIZE);
            probe_page(checkpoint, plan->small_gva[i] ^ UINT64_C(1) << 38);
        }
        break;
    case CHECKPOINT_LARGE:
    case CHECKPOINT_SPLIT:
    case CHECKPOINT_REPLACED: probe_large(checkpoint, plan); break;
    case CHECKPOINT_PROTECTED:
        probe_page(checkpoint, plan->read_only_gva);
        probe_page(checkpoint, plan->no_execute_gva);
        probe_page(checkpoint, plan->kernel_gva);
        probe_page(checkpoint, plan->user_gva);
        break;
    case CHECKPOINT_LAZY:
        for (unsigned i = 0; i < LAZY_PAGES; i++)
            probe_page(checkpoint, plan->lazy_gva + i * PAGE_SIZE);
        break;
    case CHECKPOINT_CLEAN:
        for (unsigned i = 0; i < HARVEST_PAGES; i++)
            probe_page(checkpoint, plan->harvest_gva + i * PAGE_SIZE);
        break;
    case CHECKPOINT_REMAPPED: probe_page(checkpoint, plan->remap_gva); break;
    case CHECKPOINT_SPACE_A:
    case CHECKPOINT_SPACE_B: probe_page(checkpoint, plan->shared_gva); break;
    }
}

static void checkpoint_access(struct access *access) {
    if (access->is_write)
        probe_checkpoint((enum checkpoint)access->data[0], &lab.plan);
}

static void report_word(uint32_t word) {
    lab.report[lab.report_words++] = word;
    if (lab.report_words < 3)
        return;
    event_begin("report");
    event_number("what", lab.report[0]);
    event_hex("value", lab.report[1] | (uint64_t)lab.report[2] << 32);
    event_end();
    lab.report_words = 0;
}

static void report_access(struct access *access) {
    for (uint32_t i = 0; access->is_write && access->size == 4 && i < access->count; i++) {
        uint32_t word;
        memcpy(&word, access->data + i * sizeof word, sizeof word);
        report_word(word);
    }
}

static void lab_setup(void) {
    lab.plan = plan_make(host_seed());
    lab.probes = random_stream(host_seed(), 3);
    frames_fill(&lab.plan);
    plan_record(&lab.plan);
    host_claim_pio(LAB_CHECKPOINT, 1, "lab checkpoint", checkpoint_access);
    host_claim_pio(LAB_REPORT, 4, "lab report", report_access);
}

const struct host_half host_half = {.setup = lab_setup};
