"""What `make compare LESSON=5` shows: which instructions of the guest cost a VM exit with EPT and without, what VPID
changes, and on which machine an entry that nobody has dropped can be seen."""

from collections.abc import Callable, Iterable, Sequence

from kvmlab.compare import Machine
from kvmlab.runner import Run

MACHINES = [
    Machine("vmx", f"ept={ept} vpid={vpid}", emulator_log=True) for ept, vpid in ((1, 1), (1, 0), (0, 1), (0, 0))
]


def parameter(run: Run, name: str) -> str:
    """As sysfs has it."""
    return str(run.all("parameters")[0].get(name, "-"))


def counter(run: Run, name: str) -> int | str:
    """KVM's own, at the end of the run."""
    return run.all("statistics", when="end")[0].get(name, "-")  # type: ignore[no-any-return]


def exits(run: Run, reason: str) -> int:
    return run.count("trace", point="kvm_exit", reason=reason)


def executed(run: Run, operation: str) -> int:
    return run.count("operation", operation=operation)


ROWS: list[tuple[str, Callable[[Run], object]]] = [
    ("kvm_intel: ept", lambda run: parameter(run, "ept")),
    ("kvm_intel: vpid", lambda run: parameter(run, "vpid")),
    ("the guest executed INVLPG", lambda run: executed(run, "INVLPG")),
    ("  exits of KVM for it", lambda run: exits(run, "INVLPG")),
    ("the guest executed INVPCID", lambda run: executed(run, "INVPCID")),
    ("  exits of KVM for it", lambda run: exits(run, "INVPCID")),
    ("the guest loaded CR3 or CR4", lambda run: executed(run, "MOV to CR3") + executed(run, "MOV to CR4")),
    ("  exits of KVM for control registers", lambda run: exits(run, "CR_ACCESS")),
    ("exits of KVM for page faults", lambda run: exits(run, "EXCEPTION_NMI")),
    ("exits of KVM for EPT violations", lambda run: exits(run, "EPT_VIOLATION")),
    ("KVM's counters: exits", lambda run: counter(run, "exits")),
    ("  tlb_flush", lambda run: counter(run, "tlb_flush")),
    ("  invlpg", lambda run: counter(run, "invlpg")),
    ("  mmu_unsync", lambda run: counter(run, "mmu_unsync")),
    ("the emulator's log: VM entries", lambda run: run.emulator["entries"]),
    ("  page walks of the guest", lambda run: run.emulator["guest_walks"]),
    ("  page walks of the host, between them", lambda run: run.emulator["host_walks"]),
]


def table(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield "", *(run.kvm_params.replace(" ", ", ") for run in runs)
    for name, value in ROWS:
        yield name, *(value(run) for run in runs)
    yield "what a page shows that has got another frame, after", *("" for _ in runs)
    for trials in zip(*(run.all("tried") for run in runs), strict=True):
        must = "" if not trials[0].drops else " (must be new)"
        yield f"  {trials[0].name}{must}", *("old" if trial.is_old else "new" for trial in trials)
