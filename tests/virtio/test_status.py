"""The status register: the steps of initialization, the error state, reset."""

from collections.abc import Callable

import pytest
from virtio.clauses import clause
from virtio.driver import (
    ACKNOWLEDGED,
    BROKEN,
    LIVE,
    NEGOTIATED,
    NO_ACCESS,
    PLAIN,
    QUEUE_GPA,
    QUEUE_SPACE,
    RECEIVE,
    TRANSMIT,
    Driver,
    Used,
)
from virtio.names import INT, MMIO, F, S


def offered_everywhere(driver: Driver) -> None:
    """A message, and room for input, which the device has not been notified of."""
    for queue, buffer in (
        (driver.queue(TRANSMIT), driver.readable(b"early")),
        (driver.queue(RECEIVE), driver.writable(9)),
    ):
        queue.offer(queue.chain(buffer))


def guard_everything(driver: Driver) -> None:
    """No byte of guest memory may be touched from now on."""
    driver.guard(0, len(driver.memory), NO_ACCESS)


def poke_around(driver: Driver) -> None:
    """All that makes a live device look at its queues, or send a notification."""
    for queue in driver.queues:
        queue.notify()
        driver.ring_doorbell(queue.index)
    driver.type(b"typed")
    driver.resize(100, 40)


def broken(driver: Driver) -> None:
    """A live device is told of a chain that does not exist."""
    driver.go_live()
    driver.queue(TRANSMIT).offer(77)
    driver.queue(TRANSMIT).notify()


@clause("Device Status Field", "the status starts out as 0")
def test_the_status_is_0_before_anything_is_written(driver: Driver) -> None:
    """VIRTIO 1.2 "Device Status Field"."""
    assert driver.status == 0


@clause("Device Status Field", "consume buffers before DRIVER_OK")
@pytest.mark.parametrize("status", [0, S.ACKNOWLEDGE, ACKNOWLEDGED, NEGOTIATED], ids=str)
def test_no_queue_is_touched_before_driver_ok(driver: Driver, status: int) -> None:
    """VIRTIO 1.2 "Device Status Field"."""
    driver.set_up()
    offered_everywhere(driver)
    if status != NEGOTIATED:  # the queues are still in memory, the device must not know of them
        driver.write(MMIO.STATUS, 0)
        driver.write(MMIO.STATUS, status)
    guard_everything(driver)
    poke_around(driver)
    assert (driver.output, driver.happened("virtio_chain")) == (b"", [])
    assert driver.status == status


@clause("Device Status Field", "send used buffer notifications before DRIVER_OK")
def test_no_notification_is_sent_before_driver_ok(driver: Driver) -> None:
    """VIRTIO 1.2 "Device Status Field"."""
    driver.set_up()
    offered_everywhere(driver)
    poke_around(driver)
    assert (driver.interrupts, driver.interrupt_status, driver.line) == ([], 0, False)


def test_what_was_offered_before_driver_ok_is_used_after_it(driver: Driver) -> None:
    driver.set_up()
    offered_everywhere(driver)
    driver.type(b"typed")
    driver.write(MMIO.STATUS, LIVE)
    for queue in driver.queues:
        queue.notify()
    assert driver.output == b"early"
    assert [queue.used() for queue in driver.queues] == [[Used(0, 5)], [Used(0, 0)]]


@clause("Device Status Field", "set DEVICE_NEEDS_RESET in an error state that a reset is needed for")
@clause("Device Status Field", "notify of a configuration change after setting DEVICE_NEEDS_RESET, if DRIVER_OK is set")
def test_a_live_device_that_breaks_needs_a_reset_and_says_so(driver: Driver) -> None:
    """VIRTIO 1.2 "Device Status Field"."""
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    queue.offer(queue.size)  # the head of no chain
    queue.notify()
    assert driver.status == BROKEN
    assert (driver.interrupts, driver.interrupt_status, driver.line) == (["config"], INT.CONFIG, True)
    driver.acknowledge_interrupt()
    assert not driver.line
    driver.works()


def test_a_device_that_breaks_before_driver_ok_needs_a_reset_and_sends_nothing(driver: Driver) -> None:
    driver.negotiate()
    driver.queue(TRANSMIT).configure(3)
    driver.queue(TRANSMIT).ready = True
    assert driver.status == NEGOTIATED | S.NEEDS_RESET
    assert (driver.interrupts, driver.line) == ([], False)
    driver.works()


def test_a_broken_device_touches_no_queue(driver: Driver) -> None:
    broken(driver)
    offered_everywhere(driver)
    driver.forget()
    guard_everything(driver)
    poke_around(driver)
    assert (driver.output, driver.happened("virtio_chain")) == (b"", [])


def test_a_broken_device_stays_broken_until_it_is_reset(driver: Driver) -> None:
    broken(driver)
    for status in (LIVE, BROKEN, BROKEN | S.FAILED, LIVE | S.FAILED):
        driver.write(MMIO.STATUS, status)
        assert driver.status & S.NEEDS_RESET
    driver.works()


def test_a_driver_that_gives_up_is_believed_and_may_begin_again(driver: Driver) -> None:
    driver.negotiate()
    driver.write(MMIO.STATUS, NEGOTIATED | S.FAILED)
    assert driver.status == NEGOTIATED | S.FAILED
    driver.works()


# ---- reset ----


def interrupting(driver: Driver) -> None:
    driver.go_live()
    driver.resize(1, 2)


MOMENTS: dict[str, Callable[[Driver], None]] = {
    "untouched": lambda _: None,
    "acknowledged": lambda driver: driver.write(MMIO.STATUS, S.ACKNOWLEDGE),
    "negotiated": lambda driver: driver.negotiate(),
    "set up": lambda driver: driver.set_up(),
    "live": lambda driver: driver.go_live(),
    "interrupting": interrupting,
    "broken": broken,
    "failed": lambda driver: driver.write(MMIO.STATUS, ACKNOWLEDGED | S.FAILED),
}


@clause("Device Reset", "reinitialize the status to 0")
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_reset_at_any_time_makes_the_status_0(driver: Driver, moment: Callable[[Driver], None]) -> None:
    """VIRTIO 1.2 "Device Reset"."""
    moment(driver)
    driver.write(MMIO.STATUS, 0)
    assert driver.status == 0
    driver.works()


@clause("Device Reset", "send notifications after a reset, until it is initialized again")
@clause("Device Reset", "touch the queues after a reset, until it is initialized again")
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_after_a_reset_no_queue_is_touched_and_nothing_is_sent(
    driver: Driver, moment: Callable[[Driver], None]
) -> None:
    """VIRTIO 1.2 "Device Reset"."""
    moment(driver)
    if driver.status & S.FEATURES_OK and driver.queue(TRANSMIT).size:
        offered_everywhere(driver)
    driver.write(MMIO.STATUS, 0)
    driver.forget()
    guard_everything(driver)
    poke_around(driver)
    assert (driver.interrupts, driver.interrupt_status, driver.line) == ([], 0, False)
    assert (driver.output, driver.happened("virtio_chain")) == (b"", [])


def test_features_of_before_a_reset_are_forgotten(driver: Driver) -> None:
    driver.go_live(PLAIN | F.EVENT_IDX)
    driver.write(MMIO.STATUS, 0)
    driver.write(MMIO.STATUS, ACKNOWLEDGED)
    driver.write(MMIO.STATUS, NEGOTIATED)
    assert driver.status == ACKNOWLEDGED, "nothing was accepted, not even VIRTIO_F_VERSION_1"


def test_the_addresses_of_before_a_reset_are_forgotten(driver: Driver) -> None:
    driver.go_live()
    driver.negotiate()
    driver.write(MMIO.QUEUE_SEL, TRANSMIT)
    driver.write(MMIO.QUEUE_READY, 1)
    assert "the queue's size is 0 or more than QueueNumMax" in driver.misuse
    assert not driver.queue(TRANSMIT).ready


def test_input_that_nobody_has_received_survives_a_reset(driver: Driver) -> None:
    driver.go_live()
    buffer = driver.writable(2)
    driver.queue(RECEIVE).send(buffer)
    driver.type(b"typed")
    assert driver.content(buffer) == b"ty"
    driver.go_live()
    rest = driver.writable(9)
    driver.queue(RECEIVE).send(rest)
    assert driver.content(rest)[:3] == b"ped"


def test_a_reset_finds_the_rings_at_their_beginning(driver: Driver) -> None:
    driver.go_live()
    for _ in range(5):
        driver.queue(TRANSMIT).send(driver.readable(b"."))
    driver.go_live(size=4)
    driver.forget()
    driver.queue(TRANSMIT).send(driver.readable(b"again"))
    assert (driver.output, driver.queue(TRANSMIT).used()) == (b"again", [Used(0, 0)])


def test_two_queues_do_not_share_pages(driver: Driver) -> None:
    """What the guards of these tests rely on."""
    first, second = driver.queues
    assert (first.descriptor_gpa, second.descriptor_gpa) == (QUEUE_GPA, QUEUE_GPA + QUEUE_SPACE)
