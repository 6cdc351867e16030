/*
 * A PCI device that vfio-pci has already, and what a host half needs to know before it can ask VFIO
 * for it: its name and its group, from sysfs (Linux, "VFIO - 'Virtual Function I/O'", "VFIO Usage
 * Example"). vmm/edu/vfio_pci.c
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#define VFIO_PCI_NAME_SIZE 16 /* "0000:00:02.0", and its end */

/* The name of a device with these ids ("0x1234") whose driver is vfio-pci: one with another driver is
 * somebody else's. False: there is none. */
bool vfio_pci_find(const char *vendor, const char *device, char name[VFIO_PCI_NAME_SIZE]);

/* The name of the device's IOMMU group, which is a number: the file in /dev/vfio. The answer is how
 * many devices are in it; 0: the device is in no group. */
unsigned vfio_pci_group(const char *name, char *group, size_t size);

/* Let the device, open as this file, send messages and do DMA: PCI Local Bus Specification 3.0,
 * "Device Control". False: its configuration space cannot be written. */
bool vfio_pci_let_master(int device);
