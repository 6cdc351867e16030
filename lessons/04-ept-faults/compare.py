"""Who puts the memory there, and what it costs: a row for each way in which a fault is served."""

from collections.abc import Iterable, Sequence

from kvmlab.compare import Machine
from kvmlab.events import Event
from kvmlab.runner import Run

MACHINES = [Machine("auto")]

# A stage of lab.h, what happens in it, and who serves it.
WAYS = [
    ("touch", "memory that nobody has used", "KVM and the host's mm"),
    ("device", "access to a device", "VMM, after an exit"),
    ("absent", "slot added", "VMM, after an exit"),
    ("page", "userfaultfd, a page", "a thread of the VMM"),
    ("block", "userfaultfd, 64 KiB", "a thread of the VMM"),
    ("copy on write", "write to a read-only slot", "VMM, after an exit"),
    ("dirty", "write to a page with a log", "KVM"),
    ("taken", "memory taken away", "VMM, after an error"),
]


def table(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield "", "served by", "faults", "pages", "VMM exits", "KVM exits", "us/fault"
    for run in runs:
        for stage, what, who in WAYS:
            faults, pages = served(run, stage)
            cost = f"{microseconds(run, stage) / faults:.0f}"
            yield what, who, faults, pages, exits(run, stage), kvm_exits(run, stage), cost


def served(run: Run, stage: str) -> tuple[int, int]:
    """How often a fault had to be served, and how many pages of memory came of it."""
    accesses = run.all("access", stage=stage)
    if stage == "device":
        return len(accesses), 0
    if stage == "absent":
        added = [event for event in during(run, stage) if event.kind == "slot"]
        return len(added), sum(event.size for event in added) // 4096
    if stage in ("page", "block"):
        done = [event.kind for event in after(run, stage) if event.get("result", "done") == "done"]
        return done.count("fault"), done.count("copy")
    if stage == "taken":
        mended = len(run.all("memory fault"))
        return mended, mended
    touched = [access for access in accesses if stage == "touch" or access.is_write]
    pages = len({access.gpa // 4096 for access in touched})
    return pages, pages


def during(run: Run, stage: str) -> list[Event]:
    begin, over = run.all("begin", stage=stage)[0], run.all("over", stage=stage)[0]
    return [event for event in run.events if begin.seq < event.seq < over.seq]


def after(run: Run, stage: str) -> list[Event]:
    """What is recorded when a stage is over."""
    over = run.all("over", stage=stage)[0]
    later = [event.seq for event in run.all("begin") if event.seq > over.seq]
    return [event for event in run.events if over.seq < event.seq < [*later, run.events[-1].seq][0]]


def exits(run: Run, stage: str) -> int:
    """Without the one by which the guest says that the stage is over."""
    return len([event for event in during(run, stage) if event.kind == "exit"]) - 1


def kvm_exits(run: Run, stage: str) -> int:
    before, later = run.all("statistics", when=stage)
    return int(later.exits - before.exits) - 1


def microseconds(run: Run, stage: str) -> float:
    """In KVM_RUN, and in the VMM between two of them."""
    first, *others = [event for event in during(run, stage) if event.kind == "exit"]
    return float(sum([first.guest_ns, *(event.guest_ns + event.vmm_ns for event in others)])) / 1000
