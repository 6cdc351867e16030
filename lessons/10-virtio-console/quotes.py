"""What README.md quotes of a run with SEED=7."""

from kvmlab.events import Event
from kvmlab.runner import Run

RECEIVE_GPA = 0xD0100000
ENTRIES, ELEMENTS = 0x1004, 0x2004
FLAG_NAMES = {0: "", 1: "NEXT", 2: "WRITE", 3: "WRITE NEXT"}


def receive_ring(run: Run, until: Event) -> bytearray:
    """What the driver has written into the window's receive queue."""
    ring = bytearray(0x3000)
    for event in run.all("exit", reason="MMIO", is_write=1):
        at, data = event.gpa - RECEIVE_GPA, bytes.fromhex(event.data)
        if event.seq < until.seq and 0 <= at < len(ring):
            ring[at : at + len(data)] = data
    return ring


def number(ring: bytearray, at: int, size: int) -> int:
    return int.from_bytes(ring[at : at + size], "little")


def chain(ring: bytearray, head: int) -> list[int]:
    found = [head]
    while number(ring, 16 * found[-1] + 12, 2) & 1:
        found.append(number(ring, 16 * found[-1] + 14, 2))
    return found


def descriptor(ring: bytearray, at: int) -> str:
    """A line of the picture."""
    addr, length = number(ring, 16 * at, 8), number(ring, 16 * at + 8, 4)
    flags, following = number(ring, 16 * at + 12, 2), number(ring, 16 * at + 14, 2)
    return f"{at} {addr:#x} {length} {FLAG_NAMES[flags]}" + (f" {following}" if flags & 1 else "")


def stage(run: Run, name: str) -> list[Event]:
    begin, over = run.all("stage", of=name)[0], run.all("over", of=name)[0]
    return [event for event in run.events if begin.seq < event.seq < over.seq]


def pictured(run: Run) -> list[str]:
    """The ring when the first chain of the second half of the stage reap is used."""
    reaped = [event for event in stage(run, "reap") if event.kind in ("added", "window_used")]
    added = [event for event in reaped if event.kind == "added"]
    used = next(event for event in reaped if event.kind == "window_used" and event.seq > added[-1].seq)
    ring = receive_ring(run, used)
    index = number(ring, 0x1002, 2)
    heads = [number(ring, ENTRIES + 2 * (index - 3 + i), 2) for i in range(3)]
    chains = [chain(ring, head) for head in heads]
    entries = [f"ring[{index - 3 + i}] {head} -> {' '.join(map(str, chains[i]))}" for i, head in enumerate(heads)]
    return [
        "of {}, {} and {} segments".format(*map(len, chains)),
        *(descriptor(ring, at) for at in [*chains[0], *chains[1]]),
        *entries,
        f"id {used.head}, len {used.length}",
        "in the order {}, {}, {}, by their heads; the first that comes back is {}".format(*heads, used.head),
    ]


def quotes(run: Run) -> list[str]:
    console = run.output.splitlines()
    lines = {line.split(":")[0]: line for line in console}
    bulk = [event for event in stage(run, "bulk") if event.kind == "exit"][:-1]
    kinds = [event.kind for event in stage(run, "counts")]
    shown = ("layout", "kicks", "full", "listen", "order", "receive", "broken", "bulk")
    return [
        f"`{console[0]}`",
        *(f"`{lines[name]}`" for name in shown),
        f"virtio, kicks by exit | {len(bulk)} | {len(bulk) / 64:g}",
        *pictured(run),
        f"sends {kinds.count('message')} messages with {kinds.count('virtio_notify')} kicks and "
        f"{kinds.count('virtio_interrupt')} interrupts",
    ]


QUOTES = {"kvm": quotes}
