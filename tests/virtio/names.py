"""The names of Linux's headers virtio_*.h, without the prefix that stands at each class. test_harness.py compares the
values."""

from enum import IntEnum, IntFlag


class MMIO(IntEnum):
    """VIRTIO_MMIO_: offsets of registers."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_AVAIL_LOW = 0x090
    QUEUE_AVAIL_HIGH = 0x094
    QUEUE_USED_LOW = 0x0A0
    QUEUE_USED_HIGH = 0x0A4
    SHM_SEL = 0x0AC
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


# Since Linux 6.2 in the header.
QUEUE_RESET = 0x0C0


class INT(IntFlag):
    """VIRTIO_MMIO_INT_: causes of an interrupt."""

    VRING = 1
    CONFIG = 2


class S(IntFlag):
    """VIRTIO_CONFIG_S_: the status register."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 0x40
    FAILED = 0x80


class F(IntFlag):
    """VIRTIO_F_, VIRTIO_RING_F_, VIRTIO_CONSOLE_F_: features. There the number of the bit, here the bit."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    RING_RESET = 1 << 40


# Not in the header of every Linux.
F_NOTIFICATION_DATA = 1 << 38


class DESC(IntFlag):
    """VRING_DESC_F_: flags of a descriptor."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


class AVAIL(IntFlag):
    """VRING_AVAIL_F_: flags of the available ring."""

    NO_INTERRUPT = 1


class USED(IntFlag):
    """VRING_USED_F_: flags of the used ring."""

    NO_NOTIFY = 1
