"""What is in the memory that a host half shares with a device (include/shared_memory.h), at any moment of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvmlab.events import Event
from kvmlab.expect import fail
from kvmlab.random import stream
from kvmlab.runner import Run


@dataclass(frozen=True)
class Window:
    """A piece of it: the address by which somebody knows it, and where it lies in the file."""

    address: int
    size: int
    offset: int


class SharedMemory:
    """The file, byte by byte, as it was at some event."""

    def __init__(self, run: Run, size: int, windows: Sequence[Window], content_stream: int = 2) -> None:
        """As it is at the beginning."""
        content = stream(run.seed, content_stream)
        self.run = run
        self.windows = windows
        self.bytes = bytearray(b"".join(content.next().to_bytes(8, "little") for _ in range(size // 8)))

    def at(self, address: int) -> int:
        """The offset in the file of what has this address."""
        of = next(window for window in self.windows if window.address <= address < window.address + window.size)
        return of.offset + address - of.address

    def read(self, address: int, count: int) -> bytes:
        return bytes(self.bytes[self.at(address) : self.at(address) + count])

    def write(self, address: int, data: bytes) -> None:
        self.bytes[self.at(address) : self.at(address) + len(data)] = data

    def advance(self, end: Event) -> "SharedMemory":
        """What has changed from the beginning to this event."""
        for event in self.run.all("changed"):
            if event.seq < end.seq:
                data = bytes.fromhex(event.fields["bytes"])
                self.bytes[event.offset : event.offset + len(data)] = data
        return self


def expect_memory(run: Run, what: str, expected: SharedMemory, seen: SharedMemory, near: Event) -> None:
    """Byte by byte, all of the file."""
    __tracebackhide__ = True
    differing = [at for at, byte in enumerate(expected.bytes) if byte != seen.bytes[at]]
    if differing:
        first, last = differing[0], differing[-1]
        fail(
            run,
            what,
            f"offset {first:#x} of the file ({_place(expected, first)}) is the first byte that is wrong",
            f"offset {last:#x} ({_place(expected, last)}) the last, of {len(differing)}",
            near=near,
        )


def _place(memory: SharedMemory, at: int) -> str:
    """Whose byte that is."""
    for number, window in enumerate(memory.windows):
        if window.offset <= at < window.offset + window.size:
            return f"window {number}, {window.address + at - window.offset:#x}"
    return "in no window"
