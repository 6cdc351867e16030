/*
 * Ask VFIO for anything, by a list that the seed decides: the kernel, where it has a device for VFIO, and then the
 * software of lesson 12. What each of them answers is recorded, and should be the same.
 */
#include <linux/vfio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "host.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* the lesson uses all of it */
#include "../../../lessons/12-vfio-iommu/vfio.h"
#pragma GCC diagnostic pop

/* How many requests: before all is open; of all kinds; and about a line that may be asserted. */
#define OPENING 80
#define WORKING 400
#define LINE 120

#define NO_REQUEST _IO(VFIO_TYPE, VFIO_BASE + 99)
#define NO_FD 999
#define MESSAGES UINT64_C(0xfee00000) /* a write there is an interrupt, not DMA */
#define MESSAGES_SIZE UINT64_C(0x100000)
#define IOVAS (UINT64_C(1) << IO_IOVA_BITS)
#define CAUSE 2u

/* ---- the tables of the software: nobody walks them; how many pages are mapped ---- */

static uint64_t pages;

static void io_map(uint64_t root, uint64_t iova, uint64_t hpa, uint64_t permissions) {
    (void)root, (void)iova, (void)hpa, (void)permissions;
    pages++;
}

static void io_unmap(uint64_t root, uint64_t iova) {
    (void)root, (void)iova;
    pages--;
}

/* ---- one request, and its answer ---- */

static struct {
    const char *of; /* whom it asks */
    struct random random;
    struct vfio_files *files;
    uint64_t number;       /* of the request */
    uint64_t mapped, size; /* the last mapping that was made */
    bool has_line;         /* a line is what the device interrupts by now */
    int message, line, unmask;
    uint8_t *registers;
    int doorbell[EDU_ACTING]; /* of the software */
} list;

#define COUNT(array) (sizeof(array) / sizeof(array)[0])
#define ONE_OF(...) \
    one_of((const uint64_t[]){__VA_ARGS__}, COUNT(((const uint64_t[]){__VA_ARGS__})))
static uint64_t one_of(const uint64_t *values, uint64_t count) {
    return values[random_below(&list.random, count)];
}

/* The first one, but for one time in twelve. */
#define MOSTLY(right, ...) (random_below(&list.random, 12) ? (right) : ONE_OF(__VA_ARGS__))

static int file_of(int right) {
    return (int)MOSTLY((uint64_t)right, (uint64_t)list.files->container,
                       (uint64_t)list.files->group);
}

static uint64_t signals_of(int fd) {
    eventfd_t count = 0;
    eventfd_read(fd, &count);
    return count;
}

/* `argsz` is what the structure says before the request, `result` what it says after that. */
static void answered(int answer, uint64_t argsz, uint64_t result) {
    int error = answer < 0 ? errno : 0;
    event_begin("answer");
    event_string("of", list.of);
    event_number("type", VFIO_TYPE1v2_IOMMU);
    event_number("number", list.number++);
    event_number("argsz", argsz);
    event_number("error", (uint64_t)error);
    event_hex("result", result);
    event_number("messages", signals_of(list.message));
    event_number("lines", signals_of(list.line));
    event_number("unmasks", signals_of(list.unmask));
    event_end();
}

/* ---- opening ---- */

static void ask_status(void) {
    struct vfio_group_status status = {.argsz = (uint32_t)ONE_OF(0, 7, 8, 64), .flags = 0x80};
    uint32_t argsz = status.argsz;
    int answer = vfio(file_of(list.files->group), VFIO_GROUP_GET_STATUS, &status);
    answered(answer, argsz, status.flags);
}

static void ask_set_container(void) {
    int fd = (int)ONE_OF((uint64_t)list.files->container, (uint64_t)list.files->group,
                         (uint64_t)list.message, NO_FD, UINT64_MAX);
    answered(vfio(file_of(list.files->group), VFIO_GROUP_SET_CONTAINER, &fd), 0, 0);
}

static void ask_set_iommu(void) {
    uint64_t type = ONE_OF(0, 2, 2, 99, 99, UINT64_MAX, VFIO_TYPE1v2_IOMMU);
    answered(vfio(file_of(list.files->container), VFIO_SET_IOMMU, type), 0, 0);
}

static void ask_device(void) {
    const char *names[] = {list.files->name, "0000:00:1f.7", ""};
    const char *name = names[random_below(&list.random, COUNT(names))];
    answered(vfio(file_of(list.files->group), VFIO_GROUP_GET_DEVICE_FD, name), 0, 0);
}

static void ask_nothing(void) {
    uint32_t argument[16] = {sizeof argument};
    int fd = (int)ONE_OF((uint64_t)list.files->container, (uint64_t)list.files->group,
                         (uint64_t)list.files->device, UINT64_MAX);
    answered(vfio(fd, NO_REQUEST, argument), 0, 0);
}

/* ---- memory ---- */

/* Pages that touch each other, and the ends of what there is. Not more than MAPS_MAX can be mapped at once. */
static uint64_t any_iova(void) {
    uint64_t right = PAGE_SIZE * random_below(&list.random, 5);
    return MOSTLY(right, PAGE_SIZE / 2, MESSAGES - PAGE_SIZE, MESSAGES,
                  MESSAGES + MESSAGES_SIZE - PAGE_SIZE, MESSAGES + MESSAGES_SIZE, IOVAS - PAGE_SIZE,
                  IOVAS, 0 - PAGE_SIZE);
}

static uint64_t any_size(void) {
    uint64_t right = PAGE_SIZE * (1 + random_below(&list.random, 3));
    return MOSTLY(right, 0, 1, 8 * PAGE_SIZE, PAGE_SIZE - 1, IOVAS, 0 - PAGE_SIZE, UINT64_MAX);
}

static uint64_t any_vaddr(void) {
    uint64_t first = (uintptr_t)shared_memory();
    uint64_t right = first + PAGE_SIZE * random_below(&list.random, SHARED_PAGES - 2);
    return MOSTLY(right, first + SHARED_SIZE - PAGE_SIZE, first + SHARED_SIZE, first - PAGE_SIZE,
                  first + 1, 0, 0 - PAGE_SIZE);
}

static void ask_map(void) {
    struct vfio_iommu_type1_dma_map map = {0};
    map.argsz = (uint32_t)MOSTLY(sizeof map, 0, sizeof map - 1, sizeof map + 1, 64);
    map.flags = (uint32_t)MOSTLY(3u, 0, 1, 2, 8, 0x80000003);
    map.vaddr = any_vaddr();
    map.iova = any_iova();
    map.size = any_size();
    int answer = vfio(file_of(list.files->container), VFIO_IOMMU_MAP_DMA, &map);
    if (answer == 0)
        list.mapped = map.iova, list.size = map.size;
    answered(answer, map.argsz, map.size);
}

/* Of VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP nothing more: it wants another structure. */
static void ask_unmap(void) {
    struct vfio_iommu_type1_dma_unmap unmap = {0};
    unmap.argsz = (uint32_t)MOSTLY(sizeof unmap, 0, sizeof unmap - 1);
    unmap.flags = (uint32_t)MOSTLY(0u, VFIO_DMA_UNMAP_FLAG_ALL, 8, 0x80000000,
                                   VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP);
    unmap.iova = any_iova();
    unmap.size = any_size();
    if (random_below(&list.random, 2))
        unmap.iova = list.mapped, unmap.size = list.size;
    if (unmap.flags == VFIO_DMA_UNMAP_FLAG_ALL && random_below(&list.random, 2))
        unmap.iova = unmap.size = 0;
    int answer = vfio(file_of(list.files->container), VFIO_IOMMU_UNMAP_DMA, &unmap);
    answered(answer, unmap.argsz, unmap.size);
}

/* ---- a line that may be asserted, while VFIO has it: else QEMU (7.2) forgets that it is ---- */

/* To a register that acts. Who asks a process for anything after that, finds that it has heard. */
static void device_command(unsigned offset, uint32_t value) {
    struct vfio_region_info info = {.argsz = sizeof info, .index = VFIO_PCI_BAR0_REGION_INDEX};
    memcpy(list.registers + offset, &value, sizeof value);
    if (!list.files->is_software)
        return;
    for (unsigned i = 0; i < EDU_ACTING; i++)
        if (edu_acting[i] == offset)
            eventfd_write(list.doorbell[i], 1);
    vfio(list.files->device, VFIO_DEVICE_GET_REGION_INFO, &info);
}

static void raise_line(void) {
    if (!list.has_line)
        return;
    device_command(EDU_INTERRUPT_RAISE, CAUSE);
    answered(0, 0, EDU_INTERRUPT_RAISE);
}

static void acknowledge_line(void) {
    if (!list.has_line)
        return;
    device_command(EDU_INTERRUPT_ACKNOWLEDGE, CAUSE);
    answered(0, 0, EDU_INTERRUPT_ACKNOWLEDGE);
}

/* Does this order take an interrupt away? */
static bool is_taken_away(const struct vfio_irq_set *set) {
    return set->flags == (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER) && set->count == 0;
}

/* ---- the device ---- */

/* Of the regions that there are, only the BAR: the software has no other. */
static void ask_region(void) {
    struct vfio_region_info info = {0};
    info.argsz = (uint32_t)MOSTLY(sizeof info, 0, sizeof info - 1, 64);
    info.index = (uint32_t)MOSTLY((unsigned)VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_NUM_REGIONS, 100,
                                  UINT32_MAX);
    int answer = vfio(file_of(list.files->device), VFIO_DEVICE_GET_REGION_INFO, &info);
    answered(answer, info.argsz, info.flags);
}

static uint32_t any_irq_flags(void) {
    uint64_t data = MOSTLY(ONE_OF(VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_BOOL,
                                  VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_EVENTFD),
                           0, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL);
    uint64_t action = MOSTLY(ONE_OF(VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TRIGGER,
                                    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_UNMASK),
                             0, 0x40, VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK);
    return (uint32_t)(data | action);
}

static int eventfd_for(const struct vfio_irq_set *set) {
    if (set->flags & VFIO_IRQ_SET_ACTION_UNMASK)
        return list.unmask;
    return set->index == VFIO_PCI_INTX_IRQ_INDEX ? list.line : list.message;
}

static void ask_irqs_of(uint32_t index) {
    struct {
        struct vfio_irq_set set;
        int fd, more;
    } order = {.more = 0};
    const uint32_t whole = sizeof order.set + sizeof order.fd;
    order.set.argsz = (uint32_t)MOSTLY(whole, 0, sizeof order.set - 1, sizeof order.set,
                                       sizeof order.set + 1, whole - 1, whole + 4);
    order.set.flags = any_irq_flags();
    order.set.index = index;
    order.set.start = (uint32_t)MOSTLY(0u, 1, UINT32_MAX);
    order.set.count = (uint32_t)MOSTLY(1u, 0, 0, 0, 2, UINT32_MAX);
    order.fd = (int)MOSTLY((uint64_t)eventfd_for(&order.set), UINT64_MAX, NO_FD,
                           (uint64_t)list.files->container, 0x100, 1);
    if (is_taken_away(&order.set))
        acknowledge_line();
    int answer = vfio(file_of(list.files->device), VFIO_DEVICE_SET_IRQS, &order.set);
    if (answer == 0 && index == VFIO_PCI_INTX_IRQ_INDEX)
        list.has_line = !is_taken_away(&order.set);
    answered(answer, order.set.argsz, 0);
}

static void ask_irqs(void) {
    ask_irqs_of((uint32_t)MOSTLY(ONE_OF(VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX),
                                 VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_NUM_IRQS,
                                 UINT32_MAX));
}

static void ask_line(void) { ask_irqs_of(VFIO_PCI_INTX_IRQ_INDEX); }

static void registers_map(void) {
    struct vfio_region_info info = {.argsz = sizeof info, .index = VFIO_PCI_BAR0_REGION_INDEX};
    vfio(list.files->device, VFIO_DEVICE_GET_REGION_INFO, &info);
    list.registers = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, list.files->device,
                          (off_t)info.offset);
    if (list.registers == MAP_FAILED)
        host_cannot("the device's registers cannot be mapped");
}

static void interrupts_off(void) {
    struct vfio_irq_set none = {.argsz = sizeof none,
                                .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER};
    acknowledge_line();
    for (none.index = 0; none.index <= VFIO_PCI_MSI_IRQ_INDEX; none.index++)
        answered(vfio(list.files->device, VFIO_DEVICE_SET_IRQS, &none), none.argsz, none.index);
    list.has_line = false;
}

/* ---- the list ---- */

static void ask(unsigned times, void (*const *asks)(void), unsigned count) {
    for (unsigned i = 0; i < times; i++)
        asks[random_below(&list.random, count)]();
}

/* What has not come to pass by chance. */
static void open_all(void) {
    int container = list.files->container;
    answered(vfio(list.files->group, VFIO_GROUP_SET_CONTAINER, &container), 0, 0);
    answered(vfio(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), 0, 0);
    answered(vfio(list.files->group, VFIO_GROUP_GET_DEVICE_FD, list.files->name), 0, 0);
}

static void ask_all(const char *of) {
    static void (*const opening[])(void) = {ask_status, ask_set_container, ask_set_iommu,
                                            ask_device, ask_map,           ask_unmap,
                                            ask_status, ask_nothing};
    static void (*const working[])(void) = {ask_map,  ask_map,  ask_map,    ask_unmap,  ask_unmap,
                                            ask_irqs, ask_irqs, ask_irqs,   ask_irqs,   ask_irqs,
                                            ask_irqs, ask_irqs, ask_region, ask_nothing};
    static void (*const line[])(void) = {ask_line, ask_line,   ask_line,
                                         ask_line, raise_line, acknowledge_line};
    list.of = of;
    list.number = list.mapped = list.size = 0;
    list.files = &vfio_files[0];
    list.random = random_stream(host_seed(), 5);
    ask(OPENING, opening, COUNT(opening));
    open_all();
    registers_map();
    ask(WORKING, working, COUNT(working));
    interrupts_off();
    ask(LINE, line, COUNT(line));
    interrupts_off();
    munmap(list.registers, PAGE_SIZE);
}

/* ---- both ---- */

static void ask_kernel(void) {
    ask_all("kernel");
    close(vfio_files[0].device);
    close(vfio_files[0].group);
    close(vfio_files[0].container);
}

static void device_unmap(uint64_t iova, uint64_t size) { (void)iova, (void)size; }

static void doorbells_get(void) {
    struct vfio_user_io_fds doorbells = {.argsz = sizeof doorbells,
                                         .index = VFIO_PCI_BAR0_REGION_INDEX};
    if (!device_query(VFIO_USER_DEVICE_GET_REGION_IO_FDS, &doorbells, sizeof doorbells, EDU_ACTING))
        host_cannot("the device in software has no doorbells");
    for (unsigned i = 0; i < EDU_ACTING; i++)
        list.doorbell[i] = dup(device_reply()->fd[i]);
}

static void software_start(void) {
    device_start(&(struct process_home){.trace = trace_make(),
                                        .file_offset = PAGE_SIZE,
                                        .unmap = device_unmap},
                 NULL, 0, NULL);
    if (!device_introduce())
        host_cannot("there is no device in software");
    doorbells_get();
}

/* Of the second device of vfio.h, the group is not viable. */
static void ask_software(void) {
    software_start();
    vfio_files[0] = vfio_files[1];
    vfio_files[0].is_viable = true;
    ask_all("software");
    event_begin("pages");
    event_number("pages", pages);
    event_end();
}

static void setup(void) {
    shared_memory_make(SHARED_SIZE, CONTENT_STREAM);
    list.message = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    list.line = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    list.unmask = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    vfio_open();
    if (!vfio_files[0].is_software)
        ask_kernel();
    ask_software();
}

static void end(void) { device_end(); }

const struct host_half host_half = {.setup = setup, .end = end};
