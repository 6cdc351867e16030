/*
 * Lesson 12, host half: a device by VFIO, and the IOMMU between it and memory. On svm both are the
 * machine's; elsewhere they are software (vfio.h, iommu.h), behind the same ioctls.
 */
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "apic_registers.h"
#include "host.h"
#include "iommu.h"
#include "lab.h"
#include "pic_registers.h"
#include "shared_memory.h"
#include "vfio.h"

#define REGISTERS_SLOT (HOST_SLOT_FIRST + WINDOWS) /* yours; those before it are the windows' */

static struct plan plan;

/* ---- what you write: an IOMMU ---- */

/*
 * Let the page at iova lead to the page at hpa, with these permissions (IO_READ, IO_WRITE or both).
 * `root` is the hpa of the table of level IO_LEVELS. A table that is missing on the way is made, with
 * io_table_new(); the entry that leads to it permits both, so that the last one alone decides.
 * iova has no more than IO_IOVA_BITS bits; it and hpa are those of pages.
 */
static void io_map(uint64_t root, uint64_t iova, uint64_t hpa, uint64_t permissions) {
    /* BEGIN SOLUTION */
    uint64_t table_hpa = root;
    for (unsigned level = IO_LEVELS; level > 1; level--) {
        uint64_t entry = io_read(table_hpa, io_index(iova, level));
        if (!(entry & (IO_READ | IO_WRITE))) {
            entry = io_table_new() | IO_READ | IO_WRITE;
            io_write(table_hpa, io_index(iova, level), entry);
        }
        table_hpa = entry & IO_ADDRESS;
    }
    io_write(table_hpa, io_index(iova, 1), hpa | permissions);
    /* STUB
    (void)root, (void)iova, (void)hpa, (void)permissions, (void)io_table_new, (void)io_write;
    HOST_TODO("io_map: from the root down to the page's entry");
    END SOLUTION */
}

/*
 * Where does iova lead? The answer is what all entries on the way permit, together; *hpa becomes that
 * of the page. 0: nowhere. The device may ask for any 64 bits. An entry that is not present is the
 * last to be read.
 */
static uint64_t io_walk(uint64_t root, uint64_t iova, uint64_t *hpa) {
    /* BEGIN SOLUTION */
    uint64_t permissions = IO_READ | IO_WRITE;
    *hpa = root;
    if (iova >> IO_IOVA_BITS)
        return 0;
    for (unsigned level = IO_LEVELS; level >= 1 && permissions; level--) {
        uint64_t entry = io_read(*hpa, io_index(iova, level));
        permissions &= entry;
        *hpa = entry & IO_ADDRESS;
    }
    return permissions;
    /* STUB
    (void)root, (void)iova, (void)hpa, (void)io_read;
    HOST_TODO("io_walk: where does this iova lead, and what is permitted?");
    END SOLUTION */
}

/* Let the page at iova lead nowhere. It may lead nowhere already, and the way there may be missing:
 * make none. Tables stay. */
static void io_unmap(uint64_t root, uint64_t iova) {
    /* BEGIN SOLUTION */
    uint64_t table_hpa = root;
    for (unsigned level = IO_LEVELS; level > 1; level--) {
        uint64_t entry = io_read(table_hpa, io_index(iova, level));
        if (!(entry & (IO_READ | IO_WRITE)))
            return;
        table_hpa = entry & IO_ADDRESS;
    }
    io_write(table_hpa, io_index(iova, 1), 0);
    /* STUB
    (void)root, (void)iova;
    HOST_TODO("io_unmap: take the page's entry away");
    END SOLUTION */
}

/*
 * A device wants to read or to write (need: IO_READ or IO_WRITE) the byte at iova. May it, and at
 * which *hpa is the byte? If the page stands in its place in the IOTLB, that is all there is to know.
 * Else walk, and keep what the walk has found in that place. What leads nowhere is not kept: the place
 * stays as it is.
 */
static bool iotlb_translate(struct iotlb *iotlb, uint64_t root, uint64_t iova, uint64_t need,
                            uint64_t *hpa) {
    /* BEGIN SOLUTION */
    struct iotlb_entry *entry = iotlb_place(iotlb, iova);
    uint64_t page = iova - iova % PAGE_SIZE;
    if (!entry->permissions || entry->iova != page) {
        struct iotlb_entry found = {.iova = page};
        found.permissions = io_walk(root, page, &found.hpa);
        if (!found.permissions)
            return false;
        *entry = found;
    }
    *hpa = entry->hpa + iova % PAGE_SIZE;
    return entry->permissions & need;
    /* STUB
    (void)iotlb, (void)root, (void)iova, (void)need, (void)hpa, (void)io_walk;
    HOST_TODO("iotlb_translate: from what is remembered, or by a walk");
    END SOLUTION */
}

/* Forget what is remembered of the pages in [iova, iova + size), and of no others. Both are whole
 * pages. */
static void iotlb_invalidate(struct iotlb *iotlb, uint64_t iova, uint64_t size) {
    /* BEGIN SOLUTION */
    for (unsigned i = 0; i < IOTLB_ENTRIES; i++)
        if (iotlb->entry[i].iova >= iova && iotlb->entry[i].iova - iova < size)
            iotlb->entry[i].permissions = 0;
    /* STUB
    (void)iotlb, (void)iova, (void)size;
    HOST_TODO("iotlb_invalidate: forget these pages");
    END SOLUTION */
}

/* ---- what you write: a device by VFIO ---- */

/*
 * Get at the device called `name`, by four ioctls, each vfio(file, NAME, argument):
 * VFIO_GROUP_GET_STATUS, which fills in a struct vfio_group_status: a group that is not
 * VFIO_GROUP_FLAGS_VIABLE is left alone; VFIO_GROUP_SET_CONTAINER takes a pointer to the container's
 * file descriptor; VFIO_SET_IOMMU takes the type, VFIO_TYPE1v2_IOMMU, itself; VFIO_GROUP_GET_DEVICE_FD
 * takes the name. Which file is asked for what is in <linux/vfio.h>. The answer is the device's file
 * descriptor, or -1.
 */
static int device_open(int container, int group, const char *name) {
    /* BEGIN SOLUTION */
    struct vfio_group_status status = {.argsz = sizeof status};
    if (vfio(group, VFIO_GROUP_GET_STATUS, &status) < 0 ||
        !(status.flags & VFIO_GROUP_FLAGS_VIABLE))
        return -1;
    if (vfio(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
        vfio(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        return -1;
    return vfio(group, VFIO_GROUP_GET_DEVICE_FD, name);
    /* STUB
    (void)container, (void)group, (void)name;
    HOST_TODO("device_open: from the group to the device");
    END SOLUTION */
}

/*
 * Make the registers the guest's memory: VFIO_DEVICE_GET_REGION_INFO says, in a struct
 * vfio_region_info, how large the region VFIO_PCI_BAR0_REGION_INDEX is, and where mmap() of the
 * device's file finds it. The slot, number REGISTERS_SLOT, begins at plan.bar_gpa.
 */
static void registers_map(int device) {
    /* BEGIN SOLUTION */
    struct vfio_region_info info = {.argsz = sizeof info, .index = VFIO_PCI_BAR0_REGION_INDEX};
    vfio(device, VFIO_DEVICE_GET_REGION_INFO, &info);
    void *hva =
        mmap(NULL, info.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, (off_t)info.offset);
    struct kvm_userspace_memory_region bar = {
        .slot = REGISTERS_SLOT, .guest_phys_addr = plan.bar_gpa, .memory_size = info.size};
    bar.userspace_addr = (uintptr_t)hva;
    host_vm(KVM_SET_USER_MEMORY_REGION, &bar);
    /* STUB
    (void)device;
    HOST_TODO("registers_map: the device's BAR becomes a slot");
    END SOLUTION */
}

/*
 * VFIO_DEVICE_SET_IRQS takes a struct vfio_irq_set, and behind it, in `data`, an eventfd, if flags have
 * VFIO_IRQ_SET_DATA_EVENTFD; with VFIO_IRQ_SET_DATA_NONE there is nothing behind it. This is one of
 * them, with room for the eventfd.
 */
struct irq_order {
    struct vfio_irq_set set; /* argsz, flags, index, start, count */
    int fd;
};

/* Let the device signal the eventfd fd when it sends its message: flags are
 * VFIO_IRQ_SET_ACTION_TRIGGER and where the data is, index is VFIO_PCI_MSI_IRQ_INDEX, count is 1. */
static void message_connect(int device, int fd) {
    /* BEGIN SOLUTION */
    struct irq_order order = {.set.argsz = sizeof order, .set.count = 1, .fd = fd};
    order.set.index = VFIO_PCI_MSI_IRQ_INDEX;
    order.set.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    vfio(device, VFIO_DEVICE_SET_IRQS, &order.set);
    /* STUB
    (void)device, (void)fd;
    HOST_TODO("message_connect: whom does the device signal?");
    END SOLUTION */
}

/*
 * The line (VFIO_PCI_INTX_IRQ_INDEX). The device signals `trigger` when it asserts it, and VFIO masks
 * it then: VFIO_IRQ_SET_ACTION_TRIGGER. When `unmask` is signalled, it is unmasked:
 * VFIO_IRQ_SET_ACTION_UNMASK, as a second order. Between the two stands KVM_IRQFD, with a struct
 * kvm_irqfd: `trigger` asserts plan.line, and with KVM_IRQFD_FLAG_RESAMPLE the end of the interrupt
 * (EOI) deasserts it and signals resamplefd.
 */
static void line_connect(int device, int trigger, int unmask) {
    /* BEGIN SOLUTION */
    struct kvm_irqfd line = {.fd = (uint32_t)trigger, .gsi = plan.line};
    struct irq_order order = {.set.argsz = sizeof order, .set.count = 1, .fd = trigger};
    line.flags = KVM_IRQFD_FLAG_RESAMPLE;
    line.resamplefd = (uint32_t)unmask;
    host_vm(KVM_IRQFD, &line);
    order.set.index = VFIO_PCI_INTX_IRQ_INDEX;
    order.set.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    vfio(device, VFIO_DEVICE_SET_IRQS, &order.set);
    order.set.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    order.fd = unmask;
    vfio(device, VFIO_DEVICE_SET_IRQS, &order.set);
    /* STUB
    (void)device, (void)trigger, (void)unmask;
    HOST_TODO("line_connect: from the line to KVM, and back");
    END SOLUTION */
}

/* Unmask the line now: the same action, and no data. */
static void line_unmask(int device) {
    /* BEGIN SOLUTION */
    struct vfio_irq_set again = {.argsz = sizeof again, .index = VFIO_PCI_INTX_IRQ_INDEX};
    again.flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
    again.count = 1;
    vfio(device, VFIO_DEVICE_SET_IRQS, &again);
    /* STUB
    (void)device;
    HOST_TODO("line_unmask: let the line interrupt again");
    END SOLUTION */
}

/*
 * Let the device reach a window: VFIO_IOMMU_MAP_DMA, with a struct vfio_iommu_type1_dma_map. The
 * device will call it window->iova, and this process calls it hva. May it be written to, too? Reading is
 * always permitted: VFIO_DMA_MAP_FLAG_READ, _WRITE.
 */
static void window_map(int container, const struct window *window, void *hva, bool is_writable) {
    /* BEGIN SOLUTION */
    struct vfio_iommu_type1_dma_map map = {.argsz = sizeof map,
                                           .flags = VFIO_DMA_MAP_FLAG_READ,
                                           .vaddr = (uintptr_t)hva,
                                           .iova = window->iova,
                                           .size = WINDOW_SIZE};
    if (is_writable)
        map.flags |= VFIO_DMA_MAP_FLAG_WRITE;
    vfio(container, VFIO_IOMMU_MAP_DMA, &map);
    /* STUB
    (void)container, (void)window, (void)hva, (void)is_writable;
    HOST_TODO("window_map: give the device this window");
    END SOLUTION */
}

/* Take the window away again: VFIO_IOMMU_UNMAP_DMA, with a struct vfio_iommu_type1_dma_unmap. */
static void window_unmap(int container, const struct window *window) {
    /* BEGIN SOLUTION */
    struct vfio_iommu_type1_dma_unmap range = {
        .argsz = sizeof range, .iova = window->iova, .size = WINDOW_SIZE};
    vfio(container, VFIO_IOMMU_UNMAP_DMA, &range);
    /* STUB
    (void)container, (void)window;
    HOST_TODO("window_unmap: take the window from the device");
    END SOLUTION */
}

/* ---- the rest is given: an exercise for the IOMMU, without a device ---- */

#define PAGES 6
#define FAR_BIT (UINT64_C(1) << 32)

static struct {
    const char *part;
    struct random random;
    struct iotlb iotlb;
    uint64_t root;
    uint64_t iova[PAGES];
    uint64_t block; /* as many pages, next to each other, as the IOTLB has places */
    uint64_t far;   /* a page that is not among them, but has the lower half of one's iova */
} exercise;

/* Do something, and record what it was, what it has answered, and how many entries it has read. */
static void tried_begin(const char *what, uint64_t iova) {
    event_begin("io");
    event_string("part", exercise.part);
    event_string("what", what);
    event_hex("iova", iova);
}
static void tried_end(void) {
    event_number("reads", io_memory->reads);
    event_number("tables", io_memory->tables);
    event_number("strays", io_memory->strays);
    event_end();
    io_memory->strays = 0;
}

/* The entries on the way to iova, as they stand in the tables. */
static void path_record(uint64_t iova) {
    static const char *const names[IO_LEVELS + 1] = {"", "level1", "level2", "level3"};
    uint64_t table = exercise.root;
    event_begin("path");
    event_hex("iova", iova);
    for (unsigned level = IO_LEVELS; level >= 1; level--) {
        uint64_t entry = io_read(table, io_index(iova, level));
        bool is_present = entry & (IO_READ | IO_WRITE);
        event_hex(names[level], entry);
        table = entry & IO_ADDRESS;
        if (!is_present)
            break;
    }
    event_end();
    io_memory->strays = 0;
}

/* To a page of the seed's choice. */
static void try_map(uint64_t iova, uint64_t permissions) {
    uint64_t hpa = PAGE_SIZE * random_below(&exercise.random, UINT64_C(1) << 40);
    io_memory->reads = 0;
    io_map(exercise.root, iova, hpa, permissions);
    tried_begin("map", iova);
    event_hex("hpa", hpa);
    event_number("permissions", permissions);
    tried_end();
    path_record(iova);
}

static void try_unmap(uint64_t iova) {
    io_memory->reads = 0;
    io_unmap(exercise.root, iova);
    tried_begin("unmap", iova);
    tried_end();
}

static void try_walk(uint64_t iova) {
    uint64_t hpa = 0;
    io_memory->reads = 0;
    uint64_t permissions = io_walk(exercise.root, iova, &hpa);
    tried_begin("walk", iova);
    event_number("permissions", permissions);
    event_hex("hpa", permissions ? hpa : 0);
    tried_end();
}

static void try_translate(uint64_t iova, uint64_t need) {
    uint64_t hpa = 0;
    io_memory->reads = 0;
    bool is_permitted = iotlb_translate(&exercise.iotlb, exercise.root, iova, need, &hpa);
    tried_begin("translate", iova);
    event_number("need", need);
    event_number("is_permitted", is_permitted);
    event_hex("hpa", is_permitted ? hpa : 0);
    tried_end();
}

static void try_invalidate(uint64_t iova, uint64_t size) {
    io_memory->reads = 0;
    iotlb_invalidate(&exercise.iotlb, iova, size);
    tried_begin("invalidate", iova);
    event_hex("size", size);
    tried_end();
}

/* Let the entry of this level, 2 or 3, on the way to iova permit this and no more; 0: it is not
 * present any more, although it has an address. */
static void restrict_entry(uint64_t iova, unsigned level, uint64_t permissions) {
    uint64_t table = exercise.root;
    io_memory->reads = 0;
    for (unsigned above = IO_LEVELS; above > level; above--)
        table = io_read(table, io_index(iova, above)) & IO_ADDRESS;
    uint64_t entry = io_read(table, io_index(iova, level)) & IO_ADDRESS;
    io_write(table, io_index(iova, level), entry | permissions);
    tried_begin("restrict", iova);
    event_number("level", level);
    event_number("permissions", permissions);
    tried_end();
}

/* Pages that have some of their tables in common. The fifth has the first one's place in the IOTLB, the
 * others have places of their own. */
static void pages_choose(struct random *random) {
    uint64_t first = 2 * PAGE_SIZE * random_below(random, UINT64_C(1) << 26);
    exercise.iova[0] = first;
    exercise.iova[1] = first ^ PAGE_SIZE;
    exercise.iova[2] = first ^ (2 * PAGE_SIZE) ^ (1 + random_below(random, 511)) << 21;
    exercise.iova[3] = first ^ (4 * PAGE_SIZE) ^ (1 + random_below(random, 511)) << 30;
    exercise.iova[4] = first ^ (IOTLB_ENTRIES * PAGE_SIZE);
    exercise.iova[5] = exercise.iova[3] ^ PAGE_SIZE;
    exercise.block = (exercise.iova[2] & ~(IOTLB_ENTRIES * PAGE_SIZE - 1)) ^ PAGE_SIZE * 0x100;
    exercise.far = (exercise.block + 3 * PAGE_SIZE) ^ FAR_BIT;
}

static void exercise_map(void) {
    static const uint64_t permissions[PAGES] = {IO_READ | IO_WRITE, IO_READ,  IO_WRITE,
                                                IO_READ | IO_WRITE, IO_WRITE, IO_READ};
    exercise.part = "map";
    for (unsigned i = 0; i < PAGES; i++)
        try_map(exercise.iova[i], permissions[i]);
}

static void pages_walk(void) {
    for (unsigned i = 0; i < PAGES; i++)
        try_walk(exercise.iova[i]);
}

static void exercise_walk(void) {
    uint64_t first = exercise.iova[0];
    exercise.part = "walk";
    pages_walk();
    try_walk(first + 1 + random_below(&exercise.random, PAGE_SIZE - 1));
    try_walk(first + 2 * PAGE_SIZE);
    try_walk(first ^ UINT64_C(0x3f) << 33);
    try_walk(first | UINT64_C(1) << IO_IOVA_BITS);
    try_walk(first | UINT64_C(1) << (IO_IOVA_BITS + 1 + random_below(&exercise.random, 24)));
}

static void exercise_restrict(void) {
    exercise.part = "restrict";
    for (unsigned level = IO_LEVELS; level >= 2; level--) {
        restrict_entry(exercise.iova[0], level, IO_READ);
        pages_walk();
        restrict_entry(exercise.iova[0], level, 0);
        pages_walk();
        restrict_entry(exercise.iova[0], level, IO_READ | IO_WRITE);
    }
}

static void exercise_unmap(void) {
    exercise.part = "unmap";
    try_unmap(exercise.iova[1]);
    path_record(exercise.iova[1]);
    try_walk(exercise.iova[1]);
    try_walk(exercise.iova[0]);
    try_unmap(exercise.iova[1]);
    try_unmap(exercise.iova[0] ^ UINT64_C(0x3f) << 33);
    try_walk(exercise.iova[3]);
}

static void exercise_translate(void) {
    const uint64_t *iova = exercise.iova;
    uint64_t offset = 1 + random_below(&exercise.random, PAGE_SIZE - 1);
    uint64_t same_place = PAGE_SIZE * IOTLB_ENTRIES * 2;
    exercise.part = "translate";
    try_translate(iova[0] + offset, IO_READ);
    try_translate(iova[0], IO_WRITE);
    try_translate(iova[0] + PAGE_SIZE - 1, IO_READ);
    try_translate(iova[5] + offset, IO_READ);
    try_translate(iova[5] + offset, IO_WRITE); /* it is in the IOTLB now, but */
    try_translate(iova[2], IO_READ);
    try_translate(iova[2] + offset, IO_WRITE);
    try_translate(iova[1] + offset, IO_READ); /* it was unmapped */
    try_translate(iova[1] + offset, IO_READ);
    try_translate(iova[0] | UINT64_C(1) << IO_IOVA_BITS, IO_READ);
    try_translate(iova[0] ^ same_place, IO_READ); /* nothing, in the same place: */
    try_translate(iova[0] + offset, IO_READ);     /* it stays */
    try_translate(iova[4] + offset, IO_READ);     /* in the same place, again */
    try_translate(iova[4] + offset, IO_WRITE);
    try_translate(iova[0] + offset, IO_READ);
}

/* Several pages at once, as many as there are places, and one that only looks like one of them. */
static void exercise_range(void) {
    uint64_t size = IOTLB_ENTRIES * PAGE_SIZE;
    for (unsigned round = 0; round < 2; round++) {
        for (uint64_t at = 0; at < size; at += PAGE_SIZE)
            try_map(exercise.block + at, IO_READ);
        try_invalidate(exercise.block, round ? size : PAGE_SIZE);
        for (uint64_t at = 0; at < size; at += PAGE_SIZE)
            try_translate(exercise.block + at, IO_READ);
    }
    try_map(exercise.far, IO_READ);
    try_translate(exercise.far, IO_READ);
    try_invalidate(exercise.block, size);
    try_translate(exercise.far, IO_READ);
}

static void exercise_invalidate(void) {
    const uint64_t *iova = exercise.iova;
    uint64_t both = iova[3] < iova[5] ? iova[3] : iova[5];
    exercise.part = "invalidate";
    for (unsigned i = 0; i < PAGES; i++)
        try_translate(iova[i], i == 2 || i == 4 ? IO_WRITE : IO_READ);
    try_map(iova[4], IO_WRITE);
    try_translate(iova[4], IO_WRITE);   /* the old page still */
    try_invalidate(iova[0], PAGE_SIZE); /* whose place it has */
    try_translate(iova[4], IO_WRITE);
    try_invalidate(iova[4], PAGE_SIZE);
    try_translate(iova[4], IO_WRITE);
    try_invalidate(both, PAGE_SIZE);
    try_translate(iova[3], IO_READ);
    try_translate(iova[5], IO_READ);
    try_invalidate(both, 2 * PAGE_SIZE);
    try_translate(iova[3], IO_READ);
    try_translate(iova[5], IO_READ);
    try_translate(iova[2], IO_WRITE);
    exercise_range();
    try_map(0, IO_READ); /* an iova like any other */
    try_translate(0, IO_READ);
    try_unmap(0);
    try_invalidate(0, PAGE_SIZE);
    try_translate(0, IO_READ);
}

/* What is not present is made anew, whatever its entry says besides. */
static void exercise_again(void) {
    exercise.part = "again";
    restrict_entry(exercise.iova[3], 2, 0);
    try_map(exercise.iova[5], IO_WRITE);
    try_walk(exercise.iova[5]);
    try_walk(exercise.iova[3]);
}

/* Once. */
static void exercise_all(void) {
    if (exercise.root)
        return;
    exercise.random = random_stream(host_seed(), 3);
    exercise.root = io_table_new();
    pages_choose(&exercise.random);
    exercise_map();
    exercise_walk();
    exercise_restrict();
    exercise_unmap();
    exercise_translate();
    exercise_invalidate();
    exercise_again();
    device_open(vfio_files[1].container, vfio_files[1].group, vfio_files[1].name);
}

/* ---- the device, and the IOMMU in front of it, where they are software ---- */

static struct {
    bool is_attached;
    bool is_raised;            /* the line, by hand */
    unsigned interrupts;       /* how many ways to interrupt have been set up */
    int message, line, unmask; /* eventfds */
    int kernel_log;            /* where the IOMMU is hardware */
    struct trace *trace;       /* where the device is software */
    uint32_t traced;
} lab;

/* In the device's process: what it has translated before, and each access to memory. */
static struct iotlb device_iotlb;

static uint8_t *device_reach(uint64_t iova, uint64_t *size, bool is_write) {
    uint64_t hpa, in_page = iova % PAGE_SIZE;
    uint8_t *page = NULL;
    if (*size > PAGE_SIZE - in_page)
        *size = PAGE_SIZE - in_page;
    if (iotlb_translate(&device_iotlb, io_root, iova, is_write ? IO_WRITE : IO_READ, &hpa))
        page = hpa_reach(hpa - in_page);
    if (!page)
        trace_add(lab.trace, (struct trace_entry){.kind = TRACE_FAULT,
                                                  .value = is_write,
                                                  .address = iova - in_page});
    return page ? page + in_page : NULL;
}

static void device_unmap(uint64_t iova, uint64_t size) {
    iotlb_invalidate(&device_iotlb, iova, size);
}

static void software_start(void) {
    lab.trace = trace_make();
    if (!lab.trace)
        host_cannot("there is no memory left for the lab");
    device_start(&(struct process_home){.trace = lab.trace,
                                        .file_offset = PAGE_SIZE,
                                        .reach = device_reach,
                                        .unmap = device_unmap},
                 NULL, 0, NULL);
}

/* ---- its doorbells: hardware needs none, and has memory there ---- */

static struct vfio_user_io_fds doorbells;
static int doorbell_fd[EDU_ACTING];

/* Every answer of this process is known before: it is this program's own. */
static void doorbells_get(void) {
    doorbells =
        (struct vfio_user_io_fds){.argsz = sizeof doorbells, .index = VFIO_PCI_BAR0_REGION_INDEX};
    if (!device_query(VFIO_USER_DEVICE_GET_REGION_IO_FDS, &doorbells, sizeof doorbells, EDU_ACTING))
        return;
    for (unsigned i = 0; i < EDU_ACTING; i++)
        doorbell_fd[i] = dup(device_reply()->fd[i]);
}

static void bar_access(struct access *access) {
    uint32_t number;
    if (!access->is_write || access->size != sizeof number ||
        access->address != plan.bar_gpa + EDU_DOORBELL)
        return;
    memcpy(&number, access->data, sizeof number);
    for (unsigned i = 0; i < EDU_ACTING; i++)
        if (doorbells.doorbell[i].datamatch == number && doorbell_fd[i])
            eventfd_write(doorbell_fd[i], 1);
}

/* ---- attaching the device ---- */

static int eventfd_make(void) {
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        host_cannot("it has no eventfds");
    return fd;
}

/* What a GSI stands for: the device's message, and the line of the 8259As. */
static void routes_set(void) {
    struct {
        struct kvm_irq_routing table;
        struct kvm_irq_routing_entry of[2];
    } routes = {.table = {.nr = 2}, .of = {{.gsi = plan.gsi, .type = KVM_IRQ_ROUTING_MSI}}};
    struct kvm_irq_routing_entry *line = &routes.of[1];
    routes.of[0].u.msi = (struct kvm_irq_routing_msi){.address_lo = MSI_ADDRESS,
                                                      .data = APIC_DELIVERY_FIXED | plan.vector};
    *line = (struct kvm_irq_routing_entry){.gsi = plan.line, .type = KVM_IRQ_ROUTING_IRQCHIP};
    line->u.irqchip =
        (struct kvm_irq_routing_irqchip){.irqchip = KVM_IRQCHIP_PIC_SLAVE, .pin = plan.line - 8u};
    host_vm(KVM_SET_GSI_ROUTING, &routes.table);
}

static void attach(void) {
    struct vfio_files *files = &vfio_files[0];
    int device = device_open(files->container, files->group, files->name);
    event_begin("opened");
    event_number("is_device", device >= 0 && device == files->device);
    event_end();
    if (device < 0 || (files->is_software && !device_introduce()))
        return;
    if (files->is_software)
        doorbells_get();
    else if (!vfio_pci_let_master(device))
        host_cannot("its device edu has no configuration space that can be written");
    registers_map(device);
    routes_set();
    lab.is_attached = true;
}

/* ---- interrupts ---- */

static void interrupt_off(uint32_t index) {
    struct vfio_irq_set none = {.argsz = sizeof none,
                                .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
                                .index = index};
    vfio(vfio_files[0].device, VFIO_DEVICE_SET_IRQS, &none);
}

static void irqfd_set(int fd, uint32_t gsi, uint32_t flags) {
    struct kvm_irqfd wiring = {.fd = (uint32_t)fd, .gsi = gsi, .flags = flags};
    host_vm(KVM_IRQFD, &wiring);
}

/* In this order, and no other. A message and a line exclude each other: what there was goes first. */
static void interrupt_next(enum interrupt interrupt) {
    static const enum interrupt order[] = {INTERRUPT_MESSAGE, INTERRUPT_LINE, INTERRUPT_BY_HAND,
                                           INTERRUPT_MESSAGE};
    int device = vfio_files[0].device;
    if (lab.interrupts == sizeof order / sizeof order[0] || order[lab.interrupts] != interrupt)
        return;
    switch (lab.interrupts++) {
    case 0:
        irqfd_set(lab.message, plan.gsi, 0);
        message_connect(device, lab.message);
        break;
    case 1:
        interrupt_off(VFIO_PCI_MSI_IRQ_INDEX);
        line_connect(device, lab.line, lab.unmask);
        break;
    case 2: irqfd_set(lab.line, plan.line, KVM_IRQFD_FLAG_DEASSIGN); break;
    default: interrupt_off(VFIO_PCI_INTX_IRQ_INDEX); message_connect(device, lab.message);
    }
}

/* How often the line has signalled since this was last asked. It is awaited if it should have. */
static void signals_record(const char *when, bool is_due) {
    struct pollfd source = {.fd = lab.line, .events = POLLIN};
    eventfd_t count = 0;
    poll(&source, 1, is_due ? 1000 : 0);
    eventfd_read(lab.line, &count);
    event_begin("signals");
    event_string("when", when);
    event_number("count", count);
    event_end();
}

/* VFIO has masked the line when it signalled. It is asserted still: so it signals when it is unmasked.
 * Once: a guest that asks for this at any other moment would make the VMM wait in vain. */
static void line_raised(void) {
    if (lab.is_raised || lab.interrupts <= INTERRUPT_BY_HAND)
        return;
    lab.is_raised = true;
    signals_record("raised", true);
    signals_record("masked", false);
    line_unmask(vfio_files[0].device);
    signals_record("unmasked", true);
}

static void line_acknowledged(void) {
    line_unmask(vfio_files[0].device);
    signals_record("acknowledged", false);
}

/* ---- what is recorded ---- */

/* Of a line such as "DMAR: [DMA Write NO_PASID] Request device [00:02.0] fault addr 0xc00000 ...". */
static bool fault_parse(const char *text) {
    const char *address = strstr(text, "fault addr ");
    if (!address || !strstr(text, "DMAR: "))
        return false;
    fault_record(strtoull(address + strlen("fault addr "), NULL, 16),
                 strstr(text, "[DMA Write") != NULL, text);
    return true;
}

static void kernel_log_open(void) {
    lab.kernel_log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (lab.kernel_log < 0)
        host_cannot("its kernel's log cannot be read");
    lseek(lab.kernel_log, 0, SEEK_END);
}

/* Linux, "/dev/kmsg": each read is one message, whose text stands behind a semicolon. The kernel tells
 * what its IOMMU has blocked; it is awaited if it should. */
static void kernel_log_read(bool is_due) {
    struct pollfd source = {.fd = lab.kernel_log, .events = POLLIN};
    char message[1024];
    while (poll(&source, 1, is_due ? 1000 : 0) > 0) {
        ssize_t size = read(lab.kernel_log, message, sizeof message - 1);
        if (size <= 0)
            continue;
        message[size] = 0;
        message[strcspn(message, "\n")] = 0;
        const char *text = strchr(message, ';');
        if (text && fault_parse(text + 1))
            is_due = false;
    }
}

/* Software leaves what it has blocked among all that it has done. */
static void faults_record(enum stage stage) {
    bool is_due = stage == STAGE_READ_ONLY || stage == STAGE_OUTSIDE || stage == STAGE_UNMAPPED;
    if (vfio_files[0].is_software)
        trace_record(lab.trace, &lab.traced, "software");
    else
        kernel_log_read(is_due);
}

static void stage_record(enum stage stage) {
    static const char *const names[STAGES] = {"attached",  "read",    "probed",       "messages",
                                              "line",      "raised",  "acknowledged", "moved",
                                              "read only", "outside", "unmapped",     "again"};
    if (stage == STAGE_RAISED)
        line_raised();
    if (stage == STAGE_ACKNOWLEDGED)
        line_acknowledged();
    faults_record(stage);
    shared_memory_changes_record();
    event_begin("stage");
    event_string("stage", names[stage]);
    event_number("ram_is_unchanged", ram_is(VICTIM_GPA, VICTIM_SIZE, VICTIM_BYTE));
    event_end();
    host_statistics(names[stage]);
}

static void plan_record(void) {
    event_begin("plan");
    event_string("iommu", vfio_files[0].is_software ? "software" : "hardware");
    event_hex("bar", plan.bar_gpa);
    event_hex("vector", plan.vector);
    event_hex("line_vector", (uint64_t)plan.line_base + plan.line);
    event_number("line", plan.line);
    event_number("line_rounds", plan.line_rounds);
    event_hex("liveness", plan.liveness);
    for (unsigned i = 0; i < RAISES; i++) {
        static const char *const names[RAISES] = {"raise0", "raise1", "raise2"};
        event_hex(names[i], plan.raise[i]);
    }
    event_hex("from", plan.from);
    event_hex("to", plan.to);
    event_hex("count", plan.count);
    event_hex("buffer", plan.buffer);
    event_end();
    for (unsigned i = 0; i < WINDOWS; i++) {
        event_begin("window");
        event_number("window", i);
        event_hex("gpa", plan.window[i].gpa);
        event_hex("iova", plan.window[i].iova);
        event_hex("offset", plan.window[i].offset);
        event_end();
    }
}

/* ---- ports ---- */

static void window_access(uint8_t number, bool is_map) {
    if (number >= WINDOWS || !lab.is_attached)
        return;
    const struct window *window = &plan.window[number];
    if (is_map)
        window_map(vfio_files[0].container, window, shared_memory() + window->offset,
                   number != WINDOW_SOURCE);
    else
        window_unmap(vfio_files[0].container, window);
}

static void lab_write(uint64_t port, uint8_t value) {
    switch (port) {
    case LAB_EXERCISE: exercise_all(); break;
    case LAB_ATTACH:
        if (!lab.is_attached)
            attach();
        break;
    case LAB_STAGE:
        if (value < STAGES)
            stage_record((enum stage)value);
        break;
    case LAB_INTERRUPT:
        if (lab.is_attached)
            interrupt_next((enum interrupt)value);
        break;
    case LAB_MAP: window_access(value, true); break;
    case LAB_UNMAP: window_access(value, false); break;
    default: break;
    }
}

static void lab_access(struct access *access) {
    device_look();
    if (access->is_write)
        lab_write(access->address, access->data[0]);
    else if (access->address == LAB_ATTACH)
        access->data[0] = lab.is_attached;
}

static void windows_make(void) {
    shared_memory_make(SHARED_SIZE, CONTENT_STREAM);
    for (uint32_t i = 0; i < WINDOWS; i++) {
        const struct window *window = &plan.window[i];
        shared_memory_slot(HOST_SLOT_FIRST + i, window->gpa, window->offset, WINDOW_SIZE);
    }
}

static void lab_setup(void) {
    plan = plan_make(host_seed());
    vfio_open();
    fprintf(stderr, "vmm: the device and the IOMMU before it are %s\n",
            vfio_files[0].is_software ? "software" : "this machine's, by VFIO");
    plan_record();
    windows_make();
    io_memory_make();
    io_root = io_table_new();
    lab.message = eventfd_make();
    lab.line = eventfd_make();
    lab.unmask = eventfd_make();
    if (vfio_files[0].is_software)
        software_start();
    else
        kernel_log_open();
    host_claim_pio(LAB_EXERCISE, LAB_PORTS, "lab", lab_access);
    host_claim_mmio(plan.bar_gpa, EDU_BAR_SIZE, "edu", bar_access);
}

static void lab_end(void) {
    device_look();
    device_end();
}

const struct host_half host_half = {.setup = lab_setup, .end = lab_end};
