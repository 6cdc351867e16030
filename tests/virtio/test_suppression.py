"""Notifications that are not wanted: flags and event indexes of split virtqueues."""

from collections.abc import Callable

import pytest
from virtio.clauses import clause
from virtio.driver import ALL, PLAIN, RECEIVE, TRANSMIT, Driver, Queue
from virtio.names import AVAIL, INT, USED, F

SECTION = "Split: Used Buffer Notification Suppression"
AVAILABLE = "Split: Available Buffer Notification Suppression"
EVENT_IDX = PLAIN | F.EVENT_IDX


def sent(driver: Driver, count: int = 1) -> bool:
    """So many messages are transmitted with one notification. Is there an interrupt?"""
    driver.acknowledge_interrupt()
    driver.forget()
    queue = driver.queue(TRANSMIT)
    queue.offer(*[queue.chain(driver.readable(b".")) for _ in range(count)])
    queue.notify()
    assert driver.output == b"." * count
    assert driver.line == bool(driver.interrupts) == bool(driver.interrupt_status & INT.VRING)
    return driver.line


def received(driver: Driver) -> bool:
    """Input comes. Is there an interrupt?"""
    driver.acknowledge_interrupt()
    driver.forget()
    queue = driver.queue(RECEIVE)
    queue.send(driver.writable(3))
    driver.type(b"abc")
    assert len(queue.used()) == 1
    return driver.line


DIRECTIONS: dict[int, Callable[[Driver], bool]] = {TRANSMIT: sent, RECEIVE: received}
both_directions = pytest.mark.parametrize("index", DIRECTIONS, ids=["transmit", "receive"])


# ---- without VIRTIO_F_EVENT_IDX ----


@clause(SECTION, "without VIRTIO_F_EVENT_IDX: send a notification if flags is 0")
@clause(SECTION, "without VIRTIO_F_EVENT_IDX: send a notification if flags is 1")
@both_directions
def test_flags_decide_on_each_notification(driver: Driver, index: int) -> None:
    """VIRTIO 1.2 "Split: Used Buffer Notification Suppression"."""
    driver.go_live(PLAIN)
    for not_wanted in (False, True, True, False, True, False):
        driver.queue(index).wants_no_interrupt(not_wanted)
        assert DIRECTIONS[index](driver) is not not_wanted


@clause(SECTION, "without VIRTIO_F_EVENT_IDX: ignore used_event")
@both_directions
@pytest.mark.parametrize("distance", [-1, 0, 1, 100, 0x8000], ids=str)
def test_without_event_indexes_used_event_means_nothing(driver: Driver, index: int, distance: int) -> None:
    """VIRTIO 1.2 "Split: Used Buffer Notification Suppression"."""
    driver.go_live(PLAIN)
    queue = driver.queue(index)
    for not_wanted in (False, True, False):
        queue.wants_no_interrupt(not_wanted)
        queue.set_used_event((queue.used_index + distance) % 0x10000)
        assert DIRECTIONS[index](driver) is not not_wanted


def test_the_other_bits_of_flags_mean_nothing(driver: Driver) -> None:
    driver.go_live(PLAIN)
    driver.poke16(driver.queue(TRANSMIT).driver_gpa, 0xFFFF & ~AVAIL.NO_INTERRUPT)
    assert sent(driver)


# ---- with VIRTIO_F_EVENT_IDX ----


@clause(SECTION, "with VIRTIO_F_EVENT_IDX: send a notification if the used index was equal to used_event")
@clause(SECTION, "with VIRTIO_F_EVENT_IDX: send a notification otherwise")
@both_directions
def test_the_event_index_decides_on_each_notification(driver: Driver, index: int) -> None:
    """VIRTIO 1.2 "Split: Used Buffer Notification Suppression"."""
    driver.go_live(EVENT_IDX)
    queue = driver.queue(index)
    for distance in (0, 1, -1, 0, 2, 0x7FFF, 0x8000, -2, 0):
        queue.set_used_event((queue.used_index + distance) % 0x10000)
        assert DIRECTIONS[index](driver) is (distance == 0), f"used_event was {distance} ahead"


@clause(SECTION, "with VIRTIO_F_EVENT_IDX: send a notification if the used index was equal to used_event")
@clause(SECTION, "with VIRTIO_F_EVENT_IDX: send a notification otherwise")
@pytest.mark.parametrize("distance", [-1, 0, 1, 2, 3, 4])
def test_an_event_index_anywhere_in_a_batch_is_met(driver: Driver, distance: int) -> None:
    """VIRTIO 1.2 "Split: Used Buffer Notification Suppression"."""
    driver.go_live(EVENT_IDX)
    queue = driver.queue(TRANSMIT)
    sent(driver)
    queue.set_used_event((queue.used_index + distance) % 0x10000)
    assert sent(driver, 4) is (0 <= distance < 4)
    assert driver.interrupts == ["used"] * (0 <= distance < 4), "one for the batch"


@clause(SECTION, "with VIRTIO_F_EVENT_IDX: send a notification if the used index was equal to used_event")
def test_the_event_index_is_met_where_the_indexes_wrap(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: Used Buffer Notification Suppression"."""
    driver.go_live(EVENT_IDX, size=256)
    queue = driver.queue(TRANSMIT)
    queue.set_used_event(65535)
    head = queue.chain(driver.readable(b"."))
    for _ in range(255):
        queue.offer(*[head] * 256)
        queue.notify()
        driver.events = driver.happened("virtio_interrupt")
    assert driver.interrupts == []
    queue.offer(*[head] * 255)
    queue.notify()
    assert (queue.used_index, driver.interrupts) == (65535, [])
    for expected in (["used"], ["used"]):  # the one that makes it 0, and no other
        queue.offer(head)
        queue.notify()
        assert driver.interrupts == expected
    assert queue.used_index == 1


@clause(SECTION, "with VIRTIO_F_EVENT_IDX: ignore the lower bit of flags")
@both_directions
@pytest.mark.parametrize("flags", [0, AVAIL.NO_INTERRUPT], ids=["0", "1"])
def test_with_event_indexes_flags_mean_nothing(driver: Driver, index: int, flags: int) -> None:
    """VIRTIO 1.2 "Split: Used Buffer Notification Suppression"."""
    driver.go_live(EVENT_IDX)
    queue = driver.queue(index)
    driver.poke16(queue.driver_gpa, flags)
    for is_met in (True, False, True):
        queue.set_used_event(queue.used_index if is_met else (queue.used_index + 9) % 0x10000)
        assert DIRECTIONS[index](driver) is is_met


# ---- what the device wants to be notified of ----


def looks(driver: Driver) -> Callable[[], list[Queue]]:
    """Traffic on both queues, in several steps; each gives the queues as the device has left them."""

    def steps() -> list[Queue]:
        driver.queue(RECEIVE).send(driver.writable(2))
        sent(driver, 2)
        driver.type(b"typed")
        return driver.queues

    return steps


@clause(AVAILABLE, "without VIRTIO_F_EVENT_IDX: set flags to 0 or 1")
def test_without_event_indexes_the_used_flags_are_0_or_1(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: Available Buffer Notification Suppression"."""
    driver.go_live(PLAIN)
    step = looks(driver)
    for _ in range(6):
        for queue in step():
            assert queue.used_flags in (0, USED.NO_NOTIFY)


@clause(AVAILABLE, "with VIRTIO_F_EVENT_IDX: set flags to 0")
def test_with_event_indexes_the_used_flags_are_0(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: Available Buffer Notification Suppression"."""
    driver.go_live(EVENT_IDX)
    step = looks(driver)
    for _ in range(6):
        for queue in step():
            assert queue.used_flags == 0


def test_a_device_that_has_stopped_looking_asks_to_be_notified(driver: Driver) -> None:
    """Otherwise the next message would wait for ever."""
    driver.go_live(PLAIN)
    sent(driver, 3)
    assert driver.queue(TRANSMIT).used_flags == 0
    driver.go_live(EVENT_IDX)
    for _ in range(5):
        sent(driver, 3)
        assert driver.queue(TRANSMIT).avail_event == driver.queue(TRANSMIT).available


@pytest.mark.parametrize("features", [PLAIN, EVENT_IDX], ids=str)
def test_a_device_that_waits_for_room_asks_to_be_notified(driver: Driver, features: int) -> None:
    """There is input, and no buffer for it."""
    driver.go_live(features)
    queue = driver.queue(RECEIVE)
    queue.send(driver.writable(2))
    driver.type(b"abcdef")
    if features & F.EVENT_IDX:
        assert queue.avail_event == queue.available == 1
    else:
        assert queue.used_flags == 0
    rest = driver.writable(9)
    queue.send(rest)
    assert driver.content(rest)[:4] == b"cdef"


@pytest.mark.parametrize("features", [PLAIN, EVENT_IDX], ids=str)
def test_buffers_added_without_a_notification_that_is_not_wanted_are_found(driver: Driver, features: int) -> None:
    """A driver that obeys flags and avail_event stays silent; input must find its buffers all the same."""
    driver.go_live(features)
    queue = driver.queue(RECEIVE)
    first, second = driver.writable(2), driver.writable(8)
    queue.send(first)
    wanted = queue.avail_event == queue.available if features & F.EVENT_IDX else queue.used_flags == 0
    queue.offer(queue.chain(second))
    if wanted:
        queue.notify()
    driver.type(b"abcdef")
    assert driver.content(first, second)[:6] == b"abcdef"


@clause(AVAILABLE, "handle spurious notifications")
@pytest.mark.parametrize("features", [PLAIN, ALL], ids=str)
def test_spurious_notifications_change_nothing(driver: Driver, features: int) -> None:
    """VIRTIO 1.2 "Split: Available Buffer Notification Suppression"."""
    driver.go_live(features)
    sent(driver)
    driver.acknowledge_interrupt()
    before = driver.status
    driver.forget()
    for _ in range(20):
        for queue in driver.queues:
            queue.notify()
            driver.ring_doorbell(queue.index)
    assert (driver.status, driver.output, driver.misuse, driver.interrupts) == (before, b"", [], [])
    assert [queue.used_index for queue in driver.queues] == [0, 1]
    if features == PLAIN:
        assert sent(driver)
