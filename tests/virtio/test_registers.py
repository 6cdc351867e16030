"""The registers of the MMIO transport."""

from collections.abc import Callable

import pytest
from virtio.clauses import clause
from virtio.driver import BUFFERS_GPA, LIVE, NO_ACCESS, RECEIVE, SIZE_MAX, TRANSMIT, Driver, Used
from virtio.names import INT, MMIO, F

GIB = 1 << 30


@clause("MMIO Device Register Layout", "return 0x74726976 in MagicValue")
@clause("MMIO Device Register Layout", "return 2 in Version")
@clause("Console Device: Device ID", "the device id is 3")
def test_the_device_says_what_it_is(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout" and "Console Device: Device ID"."""
    registers = (MMIO.MAGIC_VALUE, MMIO.VERSION, MMIO.DEVICE_ID)
    assert [driver.read(register) for register in registers] == [0x74726976, 2, 3]
    driver.go_live()
    assert [driver.read(register) for register in registers] == [0x74726976, 2, 3]


# ---- interrupts ----


def use_a_buffer(driver: Driver) -> None:
    driver.queue(TRANSMIT).send(driver.readable(b"."))


def change_the_configuration(driver: Driver) -> None:
    driver.resize(90, 30)


EVENTS: dict[INT, Callable[[Driver], None]] = {INT.VRING: use_a_buffer, INT.CONFIG: change_the_configuration}


@clause("MMIO Device Register Layout", "present each event in InterruptStatus until the driver acknowledges it")
@clause("MMIO Device Register Layout", "leave bits of InterruptStatus zero that stand for no event that took place")
@clause("Notifications From The Device", "the interrupt is asserted while a bit of InterruptStatus is set")
@pytest.mark.parametrize(("cause", "event"), EVENTS.items(), ids=["used", "config"])
def test_an_event_is_shown_and_the_line_is_high_until_it_is_acknowledged(
    driver: Driver, cause: INT, event: Callable[[Driver], None]
) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout" and "Notifications From The Device"."""
    driver.go_live()
    assert (driver.interrupt_status, driver.line) == (0, False)
    for _ in range(2):
        event(driver)
        other = (INT.VRING | INT.CONFIG) & ~cause
        for acknowledged in (0, other):
            driver.write(MMIO.INTERRUPT_ACK, acknowledged)
            assert (driver.interrupt_status, driver.line) == (cause, True)
        driver.write(MMIO.INTERRUPT_ACK, cause)
        assert (driver.interrupt_status, driver.line) == (0, False)


@clause("MMIO Device Register Layout", "present each event in InterruptStatus until the driver acknowledges it")
@clause("Notifications From The Device", "the interrupt is asserted while a bit of InterruptStatus is set")
def test_the_line_falls_when_the_last_of_two_events_is_acknowledged(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout" and "Notifications From The Device"."""
    driver.go_live()
    for event in EVENTS.values():
        event(driver)
    for acknowledged, left in ((INT.VRING, INT.CONFIG), (INT.VRING, INT.CONFIG), (INT.CONFIG, 0)):
        driver.write(MMIO.INTERRUPT_ACK, acknowledged)
        assert (driver.interrupt_status, driver.line) == (left, left != 0)


@clause("MMIO Device Register Layout", "clear InterruptStatus upon reset")
@clause("MMIO Device Register Layout", "clear QueueReady of all queues upon reset")
def test_a_reset_clears_interrupt_status_and_queue_ready(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    driver.go_live()
    for event in EVENTS.values():
        event(driver)
    assert (driver.interrupt_status, driver.line) == (INT.VRING | INT.CONFIG, True)
    assert [queue.ready for queue in driver.queues] == [True, True]
    driver.write(MMIO.STATUS, 0)
    assert (driver.interrupt_status, driver.line) == (0, False)
    assert [queue.ready for queue in driver.queues] == [False, False]


# ---- the configuration space ----


@clause("MMIO Device Register Layout", "change ConfigGeneration if a driver might see an inconsistent configuration")
@clause("MMIO Device Register Layout", "ConfigGeneration stays while the configuration stays")
@pytest.mark.parametrize("is_live", [False, True], ids=["untouched", "live"])
def test_the_generation_changes_with_the_configuration_and_only_then(driver: Driver, is_live: bool) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    if is_live:
        driver.go_live()
    seen = set()
    for columns in range(300):
        generation = driver.read(MMIO.CONFIG_GENERATION)
        seen.add(generation)
        assert driver.read(MMIO.CONFIG, 2) in (80, columns + 99)
        if is_live:
            use_a_buffer(driver)
        assert driver.read(MMIO.CONFIG_GENERATION) == generation
        driver.resize(columns + 100, 25)
    assert len(seen) == 300


@clause("Notification of Device Configuration Changes", "a configuration change that the device makes is notified")
def test_another_size_of_the_terminal_is_notified(driver: Driver) -> None:
    """VIRTIO 1.2 "Notification of Device Configuration Changes"."""
    driver.go_live()
    driver.resize(132, 43)
    assert (driver.interrupts, driver.interrupt_status, driver.line) == (["config"], INT.CONFIG, True)
    assert [driver.read(MMIO.CONFIG + offset, 2) for offset in (0, 2)] == [132, 43]


@clause(
    "MMIO Device Register Layout",
    "the configuration space is accessed in 8, 16 and 32 bits, by the width of its fields",
)
@clause("Device Configuration Space", "fields of more than one byte are little-endian")
def test_the_configuration_is_little_endian_in_every_width(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout" and "Device Configuration Space"."""
    driver.resize(0x1234, 0x5678)
    assert [driver.read(MMIO.CONFIG + offset, 1) for offset in range(4)] == [0x34, 0x12, 0x78, 0x56]
    assert [driver.read(MMIO.CONFIG + offset, 2) for offset in (0, 2)] == [0x1234, 0x5678]
    assert driver.read(MMIO.CONFIG, 4) == 0x56781234
    assert driver.misuse == []


# ---- queues ----


@clause("MMIO Device Register Layout", "QueueSel selects the queue; QueueNumMax of one that is not available is 0")
@clause(
    "Console Device: Virtqueues",
    "without VIRTIO_CONSOLE_F_MULTIPORT there are the queues 0, receiveq, and 1, transmitq, and no other",
)
def test_there_are_two_queues(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout" and "Console Device: Virtqueues"."""
    sizes = {}
    for queue in (0, 1, 2, 3, 4, 0x10000, 0xFFFFFFFF):
        driver.write(MMIO.QUEUE_SEL, queue)
        sizes[queue] = driver.read(MMIO.QUEUE_NUM_MAX)
        assert driver.read(MMIO.QUEUE_READY) == 0
    assert sizes == {0: SIZE_MAX, 1: SIZE_MAX} | dict.fromkeys((2, 3, 4, 0x10000, 0xFFFFFFFF), 0)


@clause("MMIO Device Register Layout", "QueueReady reads as it was last written")
@clause("MMIO Device Register Layout", "QueueSel selects the queue; QueueNumMax of one that is not available is 0")
def test_queue_ready_is_of_the_selected_queue_and_reads_as_written(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    driver.set_up()
    first, second = driver.queues
    for values in ((True, True), (False, True), (False, False), (True, False), (True, True)):
        for queue, value in zip(driver.queues, values, strict=True):
            if queue.ready != value:
                queue.ready = value
        assert (first.ready, second.ready) == values
    assert driver.misuse == []


@pytest.mark.parametrize("size", [1, 2, 4, 128, SIZE_MAX])
def test_a_queue_may_have_any_power_of_two_as_its_size(driver: Driver, size: int) -> None:
    driver.go_live(size=size)
    for _ in range(2 * size + 1):
        driver.queue(TRANSMIT).send(driver.readable(b"."))
    assert driver.output == b"." * (2 * size + 1)
    assert driver.misuse == []


@clause("MMIO Device Register Layout", "QueueDesc, QueueDriver and QueueDevice are addresses of 64 bits, in two halves")
@pytest.mark.parametrize("part", ["descriptor_gpa", "driver_gpa", "device_gpa"])
def test_the_upper_half_of_an_address_counts(driver: Driver, part: str) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    driver.negotiate()
    queue = driver.queue(TRANSMIT)
    setattr(queue, part, getattr(queue, part) + (1 << 32))
    queue.configure(8)
    queue.ready = True
    assert (queue.ready, driver.misuse) == (False, ["an area of the queue is not in memory"])


def test_parts_of_a_queue_may_lie_anywhere_in_memory_by_their_own_alignment(driver: Driver) -> None:
    queue = driver.queue(TRANSMIT)
    queue.place(len(driver.memory) - 16 * 4, BUFFERS_GPA - 6 - 8, 4)
    driver.go_live(size=4)
    queue.send(driver.readable(b"anywhere"))
    assert (driver.output, queue.used(), driver.misuse) == (b"anywhere", [Used(0, 0)], [])


@clause("MMIO Device Register Layout", "access the contents of a queue while QueueReady is 0")
def test_no_queue_is_touched_that_is_not_ready(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    driver.go_live()
    driver.queue(RECEIVE).send(driver.writable(3))  # the device looks at its input from now on
    for queue, buffer in zip(driver.queues, (driver.writable(9), driver.readable(b"no")), strict=True):
        queue.offer(queue.chain(buffer))
        queue.ready = False
    driver.guard(0, len(driver.memory), NO_ACCESS)
    for queue in driver.queues:
        queue.notify()
        driver.ring_doorbell(queue.index)
    driver.type(b"typed")
    assert (driver.status, driver.output, driver.happened("virtio_chain")) == (LIVE, b"", [])


def test_a_queue_that_was_stopped_may_be_created_again(driver: Driver) -> None:
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    queue.send(driver.readable(b"before "))
    queue.ready = False
    queue.create(4)
    queue.send(driver.readable(b"after"))
    assert (driver.output, queue.used(), driver.misuse) == (b"before after", [Used(0, 0)], [])


# ---- notification ----


@clause(
    "Available Buffer Notifications",
    "without VIRTIO_F_NOTIFICATION_DATA, QueueNotify is written with the index of the queue",
)
@pytest.mark.parametrize("by", ["exit", "ioeventfd"])
def test_a_notification_is_of_the_queue_whose_index_is_written(driver: Driver, by: str) -> None:
    """VIRTIO 1.2 "Available Buffer Notifications"."""
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    queue.offer(queue.chain(driver.readable(b"kick")))

    def notify(index: int) -> None:
        if by == "exit":
            driver.write(MMIO.QUEUE_NOTIFY, index)
        else:
            assert driver.ring_doorbell(index)

    notify(RECEIVE)
    assert driver.output == b""
    notify(TRANSMIT)
    assert driver.output == b"kick"
    assert [(event["queue"], event["by"]) for event in driver.happened("virtio_notify")] == [
        (RECEIVE, by),
        (TRANSMIT, by),
    ]


def test_there_is_a_doorbell_for_each_queue_and_no_other(driver: Driver) -> None:
    driver.go_live()
    assert [driver.ring_doorbell(value) for value in (0, 1, 2, 0x10000, 0x10001)] == [True, True, False, False, False]


# ---- what is not there ----


@clause("MMIO Device Register Layout", "a shared memory region that does not exist has the length -1")
def test_there_is_no_shared_memory(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    for region in (0, 1, 255):
        driver.write(MMIO.SHM_SEL, region)
        registers = (MMIO.SHM_LEN_LOW, MMIO.SHM_LEN_HIGH, MMIO.SHM_BASE_LOW, MMIO.SHM_BASE_HIGH)
        assert [driver.read(register) for register in registers] == [0xFFFFFFFF] * 4
    assert driver.misuse == []


def test_memory_of_3_gib_is_all_the_devices(drivers: Callable[..., Driver]) -> None:
    driver = drivers(memory_size=3 * GIB)
    driver.queue(TRANSMIT).place(3 * GIB - 0x10000)
    driver.go_live(F.VERSION_1 | F.INDIRECT_DESC)
    buffer = driver.readable(b"above 2 GiB")
    driver.poke(3 * GIB - 0x20000, driver.content(buffer))
    driver.queue(TRANSMIT).send(buffer._replace(gpa=3 * GIB - 0x20000))
    assert driver.output == b"above 2 GiB"
