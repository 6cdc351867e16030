"""Drivers that do what no driver may. The device says what was wrong (event virtio_misuse), ends in a defined state
(as before, or in need of a reset), and works again after a reset. That it touches nothing outside of guest memory, and
comes to an end, is what its process is watched for."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
from virtio.driver import (
    ACKNOWLEDGED,
    BROKEN,
    LIVE,
    NEGOTIATED,
    PLAIN,
    RECEIVE,
    TRANSMIT,
    Buffer,
    Driver,
    Queue,
    descriptor,
)
from virtio.names import DESC, MMIO, QUEUE_RESET, F, S

from kvmlab.plugin import ROOT

MEMORY_END = 1 << 20  # Driver's
TOP = 1 << 64
N = 8  # entries of a queue here


def works_without_a_reset(driver: Driver) -> None:
    driver.forget()
    driver.queue(TRANSMIT).send(driver.readable(b"still here"))
    assert (driver.output, driver.misuse) == (b"still here", [])


# ---- what is in the rings ----


# Writes descriptors, from the first one on, given the flag that is right in this queue, and a buffer that is good.
Write = Callable[[Queue, int, Buffer], None]
Entry = Callable[[int, Buffer], bytes]


class Offer(NamedTuple):
    """A chain that no driver may make, for either queue."""

    write: Write
    says: str
    head: int = 0
    features: int = PLAIN | F.INDIRECT_DESC


LOOP = "a chain is longer than the queue, or a loop"
BEYOND = "a descriptor lies beyond the end of its table"
OUTSIDE = "a buffer is not in memory"
NEXT, INDIRECT = DESC.NEXT, DESC.INDIRECT


def one(gpa: int, size: int) -> Write:
    return lambda queue, flag, _: queue.describe(0, gpa, size, flag)


def after_a_good_one(gpa: int, size: int) -> Write:
    def write(queue: Queue, flag: int, good: Buffer) -> None:
        queue.describe(0, good.gpa, good.size, flag | NEXT, 1)
        queue.describe(1, gpa, size, flag)

    return write


def linked(*following: int) -> Write:
    """The descriptors from 0 on, good but for what comes next."""

    def write(queue: Queue, flag: int, good: Buffer) -> None:
        for index, after in enumerate(following):
            queue.describe(index, good.gpa, good.size, flag | NEXT, after)

    return write


def indirect(*entries: Entry, direct: int = 0, flags: int = 0, cut: int = 0) -> Write:
    """So many good descriptors, then one that refers to a table of these entries, whose end is cut off."""

    def write(queue: Queue, flag: int, good: Buffer) -> None:
        table = queue.driver.readable(b"".join(entry(flag, good) for entry in entries))
        for index in range(direct):
            queue.describe(index, good.gpa, good.size, flag | NEXT, index + 1)
        queue.describe(direct, table.gpa, table.size - cut, INDIRECT | flags)

    return write


def entry(flags: int = 0, following: int = 0, size: int | None = None) -> Entry:
    return lambda flag, good: descriptor(good.gpa, good.size if size is None else size, flag | flags, following)


def table_at(gpa: int, size: int) -> Write:
    return lambda queue, _, __: queue.describe(0, gpa, size, INDIRECT)


def nested(queue: Queue, flag: int, good: Buffer) -> None:
    inner = queue.driver.readable(descriptor(good.gpa, good.size, flag))
    outer = queue.driver.readable(descriptor(inner.gpa, 16, INDIRECT))
    queue.describe(0, outer.gpa, 16, INDIRECT)


def table_of_itself(queue: Queue, _: int, __: Buffer) -> None:
    gpa = queue.driver.room(16)
    queue.driver.poke(gpa, descriptor(gpa, 16, INDIRECT))
    queue.describe(0, gpa, 16, INDIRECT)


def a_readable_one_after_a_writable_one(queue: Queue, _: int, good: Buffer) -> None:
    queue.describe(0, good.gpa, good.size, DESC.WRITE | NEXT, 1)
    queue.describe(1, good.gpa, good.size)


def of_other_direction(queue: Queue, flag: int, good: Buffer) -> None:
    queue.describe(0, good.gpa, good.size, flag ^ DESC.WRITE)


def nothing(*_: object) -> None:
    """The table is as it was created."""


TABLE_SIZE = "an indirect table is empty, or ends within a descriptor"
TABLE_OUTSIDE = "an indirect table is not in memory"
OFFERS = {
    "a descriptor that follows itself": Offer(linked(0), LOOP),
    "two descriptors that follow each other": Offer(linked(1, 0), LOOP),
    "a loop behind a good beginning": Offer(linked(1, 2, 3, 2), LOOP),
    "a loop in an indirect table": Offer(indirect(entry(NEXT, 1), entry(NEXT, 0)), LOOP),
    "an indirect table with more buffers than the queue": Offer(
        indirect(*[entry(NEXT, i + 1) for i in range(N)], entry()), LOOP
    ),
    "more buffers than the queue with those before the table": Offer(
        indirect(*[entry(NEXT, i + 1) for i in range(4)], entry(), direct=4), LOOP
    ),
    "a head just beyond the table": Offer(nothing, BEYOND, head=N),
    "a head far beyond the table": Offer(nothing, BEYOND, head=0xFFFF),
    "a next descriptor just beyond the table": Offer(linked(N), BEYOND),
    "a next descriptor far beyond the table": Offer(linked(1, 0xFFFF), BEYOND),
    "a next descriptor just beyond an indirect table": Offer(indirect(entry(NEXT, 1)), BEYOND),
    "a next descriptor that only the queue's table has": Offer(indirect(entry(NEXT, 7)), BEYOND),
    "a buffer behind memory": Offer(one(MEMORY_END, 1), OUTSIDE),
    "a buffer that ends behind memory": Offer(one(MEMORY_END - 1, 2), OUTSIDE),
    "a buffer far outside": Offer(one(1 << 52, 16), OUTSIDE),
    "a buffer at the last address": Offer(one(TOP - 1, 1), OUTSIDE),
    "a buffer that wraps to address 0": Offer(one(TOP - 1, 2), OUTSIDE),
    "a buffer that wraps into memory": Offer(one(TOP - 0x1000, 0x2000), OUTSIDE),
    "a buffer of 4 GiB less one": Offer(one(0, 0xFFFFFFFF), OUTSIDE),
    "a buffer outside, after a good one": Offer(after_a_good_one(MEMORY_END, 16), OUTSIDE),
    "a buffer without bytes": Offer(one(0x1000, 0), "a buffer has no bytes"),
    "a buffer without bytes, after a good one": Offer(after_a_good_one(0x1000, 0), "a buffer has no bytes"),
    "a buffer without bytes, outside": Offer(one(TOP - 1, 0), "a buffer has no bytes"),
    "a buffer without bytes in an indirect table": Offer(indirect(entry(size=0)), "a buffer has no bytes"),
    "an entry that was never written": Offer(nothing, "a buffer has no bytes"),
    "a readable buffer after a writable one": Offer(
        a_readable_one_after_a_writable_one, "a readable buffer comes after a writable one"
    ),
    "an indirect descriptor that was not agreed on": Offer(
        indirect(entry()), "an indirect descriptor, without VIRTIO_F_INDIRECT_DESC", features=PLAIN
    ),
    "an indirect table in an indirect table": Offer(nested, "an indirect descriptor in an indirect table"),
    "an indirect table that refers to itself": Offer(table_of_itself, "an indirect descriptor in an indirect table"),
    "an indirect descriptor with a next one": Offer(
        indirect(entry(), flags=NEXT), "an indirect descriptor has a next one"
    ),
    "an empty indirect table": Offer(table_at(0x1000, 0), TABLE_SIZE),
    "an indirect table of less than a descriptor": Offer(indirect(entry(), cut=1), TABLE_SIZE),
    "an indirect table that ends within a descriptor": Offer(indirect(entry(), entry(), cut=8), TABLE_SIZE),
    "an indirect table behind memory": Offer(table_at(MEMORY_END, 16), TABLE_OUTSIDE),
    "an indirect table that ends behind memory": Offer(table_at(MEMORY_END - 16, 32), TABLE_OUTSIDE),
    "an indirect table that wraps": Offer(table_at(TOP - 16, 32), TABLE_OUTSIDE),
    "an indirect table of almost 4 GiB": Offer(table_at(0, 0xFFFFFFF0), TABLE_OUTSIDE),
}
WRONG_WAY = {RECEIVE: "a buffer to receive into is readable", TRANSMIT: "a buffer to transmit is writable"}
both_queues = pytest.mark.parametrize("index", [RECEIVE, TRANSMIT], ids=["receive", "transmit"])


def good_buffer(driver: Driver, index: int) -> Buffer:
    return driver.writable(4) if index == RECEIVE else driver.readable(b"good")


def offer_to_a_device_that_looks(driver: Driver, index: int, features: int, write: Write, head: int) -> Queue:
    """On the way is also a good chain before the bad one, and one behind it."""
    driver.go_live(features, size=N)
    queue = driver.queue(index)
    good = good_buffer(driver, index)
    queue.describe(6, good.gpa, good.size, DESC.WRITE if good.is_writable else 0)
    queue.describe(7, good.gpa, good.size, DESC.WRITE if good.is_writable else 0)
    write(queue, DESC.WRITE if index == RECEIVE else 0, good)
    queue.offer(6, head, 7)
    driver.type(b"much more than one buffer takes")
    queue.notify()
    return queue


def broke(driver: Driver, queue: Queue, says: str) -> None:
    events = driver.happened("virtio_misuse")
    assert [(event["what"], event["queue"], event["is_broken"]) for event in events] == [(says, queue.index, 1)]
    assert (driver.status, driver.interrupts.count("config")) == (BROKEN, 1)


@both_queues
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_a_chain_that_no_driver_may_make_breaks_the_device(driver: Driver, index: int, offer: Offer) -> None:
    queue = offer_to_a_device_that_looks(driver, index, offer.features, offer.write, offer.head)
    broke(driver, queue, offer.says)
    assert queue.used_index == 1, "the good chain before it was used, what comes behind it was not"
    driver.works()


@both_queues
def test_a_loop_over_the_whole_table_breaks_the_device(driver: Driver, index: int) -> None:
    driver.go_live(size=N)
    queue = driver.queue(index)
    linked(1, 2, 3, 4, 5, 6, 7, 0)(queue, DESC.WRITE if index == RECEIVE else 0, good_buffer(driver, index))
    driver.type(b"typed")
    queue.offer(3)
    queue.notify()
    broke(driver, queue, LOOP)
    driver.works()


@both_queues
def test_a_buffer_of_the_wrong_direction_breaks_the_device(driver: Driver, index: int) -> None:
    queue = offer_to_a_device_that_looks(driver, index, PLAIN, of_other_direction, 0)
    broke(driver, queue, WRONG_WAY[index])
    driver.works()


@both_queues
@pytest.mark.parametrize("ahead", [N + 1, 2 * N, 0x7FFF, 0x8000, 0xFFFF], ids=str)
def test_an_available_index_that_jumps_breaks_the_device(driver: Driver, index: int, ahead: int) -> None:
    """Further than there are entries in the ring; 0xffff is one backwards."""
    driver.go_live(size=N)
    queue = driver.queue(index)
    driver.type(b"typed")
    driver.poke16(queue.driver_gpa + 2, ahead)
    queue.notify()
    broke(driver, queue, "the available index is ahead by more than the queue's size")
    assert queue.used_index == 0
    driver.works()


def test_a_chain_of_4_gib_breaks_the_device(drivers: Callable[..., Driver]) -> None:
    """It could not be told how much of it was written: len has 32 bits."""
    driver = drivers(memory_size=3 << 30)
    driver.go_live()
    queue = driver.queue(RECEIVE)
    driver.type(b"typed")
    queue.send(Buffer(0x100000, 2 << 30, True), Buffer(0x100000, 2 << 30, True))
    broke(driver, queue, "a chain has 4 GiB or more")
    driver.works()


def test_a_chain_of_almost_4_gib_is_none_too_many(drivers: Callable[..., Driver]) -> None:
    driver = drivers(memory_size=3 << 30)
    driver.go_live()
    driver.queue(RECEIVE).send(Buffer(0x100000, 2 << 30, True), Buffer(0x100000, (2 << 30) - 1, True))
    driver.type(b"typed")
    assert (driver.peek(0x100000, 5), driver.misuse) == (b"typed", [])


# ---- what is in the registers ----


class Misuse(NamedTuple):
    """Something that a driver must not do when the device is in this state."""

    does: Callable[[Driver], None]
    says: str
    when: int = LIVE
    breaks: bool = False


def writes(*accesses: tuple[int, int]) -> Callable[[Driver], None]:
    def do(driver: Driver) -> None:
        for offset, value in accesses:
            driver.write(offset, value)

    return do


def reads(offset: int, size: int = 4) -> Callable[[Driver], None]:
    def do(driver: Driver) -> None:
        assert driver.read(offset, size) == 0

    return do


def accepts(features: int) -> Callable[[Driver], None]:
    def do(driver: Driver) -> None:
        driver.accept(features)
        driver.write(MMIO.STATUS, NEGOTIATED)

    return do


def makes_ready(size: int = N, **parts: int) -> Callable[[Driver], None]:
    """A queue of this size, with these parts at these places."""

    def do(driver: Driver) -> None:
        queue = driver.queue(TRANSMIT)
        before = vars(queue).copy()
        vars(queue).update(parts)
        queue.configure(size)
        driver.write(MMIO.QUEUE_READY, 1)
        vars(queue).update(before)
        assert driver.read(MMIO.QUEUE_READY) == 0

    return do


def in_any_width_but_32_bits(driver: Driver) -> None:
    for offset in range(MMIO.MAGIC_VALUE, MMIO.CONFIG, 4):
        for at, size in ((offset, 1), (offset, 2), (offset, 8), (offset + 1, 4), (offset + 2, 2), (offset + 3, 1)):
            if at + size <= MMIO.CONFIG:
                assert driver.read(at, size) == 0
                driver.write(at, (1 << 8 * size) - 1, size)


KNOWN = {int(register) for register in MMIO}
WRITE_ONLY = [
    MMIO.DEVICE_FEATURES_SEL, MMIO.DRIVER_FEATURES, MMIO.DRIVER_FEATURES_SEL, MMIO.QUEUE_SEL, MMIO.QUEUE_NUM,
    MMIO.QUEUE_NOTIFY, MMIO.INTERRUPT_ACK, MMIO.QUEUE_DESC_LOW, MMIO.QUEUE_DESC_HIGH, MMIO.QUEUE_AVAIL_LOW,
    MMIO.QUEUE_AVAIL_HIGH, MMIO.QUEUE_USED_LOW, MMIO.QUEUE_USED_HIGH, MMIO.SHM_SEL,
]  # fmt: skip
READ_ONLY = [
    MMIO.MAGIC_VALUE, MMIO.VERSION, MMIO.DEVICE_ID, MMIO.VENDOR_ID, MMIO.DEVICE_FEATURES, MMIO.QUEUE_NUM_MAX,
    MMIO.INTERRUPT_STATUS, MMIO.SHM_LEN_LOW, MMIO.SHM_LEN_HIGH, MMIO.SHM_BASE_LOW, MMIO.SHM_BASE_HIGH,
    MMIO.CONFIG_GENERATION,
]  # fmt: skip
# Among them those of legacy devices, and QueueReset, since VIRTIO_F_RING_RESET is not offered.
UNKNOWN = [offset for offset in range(0, MMIO.CONFIG, 4) if offset not in KNOWN]
assert QUEUE_RESET in UNKNOWN


def reads_what_is_write_only(driver: Driver) -> None:
    for offset in (*WRITE_ONLY, *UNKNOWN):
        assert driver.read(offset) == 0


def writes_what_is_read_only(driver: Driver) -> None:
    for offset in (*READ_ONLY, *UNKNOWN):
        driver.write(offset, 0xFFFFFFFF)


def changes_a_ready_queue(driver: Driver) -> None:
    driver.write(MMIO.QUEUE_SEL, TRANSMIT)
    for offset in (MMIO.QUEUE_NUM, *range(MMIO.QUEUE_DESC_LOW, MMIO.QUEUE_USED_HIGH + 4, 4)):
        if offset in KNOWN:
            driver.write(offset, 0x44444444)


def sets_up_queues_that_do_not_exist(driver: Driver) -> None:
    for queue in (2, 3, 0x10001, 0xFFFFFFFF):
        driver.write(MMIO.QUEUE_SEL, queue)
        for offset in (MMIO.QUEUE_NUM, MMIO.QUEUE_READY, MMIO.QUEUE_DESC_LOW, MMIO.QUEUE_USED_HIGH):
            driver.write(offset, 1)


def stops_and_notifies(driver: Driver) -> None:
    driver.queue(TRANSMIT).ready = False
    driver.queue(TRANSMIT).notify()
    driver.ring_doorbell(TRANSMIT)
    driver.queue(TRANSMIT).create(N)


def config(offset: int, size: int) -> Callable[[Driver], None]:
    def do(driver: Driver) -> None:
        assert driver.read(MMIO.CONFIG + offset, size) == 0
        driver.write(MMIO.CONFIG + offset, 0x41, size)

    return do


def config_write(offset: int, size: int) -> Callable[[Driver], None]:
    return lambda driver: driver.write(MMIO.CONFIG + offset, 0x41, size)


def notifies(*values: int) -> Callable[[Driver], None]:
    return writes(*[(MMIO.QUEUE_NOTIFY, value) for value in values])


SIZE = "the queue's size is 0 or more than QueueNumMax"
POWER = "the queue's size is no power of two"
ALIGNED = "an area of the queue is not aligned"
AREA = "an area of the queue is not in memory"
CLEARED = "a status bit is cleared, which only a reset does"
NOT_OFFERED = "a feature is accepted that is not offered"
WIDTH = "the configuration space is accessed with a wrong width"
CONFIG_END = "the configuration space is accessed beyond its end"
BESIDE = "the configuration space is written beside emerg_wr"
BAD_QUEUES = {
    **{f"size {size}": (makes_ready(size), SIZE) for size in (0, 257, 512, 0x8000, 0x10000, 0x80000000, 0xFFFFFFFF)},
    **{f"size {size}": (makes_ready(size), POWER) for size in (3, 5, 255)},
    "descriptors misaligned": (makes_ready(descriptor_gpa=0x10008), ALIGNED),
    "available ring misaligned": (makes_ready(driver_gpa=0x10001), ALIGNED),
    "used ring misaligned": (makes_ready(device_gpa=0x10002), ALIGNED),
    "descriptors end behind memory": (makes_ready(descriptor_gpa=MEMORY_END - 16 * N + 16), AREA),
    "available ring ends behind memory": (makes_ready(driver_gpa=MEMORY_END - 6 - 2 * N + 2), AREA),
    "used ring ends behind memory": (makes_ready(device_gpa=MEMORY_END - 4 - 8 * N), AREA),
    "descriptors behind memory": (makes_ready(descriptor_gpa=MEMORY_END), AREA),
    "available ring far outside": (makes_ready(driver_gpa=1 << 52), AREA),
    "descriptors wrap": (makes_ready(descriptor_gpa=TOP - 16), AREA),
    "available ring wraps": (makes_ready(driver_gpa=TOP - 2), AREA),
    "used ring wraps": (makes_ready(device_gpa=TOP - 4), AREA),
}
MISUSES = {
    "features after FEATURES_OK": Misuse(
        writes((MMIO.DRIVER_FEATURES_SEL, 0), (MMIO.DRIVER_FEATURES, 1)), "features are accepted after FEATURES_OK"
    ),
    "features beyond bit 63": Misuse(
        writes((MMIO.DRIVER_FEATURES_SEL, 2), (MMIO.DRIVER_FEATURES, 1)),
        "features beyond bit 63 are accepted",
        ACKNOWLEDGED,
    ),
    "features not offered": Misuse(accepts(PLAIN | F.RING_PACKED), NOT_OFFERED, ACKNOWLEDGED),
    "no VIRTIO_F_VERSION_1": Misuse(
        accepts(F.EVENT_IDX), "VIRTIO_F_VERSION_1 is not accepted: this is no legacy device", ACKNOWLEDGED
    ),
    "DRIVER_OK without FEATURES_OK": Misuse(
        writes((MMIO.STATUS, ACKNOWLEDGED | S.DRIVER_OK)), "DRIVER_OK without FEATURES_OK", ACKNOWLEDGED
    ),
    "DRIVER_OK cleared": Misuse(writes((MMIO.STATUS, NEGOTIATED)), CLEARED),
    "all but one bit cleared": Misuse(writes((MMIO.STATUS, S.FAILED)), CLEARED),
    "FEATURES_OK cleared": Misuse(writes((MMIO.STATUS, ACKNOWLEDGED)), CLEARED, NEGOTIATED),
    "a queue before FEATURES_OK": Misuse(
        makes_ready(), "a queue is made ready before FEATURES_OK", ACKNOWLEDGED, breaks=True
    ),
    **{name: Misuse(does, says, NEGOTIATED, breaks=True) for name, (does, says) in BAD_QUEUES.items()},
    "QueueReady 2": Misuse(
        writes((MMIO.QUEUE_SEL, 1), (MMIO.QUEUE_READY, 2)), "QueueReady is neither 0 nor 1", NEGOTIATED
    ),
    "QueueReady twice": Misuse(
        writes((MMIO.QUEUE_SEL, 1), (MMIO.QUEUE_READY, 1)), "a queue is made ready that is ready"
    ),
    "a ready queue changed": Misuse(changes_a_ready_queue, "a queue is changed while it is ready"),
    "queues that do not exist": Misuse(sets_up_queues_that_do_not_exist, "a queue is set up that does not exist"),
    "notification of queues that do not exist": Misuse(
        notifies(2, 0x10000, 0x10001, 0xFFFFFFFF), "a queue is notified that does not exist"
    ),
    "notification before DRIVER_OK": Misuse(notifies(0, 1), "a queue is notified before DRIVER_OK", NEGOTIATED),
    "notification before all": Misuse(notifies(0, 1), "a queue is notified before DRIVER_OK", 0),
    "notification of a queue that is not ready": Misuse(stops_and_notifies, "a queue is notified that is not ready"),
    "notification of a broken device": Misuse(
        notifies(0, 1), "a queue is notified while the device needs a reset", BROKEN
    ),
    "interrupt causes that do not exist": Misuse(
        writes((MMIO.INTERRUPT_ACK, 4), (MMIO.INTERRUPT_ACK, 0xFFFFFFFF)),
        "an interrupt cause is acknowledged that does not exist",
    ),
    "wrong widths": Misuse(in_any_width_but_32_bits, "a register is accessed other than by 32 bits, aligned"),
    "reading what is for writing": Misuse(reads_what_is_write_only, "a register is read that cannot be"),
    "writing what is for reading": Misuse(writes_what_is_read_only, "a register is written that cannot be"),
    "configuration in 64 bits": Misuse(config(0, 8), WIDTH),
    "configuration unaligned, 16 bits": Misuse(config(1, 2), WIDTH),
    "configuration unaligned, 32 bits": Misuse(config(2, 4), WIDTH),
    "configuration behind its end": Misuse(config(12, 4), CONFIG_END),
    "configuration across its end": Misuse(config(11, 2), CONFIG_END),
    "configuration far behind its end": Misuse(config(0xEFC, 4), CONFIG_END),
    "cols written": Misuse(config_write(0, 2), BESIDE),
    "max_nr_ports written": Misuse(config_write(4, 4), BESIDE),
    "emerg_wr written in 8 bits": Misuse(config_write(8, 1), BESIDE),
    "emerg_wr written in its middle": Misuse(config_write(10, 2), BESIDE),
}


def bring_to(driver: Driver, status: int) -> None:
    if status & S.DRIVER_OK:
        driver.go_live(size=N)
    elif status & S.FEATURES_OK:
        driver.negotiate()
    elif status:
        driver.write(MMIO.STATUS, status)
    if status & S.NEEDS_RESET:
        driver.queue(TRANSMIT).offer(99)
        driver.queue(TRANSMIT).notify()
    assert driver.status == status


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_a_register_that_is_misused_says_so_and_the_device_is_as_it_was_or_broken(
    driver: Driver, misuse: Misuse
) -> None:
    bring_to(driver, misuse.when)
    before = (driver.interrupt_status, driver.line, driver.read(MMIO.CONFIG, 4))
    driver.forget()
    misuse.does(driver)
    assert set(driver.misuse) == {misuse.says}
    assert {event["is_broken"] for event in driver.happened("virtio_misuse")} == {int(misuse.breaks)}
    assert driver.status == misuse.when | (S.NEEDS_RESET if misuse.breaks else 0)
    assert (driver.interrupt_status, driver.line, driver.read(MMIO.CONFIG, 4)) == before
    assert driver.output == b""
    if misuse.when == LIVE:
        works_without_a_reset(driver)
    driver.works()


@pytest.mark.parametrize("misuse", [*MISUSES.values()], ids=MISUSES)
def test_a_reset_in_the_middle_of_it_forgets_it(driver: Driver, misuse: Misuse) -> None:
    bring_to(driver, misuse.when)
    misuse.does(driver)
    driver.write(MMIO.STATUS, 0)
    assert (driver.status, driver.interrupt_status, driver.line) == (0, 0, False)
    assert [queue.ready for queue in driver.queues] == [False, False]
    driver.works()


def test_accesses_that_straddle_the_end_of_the_registers_are_nobodys(driver: Driver) -> None:
    assert driver.is_claimed(0xFFC, 4)
    assert [driver.is_claimed(0xFFC, 8), driver.is_claimed(0xFFE, 4), driver.is_claimed(0x1000, 4)] == [False] * 3


@pytest.mark.parametrize("bit", [0x10, 0x20, 0x40, 0x100, 0x80000000], ids=hex)
def test_status_bits_that_are_not_the_drivers_stay_as_they_are(driver: Driver, bit: int) -> None:
    driver.go_live()
    driver.write(MMIO.STATUS, LIVE | bit)
    assert driver.status == LIVE
    works_without_a_reset(driver)


def test_a_queue_without_addresses_lies_at_address_0_and_harms_nobody(driver: Driver) -> None:
    """Memory begins there, so that these are addresses like any others; all three parts overlap."""
    driver.negotiate()
    for queue in (RECEIVE, TRANSMIT):
        writes((MMIO.QUEUE_SEL, queue), (MMIO.QUEUE_NUM, 4), (MMIO.QUEUE_READY, 1))(driver)
    driver.write(MMIO.STATUS, LIVE)
    driver.type(b"typed")
    for value in range(0x100):
        driver.poke(0, bytes([value, 1, value & 7]) * 40)
        notifies(0, 1)(driver)
    assert driver.status in (LIVE, BROKEN)
    driver.works()


@both_queues
def test_rings_that_overlap_their_buffers_harm_nobody(driver: Driver, index: int) -> None:
    """The device writes over the descriptors that it is about to read."""
    driver.go_live(size=N)
    queue = driver.queue(index)
    flag = DESC.WRITE if index == RECEIVE else 0
    for i, gpa in enumerate((queue.descriptor_gpa, queue.driver_gpa, queue.device_gpa)):
        queue.describe(i, gpa, 16 * N, flag)
    queue.offer(0, 1, 2, 0, 1, 2)
    queue.notify()
    driver.type(bytes(range(256)) * 8)
    queue.notify()
    assert driver.status in (LIVE, BROKEN)
    driver.works()


# ---- what changes while the device reads it ----


def halves(gpa: int, size: int, flags: int = 0, following: int = 0) -> tuple[bytes, bytes]:
    whole = descriptor(gpa, size, flags, following)
    return whole[:8], whole[8:]


class Change(NamedTuple):
    """A descriptor that is good when the device looks at it first, and what one half of it is from then on."""

    half: int  # 0: addr, 1: len, flags, next
    becomes: bytes


END = MEMORY_END - 4  # where a good buffer of 4 bytes lies: one byte more is outside
CHANGES = {
    "longer": Change(1, halves(END, 0x1000)[1]),
    "longer, and writable": Change(1, halves(END, 0x1000, DESC.WRITE)[1]),
    "of 4 GiB": Change(1, halves(END, 0xFFFFFFFF)[1]),
    "empty": Change(1, halves(END, 0)[1]),
    "outside": Change(0, halves(MEMORY_END, 4)[0]),
    "far outside": Change(0, halves(TOP - 2, 4)[0]),
    "indirect": Change(1, halves(END, 0x1000, INDIRECT)[1]),
    "a loop": Change(1, halves(END, 4, NEXT, 0)[1]),
    "followed by nothing": Change(1, halves(END, 4, NEXT, 0xFFFF)[1]),
}
ACCESSES_MAX = 12  # instructions that a device may take to read one of them, and some more
WHERE = ["in the queue's table", "in an indirect table", "referring to an indirect table"]


@both_queues
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_descriptor_that_changes_while_it_is_read_harms_nobody(
    driver: Driver, index: int, where: str, change: Change
) -> None:
    """It is read once, and what was read is checked and used."""
    queue = driver.queue(index)
    flag = DESC.WRITE if index == RECEIVE else 0
    table_gpa = driver.room(4096, align=4096)
    changing = table_gpa if where == "in an indirect table" else queue.descriptor_gpa
    for accesses in range(1, ACCESSES_MAX):
        driver.go_live(PLAIN | F.INDIRECT_DESC, size=N)
        driver.poke(table_gpa, descriptor(END, 4, flag))
        if where == "in the queue's table":
            queue.describe(0, END, 4, flag)
        else:
            queue.describe(0, table_gpa, 16, INDIRECT)
        queue.offer(0)
        driver.change(changing + 8 * change.half, change.becomes, accesses)
        driver.type(bytes(4096))
        queue.notify()
        driver.change_nothing()
        assert driver.status in (LIVE, BROKEN)
        if accesses == 1:
            assert driver.peek(changing + 8 * change.half, 8) == change.becomes, "it was looked at"
    driver.works()


@both_queues
def test_an_indirect_table_that_becomes_shorter_while_it_is_read_is_not_left(driver: Driver, index: int) -> None:
    """It lies at the very end of memory, and its entry leads to the next, which would be outside."""
    queue = driver.queue(index)
    table_gpa = MEMORY_END - 16
    driver.poke(table_gpa, descriptor(0x1000, 4, (DESC.WRITE if index == RECEIVE else 0) | NEXT, 1))
    for accesses in range(1, ACCESSES_MAX):
        driver.go_live(PLAIN | F.INDIRECT_DESC, size=N)
        queue.describe(0, table_gpa, 0x1000, INDIRECT)
        queue.offer(0)
        driver.change(queue.descriptor_gpa + 8, halves(0, 16, INDIRECT)[1], accesses)
        driver.type(bytes(4096))
        queue.notify()
        driver.change_nothing()
        assert driver.status == BROKEN
    driver.works()


@both_queues
@pytest.mark.parametrize("ring", [(0, N, 0, 0), (0, 0x8000, 0, 0), (1, 1, 0xFFFF, 0xFFFF), (0, 1, N, N)], ids=str)
def test_an_available_ring_that_changes_while_it_is_read_harms_nobody(
    driver: Driver, index: int, ring: tuple[int, ...]
) -> None:
    """Its flags, index and first two entries."""
    queue = driver.queue(index)
    becomes = b"".join(value.to_bytes(2, "little") for value in ring)
    for accesses in range(1, ACCESSES_MAX):
        driver.go_live(size=N)
        queue.offer(queue.chain(good_buffer(driver, index)), queue.chain(good_buffer(driver, index)))
        driver.change(queue.driver_gpa, becomes, accesses)
        driver.type(bytes(64))
        queue.notify()
        driver.change_nothing()
        assert driver.status in (LIVE, BROKEN)
        if accesses == 1:
            assert driver.peek(queue.driver_gpa, 8) == becomes, "it was looked at"
    driver.works()


# ---- all of it ----


def test_every_complaint_of_the_device_is_provoked_here() -> None:
    said = {offer.says for offer in OFFERS.values()} | {misuse.says for misuse in MISUSES.values()}
    said |= {
        *WRONG_WAY.values(),
        "the available index is ahead by more than the queue's size",
        "a chain has 4 GiB or more",
    }
    files = [ROOT / "vmm" / f"{name}.c" for name in ("virtio_mmio", "virtqueue", "virtio_console")]
    source = "".join(path.read_text() for path in files)
    calls = r'(?:ignore|virtio_misuse|virtio_break)\([^;]*?"([^"]+)"(?:\s*:\s*"([^"]+)")?\)'
    found = {text for pair in re.findall(calls, source) for text in pair if text}
    found |= set(re.findall(r'(?:return|wrong =) "([^"]+)"', source))
    # A console has a configuration space that can be written; devices of lessons need not.
    assert found - said == {"the configuration space is written, which it cannot be"}
