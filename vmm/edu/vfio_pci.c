/* Where a PCI device that is vfio-pci's is found, and what it is not without. */
#include <dirent.h>
#include <fcntl.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "vfio_pci.h"

#define DEVICES "/sys/bus/pci/devices"

/* The last part of what a link of the device's points to, or else the first line of a file of its. */
static void device_read(const char *name, const char *file, char *word, size_t size) {
    char path[300], text[300] = "";
    snprintf(path, sizeof path, DEVICES "/%s/%s", name, file);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (readlink(path, text, sizeof text - 1) < 0 && read(fd, text, sizeof text - 1) < 0)
        text[0] = 0;
    close(fd);
    text[strcspn(text, "\n")] = 0;
    const char *last = strrchr(text, '/');
    snprintf(word, size, "%s", last ? last + 1 : text);
}

static bool device_says(const char *name, const char *file, const char *expected) {
    char word[32];
    device_read(name, file, word, sizeof word);
    return !strcmp(word, expected);
}

bool vfio_pci_find(const char *vendor, const char *device, char name[VFIO_PCI_NAME_SIZE]) {
    DIR *devices = opendir(DEVICES);
    struct dirent *entry;
    bool is_found = false;
    while (devices && !is_found && (entry = readdir(devices))) {
        is_found = strlen(entry->d_name) < VFIO_PCI_NAME_SIZE &&
                   device_says(entry->d_name, "vendor", vendor) &&
                   device_says(entry->d_name, "device", device) &&
                   device_says(entry->d_name, "driver", "vfio-pci");
        if (is_found)
            memcpy(name, entry->d_name, strlen(entry->d_name) + 1);
    }
    if (devices)
        closedir(devices);
    return is_found;
}

unsigned vfio_pci_group(const char *name, char *group, size_t size) {
    char path[300];
    unsigned count = 0;
    struct dirent *entry;
    device_read(name, "iommu_group", group, size);
    snprintf(path, sizeof path, DEVICES "/%s/iommu_group/devices", name);
    DIR *devices = opendir(path);
    while (devices && (entry = readdir(devices)))
        count += entry->d_name[0] != '.';
    if (devices)
        closedir(devices);
    return count;
}

bool vfio_pci_let_master(int device) {
    struct vfio_region_info info = {.argsz = sizeof info, .index = VFIO_PCI_CONFIG_REGION_INDEX};
    uint16_t command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
    return ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) == 0 &&
           pwrite(device, &command, sizeof command, (off_t)info.offset + PCI_COMMAND) ==
               sizeof command;
}
