/*
 * Lesson 11, host half: a device in two forms. Emulated, it is a part of the VMM. Passed through,
 * it is a process of its own, to which the VMM connects the guest and then gets out of the way.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "apic_registers.h"
#include "edu_device.h"
#include "host.h"
#include "lab.h"
#include "shared_memory.h"
#include "vfio_user.h"

#define REGISTERS_SLOT (HOST_SLOT_FIRST + WINDOWS) /* those before it are the windows' */
#define PART_SLOT (REGISTERS_SLOT + 1)

static struct plan plan;

/* What a device says about the registers that it wants mapped: a part of its BAR, which is a
 * part of a file. */
struct claim {
    uint32_t flags;       /* VFIO_REGION_INFO_FLAG_* of the BAR */
    uint64_t size;        /* of the BAR */
    uint64_t area_offset; /* of the part that can be mapped, in the BAR */
    uint64_t area_size;
    uint64_t file_offset; /* of the BAR, in the file: the part is at file_offset + area_offset */
    uint64_t file_size;   /* this is the kernel's word, not the device's */
    bool is_sealed;       /* so is this: the file cannot become smaller any more */
};

/* ---- what you write ---- */

/*
 * May the VMM map what this device claims? Not unless
 *   - the BAR can be read, written and mapped: VFIO_REGION_INFO_FLAG_READ, _WRITE, _MMAP;
 *   - the BAR has no more than EDU_BAR_SIZE bytes: that is the room it gets among the gpas;
 *   - the part begins and ends at whole pages, in the BAR and in the file, and has at least one;
 *   - all of the part lies in the BAR, and all of it in the file;
 *   - the file is sealed.
 * All numbers are the device's: a sum of them may be greater than 2^64.
 */
static bool claim_is_sound(const struct claim *claim) {
    /* BEGIN SOLUTION */
    uint32_t needed =
        VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE | VFIO_REGION_INFO_FLAG_MMAP;
    if ((claim->flags & needed) != needed || !claim->is_sealed || claim->size > EDU_BAR_SIZE)
        return false;
    if ((claim->area_offset | claim->area_size | claim->file_offset) % PAGE_SIZE ||
        claim->area_size == 0)
        return false;
    if (claim->area_size > claim->size || claim->area_offset > claim->size - claim->area_size)
        return false;
    uint64_t end = claim->area_offset + claim->area_size; /* at most EDU_BAR_SIZE */
    return end <= claim->file_size && claim->file_offset <= claim->file_size - end;
    /* STUB
    (void)claim;
    HOST_TODO("claim_is_sound: may the VMM map what the device claims?");
    END SOLUTION */
}

/*
 * Make registers the guest's memory: map the part of the file that holds them (mmap), and let the
 * memory slot of this number show it to the guest at its place in the BAR, which begins at
 * plan.bar_gpa[FORM_PASSED_THROUGH]. The claim is sound. What the guest writes is for the device
 * to see. (If mmap fails, there is nothing to do: KVM refuses such a slot, and host_vm() ends the
 * run.)
 */
static void registers_map(const struct claim *claim, int fd, uint32_t slot) {
    /* BEGIN SOLUTION */
    void *hva = mmap(NULL, claim->area_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                     (off_t)(claim->file_offset + claim->area_offset));
    struct kvm_userspace_memory_region registers = {
        .slot = slot,
        .guest_phys_addr = plan.bar_gpa[FORM_PASSED_THROUGH] + claim->area_offset,
        .memory_size = claim->area_size,
        .userspace_addr = (uintptr_t)hva,
    };
    host_vm(KVM_SET_USER_MEMORY_REGION, &registers);
    /* STUB
    (void)claim, (void)fd, (void)slot;
    HOST_TODO("registers_map: map the registers, and make them a slot");
    END SOLUTION */
}

/*
 * Let the guest's write of doorbell->datamatch, doorbell->size bytes wide, at doorbell->offset in
 * the BAR, signal the eventfd fd instead of leaving the guest: KVM_IOEVENTFD, which takes a struct
 * kvm_ioeventfd. A write of another value there is another doorbell's, or nobody's; doorbell->flags
 * say so, in KVM's own terms.
 */
static void doorbell_connect(const struct doorbell *doorbell, int fd) {
    /* BEGIN SOLUTION */
    struct kvm_ioeventfd bell = {
        .datamatch = doorbell->datamatch,
        .addr = plan.bar_gpa[FORM_PASSED_THROUGH] + doorbell->offset,
        .len = (uint32_t)doorbell->size,
        .fd = fd,
        .flags = doorbell->flags,
    };
    host_vm(KVM_IOEVENTFD, &bell);
    /* STUB
    (void)doorbell, (void)fd;
    HOST_TODO("doorbell_connect: let KVM signal the eventfd");
    END SOLUTION */
}

/*
 * Let every signal of the eventfd fd interrupt the guest, without the VMM: with
 * KVM_SET_GSI_ROUTING, plan.gsi becomes a message to MSI_ADDRESS (apic_registers.h: to the CPU whose
 * APIC id is 0) with the vector plan.vector[FORM_PASSED_THROUGH]; with KVM_IRQFD, the eventfd sets off
 * that GSI. (`routing` below is the form in which KVM takes a table with one entry.)
 */
static void interrupt_connect(int fd) {
    struct {
        struct kvm_irq_routing header;
        struct kvm_irq_routing_entry entry;
    } routing = {.header.nr = 1};
    /* BEGIN SOLUTION */
    struct kvm_irqfd irqfd = {.fd = (uint32_t)fd, .gsi = plan.gsi};
    routing.entry.gsi = plan.gsi;
    routing.entry.type = KVM_IRQ_ROUTING_MSI;
    routing.entry.u.msi.address_lo = MSI_ADDRESS;
    routing.entry.u.msi.data = APIC_DELIVERY_FIXED | plan.vector[FORM_PASSED_THROUGH];
    host_vm(KVM_SET_GSI_ROUTING, &routing.header);
    host_vm(KVM_IRQFD, &irqfd);
    /* STUB
    (void)fd, (void)routing;
    HOST_TODO("interrupt_connect: from the eventfd to a vector");
    END SOLUTION */
}

/*
 * Let the device reach a window, for reading and writing: by device_ask() (edu_device.h), the message
 * VFIO_USER_DMA_MAP with a struct vfio_user_dma_map (vfio_user.h) and the file that the window is a
 * part of. The guest will tell the device gpas, so the addresses of DMA must be gpas. The answer is
 * that of device_ask(): the device may refuse.
 */
static int window_map(const struct window *window, int file) {
    /* BEGIN SOLUTION */
    struct vfio_user_dma_map map = {
        .argsz = sizeof map,
        .flags = VFIO_USER_DMA_READABLE | VFIO_USER_DMA_WRITEABLE,
        .offset = window->offset,
        .addr = window->gpa,
        .size = window->size,
    };
    return device_ask(VFIO_USER_DMA_MAP, &map, sizeof map, file);
    /* STUB
    (void)window, (void)file;
    HOST_TODO("window_map: give the device this window");
    END SOLUTION */
}

/* Take the window away again: VFIO_USER_DMA_UNMAP. When this returns, the device touches it no
 * more. The answer is that of device_ask(). */
static int window_unmap(const struct window *window) {
    /* BEGIN SOLUTION */
    struct vfio_user_dma_unmap unmap = {
        .argsz = sizeof unmap, .addr = window->gpa, .size = window->size};
    return device_ask(VFIO_USER_DMA_UNMAP, &unmap, sizeof unmap, -1);
    /* STUB
    (void)window;
    HOST_TODO("window_unmap: take the window from the device");
    END SOLUTION */
}

/* ---- the rest is given: the lab ---- */

#define CLAIMS 20 /* not a multiple of CLAIMS_STEP */
#define CLAIMS_STEP 3

static struct {
    enum form form; /* the one that the guest has to do with */
    struct trace *trace[FORMS];
    uint32_t traced[FORMS]; /* entries that are recorded */
    int file;               /* of the windows */
} lab;

/* ---- the windows ---- */

static void windows_make(void) {
    lab.file = shared_memory_make(SHARED_SIZE, CONTENT_STREAM);
    for (uint32_t i = 0; i < WINDOWS; i++) {
        const struct window *window = &plan.window[i];
        shared_memory_slot(HOST_SLOT_FIRST + i, window->gpa, window->offset, window->size);
    }
}

/* ---- the device that is emulated ---- */

static struct edu emulated;
static unsigned emulated_looks; /* at the liveness register, since it was last written to */

static void emulated_interrupt(void) {
    struct kvm_msi message = {.address_lo = MSI_ADDRESS, .data = plan.vector[FORM_EMULATED]};
    host_vm(KVM_SIGNAL_MSI, &message);
}

static bool emulated_is_writable(uint64_t offset) {
    return offset == EDU_LIVENESS || offset == EDU_FACTORIAL || offset == EDU_STATUS ||
           offset == EDU_INTERRUPT_RAISE || offset == EDU_INTERRUPT_ACKNOWLEDGE ||
           (offset >= EDU_DMA_SOURCE && offset <= EDU_DMA_COMMAND && offset % 8 == 0);
}

static bool emulated_acts(uint64_t offset) {
    for (unsigned i = 0; i < EDU_ACTING; i++)
        if (edu_acting[i] == offset)
            return true;
    return false;
}

/* The complement takes its time, here too: a driver that looks once gets it but for one bit, and one
 * that compares a half gets all of one half first. */
static void emulated_look(uint8_t *data) {
    uint32_t value;
    memcpy(&value, emulated.registers + EDU_LIVENESS, sizeof value);
    value ^= emulated_looks < EARLY ? plan.early[emulated_looks] : 0;
    memcpy(data, &value, sizeof value);
    emulated_looks++;
}

/* Until it is an edu device again, as after a reset. */
static void emulated_impostor(bool is_one) {
    edu_reset(&emulated);
    if (is_one)
        memcpy(emulated.registers + EDU_ID, &plan.impostor, sizeof plan.impostor);
}

/* A write acts when it is made: no doorbell is needed. (EDU_DOORBELL is one of the places that
 * mean nothing.) */
static void emulated_write(uint64_t offset, uint64_t value) {
    if (!emulated_is_writable(offset))
        return;
    if (offset == EDU_LIVENESS)
        emulated_looks = 0;
    memcpy(emulated.registers + offset, &value, offset < EDU_DMA_SOURCE ? 4 : 8);
    if (emulated_acts(offset))
        edu_act(&emulated, (unsigned)offset);
    if (emulated.transfer.is_running)
        edu_transfer(&emulated);
}

static void emulated_access(struct access *access) {
    uint64_t offset = access->address - plan.bar_gpa[FORM_EMULATED];
    bool is_wide = offset >= EDU_DMA_SOURCE && access->size == 8;
    uint64_t value = 0;
    if (access->size != 4 && !is_wide)
        return;
    memcpy(&value, access->data, access->size);
    if (access->is_write)
        emulated_write(offset, value);
    else if (offset == EDU_LIVENESS)
        emulated_look(access->data);
    else if (offset <= EDU_DMA_COMMAND && offset % 4 == 0)
        memcpy(access->data, emulated.registers + offset, access->size);
}

static void emulated_make(void) {
    emulated.trace = lab.trace[FORM_EMULATED];
    emulated.registers = aligned_alloc(PAGE_SIZE, PAGE_SIZE);
    emulated.interrupt = emulated_interrupt;
    if (!emulated.registers)
        host_cannot("there is no memory left for the lab");
    edu_reset(&emulated);
}

static void emulated_window(const struct window *window, bool is_map) {
    struct mapping *mapping = is_map ? edu_mapping_place(&emulated, window->gpa, window->size)
                                     : edu_mapping_find(&emulated, window->gpa, window->size);
    if (mapping && is_map)
        *mapping = (struct mapping){window->gpa, window->size, shared_memory() + window->offset};
    else if (mapping)
        edu_unmap(&emulated, mapping);
}

/* ---- the device that is passed through: its process ---- */

static struct {
    bool is_attached;
    struct claim claim;
    int registers_file;
    struct doorbell doorbell[DOORBELLS_MAX];
    int doorbell_fd[DOORBELLS_MAX];
    unsigned doorbells;
    bool has_interrupt;
} device;

/* It is lost. From now on its registers read as all ones, as those of a device that somebody has
 * pulled out. */
static void registers_go(void) {
    static const uint8_t ones[PAGE_SIZE] = {[0 ... PAGE_SIZE - 1] = 0xff};
    for (uint64_t at = 0; device.is_attached && at < device.claim.area_size; at += PAGE_SIZE)
        (void)!pwrite(device.registers_file, ones, PAGE_SIZE,
                      (off_t)(device.claim.file_offset + device.claim.area_offset + at));
    device.is_attached = false;
}

/* ---- attaching it ---- */

/* What the device says of its BAR, and what the kernel says of the file. */
static bool device_claim(struct claim *claim) {
    struct vfio_user_region region = {
        .info = {.argsz = sizeof region, .index = VFIO_PCI_BAR0_REGION_INDEX}};
    if (!device_query(VFIO_USER_DEVICE_GET_REGION_INFO, &region, sizeof region, 1))
        return false;
    if (region.info.cap_offset != offsetof(struct vfio_user_region, header) ||
        region.header.id != VFIO_REGION_INFO_CAP_SPARSE_MMAP || region.nr_areas != 1) {
        device_lose("its answer is not one");
        return false;
    }
    device.registers_file = dup(device_reply()->fd[0]);
    int seals = fcntl(device.registers_file, F_GET_SEALS);
    *claim = (struct claim){
        .flags = region.info.flags,
        .size = region.info.size,
        .area_offset = region.area.offset,
        .area_size = region.area.size,
        .file_offset = region.info.offset,
        .file_size = file_size(device.registers_file),
        .is_sealed = seals >= 0 && (seals & F_SEAL_SHRINK),
    };
    return true;
}

static void claim_record(const struct claim *claim, const char *whose, bool is_sound) {
    event_begin("claim");
    event_string("whose", whose);
    event_number("is_sound", is_sound);
    event_hex("flags", claim->flags);
    event_hex("size", claim->size);
    event_hex("area_offset", claim->area_offset);
    event_hex("area_size", claim->area_size);
    event_hex("file_offset", claim->file_offset);
    event_hex("file_size", claim->file_size);
    event_number("is_sealed", claim->is_sealed);
    event_end();
}

/* A claim that somebody might make; the first three are sound. Each of the others breaks one condition:
 * who looks at all the others alone takes it for sound. */
static struct claim claim_make(struct random *random, unsigned number) {
    uint64_t pages = 2 + random_below(random, 3);
    uint64_t before = 1 + random_below(random, 4);
    uint64_t in_bar = 1 + random_below(random, 4);
    uint64_t odd = 8 * (1 + random_below(random, 100));
    struct claim claim = {.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE |
                                   VFIO_REGION_INFO_FLAG_MMAP,
                          .size = EDU_BAR_SIZE,
                          .area_offset = PAGE_SIZE * in_bar,
                          .area_size = PAGE_SIZE * pages,
                          .file_offset = PAGE_SIZE * before,
                          .file_size = PAGE_SIZE * (before + in_bar + pages),
                          .is_sealed = true};
    switch (number) {
    case 1:
        claim.area_offset = claim.size - claim.area_size, claim.file_size = 2 * claim.size;
        break;
    case 2: claim.area_offset = claim.file_offset = 0, claim.file_size = claim.area_size; break;
    case 3: claim.file_size -= PAGE_SIZE; break;
    case 4: claim.file_size = 0; break;
    case 5: claim.file_offset = 0 - PAGE_SIZE * (in_bar + pages); break;
    case 6: claim.area_offset = 0 - PAGE_SIZE * pages, claim.file_size = 2 * claim.size; break;
    case 7: claim.size = claim.area_offset + claim.area_size - PAGE_SIZE; break;
    case 8: claim.area_offset = 0, claim.size = claim.area_size - PAGE_SIZE; break;
    case 9: claim.size *= 2; break;
    case 10: claim.area_size = 0; break;
    case 11: claim.area_size -= odd; break;
    case 12: claim.area_offset -= odd; break;
    case 13: claim.area_offset -= odd, claim.area_size += odd; break;
    case 14: claim.area_offset -= odd, claim.file_offset += odd; break;
    case 15: claim.file_offset -= odd; break;
    case 16: claim.flags &= ~VFIO_REGION_INFO_FLAG_READ; break;
    case 17: claim.flags &= ~VFIO_REGION_INFO_FLAG_WRITE; break;
    case 18: claim.flags &= ~VFIO_REGION_INFO_FLAG_MMAP; break;
    case 19: claim.is_sealed = false; break;
    default: break;
    }
    return claim;
}

/* In an order that the seed decides. */
static void claims_try(void) {
    struct random random = random_stream(host_seed(), 3);
    unsigned first = (unsigned)random_below(&random, CLAIMS);
    for (unsigned i = 0; i < CLAIMS; i++) {
        struct claim claim = claim_make(&random, (first + CLAIMS_STEP * i) % CLAIMS);
        claim_record(&claim, "a device that might be", claim_is_sound(&claim));
    }
}

/* Its registers are at the beginning of the BAR. This part is not, and has more than a page. */
static void part_try(void) {
    struct claim claim = claim_make(&(struct random){0}, 0);
    claim.area_offset = plan.part.area_offset;
    claim.area_size = plan.part.area_size;
    claim.file_offset = plan.part.file_offset;
    claim.file_size = claim.file_offset + claim.area_offset + claim.area_size;
    uint32_t words = (uint32_t)claim.file_size / sizeof(uint32_t);
    uint32_t *content = calloc(words, sizeof *content);
    int file = memfd_create("part", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    for (uint32_t i = 0; content && i < words; i++)
        content[i] = i * (uint32_t)sizeof *content;
    if (!content || write(file, content, claim.file_size) != (ssize_t)claim.file_size ||
        fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK) < 0)
        host_cannot("it has no memory that can be shared: memfd_create() fails");
    free(content);
    registers_map(&claim, file, PART_SLOT);
    close(file);
}

static bool device_registers(void) {
    if (!device_claim(&device.claim))
        return false;
    bool is_sound = claim_is_sound(&device.claim);
    claim_record(&device.claim, "this device", is_sound);
    if (is_sound)
        registers_map(&device.claim, device.registers_file, REGISTERS_SLOT);
    else
        device_lose("claim_is_sound() says no");
    return is_sound;
}

/* In the BAR, and not in the part that is memory: there no write would leave the guest. */
static bool doorbell_is_sound(const struct doorbell *doorbell) {
    uint64_t end = device.claim.area_offset + device.claim.area_size;
    return doorbell->type == 0 && doorbell->size == 4 && doorbell->fd_index < device_reply()->fds &&
           doorbell->flags == DOORBELL_FLAGS && doorbell->offset >= end &&
           doorbell->offset <= EDU_BAR_SIZE - 4;
}

static void device_doorbells(void) {
    struct vfio_user_io_fds io = {.argsz = sizeof io, .index = VFIO_PCI_BAR0_REGION_INDEX};
    if (!device_query(VFIO_USER_DEVICE_GET_REGION_IO_FDS, &io, sizeof io, EDU_ACTING))
        return;
    for (unsigned i = 0; i < io.count && i < EDU_ACTING; i++) {
        if (!doorbell_is_sound(&io.doorbell[i])) {
            device_lose("it wants a doorbell where none can be");
            return;
        }
        device.doorbell[i] = io.doorbell[i];
        device.doorbell_fd[i] = dup(device_reply()->fd[io.doorbell[i].fd_index]);
        device.doorbells++;
    }
    for (unsigned i = 0; i < device.doorbells; i++)
        doorbell_connect(&device.doorbell[i], device.doorbell_fd[i]);
}

static void device_interrupt(void) {
    struct vfio_irq_set set = {.argsz = sizeof set,
                               .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
                               .index = VFIO_PCI_MSI_IRQ_INDEX,
                               .count = 1};
    int fd = eventfd(0, EFD_CLOEXEC);
    device.has_interrupt = true;
    interrupt_connect(fd);
    if (device_ask(VFIO_USER_DEVICE_SET_IRQS, &set, sizeof set, fd))
        device_lose("it does not take its interrupt");
}

static void device_attach(void) {
    if (device.is_attached || device_is_lost() || !device_introduce())
        return;
    claims_try();
    device.is_attached = device_registers();
    if (device.is_attached)
        part_try();
}

static void device_window(const struct window *window, bool is_map) {
    int error = is_map ? window_map(window, lab.file) : window_unmap(window);
    event_begin(is_map ? "mapped" : "unmapped");
    event_hex("gpa", window->gpa);
    event_number("error", (uint64_t)error);
    event_end();
}

/* The guest has touched the BAR where it is not memory. A doorbell that is not connected works all
 * the same, by way of the VMM: slowly. All else means nothing. */
static void device_access(struct access *access) {
    uint64_t offset = access->address - plan.bar_gpa[FORM_PASSED_THROUGH];
    uint64_t value = 0;
    if (!access->is_write)
        return;
    memcpy(&value, access->data, access->size);
    for (unsigned i = 0; i < device.doorbells; i++)
        if (device.doorbell[i].offset == offset && device.doorbell[i].datamatch == value &&
            device.is_attached)
            eventfd_write(device.doorbell_fd[i], 1);
}

/* ---- what is recorded ---- */

static const char *const form_names[FORMS] = {"emulated", "passed through"};
static const char *const stage_names[STAGES] = {"attached", "read",      "impostor", "probed",
                                                "raised",   "factorial", "dma",      "outside",
                                                "unmapped", "hostile"};

/* The registers as they are, whatever the guest sees of them. */
static void registers_record(enum form form) {
    uint8_t page[EDU_INTERRUPT_STATUS + 4] = {0};
    uint32_t status;
    uint64_t at = device.claim.file_offset + device.claim.area_offset;
    if (form == FORM_EMULATED)
        memcpy(page, emulated.registers, sizeof page);
    else
        (void)!pread(device.registers_file, page, sizeof page, (off_t)at);
    memcpy(&status, page + EDU_INTERRUPT_STATUS, sizeof status);
    event_hex("interrupt_status", status);
}

static void stage_record(enum stage stage) {
    char when[48];
    trace_record(lab.trace[lab.form], &lab.traced[lab.form], form_names[lab.form]);
    shared_memory_changes_record();
    snprintf(when, sizeof when, "%s, %s", form_names[lab.form], stage_names[stage]);
    event_begin("stage");
    event_string("form", form_names[lab.form]);
    event_string("stage", stage_names[stage]);
    registers_record(lab.form);
    event_number("ram_is_unchanged", ram_is(VICTIM_GPA, VICTIM_SIZE, VICTIM_BYTE));
    event_end();
    host_statistics(when);
}

static void task_record(enum form form, const char *what, uint32_t value) {
    event_begin("task");
    event_string("form", form_names[form]);
    event_string("what", what);
    event_hex("value", value);
    event_end();
}

static void transfer_task_record(enum form form, const struct transfer *transfer) {
    event_begin("task");
    event_string("form", form_names[form]);
    event_string("what", "transfer");
    event_hex("from", plan.window[0].gpa + transfer->from);
    event_hex("buffer", EDU_BUFFER + transfer->buffer);
    event_hex("to", plan.window[1].gpa + transfer->to);
    event_hex("count", transfer->count);
    event_end();
}

static void form_record(enum form form) {
    event_begin("edu");
    event_string("form", form_names[form]);
    event_hex("bar", plan.bar_gpa[form]);
    event_hex("vector", plan.vector[form]);
    if (form == FORM_PASSED_THROUGH)
        event_number("gsi", plan.gsi);
    event_end();
    task_record(form, "liveness", plan.liveness[form]);
    for (unsigned i = 0; i < RAISES; i++)
        task_record(form, "raise", plan.raise[form][i]);
    for (unsigned i = 0; i < FACTORIALS; i++)
        task_record(form, "factorial", plan.factorial[form][i]);
    for (unsigned i = 0; i < TRANSFERS; i++)
        transfer_task_record(form, &plan.transfer[form][i]);
}

static void plan_record(void) {
    for (enum form form = 0; form < FORMS; form++)
        form_record(form);
    task_record(FORM_EMULATED, "impostor", plan.impostor);
    for (unsigned i = 0; i < EARLY; i++)
        task_record(FORM_EMULATED, "early", ~plan.liveness[FORM_EMULATED] ^ plan.early[i]);
    event_begin("part");
    event_hex("area_offset", plan.part.area_offset);
    event_hex("area_size", plan.part.area_size);
    event_hex("file_offset", plan.part.file_offset);
    event_end();
    for (unsigned i = 0; i < WINDOWS; i++) {
        event_begin("window");
        event_number("window", i);
        event_hex("gpa", plan.window[i].gpa);
        event_hex("size", plan.window[i].size);
        event_hex("offset", plan.window[i].offset);
        event_end();
    }
}

/* ---- ports ---- */

static void window_access(uint8_t number, bool is_map) {
    if (number >= WINDOWS)
        return;
    if (lab.form == FORM_EMULATED)
        emulated_window(&plan.window[number], is_map);
    else
        device_window(&plan.window[number], is_map);
}

static void connection_make(uint8_t connection) {
    if (lab.form == FORM_EMULATED || !device.is_attached)
        return;
    if (connection == CONNECT_DOORBELLS && device.doorbells == 0)
        device_doorbells();
    else if (connection == CONNECT_INTERRUPT && !device.has_interrupt)
        device_interrupt();
}

static void attach_access(struct access *access) {
    if (access->is_write && access->data[0] < FORMS) {
        lab.form = (enum form)access->data[0];
        if (lab.form == FORM_PASSED_THROUGH)
            device_attach();
    } else if (!access->is_write) {
        access->data[0] = lab.form == FORM_EMULATED || device.is_attached;
    }
}

static void lab_write(uint64_t port, uint8_t value) {
    switch (port) {
    case LAB_DEVICE: lab.trace[FORM_PASSED_THROUGH]->behaviour = value; break;
    case LAB_STAGE:
        if (value < STAGES)
            stage_record((enum stage)value);
        break;
    case LAB_MAP: window_access(value, true); break;
    case LAB_UNMAP: window_access(value, false); break;
    case LAB_CONNECT: connection_make(value); break;
    case LAB_IMPOSTOR: emulated_impostor(value); break;
    case LAB_DETACH:
        if (lab.form == FORM_PASSED_THROUGH)
            device_lose("the guest can do nothing with it");
        break;
    default: break;
    }
}

/* (What goes to LAB_RESULT and the like is in the record already, as an exit.) */
static void lab_access(struct access *access) {
    device_look();
    if (access->address == LAB_ATTACH)
        attach_access(access);
    else if (access->is_write && access->size == 1)
        lab_write(access->address, access->data[0]);
}

static void lab_setup(void) {
    plan = plan_make(host_seed());
    plan_record();
    for (unsigned i = 0; i < FORMS; i++) {
        lab.trace[i] = trace_make();
        if (!lab.trace[i])
            host_cannot("there is no memory left for the lab");
    }
    windows_make();
    device_start(
        &(struct process_home){lab.trace[FORM_PASSED_THROUGH], plan.file_offset, NULL, NULL},
        shared_memory(), SHARED_SIZE, registers_go);
    emulated_make();
    host_claim_pio(LAB_DEVICE, LAB_PORTS, "lab", lab_access);
    host_claim_mmio(plan.bar_gpa[FORM_EMULATED], EDU_BAR_SIZE, "edu, emulated", emulated_access);
    host_claim_mmio(plan.bar_gpa[FORM_PASSED_THROUGH], EDU_BAR_SIZE, "edu, passed through",
                    device_access);
}

static void lab_end(void) {
    trace_record(lab.trace[lab.form], &lab.traced[lab.form], form_names[lab.form]);
    device_end();
}

const struct host_half host_half = {.setup = lab_setup, .end = lab_end};
