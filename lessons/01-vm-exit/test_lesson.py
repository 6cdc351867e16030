"""The checks of lesson 1: what left the guest, and what the lab device made of it."""

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.random import Random, stream
from kvmlab.runner import Run

REGISTERS = 0x500
REGISTER_COUNT = 8
NONCE_GPA = 0xD0000000
ANSWER_GPA = NONCE_GPA + 4
STREAM_NONCE, STREAM_FIFO, STREAM_GUEST = 1, 2, 3
SIGNATURE = int.from_bytes(b"kvml", "little")  # EBX of CPUID leaf 0x40000000


class Plan:
    """What the seed makes the guest do: the mirror of guest_main() in guest.c."""

    def __init__(self, seed: int) -> None:
        random = stream(seed, STREAM_GUEST)
        self.count = 8 + 4 * random.below(7)
        self.accesses = [self._access(random) for _ in range(24)]
        self.sent = bytes(random.next() & 0xFF for _ in range(self.count))
        fifo = stream(seed, STREAM_FIFO)
        self.received = bytes(fifo.next() & 0xFF for _ in range(3 * self.count))
        self.nonce = stream(seed, STREAM_NONCE).next() & 0xFFFFFFFF

    @staticmethod
    def _access(random: Random) -> tuple[int, bytes, int, int]:
        value = random.next() & 0xFFFFFFFF
        shift = random.below(3)
        size = 1 << shift
        to = random.below(REGISTER_COUNT >> shift) << shift
        source = random.below(REGISTER_COUNT >> shift) << shift
        return to, value.to_bytes(4, "little")[:size], source, size


def register_exits(run: Run) -> list[Event]:
    """All accesses that the plan has: with fewer there is nothing to judge."""
    exits = run.all("exit", reason="IO", device="lab registers")
    require(run, "the state of the lab device at the end", "lab")
    count = 2 * len(Plan(run.seed).accesses)
    expect(run, "the number of exits for the registers", expected=str(count), seen=str(len(exits)))
    return exits


def test_nonce_is_read_once_and_before_the_answer(run: Run) -> None:
    read = require(run, "a read of the nonce", "exit", reason="MMIO", gpa=NONCE_GPA, is_write=0)
    expect(run, "the width of that read", expected="4 bytes", seen=f"{read.size} bytes", near=read)
    answer = require(run, "a 32-bit write of the answer", "exit", reason="MMIO", gpa=ANSWER_GPA, is_write=1, size=4)
    reads = run.all("exit", reason="MMIO", gpa=NONCE_GPA, is_write=0)
    expect(run, "the number of reads of the nonce", expected="1", seen=str(len(reads)), near=reads[-1])
    if answer.seq < read.seq:
        expected, seen = f"after event #{read.seq}, the read of the nonce", f"before it, as event #{answer.seq}"
        fail(run, "when the answer was written", f"expected {expected}", f"seen     {seen}", near=answer)


def test_answer_is_made_of_the_nonce_and_cpuid(run: Run) -> None:
    answer = require(run, "a 32-bit write of the answer", "exit", reason="MMIO", gpa=ANSWER_GPA, is_write=1, size=4)
    nonce = Plan(run.seed).nonce
    expected = ((nonce << 8 | nonce >> 24) & 0xFFFFFFFF) ^ SIGNATURE
    seen = int.from_bytes(bytes.fromhex(answer.data), "little")
    what = f"nonce {nonce:#x} rotated left by 8, xor {SIGNATURE:#x}"
    expect(run, what, expected=expected, seen=seen, near=answer)
    answers = run.all("exit", reason="MMIO", gpa=ANSWER_GPA, is_write=1)
    expect(run, "the number of answers", expected="1", seen=str(len(answers)), near=answers[-1])


def test_register_writes_reach_their_ports_at_every_width(run: Run) -> None:
    bank = bytearray(REGISTER_COUNT)
    for to, value, _, _ in Plan(run.seed).accesses:
        bank[to : to + len(value)] = value
    writes = [event for event in register_exits(run) if event.is_write]
    written = [(event.port - REGISTERS, bytes.fromhex(event.data)) for event in writes]
    expected = [(to, value) for to, value, _, _ in Plan(run.seed).accesses]
    expect(run, "the writes that left the guest (port - 0x500, bytes)", expected=expected, seen=written)
    end = require(run, "the state of the lab device at the end", "lab")
    seen = bytes.fromhex(end.registers)
    wrong = next((at for at, pair in enumerate(zip(bank, seen, strict=True)) if pair[0] != pair[1]), 0)
    writers = [event for event in writes if event.port <= REGISTERS + wrong < event.port + event.size]
    near = writers[-1] if writers else None
    expect(run, "the bytes in the registers at the end", expected=bytes(bank), seen=seen, near=near)


def test_register_reads_see_what_was_written(run: Run) -> None:
    bank = bytearray(REGISTER_COUNT)
    exits = register_exits(run)
    read = [(event.port - REGISTERS, event.size) for event in exits if not event.is_write]
    expected = [(source, size) for _, _, source, size in Plan(run.seed).accesses]
    expect(run, "the reads that left the guest (port - 0x500, bytes)", expected=expected, seen=read)
    for event in exits:
        at = event.port - REGISTERS
        if event.is_write:
            bank[at : at + event.size] = bytes.fromhex(event.data)
            continue
        what = f"a {8 * event.size}-bit read of port {event.port:#x}"
        expect(run, what, expected=bytes(bank[at : at + event.size]), seen=bytes.fromhex(event.data), near=event)


def test_string_writes_append_every_element_in_order(run: Run) -> None:
    plan = Plan(run.seed)
    end = require(run, "the state of the lab device at the end", "lab")
    seen = bytes.fromhex(end.pushed)[: 3 * plan.count]
    what = "what the FIFO took in: the same bytes sent as bytes, as words, as double words"
    expect(run, what, expected=plan.sent * 3, seen=seen)
    batch = require(run, "a write of 3 words in one access", "batch")
    what = "what the FIFO took in of 3 words in one access (size=2 count=3)"
    expect(run, what, expected=bytes.fromhex(batch.sent), seen=bytes.fromhex(batch.pushed), near=batch)


def test_string_reads_take_every_element_in_order(run: Run) -> None:
    plan = Plan(run.seed)
    reads = run.all("exit", reason="IO", device="lab fifo", is_write=0)
    seen = b"".join(bytes.fromhex(event.data) for event in reads)
    near = next((event for event in reads if event.count > 1), None)
    what = "what the FIFO gave out, to `rep ins` of bytes, words and double words"
    expect(run, what, expected=plan.received, seen=seen, near=near)
    end = require(run, "the state of the lab device at the end", "lab")
    echo = bytes.fromhex(end.pushed)[3 * plan.count :]
    expect(run, "what the guest found in its memory, sent back", expected=plan.received, seen=echo)


def test_halt_is_the_last_exit(run: Run) -> None:
    halt = require(run, "an exit by HLT", "exit", reason="HLT")
    expect(run, "RFLAGS.IF at the halt: off, so that nothing wakes the CPU", expected=0, seen=halt.if_flag, near=halt)
    last = run.all("exit")[-1]
    expect(run, "the last exit", expected="HLT", seen=last.reason, near=last)
    require(run, "the FIFO was used before the halt", "exit", reason="IO", device="lab fifo")
