"""What the console does with what it gets."""

from collections.abc import Callable

import pytest
from virtio.clauses import clause
from virtio.driver import ACKNOWLEDGED, ALL, LIVE, NEGOTIATED, PLAIN, RECEIVE, TRANSMIT, Driver, Used
from virtio.names import MMIO, F, S

EMERG_WRITE = MMIO.CONFIG + 8
PIPE_SIZE = 65536


@clause("Console Device: Device Operation", "the characters in a buffer of the transmitq are the output")
@pytest.mark.parametrize("features", [PLAIN, ALL], ids=str)
def test_what_is_transmitted_is_the_output(driver: Driver, features: int) -> None:
    """VIRTIO 1.2 "Console Device: Device Operation"."""
    driver.go_live(features)
    queue = driver.queue(TRANSMIT)
    everything = bytes(range(256)) * 5
    queue.send(driver.readable(b"x"))
    queue.send(driver.readable(everything))
    queue.send(*[driver.readable(part) for part in (b"scattered ", b"and gathered", b"\n")])
    assert driver.output == b"x" + everything + b"scattered and gathered\n"
    assert queue.used() == [Used(0, 0), Used(1, 0), Used(2, 0)], "nothing is written to what is transmitted"


def test_what_is_transmitted_stays_in_its_order(driver: Driver) -> None:
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    heads = [queue.chain(driver.readable(b"%d" % i)) for i in range(8)]
    order = [3, 1, 4, 0, 5, 2, 6, 7]
    queue.offer(*[heads[i] for i in order])
    queue.notify()
    assert driver.output == b"31405267"
    assert [used.id for used in queue.used()] == order


@clause("Console Device: Device Operation", "the input comes in buffers of the receiveq, with a notification")
@pytest.mark.parametrize("features", [PLAIN, ALL], ids=str)
def test_input_comes_in_the_buffers_of_the_receiveq(driver: Driver, features: int) -> None:
    """VIRTIO 1.2 "Console Device: Device Operation"."""
    driver.go_live(features)
    queue = driver.queue(RECEIVE)
    buffer = driver.writable(16)
    queue.send(buffer)
    assert (driver.interrupts, queue.used()) == ([], [])
    driver.type(b"keys")
    assert driver.content(buffer) == b"keys" + b"\xee" * 12, "and what lies behind them is untouched"
    assert (driver.interrupts, driver.line, queue.used()) == (["used"], True, [Used(0, 4)])


def test_input_that_no_buffer_is_there_for_waits(driver: Driver) -> None:
    driver.go_live()
    queue = driver.queue(RECEIVE)
    driver.type(b"before any buffer, ")
    first = driver.writable(10)
    queue.send(first)
    assert (driver.content(first), queue.used()) == (b"before any", [Used(0, 10)])
    rest = driver.writable(100)
    queue.send(rest)
    driver.type(b"and after")
    more = driver.writable(100)
    queue.send(more)
    assert [used.length for used in queue.used()] == [9, 9]
    assert driver.content(rest)[:9] + driver.content(more)[:9] == b" buffer, and after"


def test_much_input_fills_one_buffer_after_the_other(driver: Driver) -> None:
    driver.go_live()
    queue = driver.queue(RECEIVE)
    keys = bytes(i * 7 % 256 for i in range(PIPE_SIZE))
    assert not driver.type(keys), "nobody wants it yet"
    seen = b""
    buffers = [driver.writable(500) for _ in range(8)]
    while len(seen) < len(keys):
        queue.offer(*[queue.chain(buffer) for buffer in buffers])
        queue.notify()
        used = queue.used()
        assert used, f"{len(keys) - len(seen)} bytes of input do not come"
        for buffer, (_, length) in zip(buffers, used, strict=False):
            seen += driver.content(buffer)[:length]
    assert seen == keys


def test_the_end_of_the_input_is_no_input(driver: Driver) -> None:
    driver.go_live()
    driver.queue(RECEIVE).send(driver.writable(16))
    driver.type(b"last")
    driver.queue(RECEIVE).send(driver.writable(16))
    driver.type_end()
    assert driver.queue(RECEIVE).used() == [Used(0, 4)]
    assert driver.status == LIVE


@clause(
    "Console Device: Device configuration layout",
    "cols and rows are the size of the console, if VIRTIO_CONSOLE_F_SIZE is offered",
)
@clause(
    "Device Configuration Space",
    "allow reading any field before FEATURES_OK, also one that belongs to an offered feature",
)
@pytest.mark.parametrize("status", [0, S.ACKNOWLEDGE, ACKNOWLEDGED, NEGOTIATED], ids=str)
def test_the_configuration_can_be_read_at_any_time(driver: Driver, status: int) -> None:
    """VIRTIO 1.2 "Console Device: Device configuration layout" and "Device Configuration Space"."""
    if status == NEGOTIATED:
        driver.negotiate(PLAIN)  # also without VIRTIO_CONSOLE_F_SIZE
    else:
        driver.write(MMIO.STATUS, status)
    fields = ((0, 2), (2, 2), (4, 4), (8, 4))
    seen = [driver.read(MMIO.CONFIG + offset, size) for offset, size in fields]
    assert seen == [80, 25, 1, 0], "where standard output is no terminal"
    assert driver.misuse == []


def broken(driver: Driver) -> None:
    driver.go_live()
    driver.queue(TRANSMIT).offer(99)
    driver.queue(TRANSMIT).notify()
    assert driver.status & S.NEEDS_RESET


CONFIGURED: dict[str, Callable[[Driver], None]] = {
    "untouched": lambda _: None,
    "acknowledged": lambda driver: driver.write(MMIO.STATUS, ACKNOWLEDGED),
    "without VIRTIO_CONSOLE_F_EMERG_WRITE": lambda driver: driver.negotiate(PLAIN),
    "live": lambda driver: driver.go_live(ALL),
    "given up": lambda driver: driver.write(MMIO.STATUS, ACKNOWLEDGED | S.FAILED),
    "broken": broken,
}


@clause("Console Device: Device Initialization", "allow a write to emerg_wr, even on an unconfigured device")
@clause("Console Device: Device Initialization", "put out the lower byte that is written to emerg_wr")
@pytest.mark.parametrize("configure", CONFIGURED.values(), ids=CONFIGURED)
def test_an_emergency_write_puts_out_the_lower_byte_at_any_time(
    driver: Driver, configure: Callable[[Driver], None]
) -> None:
    """VIRTIO 1.2 "Console Device: Device Initialization"."""
    configure(driver)
    driver.forget()
    for value in (0x21, 0xFFFFFF00 | 0x0A, 0x100, 0x12345641):
        driver.write(EMERG_WRITE, value)
    assert driver.output == b"!\n\0A"
    assert driver.misuse == []
    assert driver.read(EMERG_WRITE) == 0, "it is for writing"


def test_an_emergency_write_does_not_disturb_the_queues(driver: Driver) -> None:
    driver.go_live(ALL | F.EMERG_WRITE)
    queue = driver.queue(TRANSMIT)
    queue.offer(queue.chain(driver.readable(b"later")))
    driver.write(EMERG_WRITE, ord("!"))
    assert (driver.output, queue.used()) == (b"!", [])
    queue.notify()
    assert driver.output == b"!later"
