"""The guest of lesson 3 is a hypervisor that keeps shadows. Without EPT or NPT, so is KVM under it: what either
of them does about page faults, side by side."""

from collections.abc import Iterable, Sequence

from kvmlab.compare import Machine
from kvmlab.runner import Run

MACHINES = [Machine("svm"), Machine("svm", "npt=0"), Machine("vmx"), Machine("vmx", "ept=0")]

# As KVM's tracepoints call the reasons: on AMD, on Intel.
REASONS = {
    "second-level fault": ("npf", "EPT_VIOLATION"),
    "page fault": ("PF", "EXCEPTION_NMI"),
    "MOV to or from CR3": ("write_cr3", "read_cr3", "CR_ACCESS"),
    "INVLPG": ("invlpg", "INVLPG"),
    "I/O": ("io", "IO_INSTRUCTION"),
}
COUNTERS = ("pf_taken", "pf_guest", "pf_fixed", "pf_emulate", "mmu_pte_write", "invlpg", "tlb_flush")


def exits(run: Run, reasons: Sequence[str]) -> int:
    return sum(run.count("trace", point="kvm_exit", reason=reason) for reason in reasons)


def table(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield "", *(f"{run.engine} {run.kvm_params}".strip() for run in runs)
    yield "exits, by KVM's tracepoint", *(run.count("trace", point="kvm_exit") for run in runs)
    for name, reasons in REASONS.items():
        yield f"  {name}", *(exits(run, reasons) for run in runs)
    for name in COUNTERS:
        yield f"KVM's counter {name}", *(statistics(run)[name] for run in runs)


def statistics(run: Run) -> dict[str, int]:
    event = run.one("statistics", when="end")
    assert event, "a run that has come to its end has its counters"
    return event.fields
