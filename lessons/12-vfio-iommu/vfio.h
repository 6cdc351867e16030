/*
 * VFIO: the kernel's, where there is an IOMMU and a device that is vfio-pci's, and one of software,
 * which takes the same ioctls, gives the same answers, and has the device in a process of its own
 * behind the IOMMU of host.c. (Linux, "VFIO - 'Virtual Function I/O'", and <linux/vfio.h>.)
 */
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "edu_device.h"
#include "host.h"
#include "iommu.h"
#include "lab.h"
#include "shared_memory.h"
#include "vfio_pci.h"

/* The three files of VFIO: of a container (an I/O address space), a group, and a device in it. */
struct vfio_files {
    int container, group, device;  /* file descriptors */
    char name[VFIO_PCI_NAME_SIZE]; /* of the device */
    /* What software has instead of a kernel: */
    bool is_software, is_viable, has_container, has_iommu;
};
static struct vfio_files vfio_files[2]; /* the guest's device; and one for an exercise */

/*
 * ioctl(file, request, argument), and an event `vfio` in the record. The answer is the ioctl's: -1 if
 * it was refused, with errno.
 */
#define vfio(file, request, argument) \
    vfio_ioctl(file, request, #request, (void *)(uintptr_t)(argument))
static int vfio_ioctl(int file, unsigned long request, const char *name, void *argument);

/* ---- given by host.c ---- */

static uint64_t io_root; /* of the device's I/O page tables */
static void io_map(uint64_t root, uint64_t iova, uint64_t hpa, uint64_t permissions);
static void io_unmap(uint64_t root, uint64_t iova);

/* ---- memory, as the software IOMMU sees it ---- */

/* Where the pages of the shared file lie among hpas: not next to each other, since they never do. */
#define SHARED_HPA UINT64_C(0x180000000)

static uint64_t hpa_of(uint64_t offset) {
    return SHARED_HPA + PAGE_SIZE * ((offset / PAGE_SIZE * 5 + 3) % SHARED_PAGES);
}

/* The page of the file at this hpa, or NULL. */
static uint8_t *hpa_reach(uint64_t hpa) {
    for (uint64_t offset = 0; offset < SHARED_SIZE; offset += PAGE_SIZE)
        if (hpa_of(offset) == hpa)
            return shared_memory() + offset;
    return NULL;
}

/* ---- the container: an I/O address space ---- */

#define MAPS_MAX 8

static struct { uint64_t iova, size; /* size 0: none */ } maps[MAPS_MAX];

static bool map_overlaps(unsigned i, uint64_t iova, uint64_t size) {
    return iova < maps[i].iova + maps[i].size && maps[i].iova < iova + size;
}

/* Whole pages, and at least one. */
static bool is_bad_range(uint64_t first, uint64_t size) {
    return size == 0 || (first | size) % PAGE_SIZE || first + size - 1 < first;
}

/* Where a write is no DMA, but a message. */
#define MESSAGES_FIRST UINT64_C(0xfee00000)
#define MESSAGES_LAST UINT64_C(0xfeefffff)

static bool is_for_dma(uint64_t iova, uint64_t size) {
    uint64_t last = iova + size - 1;
    return !(last >> IO_IOVA_BITS) && (last < MESSAGES_FIRST || iova > MESSAGES_LAST);
}

static int software_map(const struct vfio_iommu_type1_dma_map *map) {
    uint64_t offset = map->vaddr - (uintptr_t)shared_memory();
    unsigned place = MAPS_MAX;
    uint32_t known = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    if (map->argsz < sizeof *map || !(map->flags & known) || (map->flags & ~known) ||
        is_bad_range(map->iova, map->size) || is_bad_range(map->vaddr, map->size))
        return EINVAL;
    for (unsigned i = 0; i < MAPS_MAX; i++) {
        if (maps[i].size == 0)
            place = i;
        else if (map_overlaps(i, map->iova, map->size))
            return EEXIST;
    }
    if (!is_for_dma(map->iova, map->size))
        return EINVAL;
    if (map->size > SHARED_SIZE || offset > SHARED_SIZE - map->size)
        return EFAULT;
    if (place == MAPS_MAX)
        return ENOSPC;
    maps[place].iova = map->iova, maps[place].size = map->size;
    for (uint64_t at = 0; at < map->size; at += PAGE_SIZE)
        io_map(io_root, map->iova + at, hpa_of(offset + at), map->flags); /* the same bits */
    return 0;
}

/* A mapping goes as a whole, or nothing does. (So it is in the second version of type 1. The first one
 * takes more away than it was asked to; here both are the second.) */
static bool is_in_parts(uint64_t iova, uint64_t size) {
    for (unsigned i = 0; i < MAPS_MAX; i++)
        if (maps[i].size && map_overlaps(i, iova, size) &&
            (maps[i].iova < iova || maps[i].iova + maps[i].size - iova > size))
            return true;
    return false;
}

/* What the IOMMU remembers of it goes when the device's process has answered. */
static int software_unmap(struct vfio_iommu_type1_dma_unmap *unmap) {
    bool is_all = unmap->flags == VFIO_DMA_UNMAP_FLAG_ALL;
    uint64_t size = is_all ? UINT64_MAX : unmap->size;
    struct vfio_user_dma_unmap message = {
        .argsz = sizeof message, .addr = unmap->iova, .size = size};
    if (unmap->argsz < sizeof *unmap || (unmap->flags && !is_all))
        return EINVAL;
    if (is_all ? unmap->iova || unmap->size
               : is_bad_range(unmap->iova, size) || is_in_parts(unmap->iova, size))
        return EINVAL;
    unmap->size = 0;
    for (unsigned i = 0; i < MAPS_MAX; i++) {
        if (maps[i].size == 0 || !map_overlaps(i, unmap->iova, size))
            continue;
        for (uint64_t at = 0; at < maps[i].size; at += PAGE_SIZE)
            io_unmap(io_root, maps[i].iova + at);
        unmap->size += maps[i].size;
        maps[i].size = 0;
    }
    return device_ask(VFIO_USER_DMA_UNMAP, &message, sizeof message, -1);
}

static int software_container(struct vfio_files *files, unsigned long request, void *argument) {
    if (request == VFIO_SET_IOMMU) {
        if (!files->has_container || files->has_iommu)
            return EINVAL;
        if ((uintptr_t)argument != VFIO_TYPE1_IOMMU && (uintptr_t)argument != VFIO_TYPE1v2_IOMMU)
            return ENODEV;
        files->has_iommu = true;
        return 0;
    }
    if (!files->has_iommu)
        return EINVAL;
    if (request == VFIO_IOMMU_MAP_DMA)
        return software_map(argument);
    return request == VFIO_IOMMU_UNMAP_DMA ? software_unmap(argument) : ENOTTY;
}

/* ---- the group and the device ---- */

static bool is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }

static int software_group(struct vfio_files *files, unsigned long request, void *argument) {
    struct vfio_group_status *status = argument;
    switch (request) {
    case VFIO_GROUP_GET_STATUS:
        if (status->argsz < sizeof *status)
            return EINVAL;
        status->flags = (files->is_viable ? VFIO_GROUP_FLAGS_VIABLE : 0) |
                        (files->has_container ? VFIO_GROUP_FLAGS_CONTAINER_SET : 0);
        return 0;
    case VFIO_GROUP_SET_CONTAINER:
        if (!is_open(*(int *)argument))
            return EBADF;
        if (*(int *)argument != files->container || files->has_container)
            return EINVAL;
        files->has_container = true;
        return 0;
    case VFIO_GROUP_GET_DEVICE_FD:
        if (strcmp(argument, files->name) != 0)
            return ENODEV;
        return files->has_container && files->has_iommu && files->is_viable ? 0 : EINVAL;
    default: return ENOTTY;
    }
}

/* Of the BAR: what can be mapped, a page. The file is the device's process's own. */
static int software_region(struct vfio_region_info *info) {
    struct vfio_user_region region = {.info = {.argsz = sizeof region, .index = info->index}};
    if (info->argsz < sizeof *info || info->index != VFIO_PCI_BAR0_REGION_INDEX ||
        !device_query(VFIO_USER_DEVICE_GET_REGION_INFO, &region, sizeof region, 1))
        return EINVAL;
    info->flags = region.info.flags & ~(uint32_t)VFIO_REGION_INFO_FLAG_CAPS;
    info->size = PAGE_SIZE;
    info->offset = region.info.offset;
    return dup2(device_reply()->fd[0], vfio_files[0].device) < 0 ? errno : 0;
}

/* How many bytes there must be behind the structure: a truth value, or an eventfd, for each interrupt. */
static uint64_t irq_data_size(const struct vfio_irq_set *set) {
    uint64_t each = set->flags & VFIO_IRQ_SET_DATA_EVENTFD ? sizeof(int32_t)
                    : set->flags & VFIO_IRQ_SET_DATA_BOOL  ? 1
                                                           : 0;
    return each * set->count;
}

/* An eventfd travels with the message. The process says EBADF of all that is none. */
static int software_irqs(const struct vfio_files *files, const struct vfio_irq_set *set) {
    uint8_t message[sizeof *set + sizeof(int32_t)] = {0};
    int fd = -1;
    if (set->argsz < sizeof *set || set->argsz - sizeof *set < irq_data_size(set) || set->count > 1)
        return EINVAL;
    memcpy(message, set, sizeof *set + irq_data_size(set));
    if (set->flags & VFIO_IRQ_SET_DATA_EVENTFD)
        memcpy(&fd, set->data, irq_data_size(set));
    bool is_closed = fd >= 0 && !is_open(fd);
    int error = device_ask(VFIO_USER_DEVICE_SET_IRQS, message, sizeof message,
                           is_closed ? files->container : fd);
    return error == EBADF && !is_closed ? EINVAL : error;
}

/* 0, or an errno. */
static int software_ioctl(struct vfio_files *files, int file, unsigned long request,
                          void *argument) {
    if (file == files->container)
        return software_container(files, request, argument);
    if (file == files->group)
        return software_group(files, request, argument);
    if (request == VFIO_DEVICE_GET_REGION_INFO)
        return software_region(argument);
    return request == VFIO_DEVICE_SET_IRQS ? software_irqs(files, argument) : ENOTTY;
}

/* ---- the kernel's: which group ---- */

static int group_open(const char *device) {
    char number[16], path[32];
    if (!vfio_pci_group(device, number, sizeof number))
        host_cannot("its device edu is in no IOMMU group");
    snprintf(path, sizeof path, "/dev/vfio/%s", number);
    return open(path, O_RDWR | O_CLOEXEC);
}

/* ---- both ---- */

/* The files of the guest's device. Where there is no hardware: some that only have a number. */
static void vfio_open(void) {
    for (unsigned i = 0; i < 2; i++) {
        struct vfio_files *files = &vfio_files[i];
        *files = (struct vfio_files){.is_software = true, .is_viable = i == 0, .name = "edu"};
        files->container = open("/dev/null", O_RDWR | O_CLOEXEC);
        files->group = open("/dev/null", O_RDWR | O_CLOEXEC);
        files->device = open("/dev/null", O_RDWR | O_CLOEXEC);
    }
    if (!vfio_pci_find("0x1234", "0x11e8", vfio_files[0].name))
        return;
    vfio_files[0].is_software = false;
    vfio_files[0].container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
    vfio_files[0].group = group_open(vfio_files[0].name);
    if (vfio_files[0].container < 0 || vfio_files[0].group < 0)
        host_cannot("its files in /dev/vfio cannot be opened");
}

static struct vfio_files *vfio_files_of(int file) {
    for (unsigned i = 0; i < 2; i++)
        if (file == vfio_files[i].container || file == vfio_files[i].group ||
            file == vfio_files[i].device)
            return &vfio_files[i];
    return NULL;
}

static const char *file_name(const struct vfio_files *files, int file) {
    if (!files)
        return "none of VFIO's";
    return file == files->container ? "container" : file == files->group ? "group" : "device";
}

/* All arguments are pointers, but for one. What cannot be a pointer is not followed. */
static bool is_bad_pointer(unsigned long request, const void *argument) {
    return request != VFIO_SET_IOMMU && (uintptr_t)argument < PAGE_SIZE;
}

/* The ioctl itself: its answer, and errno. */
static int vfio_do(struct vfio_files *files, int file, unsigned long request, void *argument) {
    bool is_device_fd = request == VFIO_GROUP_GET_DEVICE_FD;
    if (is_bad_pointer(request, argument)) {
        errno = EFAULT;
        return -1;
    }
    if (!files || !files->is_software) {
        int answer = ioctl(file, request, argument);
        if (files && is_device_fd && answer >= 0)
            files->device = answer;
        return answer;
    }
    errno = software_ioctl(files, file, request, argument);
    return errno ? -1 : is_device_fd ? files->device : 0;
}

static void vfio_record(unsigned long request, const void *argument,
                        const struct vfio_iommu_type1_dma_unmap *unmap) {
    const struct vfio_iommu_type1_dma_map *map = argument;
    const struct vfio_irq_set *set = argument;
    const struct vfio_region_info *region = argument;
    if (is_bad_pointer(request, argument))
        return;
    switch (request) {
    case VFIO_SET_IOMMU: event_number("type", (uintptr_t)argument); break;
    case VFIO_DEVICE_GET_REGION_INFO:
        event_number("index", region->index);
        event_hex("size", region->size);
        event_hex("offset", region->offset);
        break;
    case VFIO_IOMMU_MAP_DMA:
        event_hex("offset", map->vaddr - (uintptr_t)shared_memory());
        event_hex("iova", map->iova);
        event_hex("size", map->size);
        event_number("flags", map->flags);
        break;
    case VFIO_IOMMU_UNMAP_DMA:
        event_hex("iova", unmap->iova);
        event_hex("size", unmap->size);
        break;
    case VFIO_DEVICE_SET_IRQS:
        event_number("index", set->index);
        event_number("count", set->count);
        event_hex("flags", set->flags);
        break;
    default: break;
    }
}

static int vfio_ioctl(int file, unsigned long request, const char *name, void *argument) {
    struct vfio_files *files = vfio_files_of(file);
    /* As it was asked: the answer has another size. */
    struct vfio_iommu_type1_dma_unmap unmap = {0};
    if (request == VFIO_IOMMU_UNMAP_DMA && !is_bad_pointer(request, argument))
        unmap = *(struct vfio_iommu_type1_dma_unmap *)argument;
    int answer = vfio_do(files, file, request, argument);
    int error = answer < 0 ? errno : 0;
    event_begin("vfio");
    event_string("of", files == &vfio_files[1] ? "exercise" : "device");
    event_string("file", file_name(files, file));
    event_string("request", name);
    vfio_record(request, argument, &unmap);
    event_number("error", (uint64_t)error);
    event_end();
    errno = error;
    return answer;
}
