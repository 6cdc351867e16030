/*
 * A host half that gives its guest a real device by VFIO: QEMU's edu, which one of the emulated machines has behind
 * an IOMMU. Linux, Documentation/driver-api/vfio; the structures are in linux/vfio.h.
 */
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "apic_registers.h"
#include "host.h"
#include "lab.h"
#include "vfio_pci.h"

#define MSI_GSI 30

static struct {
    char name[VFIO_PCI_NAME_SIZE];     /* of the device, in sysfs and for VFIO */
    int container, group, device;      /* file descriptors */
    int message_fd, line_fd, again_fd; /* eventfds: an interrupt; one by INTx; unmask INTx */
    int kernel_log;
} lab;

static int must(int answer, const char *what) {
    if (answer < 0)
        host_cannot(what);
    return answer;
}

/* ---- VFIO ---- */

static void device_open(void) {
    struct vfio_group_status status = {.argsz = sizeof status};
    char number[16], path[32];
    unsigned devices = vfio_pci_group(lab.name, number, sizeof number);
    if (!devices)
        host_cannot("the device has no IOMMU group");
    snprintf(path, sizeof path, "/dev/vfio/%s", number);
    lab.container = must(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "no /dev/vfio/vfio");
    lab.group = must(open(path, O_RDWR | O_CLOEXEC), "no group in /dev/vfio");
    must(ioctl(lab.group, VFIO_GROUP_GET_STATUS, &status), "VFIO_GROUP_GET_STATUS");
    event_begin("group");
    event_string("number", number);
    event_number("devices", devices);
    event_number("is_viable", (status.flags & VFIO_GROUP_FLAGS_VIABLE) != 0);
    event_number("type1", (uint64_t)ioctl(lab.container, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU));
    event_end();
    must(ioctl(lab.group, VFIO_GROUP_SET_CONTAINER, &lab.container), "VFIO_GROUP_SET_CONTAINER");
    must(ioctl(lab.container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
    lab.device = must(ioctl(lab.group, VFIO_GROUP_GET_DEVICE_FD, lab.name), "the device's fd");
}

static struct vfio_region_info region_info(uint32_t index) {
    struct vfio_region_info info = {.argsz = sizeof info, .index = index};
    must(ioctl(lab.device, VFIO_DEVICE_GET_REGION_INFO, &info), "VFIO_DEVICE_GET_REGION_INFO");
    return info;
}

static void registers_map(void) {
    struct vfio_region_info info = region_info(VFIO_PCI_BAR0_REGION_INDEX);
    if (info.size != EDU_BAR_SIZE || !(info.flags & VFIO_REGION_INFO_FLAG_MMAP))
        host_cannot("the device's registers cannot be mapped");
    void *hva =
        mmap(NULL, info.size, PROT_READ | PROT_WRITE, MAP_SHARED, lab.device, (off_t)info.offset);
    if (hva == MAP_FAILED)
        host_cannot("the device's registers are not mapped");
    struct kvm_userspace_memory_region slot = {.slot = HOST_SLOT_FIRST,
                                               .guest_phys_addr = LAB_BAR,
                                               .memory_size = info.size,
                                               .userspace_addr = (uintptr_t)hva};
    host_vm(KVM_SET_USER_MEMORY_REGION, &slot);
}

/*
 * The page is written to first. Linux gives memory that was never written to a page of zeros that all share, and
 * another page at the first write: a device that may only read would go on reading zeros.
 */
static void dma_map(uint64_t iova, gpa_t gpa, uint32_t flags) {
    void *hva = host_memory(gpa, PAGE_SIZE);
    memset(hva, 0, PAGE_SIZE);
    struct vfio_iommu_type1_dma_map map = {.argsz = sizeof map,
                                           .flags = flags,
                                           .vaddr = (uintptr_t)hva,
                                           .iova = iova,
                                           .size = PAGE_SIZE};
    must(ioctl(lab.container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
}

static void dma_unmap(uint64_t iova) {
    struct vfio_iommu_type1_dma_unmap map = {.argsz = sizeof map, .iova = iova, .size = PAGE_SIZE};
    must(ioctl(lab.container, VFIO_IOMMU_UNMAP_DMA, &map), "VFIO_IOMMU_UNMAP_DMA");
    event_begin("unmapped");
    event_hex("bytes", map.size);
    event_end();
}

/* ---- interrupts ---- */

/* Do something (VFIO_IRQ_SET_ACTION_*) to one of the device's interrupts; fd: it is the eventfd's from now on, or,
 * if -1, is done now. */
static void irq_set(uint32_t index, uint32_t action, int fd) {
    struct {
        struct vfio_irq_set set;
        int fd;
    } order = {{.argsz = sizeof order, .index = index, .count = 1}, fd};
    order.set.flags = action | (fd < 0 ? VFIO_IRQ_SET_DATA_NONE : VFIO_IRQ_SET_DATA_EVENTFD);
    must(ioctl(lab.device, VFIO_DEVICE_SET_IRQS, &order.set), "VFIO_DEVICE_SET_IRQS");
}

static void irq_off(uint32_t index) {
    struct vfio_irq_set none = {.argsz = sizeof none, .index = index};
    none.flags = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_NONE;
    must(ioctl(lab.device, VFIO_DEVICE_SET_IRQS, &none), "VFIO_DEVICE_SET_IRQS");
}

static void routes_set(void) {
    struct {
        struct kvm_irq_routing header;
        struct kvm_irq_routing_entry entries[2];
    } table = {.header = {.nr = 2}};
    table.entries[0] = (struct kvm_irq_routing_entry){.gsi = MSI_GSI, .type = KVM_IRQ_ROUTING_MSI};
    table.entries[0].u.msi.address_lo = MSI_ADDRESS;
    table.entries[0].u.msi.data = LAB_MSI_VECTOR;
    table.entries[1] =
        (struct kvm_irq_routing_entry){.gsi = LAB_LINE_PIN, .type = KVM_IRQ_ROUTING_IRQCHIP};
    table.entries[1].u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    table.entries[1].u.irqchip.pin = LAB_LINE_PIN;
    host_vm(KVM_SET_GSI_ROUTING, &table.header);
}

static void irqfd_set(int fd, uint32_t gsi, int resample_fd, uint32_t flags) {
    struct kvm_irqfd irqfd = {.fd = (uint32_t)fd, .gsi = gsi, .flags = flags};
    if (resample_fd >= 0) {
        irqfd.flags |= KVM_IRQFD_FLAG_RESAMPLE;
        irqfd.resamplefd = (uint32_t)resample_fd;
    }
    host_vm(KVM_IRQFD, &irqfd);
}

static void form_access(struct access *access) {
    switch ((enum form)access->data[0]) {
    case FORM_MSI:
        irqfd_set(lab.message_fd, MSI_GSI, -1, 0);
        irq_set(VFIO_PCI_MSI_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER, lab.message_fd);
        break;
    case FORM_LINE: /* the two exclude each other */
        irq_off(VFIO_PCI_MSI_IRQ_INDEX);
        irqfd_set(lab.line_fd, LAB_LINE_PIN, lab.again_fd, 0);
        irq_set(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER, lab.line_fd);
        irq_set(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK, lab.again_fd);
        break;
    case FORM_BY_HAND: irqfd_set(lab.line_fd, LAB_LINE_PIN, -1, KVM_IRQFD_FLAG_DEASSIGN); break;
    }
}

/* How often the line has interrupted since this was last asked. It is awaited if it must come. */
static void interrupts_count(const char *when, bool must_come) {
    struct pollfd source = {.fd = lab.line_fd, .events = POLLIN};
    eventfd_t count = 0;
    poll(&source, 1, must_come ? 5000 : 0);
    eventfd_read(lab.line_fd, &count);
    event_begin("interrupts");
    event_string("when", when);
    event_number("count", count);
    event_end();
}

/* VFIO masks the line when it interrupts. It is high still, so it interrupts as soon as it is unmasked. */
static void by_hand(void) {
    interrupts_count("raised", true);
    interrupts_count("masked by VFIO", false);
    irq_set(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK, -1);
    interrupts_count("unmasked", true);
}

static void acknowledged(void) {
    irq_set(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK, -1);
    interrupts_count("acknowledged", false);
    irq_set(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_MASK, -1);
}

/* ---- what became of memory, and what the kernel says ---- */

static void memory_record(const char *when) {
    event_begin("memory");
    event_string("when", when);
    event_bytes("source", host_memory(LAB_SOURCE, LAB_BYTES), LAB_BYTES);
    event_bytes("destination", host_memory(LAB_DESTINATION, LAB_BYTES), LAB_BYTES);
    event_bytes("victim", host_memory(LAB_VICTIM, LAB_BYTES), LAB_BYTES);
    event_end();
}

/* Linux, Documentation/ABI/testing/dev-kmsg: each read is one message, whose text stands behind a semicolon. */
static void fault_record(void) {
    char message[1024];
    ssize_t size = 0;
    struct pollfd source = {.fd = lab.kernel_log, .events = POLLIN};
    do {
        poll(&source, 1, 5000);
        size = read(lab.kernel_log, message, sizeof message - 1);
        message[size > 0 ? size : 0] = 0;
    } while (size > 0 && !strstr(message, "fault addr"));
    char *text = strchr(message, ';');
    message[strcspn(message, "\n")] = 0;
    event_begin("iommu_fault");
    event_string("text", text ? text + 1 : "");
    event_end();
}

static void stage_access(struct access *access) {
    switch ((enum stage)access->data[0]) {
    case STAGE_READ: host_statistics("before"); break;
    case STAGE_HAS_READ: host_statistics("after"); break;
    case STAGE_BY_HAND: by_hand(); break;
    case STAGE_ACKNOWLEDGED: acknowledged(); break;
    case STAGE_READ_ONLY: memory_record("read only"), fault_record(); break;
    case STAGE_MOVED: memory_record("moved"); break;
    case STAGE_CACHED: memory_record("cached"); break;
    case STAGE_UNMAP: dma_unmap(LAB_DESTINATION_IOVA); break;
    case STAGE_UNMAPPED: memory_record("unmapped"), fault_record(); break;
    case STAGE_NEVER_MAPPED: memory_record("never mapped"), fault_record(); break;
    }
}

/* ---- the whole ---- */

static void record_only(struct access *access) { (void)access; }

static void setup(void) {
    if (!vfio_pci_find("0x1234", "0x11e8", lab.name))
        host_cannot("it has no device edu that is vfio-pci's");
    lab.kernel_log = must(open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC), "no /dev/kmsg");
    lseek(lab.kernel_log, 0, SEEK_END);
    lab.message_fd = must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "no eventfd");
    lab.line_fd = must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "no eventfd");
    lab.again_fd = must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "no eventfd");
    device_open();
    registers_map();
    if (!vfio_pci_let_master(lab.device))
        host_cannot("the device's configuration space cannot be written");
    routes_set();
    dma_map(LAB_SOURCE_IOVA, LAB_SOURCE, VFIO_DMA_MAP_FLAG_READ);
    dma_map(LAB_DESTINATION_IOVA, LAB_DESTINATION,
            VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    host_claim_pio(LAB_STAGE, 1, "stage", stage_access);
    host_claim_pio(LAB_INTERRUPT, 1, "form", form_access);
    host_claim_pio(LAB_WRONG, 4, "wrong", record_only);
    host_claim_pio(LAB_LIVENESS, 4, "liveness", record_only);
    host_claim_pio(LAB_CAUSE, 4, "cause", record_only);
}

static void end(void) { close(lab.kernel_log); }

const struct host_half host_half = {.setup = setup, .end = end};
