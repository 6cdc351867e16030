"""Split virtqueues: descriptors and the used ring."""

from collections.abc import Callable

import pytest
from virtio.clauses import clause
from virtio.driver import (
    ALL,
    LIVE,
    NO_ACCESS,
    PAGE,
    PLAIN,
    READ_ONLY,
    RECEIVE,
    TRANSMIT,
    Buffer,
    Driver,
    Queue,
    Used,
    descriptor,
)
from virtio.names import DESC, F

INDIRECT = PLAIN | F.INDIRECT_DESC
MESSAGE = bytes(range(97, 97 + 24))


def indirect_table(driver: Driver, buffers: list[Buffer], *, align: int = 16, spare: int = 0) -> Buffer:
    """A table of these buffers, in memory, that has some entries more than it needs."""
    entries = b""
    for i, buffer in enumerate(buffers):
        more = DESC.NEXT if i + 1 < len(buffers) else 0
        entries += descriptor(buffer.gpa, buffer.size, (DESC.WRITE if buffer.is_writable else 0) | more, i + 1)
    entries += descriptor(0xBAD << 52, 1) * spare
    table = driver.readable(entries)
    if align < 16:
        table = Buffer(driver.room(len(entries) + align) + align, len(entries), False)
        driver.poke(table.gpa, entries)
    return table


def send_indirect(queue: Queue, direct: list[Buffer], table: Buffer, flags: int = 0) -> None:
    """A chain of direct descriptors, and of the last one, which refers to a table."""
    head = queue.chain(*direct, table)
    queue.describe((head + len(direct)) % queue.size, table.gpa, table.size, DESC.INDIRECT | flags)
    queue.offer(head)
    queue.notify()


# ---- any arrangement ----

ARRANGEMENTS = [(24,), (1, 23), (23, 1), (8, 8, 8), (1, 2, 3, 4, 5, 9), (3,) * 8]


def parts_of(lengths: tuple[int, ...]) -> list[bytes]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [MESSAGE[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@clause("Split: Message Framing", "assume anything about the arrangement of descriptors")
@pytest.mark.parametrize("lengths", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("direct", [0, 1, 99], ids=["indirect", "one, then indirect", "direct"])
def test_a_message_may_be_split_over_descriptors_in_any_way(
    driver: Driver, lengths: tuple[int, ...], direct: int
) -> None:
    """VIRTIO 1.2 "Split: Message Framing"."""
    driver.go_live(INDIRECT)
    queue = driver.queue(TRANSMIT)
    buffers = [driver.readable(part) for part in parts_of(lengths)]
    if direct < len(buffers):
        send_indirect(queue, buffers[:direct], indirect_table(driver, buffers[direct:]))
    else:
        queue.send(*buffers)
    assert (driver.output, queue.used()) == (MESSAGE, [Used(0, 0)])


@clause("Split: Message Framing", "assume anything about the arrangement of descriptors")
@pytest.mark.parametrize("lengths", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("direct", [0, 1, 99], ids=["indirect", "one, then indirect", "direct"])
def test_input_may_be_split_over_descriptors_in_any_way(driver: Driver, lengths: tuple[int, ...], direct: int) -> None:
    """VIRTIO 1.2 "Split: Message Framing"."""
    driver.go_live(INDIRECT)
    queue = driver.queue(RECEIVE)
    buffers = [driver.writable(length) for length in lengths]
    if direct < len(buffers):
        send_indirect(queue, buffers[:direct], indirect_table(driver, buffers[direct:]))
    else:
        queue.send(*buffers)
    driver.type(MESSAGE)
    assert (driver.content(*buffers), queue.used()) == (MESSAGE, [Used(0, 24)])


@clause("Split: Message Framing", "assume anything about the arrangement of descriptors")
@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=["upwards", "downwards", "criss-cross"]
)
def test_the_descriptors_of_a_chain_may_lie_anywhere_in_the_table(driver: Driver, order: tuple[int, ...]) -> None:
    """VIRTIO 1.2 "Split: Message Framing"."""
    driver.go_live(size=4)
    queue = driver.queue(TRANSMIT)
    for place, index in enumerate(order):
        buffer = driver.readable(b"%d" % place)
        is_last = place == len(order) - 1
        queue.describe(index, buffer.gpa, buffer.size, 0 if is_last else DESC.NEXT, 99 if is_last else order[place + 1])
    queue.offer(order[0])
    queue.notify()
    assert (driver.output, queue.used()) == (b"0123", [Used(order[0], 0)])


@clause("Split: Message Framing", "assume anything about the arrangement of descriptors")
def test_buffers_may_lie_at_any_address_to_the_last_byte(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: Message Framing"."""
    driver.go_live()
    end = len(driver.memory)
    driver.poke(0, b"first")
    driver.poke(end - 5, b" last")
    driver.queue(TRANSMIT).send(Buffer(0, 5, False), Buffer(end - 5, 5, False))
    assert driver.output == b"first last"


# ---- who writes where ----


def page_of(driver: Driver, size: int = PAGE) -> int:
    return driver.room(size, align=PAGE)


@clause("Split: The Virtqueue Descriptor Table", "write to a device-readable buffer")
def test_no_device_readable_buffer_is_written_to(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: The Virtqueue Descriptor Table"."""
    driver.go_live(ALL)
    gpa = page_of(driver)
    driver.poke(gpa, b"r" * PAGE)
    driver.guard(gpa, PAGE, READ_ONLY)
    driver.queue(TRANSMIT).send(Buffer(gpa, PAGE, False))
    assert driver.output == b"r" * PAGE
    # Nor where it has no business to be.
    driver.queue(RECEIVE).send(Buffer(gpa, PAGE, False))
    driver.type(b"typed")
    assert driver.misuse == ["a buffer to receive into is readable"]


@clause("Split: The Virtqueue Descriptor Table", "read a device-writable buffer")
def test_what_stands_in_a_device_writable_buffer_is_not_put_out(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: The Virtqueue Descriptor Table"."""
    driver.go_live()
    driver.queue(TRANSMIT).send(driver.readable(b"mine"), driver.writable(6, b"s"))
    assert b"s" not in driver.output
    assert driver.misuse == ["a buffer to transmit is writable"]


@clause("Split: The Virtqueue Descriptor Table", "write to any entry of a descriptor table")
@pytest.mark.parametrize("features", [PLAIN, ALL], ids=str)
def test_descriptor_tables_and_the_available_ring_are_never_written_to(driver: Driver, features: int) -> None:
    """VIRTIO 1.2 "Split: The Virtqueue Descriptor Table"."""
    driver.go_live(features)
    transmit, receive = driver.queue(TRANSMIT), driver.queue(RECEIVE)
    out, room = driver.readable(b"out"), driver.writable(8)
    transmit.offer(transmit.chain(out))
    receive.offer(receive.chain(room))
    pages = [gpa for queue in driver.queues for gpa in (queue.descriptor_gpa, queue.driver_gpa)]
    if features & F.INDIRECT_DESC:
        tables = page_of(driver)
        for queue, buffer, gpa in ((transmit, out, tables), (receive, room, tables + 16)):
            driver.poke(gpa, descriptor(buffer.gpa, buffer.size, DESC.WRITE if buffer.is_writable else 0))
            queue.describe(0, gpa, 16, DESC.INDIRECT)
        pages.append(tables)
    for gpa in pages:
        driver.guard(gpa, PAGE, READ_ONLY)
    transmit.notify()
    receive.notify()
    driver.type(b"typed")
    assert (driver.output, driver.content(room)[:5]) == (b"out", b"typed")


def test_a_write_to_a_guarded_page_is_seen(driver: Driver) -> None:
    """So that the tests above can fail: the used ring is the device's to write."""
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    driver.guard(queue.device_gpa, PAGE, READ_ONLY)
    with driver.dies_at(queue.device_gpa, queue.device_gpa + PAGE):
        queue.send(driver.readable(b"out"))


def test_a_read_of_a_guarded_page_is_seen(driver: Driver) -> None:
    """So that the tests above can fail: the descriptor table is the device's to read."""
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    queue.offer(queue.chain(driver.readable(b"out")))
    driver.guard(queue.descriptor_gpa, PAGE, NO_ACCESS)
    with driver.dies_at(queue.descriptor_gpa, queue.descriptor_gpa + 15):
        queue.notify()


# ---- indirect descriptors ----


@clause("Split: Indirect Descriptors", "ignore the write-only flag of the descriptor that refers to an indirect table")
@pytest.mark.parametrize("flags", [0, DESC.WRITE], ids=["clear", "set"])
def test_the_write_flag_of_an_indirect_descriptor_means_nothing(driver: Driver, flags: int) -> None:
    """VIRTIO 1.2 "Split: Indirect Descriptors"."""
    driver.go_live(INDIRECT)
    send_indirect(driver.queue(TRANSMIT), [], indirect_table(driver, [driver.readable(b"out")]), flags)
    room = driver.writable(4)
    send_indirect(driver.queue(RECEIVE), [], indirect_table(driver, [room]), flags)
    driver.type(b"in")
    assert (driver.output, driver.content(room), driver.misuse) == (b"out", b"in\xee\xee", [])


@clause("Split: Indirect Descriptors", "handle zero or more chained descriptors, followed by one that is indirect")
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_an_indirect_descriptor_may_end_a_chain(driver: Driver, count: int) -> None:
    """VIRTIO 1.2 "Split: Indirect Descriptors"."""
    driver.go_live(INDIRECT)
    direct = [driver.readable(b"%d" % i) for i in range(count)]
    table = indirect_table(driver, [driver.readable(b"a"), driver.readable(b"b")])
    send_indirect(driver.queue(TRANSMIT), direct, table)
    assert driver.output == b"01234"[:count] + b"ab"
    assert (driver.queue(TRANSMIT).used(), driver.misuse) == ([Used(0, 0)], [])


@pytest.mark.parametrize("align", [1, 2, 4, 8])
def test_an_indirect_table_may_have_any_address(driver: Driver, align: int) -> None:
    driver.go_live(INDIRECT)
    table = indirect_table(driver, [driver.readable(b"un"), driver.readable(b"aligned")], align=align)
    assert table.gpa % 16 == align
    send_indirect(driver.queue(TRANSMIT), [], table)
    assert (driver.output, driver.misuse) == (b"unaligned", [])


def test_the_entries_of_an_indirect_table_may_be_linked_in_any_order(driver: Driver) -> None:
    driver.go_live(INDIRECT)
    a, b, c = (driver.readable(text) for text in (b"a", b"b", b"c"))
    entries = descriptor(a.gpa, 1, DESC.NEXT, 2) + descriptor(c.gpa, 1) + descriptor(b.gpa, 1, DESC.NEXT, 1)
    send_indirect(driver.queue(TRANSMIT), [], driver.readable(entries))
    assert (driver.output, driver.misuse) == (b"abc", [])


@pytest.mark.parametrize("spare", [1, 5, 6, 100])
def test_an_indirect_table_may_have_more_entries_than_the_chain(driver: Driver, spare: int) -> None:
    """Only the chain must not be longer than the queue: VIRTIO 1.2 "Split: Indirect Descriptors", the driver's part."""
    driver.go_live(INDIRECT, size=8)
    table = indirect_table(driver, [driver.readable(b"a"), driver.readable(b"b")], spare=spare)
    send_indirect(driver.queue(TRANSMIT), [], table)
    assert (driver.output, driver.misuse) == (b"ab", [])


@pytest.mark.parametrize("features", [PLAIN, INDIRECT], ids=["direct", "indirect"])
def test_a_chain_may_be_as_long_as_the_queue(driver: Driver, features: int) -> None:
    driver.go_live(features, size=8)
    queue = driver.queue(TRANSMIT)
    buffers = [driver.readable(b"%d" % i) for i in range(8)]
    if features == INDIRECT:
        send_indirect(queue, [], indirect_table(driver, buffers))
    else:
        queue.send(*buffers)
    assert (driver.output, driver.misuse) == (b"01234567", [])


# ---- the used ring ----


def with_split_used_ring(driver: Driver, queue: Queue) -> tuple[int, int]:
    """A live device whose used ring has flags and index at the end of one page and the elements in the next. The event
    index says where notifications are wanted, so that nothing is written to flags."""
    index_page = page_of(driver, 2 * PAGE)
    queue.place(queue.descriptor_gpa, queue.driver_gpa, index_page + PAGE - 4)
    driver.go_live(PLAIN | F.EVENT_IDX)
    return index_page, index_page + PAGE


@clause("Split: The Virtqueue Used Ring", "set len before it updates the used index")
def test_the_element_is_written_before_the_index(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: The Virtqueue Used Ring"."""
    queue = driver.queue(TRANSMIT)
    _, element_page = with_split_used_ring(driver, queue)
    queue.offer(queue.chain(driver.readable(b"out")))
    driver.guard(element_page, PAGE, READ_ONLY)
    with driver.dies_at(element_page, element_page + 7):
        queue.notify()
    assert queue.used_index == 0


@clause("Split: The Virtqueue Used Ring", "set len before it updates the used index")
@clause(
    "Split: The Virtqueue Used Ring",
    "write at least len bytes, from the first device-writable buffer on, before it updates the used index",
)
def test_at_the_write_of_the_index_all_else_is_there(driver: Driver) -> None:
    """VIRTIO 1.2 "Split: The Virtqueue Used Ring"."""
    queue = driver.queue(RECEIVE)
    index_page, element_page = with_split_used_ring(driver, queue)
    buffers = [driver.writable(size) for size in (3, 1, 40)]
    head = queue.chain(driver.writable(1))  # so that the head is no 0
    head = queue.chain(*buffers)
    queue.offer(head)
    queue.notify()
    driver.guard(index_page, PAGE, READ_ONLY)
    with driver.dies_at(queue.device_gpa + 2):
        driver.type(MESSAGE)
    assert driver.peek(element_page, 8) == (1).to_bytes(4, "little") + len(MESSAGE).to_bytes(4, "little")
    assert driver.content(*buffers) == MESSAGE + b"\xee" * 20


@clause(
    "Split: The Virtqueue Used Ring",
    "write at least len bytes, from the first device-writable buffer on, before it updates the used index",
)
@pytest.mark.parametrize("length", [1, 5, 6, 7, 11, 12, 13, 40])
def test_len_bytes_are_written_from_the_first_writable_one_on(driver: Driver, length: int) -> None:
    """VIRTIO 1.2 "Split: The Virtqueue Used Ring"."""
    driver.go_live()
    queue = driver.queue(RECEIVE)
    keys = bytes(range(65, 65 + length))
    chains = [[driver.writable(6), driver.writable(6)], [driver.writable(64)]]
    for chain in chains:
        queue.send(*chain)
    driver.type(keys)
    used = queue.used()
    assert sum(entry.length for entry in used) == length
    written = [driver.content(*chain)[: entry.length] for chain, entry in zip(chains, used, strict=False)]
    assert b"".join(written) == keys
    assert [entry.length for entry in used] == [part for part in (min(length, 12), length - 12) if part > 0]


def test_indexes_run_past_65535(driver: Driver) -> None:
    driver.go_live(size=256)
    queue = driver.queue(TRANSMIT)
    head = queue.chain(driver.readable(b"."))
    for _ in range(65536 // 256 + 2):
        driver.forget()
        queue.offer(*[head] * 256)
        queue.notify()
        assert driver.output == b"." * 256
    assert queue.used_index == queue.available == 512
    assert (driver.status, driver.misuse) == (LIVE, [])


def test_more_than_a_queue_full_of_input_is_spread_over_all_that_is_offered(driver: Driver) -> None:
    driver.go_live(size=4)
    queue = driver.queue(RECEIVE)
    buffers = [driver.writable(2) for _ in range(4)]
    queue.offer(*[queue.chain(buffer) for buffer in buffers])
    queue.notify()
    driver.type(b"abcdefghijk")
    assert (driver.content(*buffers), [used.length for used in queue.used()]) == (b"abcdefgh", [2, 2, 2, 2])


def test_what_was_used_before_the_chain_that_breaks_the_device_is_notified(driver: Driver) -> None:
    """Without that, a driver that waits for its first buffer would not see that it is done."""
    good: Callable[[], Buffer] = lambda: driver.readable(b"good")  # noqa: E731
    driver.go_live()
    queue = driver.queue(TRANSMIT)
    queue.offer(queue.chain(good()), queue.chain(driver.writable(4)), queue.chain(good()))
    queue.notify()
    assert (driver.output, queue.used()) == (b"good", [Used(0, 0)])
    assert sorted(driver.interrupts) == ["config", "used"]
