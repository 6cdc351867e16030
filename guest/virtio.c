/* From a word on the command line to a device that is ready for its queues: VIRTIO 1.2, "Virtio Over MMIO". */
#include "virtio.h"

#define MAGIC 0x74726976u /* "virt" */
#define VERSION 2
#define MAPPED_END (UINT64_C(4) << 30) /* of what the boot page tables map */
#define RINGS_MAX 8                    /* of all devices together */

/* ---- finding it ---- */

static int lower(int c) { return c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c; }

static unsigned digit_value(char c) {
    if (c >= '0' && c <= '9')
        return (unsigned)(c - '0');
    return lower(c) >= 'a' && lower(c) <= 'f' ? (unsigned)(lower(c) - 'a') + 10 : UINT32_MAX;
}

/* Take a number off the text, as C writes it: 0x for base 16, 0 for base 8. False if there is none, or one
 * of more than 64 bits. */
static bool number_take(const char **text, uint64_t *number) {
    const char *c = *text;
    unsigned base = *c == '0' ? 8 : 10;
    if (c[0] == '0' && lower(c[1]) == 'x' && digit_value(c[2]) < 16) {
        base = 16;
        c += 2;
    }
    const char *first = c;
    for (*number = 0; digit_value(*c) < base; c++)
        if (__builtin_mul_overflow(*number, base, number) ||
            __builtin_add_overflow(*number, digit_value(*c), number))
            return false;
    *text = c;
    return c > first;
}

static bool character_take(const char **text, char wanted) {
    bool is_there = **text == wanted;
    *text += is_there;
    return is_there;
}

/* A number of bytes: 4096, 4K. */
static bool size_take(const char **text, uint64_t *size) {
    if (!number_take(text, size))
        return false;
    int unit = lower(**text);
    unsigned shift = unit == 'k' ? 10 : unit == 'm' ? 20 : unit == 'g' ? 30 : 0;
    *text += shift != 0;
    bool fits = *size <= UINT64_MAX >> shift;
    *size <<= shift;
    return fits;
}

/* SIZE@GPA:IRQ[:ID], as Linux documents it in "The kernel's command-line parameters". */
static bool word_parse(const char *word, struct virtio_device *device) {
    uint64_t size, irq, id;
    if (!size_take(&word, &size) || !character_take(&word, '@') ||
        !number_take(&word, &device->gpa) || !character_take(&word, ':') ||
        !number_take(&word, &irq) || irq > UINT32_MAX)
        return false;
    if (character_take(&word, ':') && !number_take(&word, &id))
        return false;
    device->irq = (unsigned)irq;
    device->features = 0;
    return *word == '\0' && device->gpa % sizeof(uint32_t) == 0 && size > VIRTIO_MMIO_CONFIG &&
           size <= MAPPED_END && device->gpa <= MAPPED_END - size;
}

/* "MMIO-specific Initialization And Device Operation": look at no other register before these say yes, and
 * in this order. */
static bool has_id(const struct virtio_device *device, uint32_t id) {
    return virtio_read(device, VIRTIO_MMIO_MAGIC_VALUE) == MAGIC &&
           virtio_read(device, VIRTIO_MMIO_VERSION) == VERSION &&
           virtio_read(device, VIRTIO_MMIO_DEVICE_ID) == id;
}

bool virtio_find(uint32_t id, struct virtio_device *device) {
    char word[64];
    for (unsigned i = 0; guest_parameter_at("virtio_mmio.device", i, word, sizeof word); i++)
        if (word_parse(word, device) && has_id(device, id))
            return true;
    return false;
}

/* ---- agreeing with it ---- */

static void status_add(const struct virtio_device *device, uint32_t bit) {
    virtio_write(device, VIRTIO_MMIO_STATUS, virtio_read(device, VIRTIO_MMIO_STATUS) | bit);
}

/* "Device Reset": it is over when the status reads as 0. */
void virtio_reset(const struct virtio_device *device) {
    virtio_write(device, VIRTIO_MMIO_STATUS, 0);
    while (virtio_read(device, VIRTIO_MMIO_STATUS))
        pause();
}

uint64_t virtio_features_offered(const struct virtio_device *device) {
    virtio_write(device, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    uint64_t high = virtio_read(device, VIRTIO_MMIO_DEVICE_FEATURES);
    virtio_write(device, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    return high << 32 | virtio_read(device, VIRTIO_MMIO_DEVICE_FEATURES);
}

static void features_write(const struct virtio_device *device, uint64_t features) {
    virtio_write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    virtio_write(device, VIRTIO_MMIO_DRIVER_FEATURES, (uint32_t)(features >> 32));
    virtio_write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    virtio_write(device, VIRTIO_MMIO_DRIVER_FEATURES, (uint32_t)features);
}

/* Only a device with VIRTIO_F_VERSION_1 keeps to this specification. */
static bool features_agree(struct virtio_device *device, uint64_t wanted) {
    uint64_t needed = UINT64_C(1) << VIRTIO_F_VERSION_1;
    device->features = virtio_features_offered(device) & (wanted | needed);
    if (!(device->features & needed))
        return false;
    features_write(device, device->features);
    status_add(device, VIRTIO_CONFIG_S_FEATURES_OK);
    return virtio_read(device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK;
}

void virtio_give_up(const struct virtio_device *device) {
    status_add(device, VIRTIO_CONFIG_S_FAILED);
}

bool virtio_begin(struct virtio_device *device, uint64_t wanted) {
    virtio_reset(device);
    status_add(device, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    status_add(device, VIRTIO_CONFIG_S_DRIVER);
    if (features_agree(device, wanted))
        return true;
    virtio_give_up(device);
    return false;
}

void virtio_driver_ok(const struct virtio_device *device) {
    status_add(device, VIRTIO_CONFIG_S_DRIVER_OK);
}

/* ---- its rings ---- */

/* A page holds the largest ring: its descriptors, the available ring and the used ring, each with two indices
 * and flags. */
_Static_assert(VIRTIO_RING_SIZE_MAX *(sizeof(struct vring_desc) + sizeof(uint16_t) +
                                      sizeof(struct vring_used_elem)) +
                       6 * sizeof(uint16_t) + VRING_USED_ALIGN_SIZE <=
                   PAGE_SIZE,
               "a ring is a page");

/* The page of this queue, zeroed. Pages cannot be given back: a queue keeps its own. */
static void *ring_page(const struct virtio_device *device, unsigned queue) {
    static struct {
        uint64_t device_gpa, page_gpa;
        unsigned queue;
    } rings[RINGS_MAX];
    static unsigned count;
    for (unsigned i = 0; i < count; i++)
        if (rings[i].device_gpa == device->gpa && rings[i].queue == queue)
            return memset((void *)rings[i].page_gpa, 0, PAGE_SIZE);
    if (count == RINGS_MAX)
        PANIC("virtio_ring_create: this is one queue too many");
    rings[count].device_gpa = device->gpa;
    rings[count].queue = queue;
    rings[count].page_gpa = page_alloc();
    return (void *)rings[count++].page_gpa;
}

/* An address takes two registers, the lower half first. gva = gpa for what comes from page_alloc(). */
static void address_write(const struct virtio_device *device, unsigned offset, const void *at) {
    uint64_t gpa = (uint64_t)at;
    virtio_write(device, offset, (uint32_t)gpa);
    virtio_write(device, offset + sizeof(uint32_t), (uint32_t)(gpa >> 32));
}

/* "Virtqueue Configuration", in its order. */
bool virtio_ring_create(const struct virtio_device *device, unsigned queue, uint16_t size,
                        struct vring *ring) {
    bool is_power_of_two = size && !(size & (size - 1));
    if (!is_power_of_two || size > VIRTIO_RING_SIZE_MAX)
        return false;
    virtio_write(device, VIRTIO_MMIO_QUEUE_SEL, queue);
    if (virtio_read(device, VIRTIO_MMIO_QUEUE_READY) ||
        virtio_read(device, VIRTIO_MMIO_QUEUE_NUM_MAX) < size)
        return false;
    vring_init(ring, size, ring_page(device, queue), VRING_USED_ALIGN_SIZE);
    virtio_write(device, VIRTIO_MMIO_QUEUE_NUM, size);
    address_write(device, VIRTIO_MMIO_QUEUE_DESC_LOW, ring->desc);
    address_write(device, VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring->avail);
    address_write(device, VIRTIO_MMIO_QUEUE_USED_LOW, ring->used);
    virtio_write(device, VIRTIO_MMIO_QUEUE_READY, 1);
    return true;
}

/* "Notifications From The Device". Acknowledged before the rings are looked at: what the device uses from now
 * on raises the line again. */
uint32_t virtio_interrupt_take(const struct virtio_device *device) {
    uint32_t causes = virtio_read(device, VIRTIO_MMIO_INTERRUPT_STATUS) &
                      (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    if (causes)
        virtio_write(device, VIRTIO_MMIO_INTERRUPT_ACK, causes);
    return causes;
}
