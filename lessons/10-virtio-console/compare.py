"""What it costs to send 64 KiB: by COM1, byte by byte or by string instructions, and by virtio, whose kicks are exits
or writes to an eventfd. By COM1 the guest sends the first KiB of them, and the table has 64 times what that took: to
COM1 all bytes are alike. (The record is on, so each exit costs what it takes to write it down, too.)"""

from collections.abc import Iterable, Sequence

from kvmlab.compare import Machine
from kvmlab.events import Event
from kvmlab.runner import Run

KIB = 64
SERIAL_KIB = 1
NS_PER_INSTRUCTION = 20  # of Bochs, whose clock counts instructions: 50 million are a second

MACHINES = [
    Machine("auto", options=("--append=serial=1",)),
    Machine("auto", options=("--virtio-notify=ioeventfd", "--append=patient=1")),
]

# A stage of lab.h, in the first run or in the second.
WAYS = [
    ("COM1, an OUT for each byte", "bytes", 0),
    ("COM1, a REP OUTS for 16 bytes", "strings", 0),
    ("virtio, kicks by exit", "bulk", 0),
    ("virtio, kicks by ioeventfd", "bulk", 1),
]


def table(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield f"{KIB} KiB", "exits", "exits a KiB", "instructions", "microseconds", "as a ratio"
    least = min(spent_ns(runs[run], stage) for _, stage, run in WAYS)
    for what, stage, run in WAYS:
        count, ns = exits(runs[run], stage), spent_ns(runs[run], stage)
        yield what, count, f"{count / KIB:g}", instructions(runs[run], ns), ns // 1000, f"{ns / least:.1f}"


def times(stage: str) -> int:
    return 1 if stage == "bulk" else KIB // SERIAL_KIB


def marks(run: Run, stage: str) -> tuple[Event, Event]:
    """The exits by which the guest says that the stage begins, and that it is over."""
    begin, over = run.all("stage", of=stage)[0], run.all("over", of=stage)[0]
    first, last = ([event for event in run.all("exit") if event.seq < mark.seq][-1] for mark in (begin, over))
    return first, last


def exits(run: Run, stage: str) -> int:
    """Without the one that says that it is over."""
    first, last = marks(run, stage)
    return int(last.exit - first.exit - 1) * times(stage)


def spent_ns(run: Run, stage: str) -> int:
    first, last = marks(run, stage)
    return int(last.ns - first.ns) * times(stage)


def instructions(run: Run, ns: int) -> int | str:
    """Those of the guest, of KVM and of the VMM together. Only vmx can tell."""
    return ns // NS_PER_INSTRUCTION if run.engine == "vmx" else "-"
