"""The checks of lesson 10. In the window each access of the driver to its rings is an exit, so a model of the two rings
is led through them and knows at each what is in flight, what is free and what is used. On the device the
accesses of the host half are in the record, by the names of the fields. What arrives, and in which order it is used,
comes from the seed, as in lab.h."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

import pytest

from kvmlab import random
from kvmlab.events import Event
from kvmlab.expect import expect, fail, how_it_ended, require
from kvmlab.runner import Run

MASK = 0xFFFF
QUEUE_SIZE = 16
RECEIVE, TRANSMIT = range(2)
NO_CHAIN = 0xFFFF
NEXT, WRITE = 1, 2  # VRING_DESC_F_*
WINDOW_GPA, WINDOW_QUEUE_SIZE, AREA_SIZE = 0xD0100000, 0x3000, 0x1000
DESCRIPTORS, AVAILABLE, USED = range(3)  # areas
FLAGS, INDEX, ENTRIES = 0, 2, 4  # offsets in the rings
USED_EVENT = ENTRIES + 2 * QUEUE_SIZE
QUEUE_NOTIFY_GPA = 0xD0000050
COM1 = 0x3F8
MESSAGES_GPA, MESSAGE_PAGES, SEGMENTS_MAX, SEGMENT_BYTES_MAX = 0x800000, 8, 5, 48
STAGES = (
    *("layout", "kicks", "reap", "full", "listen"),
    *("messages", "order", "receive", "doze", "events", "counts", "broken", "reset", "again", "bulk"),
)
LAYOUT_SENT = 2
INPUTS = 8
BROKEN = {
    0: "a loop",
    1: "a next outside of the table",
    2: "a head outside of the table",
    3: "an address behind the end of memory",
    4: "a segment whose last byte lies behind the end of memory",
    5: "a segment whose end is 2^64 + 8",
    6: "a segment of 2^32 - 1 bytes",
    7: "a segment in the transmit queue that the device is to write into",
    8: "a segment in the receive queue that the device is to read",
    9: "an indirect descriptor, which was not agreed on",
    10: "an available index that has moved on by 17",
    11: "a chain of 17 descriptors: a loop that the driver ends when the device comes to the 17th",
}
LEGAL = {  # segments of each chain
    12: ([16], "a chain of all 16 descriptors"),
    13: ([2], "a segment that ends where memory ends"),
    14: ([1] * 16, "a ring with 16 chains, of one descriptor each"),
}
BLOCKS, BLOCK_SIZE, BLOCK_STEP = 16, 4096, 8
FEW = 4


# ---- what the seed asks for, as in lab.h ----


@dataclass
class Segment:
    gpa: int
    size: int


def message_number(stage: str, i: int) -> int:
    return 16 * STAGES.index(stage) + i


def segments_of(seed: int, number: int) -> list[Segment]:
    numbers = random.stream(seed, 16 + number)
    count, first, segments = 1 + numbers.below(SEGMENTS_MAX), numbers.below(MESSAGE_PAGES), []
    for i in range(count):
        page = number * MESSAGE_PAGES + (first + 3 * i) % MESSAGE_PAGES
        gpa = MESSAGES_GPA + page * 4096 + numbers.below(4000)
        segments.append(Segment(gpa, 1 + numbers.below(SEGMENT_BYTES_MAX)))
    return segments


def bytes_of(seed: int, number: int, size: int) -> bytes:
    words = random.stream(seed, 4096 + number)
    return b"".join(words.next().to_bytes(8, "little") for _ in range(size // 8 + 1))[:size]


def message_bytes(seed: int, number: int) -> bytes:
    return bytes_of(seed, number, sum(segment.size for segment in segments_of(seed, number)))


def digest_of(data: bytes) -> int:
    digest = 0x811C9DC5
    for byte in data:
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return digest


def blocks_of(seed: int) -> list[bytes]:
    words = random.stream(seed, 5)
    size = BLOCK_SIZE + BLOCKS * BLOCK_STEP
    data = b"".join(words.next().to_bytes(8, "little") for _ in range(size // 8))
    return [data[BLOCK_STEP * i : BLOCK_STEP * i + BLOCK_SIZE] for i in range(BLOCKS)]


def is_due(event: Event) -> bool:
    """VIRTIO 1.2 "Available Buffer Notification Suppression", "Used Buffer Notification Suppression": has the index
    gone past the event? Without VIRTIO_F_EVENT_IDX: is the flag 0?"""
    if not event.has_event_index:
        return not event.flags & 1
    return has_passed(event.event, event.before, event.now)


def has_passed(event: int, before: int, now: int) -> bool:
    return (now - event - 1) & MASK < (now - before) & MASK


# ---- the parts of a run ----


def during(run: Run, stage: str) -> list[Event]:
    """From the beginning of the stage to its end, or to that of the run."""
    begin, over = run.one("stage", of=stage), run.one("over", of=stage)
    if not begin:
        return []
    return [event for event in run.events if begin.seq < event.seq and (not over or event.seq < over.seq)]


def come_through(run: Run, upto: str) -> None:
    """The run has come to the end of this stage."""
    __tracebackhide__ = True
    for stage in STAGES[: STAGES.index(upto) + 1]:
        if not run.one("over", of=stage):
            incomplete(run, stage)


def console(run: Run) -> str:
    """What the guest has printed."""
    sent = run.all("exit", port=COM1, is_write=1)
    return b"".join(bytes.fromhex(event.data) for event in sent).decode(errors="replace")


def incomplete(run: Run, stage: str) -> NoReturn:
    """The run ended early, or never began. What it did wrong may belong to another check."""
    __tracebackhide__ = True
    what = f"the run did not come through the stage {stage}"
    begin = run.one("stage", of=stage)
    if not begin:
        require(run, what, "stage", of=stage)
    for rescue in run.all("rescue"):
        fail(run, what, "the guest slept, and nothing would ever have woken it", near=rescue)
    gave_up = [line for line in console(run).splitlines() if line.startswith("gave up")]
    end = run.one("end")
    fail(run, what, *gave_up, how_it_ended(run), near=None if end and end.how == "todo" else last_telling(run))


def last_telling(run: Run) -> Event:
    """What happened before the guest said why it gave up."""
    silent = ("com1", "exit")
    telling = [event for event in run.events if event.kind not in ("entry", "statistics", "end")]
    return [event for event in telling if event.get("device") not in silent][-1]


# ---- the driver, in the window ----


@dataclass
class Finding:
    """Something that should not have been done, or should have."""

    about: str
    what: str
    lines: tuple[str, ...]
    near: Event


@dataclass
class Chain:
    """A message in the ring."""

    message: int
    head: int
    descriptors: list[int] = field(default_factory=list)
    is_settled: bool = False  # the driver has come back from queue_publish()


@dataclass
class Ring:
    """What is in the window for one queue."""

    number: int
    bytes: bytearray = field(default_factory=lambda: bytearray(WINDOW_QUEUE_SIZE))
    added: list[Chain] = field(default_factory=list)  # not published yet
    published: list[Chain] = field(default_factory=list)  # and not reaped yet
    index: int = 0  # of the available ring
    used: list[Event] = field(default_factory=list)
    reaped: int = 0
    index_read: int = 0  # what the driver has last seen of the used index
    listen: Event | None = None
    asked: Event | None = None  # the write that asks for an interrupt
    looked: Event | None = None  # the last look at the used index

    def get(self, area: int, offset: int, size: int) -> int:
        at = area * AREA_SIZE + offset
        return int.from_bytes(self.bytes[at : at + size], "little")

    def free(self) -> int:
        return QUEUE_SIZE - sum(len(chain.descriptors) for chain in self.published)


class Window:
    """The two rings, led through the accesses of a run."""

    def __init__(self, run: Run) -> None:
        self.seed = run.seed
        self.findings: list[Finding] = []
        self.rings = [Ring(RECEIVE), Ring(TRANSMIT)]
        messages = run.one("stage", of="messages")
        for event in run.events:
            if messages and event.seq > messages.seq:
                break
            if follow := getattr(self, f"on_{event.kind}", None):
                follow(event)

    def find(self, about: str, what: str, *lines: str, near: Event) -> None:
        """What follows from an index that was written too early, or from descriptors that were not free, is no
        mistake of its own."""
        if about in ("chain", "free", "reap") and self.about("order"):
            return
        if about in ("chain", "reap") and self.about("free"):
            return
        self.findings.append(Finding(about, what, lines, near))

    def about(self, *about: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.about in about), None)

    def on_exit(self, event: Event) -> None:
        if event.get("reason") != "MMIO" or not 0 <= event.gpa - WINDOW_GPA < 2 * WINDOW_QUEUE_SIZE:
            self.settle(event)
            return
        number, offset = divmod(event.gpa - WINDOW_GPA, WINDOW_QUEUE_SIZE)
        area, offset = divmod(offset, AREA_SIZE)
        ring = self.rings[number]
        if event.is_write:
            at, data = area * AREA_SIZE + offset, bytes.fromhex(event.data)
            ring.bytes[at : at + len(data)] = data
            self.written(ring, area, offset, event)
        elif area == USED:
            self.used_read(ring, offset, event)

    # ---- what goes in ----

    def on_added(self, event: Event) -> None:
        is_transmit = event.message < LAYOUT_SENT
        ring = self.rings[TRANSMIT if is_transmit else RECEIVE]
        self.expect_reaped(ring)
        wanted, free = len(segments_of(self.seed, event.message)), ring.free()
        what = (
            f"queue_add() for message {event.message}, which has {wanted} segments, while {free} descriptors are free"
        )
        if event.head == NO_CHAIN and wanted <= free:
            self.find("free", what, "expected a chain", "seen     NO_CHAIN", near=event)
        elif event.head != NO_CHAIN and wanted > free:
            self.find("free", what, "expected NO_CHAIN", f"seen     a chain with head {event.head}", near=event)
        if event.head != NO_CHAIN:
            ring.added.append(Chain(event.message, event.head))

    def written(self, ring: Ring, area: int, offset: int, event: Event) -> None:
        if area == DESCRIPTORS:
            self.descriptor_written(ring, offset // 16, event)
        elif area == AVAILABLE and offset in (FLAGS, USED_EVENT):
            ring.asked = event
        elif area == AVAILABLE and offset >= ENTRIES:
            self.entry_written(ring, (offset - ENTRIES) // 2, event)
        self.index_follow(ring, event)

    def descriptor_written(self, ring: Ring, number: int, event: Event) -> None:
        for chain in ring.published:
            if number not in chain.descriptors:
                continue
            what = f"descriptor {number} was written (event {event.seq})"
            if chain.is_settled:
                why = f"it belongs to message {chain.message}, which the device has and has not used yet"
                self.find("free", f"{what}, but {why}", near=event)
            else:
                why = f"after the index that makes message {chain.message} available, to which it belongs"
                self.find("order", f"{what} {why}", near=event)

    def entry_written(self, ring: Ring, entry: int, event: Event) -> None:
        count = len(ring.published)
        for i, chain in enumerate(ring.published):
            if (ring.index - count + i) % QUEUE_SIZE == entry and not chain.is_settled:
                what = f"entry {entry} of the available ring was written (event {event.seq})"
                self.find("order", f"{what} after the index that makes it available", near=event)

    def index_follow(self, ring: Ring, event: Event) -> None:
        index = ring.get(AVAILABLE, INDEX, 2)
        steps = (index - ring.index) & MASK
        if steps == 0:
            return
        if steps > 1 or not ring.added:
            what = f"the available index went from {ring.index} to {index} (event {event.seq})"
            self.find("chain", what, "expected one more, for the chain that was to be published", near=event)
        ring.index = index
        if ring.added:
            chain = ring.added.pop(0)
            chain.descriptors = self.descriptors(ring, chain)
            ring.published.append(chain)

    def descriptors(self, ring: Ring, chain: Chain) -> list[int]:
        """Of the chain that begins at this head, as far as it goes."""
        found = [chain.head % QUEUE_SIZE]
        while ring.get(DESCRIPTORS, 16 * found[-1] + 12, 2) & NEXT and len(found) < QUEUE_SIZE:
            found.append(ring.get(DESCRIPTORS, 16 * found[-1] + 14, 2) % QUEUE_SIZE)
        return found

    def settle(self, event: Event) -> None:
        """The driver has come back: what it has published is as it is meant to be."""
        for ring in self.rings:
            for i, chain in enumerate(ring.published):
                if not chain.is_settled:
                    chain.is_settled = True
                    self.check_chain(ring, chain, ring.index - len(ring.published) + i, event)

    def check_chain(self, ring: Ring, chain: Chain, index: int, event: Event) -> None:
        what = f"message {chain.message} in the {('receive', 'transmit')[ring.number]} queue"
        entry = index % QUEUE_SIZE
        head = ring.get(AVAILABLE, ENTRIES + 2 * entry, 2)
        if head != chain.head:
            lines = f"expected {chain.head}, as queue_add() has answered", f"seen     {head}"
            self.find("chain", f"{what}: entry {entry} of the available ring", *lines, near=event)
        wanted = segments_of(self.seed, chain.message)
        chain.descriptors = self.descriptors(ring, chain)
        count = len(chain.descriptors)
        if count != len(wanted):
            lines = f"expected {len(wanted)}, one for each segment", f"seen     {count}"
            self.find("chain", f"{what}: descriptors in the chain from {chain.head}", *lines, near=event)
        elif len(set(chain.descriptors)) < count:
            self.find("chain", f"{what}: the chain {chain.descriptors} has a descriptor twice", near=event)
        direction = WRITE if ring.number == RECEIVE else 0
        for i, (at, segment) in enumerate(zip(chain.descriptors, wanted, strict=False)):
            flags = direction | (NEXT if i < len(wanted) - 1 else 0)
            self.check_descriptor(ring, at, segment, flags, f"{what}, segment {i}: descriptor {at}", event)

    def check_descriptor(self, ring: Ring, at: int, segment: Segment, flags: int, what: str, near: Event) -> None:
        names = {0: "0", NEXT: "NEXT", WRITE: "WRITE", NEXT | WRITE: "NEXT, WRITE"}
        seen = ring.get(DESCRIPTORS, 16 * at + 12, 2)
        for name, offset, size, expected in (("addr", 0, 8, segment.gpa), ("len", 8, 4, segment.size)):
            value = ring.get(DESCRIPTORS, 16 * at + offset, size)
            if value != expected:
                self.find("chain", f"{what}: {name}", f"expected {expected:#x}", f"seen     {value:#x}", near=near)
        if seen != flags:
            lines = f"expected {names[flags]}", f"seen     {names.get(seen, hex(seen))}"
            self.find("chain", f"{what}: flags", *lines, near=near)

    # ---- what comes back ----

    def on_window_used(self, event: Event) -> None:
        self.rings[event.queue].used.append(event)

    def used_read(self, ring: Ring, offset: int, event: Event) -> None:
        value = int.from_bytes(bytes.fromhex(event.data), "little")
        if offset == INDEX:
            ring.index_read, ring.looked = value & MASK, event
        elif ENTRIES <= offset < ENTRIES + 8 * QUEUE_SIZE and ring.index_read == ring.reaped & MASK:
            what = f"element {(offset - ENTRIES) // 8} of the used ring was read (event {event.seq})"
            self.find("reap", f"{what} before the driver had seen in the index that it is there", near=event)

    def on_reaped(self, event: Event) -> None:
        ring = self.rings[RECEIVE]
        if ring.reaped >= len(ring.used):
            self.find("reap", f"queue_reap() gave head {event.head}, but nothing was used any more", near=event)
            return
        used = ring.used[ring.reaped]
        ring.reaped += 1
        what = f"queue_reap() for what was used by event {used.seq}"
        expected, seen = (used.head, used.length), (event.head, event.length)
        if seen != expected:
            lines = (
                f"{said} head {head}, {length} bytes"
                for said, (head, length) in (("expected", expected), ("seen    ", seen))
            )
            self.find("reap", what, *lines, near=event)
        for chain in ring.published:
            if chain.head == used.head:
                ring.published.remove(chain)
                break

    def expect_reaped(self, ring: Ring) -> None:
        if ring.reaped < len(ring.used):
            used = ring.used[ring.reaped]
            what = f"the chain with head {used.head} was used (event {used.seq})"
            self.find("reap", f"{what}, but queue_reap() has not given it back", near=used)
            ring.reaped = len(ring.used)

    def on_over(self, _: Event) -> None:
        self.expect_reaped(self.rings[RECEIVE])

    # ---- interrupts ----

    def on_listen(self, event: Event) -> None:
        ring = self.rings[RECEIVE]
        ring.listen, ring.asked, ring.looked = event, None, None

    def on_heard(self, event: Event) -> None:
        ring = self.rings[RECEIVE]
        by_event, when = ring.listen.case % 2 if ring.listen else 0, ring.listen.case // 2 if ring.listen else 0
        how = "by event index" if by_event else "by flags"
        if by_event:
            expected, seen = ring.reaped & MASK, ring.get(AVAILABLE, USED_EVENT, 2)
            what = f"queue_listen() {how}: used_event, after {ring.reaped} chains were reaped"
        else:
            expected, seen = 0, ring.get(AVAILABLE, FLAGS, 2)
            what = f"queue_listen() {how}: the flags of the available ring"
        if not ring.asked:
            field = "used_event" if by_event else "the flags of the available ring"
            line = f"expected {field} to be stored in any case, and then a look at the used index"
            self.find("listen", f"queue_listen() {how} has returned, and not asked for an interrupt", line, near=event)
        elif seen != expected:
            self.find("listen", what, f"expected {expected}", f"seen     {seen}", near=ring.asked)
        elif not ring.looked or ring.looked.seq < ring.asked.seq:
            what = f"queue_listen() {how} has asked for an interrupt (event {ring.asked.seq})"
            self.find("listen", f"{what}, and not looked at the used index after that", near=ring.asked)
        answer = len(ring.used) > ring.reaped
        whens = "", ": a chain was used before the call", ": a chain was used just before the request reached the ring"
        if bool(event.answer) != answer:
            what = f"the answer of queue_listen() {how}{whens[when] or ': nothing was used meanwhile'}"
            self.find("listen", what, f"expected {answer}", f"seen     {bool(event.answer)}", near=event)


@pytest.fixture(scope="module")
def window(run: Run) -> Window:
    return Window(run)


def judge(run: Run, window: Window, upto: str, *about: str) -> None:
    """Nothing of this sort was found, in a run that has come through the stages up to this one."""
    __tracebackhide__ = True
    if finding := window.about(*about):
        fail(run, finding.what, *finding.lines, near=finding.near)
    if not run.one("over", of=upto):
        for other in window.findings:
            fail(run, f"the run did not come through the stage {upto}", other.what, *other.lines, near=other.near)
    come_through(run, upto)


def test_chain_describes_the_segments_of_its_message(run: Run, window: Window) -> None:
    judge(run, window, "layout", "chain")


def test_index_is_written_after_all_that_it_makes_available(run: Run, window: Window) -> None:
    judge(run, window, "layout", "order")


def test_kick_is_due_when_the_device_has_asked_for_it(run: Run) -> None:
    expect_trials(run, "kicks", "kick", "queue_kick_is_due()")


def test_used_chains_are_reaped_in_the_order_of_the_used_ring(run: Run, window: Window) -> None:
    judge(run, window, "reap", "reap")


def test_descriptors_are_free_again_when_they_are_reaped_and_not_before(run: Run, window: Window) -> None:
    judge(run, window, "full", "free")
    full = [event for event in during(run, "full") if event.kind == "added" and event.head == NO_CHAIN]
    expect(run, "the ring was full at some time", expected=True, seen=bool(full))


def test_nothing_used_is_missed_when_the_driver_asks_for_an_interrupt(run: Run, window: Window) -> None:
    judge(run, window, "listen", "listen")


# ---- when is a notification due? ----


def asked_for(event: Event) -> str:
    steps = f"from {event.before} to {event.now}"
    if event.has_event_index:
        return f"the index went {steps}, and the event is {event.event} (flags, which do not count: {event.flags})"
    return f"no event index, the index went {steps}, and the flags are {event.flags}"


def expect_trials(run: Run, upto: str, of: str, function: str) -> None:
    __tracebackhide__ = True
    for trial in run.all("trial", of=of):
        expect(run, f"{function}: {asked_for(trial)}", expected=is_due(trial), seen=bool(trial.answer), near=trial)
    come_through(run, upto)
    expect(run, f"the number of trials of {function}", expected="28", seen=str(run.count("trial", of=of)))


# ---- the device ----


@dataclass
class Call:
    """A call of a function of the host half, and what it did to the rings."""

    event: Event
    accesses: list[Event] = field(default_factory=list)

    def all(self, kind: str, *fields: str) -> list[Event]:
        """Of this kind; those of these fields, if any are named."""
        return [access for access in self.accesses if access.kind == kind and (not fields or access.field in fields)]

    def barriers(self, of: str) -> list[int]:
        """Where in the record such a barrier stands, or one that is more."""
        return [access.seq for access in self.all("barrier") if access.of in (of, "full")]


def seen_barriers(events: list[Event], after: int, before: int) -> str:
    """Which barriers stand there, for the line that says what was seen."""
    found = {event.of for event in events if event.kind == "barrier" and after < event.seq < before}
    return "seen     only " + ", ".join(f"barrier_{of}()" for of in sorted(found)) if found else "seen     no barrier"


def calls(events: list[Event], function: str) -> Iterator[Call]:
    call: Call | None = None
    for event in events:
        if call and event.kind in ("load", "store", "barrier"):
            call.accesses.append(event)
            continue
        if call:
            yield call
        call = Call(event) if event.kind == "call" and event.function == function else None
    if call:
        yield call


def expect_messages(run: Run, stage: str, sent: list[bytes]) -> None:
    """Just these have arrived in this stage, in this order."""
    __tracebackhide__ = True
    misuse = next((event for event in during(run, stage) if event.kind == "virtio_misuse"), None)
    if misuse:
        fail(run, f"in the stage {stage} the device finds fault with its driver: {misuse.what}", near=misuse)
    come_through(run, stage)
    arrived = [event for event in during(run, stage) if event.kind == "message"]
    for i, (data, message) in enumerate(zip(sent, arrived, strict=False)):
        what = f"message {i} of the stage {stage}"
        expect(run, f"{what}: bytes", expected=str(len(data)), seen=str(message.size), near=message)
        shown = bytes.fromhex(message.data)
        expect(run, f"{what} begins", expected=data[: len(shown)], seen=shown, near=message)
        expect(run, f"{what}: the digest of all its bytes", expected=digest_of(data), seen=message.digest, near=message)
    expect(run, f"messages of the stage {stage}", expected=str(len(sent)), seen=str(len(arrived)))


def expect_sent(run: Run, stage: str, count: int) -> None:
    __tracebackhide__ = True
    expect_messages(run, stage, [message_bytes(run.seed, message_number(stage, i)) for i in range(count)])


def expect_used(run: Run, stage: str) -> None:
    """Each element of the used ring says what was used."""
    __tracebackhide__ = True
    for event in (event for event in during(run, stage) if event.kind == "used"):
        what = f"the chain with head {event.head} is used: element {event.index % QUEUE_SIZE} of the used ring"
        expect(run, f"{what}, id", expected=event.head, seen=event.id, near=event)
        expect(run, f"{what}, len", expected=event.written, seen=event.len, near=event)
        expect(run, "the used index after that", expected=(event.index + 1) & MASK, seen=event.idx, near=event)


def expect_reaped(run: Run, stage: str) -> None:
    """And the driver has taken it back, in that order."""
    __tracebackhide__ = True
    come_through(run, stage)
    used, reaped = ([event.head for event in during(run, stage) if event.kind == kind] for kind in ("used", "reaped"))
    expect(run, f"the heads that were reaped in the stage {stage}", expected=used, seen=reaped)


def test_scattered_messages_arrive_whole(run: Run) -> None:
    expect_used(run, "messages")
    expect_sent(run, "messages", 6)
    expect_reaped(run, "messages")


def before_broken(run: Run) -> list[Event]:
    """A loop in a chain is walked more than once."""
    broken = run.one("stage", of="broken")
    return [event for event in run.events if not broken or event.seq < broken.seq]


def test_device_reads_each_field_once_and_the_index_first(run: Run) -> None:
    events = before_broken(run)
    for function in ("available_take", "chain_walk"):
        for call in calls(events, function):
            times = Counter(load.field for load in call.all("load"))
            for load in call.all("load"):
                if times[load.field] > 1:
                    what = f"{function}() loads {load.field} {times[load.field]} times"
                    fail(run, f"{what}: what was checked may not be what is used", near=load)
    for call in calls(events, "available_take"):
        expect_index_first(run, call)
    come_through(run, "messages")
    for call in calls(during(run, "messages"), "chain_walk"):
        loaded = [load.field for load in call.all("load")]
        walked = {name.split(".")[0] for name in loaded if name.startswith("desc[")} or {"desc[0]"}
        for name in (f"{at}.{member}" for at in sorted(walked) for member in ("addr", "len", "flags")):
            if name not in loaded:
                fail(run, f"chain_walk() has not loaded {name} with LOAD()", near=call.event)


def expect_index_first(run: Run, call: Call) -> None:
    __tracebackhide__ = True
    index, entries = call.all("load", "avail.idx"), [load for load in call.all("load") if "ring[" in load.field]
    if not entries:
        return
    if not index or index[0].seq > entries[0].seq:
        what = "available_take() loads an entry before it knows from the index that it is there"
        fail(run, what, near=entries[0])
    if not any(index[0].seq < barrier < entries[0].seq for barrier in call.barriers("loads")):
        what = "available_take(): between the load of the index and that of the entry"
        seen = seen_barriers(call.accesses, index[0].seq, entries[0].seq)
        fail(run, what, "expected barrier_loads()", seen, near=entries[0])


def test_device_writes_the_used_index_last(run: Run) -> None:
    for call in calls(run.events, "used_put"):
        index = call.all("store", "used.idx")
        element = [store for store in call.all("store") if "ring[" in store.field]
        for store in call.all("store", "outside of all rings"):
            fail(run, "used_put() went outside of all rings: the ring has 16 elements", near=store)
        if not index or len(element) < 2:
            missing = "both id and len of an element" if index else "used.idx"
            fail(run, f"used_put() has not stored {missing} with STORE()", near=call.event)
        if late := [store for store in element if store.seq > index[0].seq]:
            what = f"used_put() stores {late[0].field} (event {late[0].seq})"
            fail(run, f"{what} after the index that gives it to the driver (event {index[0].seq})", near=late[0])
        if not any(element[-1].seq < barrier < index[0].seq for barrier in call.barriers("stores")):
            what = "used_put(): between the stores of the element and that of the index"
            seen = seen_barriers(call.accesses, element[-1].seq, index[0].seq)
            fail(run, what, "expected barrier_stores()", seen, near=index[0])
    come_through(run, "messages")


def test_messages_come_back_in_any_order_through_a_full_ring(run: Run) -> None:
    expect_used(run, "order")
    expect_sent(run, "order", 14)
    expect_reaped(run, "order")
    events = during(run, "order")
    taken = [event.head for event in events if event.kind == "message"]
    used = [event.head for event in events if event.kind == "used"]
    expect(run, "some were used in another order", expected=True, seen=taken != used)
    full = [event for event in events if event.kind == "added" and event.head == NO_CHAIN]
    expect(run, "the ring was full at some time", expected=True, seen=bool(full))


def test_input_arrives_by_interrupt(run: Run) -> None:
    events = during(run, "receive")
    for rescue in (event for event in events if event.kind == "rescue"):
        fail(run, "the guest slept, input was there, and no interrupt came", near=rescue)
    expect_used(run, "receive")
    expect_reaped(run, "receive")
    inputs = [event for event in events if event.kind == "input"]
    received = [event for event in events if event.kind == "received"]
    expect(run, "inputs", expected=str(INPUTS), seen=str(len(inputs)))
    for given, taken in zip(inputs, received, strict=False):
        what = f"input {given.number}, {given.size} bytes"
        sent = digest_of(bytes_of(run.seed, 1024 + given.number, given.size))
        expect(run, f"{what}: digest of what the device wrote", expected=sent, seen=given.digest, near=given)
        expect(run, f"{what}: digest of what the driver read", expected=given.digest, seen=taken.digest, near=taken)
    expect(run, "inputs that the driver has read", expected=str(INPUTS), seen=str(len(received)))
    interrupts = [event for event in events if event.kind == "inject"]
    expect(run, "the guest was interrupted", expected=True, seen=bool(interrupts))


def test_interrupt_is_due_when_the_driver_has_asked_for_it(run: Run) -> None:
    expect_trials(run, "receive", "interrupt", "interrupt_is_due()")
    for decided in run.all("decided"):
        what = f"interrupt_is_due(): {asked_for(decided)}"
        expect(run, what, expected=is_due(decided), seen=bool(decided.answer), near=decided)
    barriers = [barrier.seq for barrier in run.all("barrier", of="full")]
    indices = [store.seq for store in run.all("store", field="used.idx")]
    for call in calls(run.events, "interrupt_is_due"):
        for load in call.all("load", "used_event", "avail.flags")[:1]:
            index = max((seq for seq in indices if seq < load.seq), default=call.event.seq)
            if not any(index < barrier < load.seq for barrier in barriers):
                what = (
                    "interrupt_is_due(): between the store of the used index and the load of what the driver asks for"
                )
                seen = seen_barriers(run.events, index, load.seq)
                fail(run, what, "expected barrier_full()", seen, near=load)


def test_device_that_goes_to_sleep_misses_no_message(run: Run) -> None:
    for call in calls(run.events, "kicks_listen"):
        asked, looked = call.all("store", "used.flags", "avail_event"), call.all("load", "avail.idx")
        if not asked and looked:
            what = "kicks_listen() has returned, and not asked for a notification"
            fail(run, what, "expected flags or avail_event to be stored in any case, and then a look", near=looked[0])
        if not asked:
            fail(run, "kicks_listen() has not stored flags or avail_event with STORE()", near=call.event)
        if not any(asked[-1].seq < look.seq for look in looked):
            what = f"kicks_listen() has asked for a notification (event {asked[-1].seq})"
            fail(run, f"{what}, and not looked at the available index after that", near=asked[-1])
        if not any(asked[-1].seq < barrier < looked[-1].seq for barrier in call.barriers("full")):
            what = "kicks_listen(): between the request and the look at the available index"
            seen = seen_barriers(call.accesses, asked[-1].seq, looked[-1].seq)
            fail(run, what, "expected barrier_full()", seen, near=looked[-1])
    for doze in run.all("doze"):
        what = "the device sleeps, by event index" if doze.has_event_index else "the device sleeps, by flags"
        if doze.taken != doze.available:
            fail(
                run, f"{what}, while {doze.available - doze.taken} of the messages in the ring are not taken", near=doze
            )
        if doze.has_event_index:
            expect(run, f"{what}: avail_event", expected=str(doze.taken), seen=str(doze.avail_event), near=doze)
        else:
            expect(run, f"{what}: the flags of the used ring", expected=0, seen=doze.flags, near=doze)
    for stage in ("doze", "events"):
        expect_sent(run, stage, 3)


def test_event_index_saves_kicks_and_interrupts(run: Run) -> None:
    come_through(run, "counts")
    events = during(run, "counts")
    before = kicks = 0
    for i, event in enumerate(events):
        if event.kind != "ask":
            continue
        due = has_passed(event.event, before, event.now)
        until = next((j for j in range(i + 1, len(events)) if events[j].get("reason") in ("IO", "HLT")), len(events))
        kicked = any(later.kind == "virtio_notify" for later in events[i:until])
        what = (
            f"{event.now - before} messages more are available, {before} to {event.now}; avail_event is {event.event}"
        )
        expect(run, f"{what}: the driver notifies", expected=due, seen=kicked, near=event)
        before, kicks = event.now, kicks + kicked
    counted = Counter(event.kind for event in events)
    wanted = sum(is_due(event) for event in events if event.kind == "decided")
    expect(run, "interrupts", expected=str(wanted), seen=str(counted["virtio_interrupt"]))
    for what, seen in (("notifications", kicks), ("interrupts", counted["virtio_interrupt"])):
        expect(run, f"fewer {what} than messages", expected=True, seen=0 < seen < counted["message"])


def test_broken_chains_are_refused_and_no_others(run: Run) -> None:
    for load in run.all("load", field="outside of all rings"):
        fail(run, "the device has looked outside of the rings", near=load)
    for call in calls(run.events, "chain_walk"):
        for load in call.all("load"):
            if not load.field.startswith("desc["):
                what = "chain_walk() has looked outside of the descriptor table"
                fail(run, f"{what}, where {load.field} lies (event {load.seq})", near=load)
    cases = [*run.all("case"), *(run.all("over", of="broken") or run.events[-1:])]
    for case, following in pairwise(cases):
        events = [event for event in run.events if case.seq < event.seq < following.seq]
        broken = [event for event in events if event.kind == "virtio_misuse" and event.is_broken]
        if case.number in LEGAL:
            segments, name = LEGAL[case.number]
            if broken:
                fail(run, f"the device refuses {name}, which is legal: {broken[0].what}", near=broken[0])
            taken = [event.segments for event in events if event.kind == "chain"][: len(segments)]
            expect(run, f"{name}: the segments of the chains taken", expected=segments, seen=taken, near=case)
        elif not broken:
            fail(run, f"the device does not refuse {BROKEN[case.number]}", near=case)
        elif "finds nothing wrong" in broken[0].what:
            fail(run, f"{BROKEN[case.number]}: {broken[0].what}", near=broken[0])
    come_through(run, "broken")
    expect(run, "the number of cases", expected=str(len(BROKEN) + len(LEGAL)), seen=str(run.count("case")))
    messages = [event for event in during(run, "broken") if event.kind == "message"]
    data = message_bytes(run.seed, message_number("broken", 0))
    expect(run, "the message after all that: its digest", expected=digest_of(data), seen=messages[-1].digest)


def test_reset_takes_all_memory_back(run: Run) -> None:
    come_through(run, "reset")
    for forgotten in run.all("forget"):
        what = f"the driver resets the device while {forgotten.in_flight} chains are in flight: those left"
        expect(run, what, expected=0, seen=forgotten.left, near=forgotten)
    look = require(run, "the old queues' memory is compared", "old_memory")
    what = "the memory of the old queues is as the driver has left it after the reset"
    expect(run, what, expected=True, seen=bool(look.is_unchanged), near=look)
    expect(run, "a device was reset with chains in flight", expected=True, seen=run.count("forget") > 0)
    expect_sent(run, "again", 2)


# ---- what it costs ----


def exits_during(run: Run, stage: str) -> list[Event]:
    """Without the one by which the guest says that the stage is over."""
    return [event for event in during(run, stage) if event.kind == "exit"][:-1]


def test_64_kib_need_1000_times_fewer_exits_per_byte_than_com1(run: Run) -> None:
    expect_messages(run, "bulk", blocks_of(run.seed))
    exits = exits_during(run, "bulk")
    kicks = [event for event in exits if event.get("gpa") == QUEUE_NOTIFY_GPA]
    expect(run, "a kick for each block", expected=str(BLOCKS), seen=str(len(kicks)))
    if len(exits) > len(kicks) + FEW:
        what = f"{len(exits)} exits for 64 KiB, and only {len(kicks)} of them are kicks"
        other = next(event for event in exits if event not in kicks)
        fail(run, what, "expected hardly any other: the driver has not asked to be interrupted", near=other)
    com1 = run.all("exit", device="com1")
    printed = sum(event.size * event.count for event in com1 if event.port == COM1 and event.is_write)
    ratio = len(com1) / printed / (len(exits) / (BLOCKS * BLOCK_SIZE))
    if ratio < 1000:
        what = f"{len(exits)} exits for 64 KiB, and {len(com1)} for the {printed} bytes that the guest has printed"
        fail(run, what, "expected 1,000 times fewer for a byte", f"seen     {ratio:.0f} times")


def test_ioeventfd_carries_the_same_messages_without_an_exit(run: Run, rerun: Callable[..., Run]) -> None:
    come_through(run, "bulk")
    other = rerun("--virtio-notify=ioeventfd", "--append=patient=1")
    come_through(other, "bulk")
    messages = [Counter((event.size, event.digest) for event in one.all("message")) for one in (run, other)]
    expect(other, "the messages are the same", expected=True, seen=messages[0] == messages[1])
    notified = other.all("virtio_notify", by="ioeventfd")
    expect(other, "the device was notified by ioeventfd", expected=True, seen=bool(notified))
    kicks = [event for event in other.all("exit", reason="MMIO") if event.gpa == QUEUE_NOTIFY_GPA]
    expect(other, "exits for QueueNotify", expected="0", seen=str(len(kicks)))
