"""The same work, by the same driver, with the device emulated and passed through: who was asked how often."""

from collections.abc import Iterable, Sequence

from kvmlab.compare import Machine
from kvmlab.events import Event
from kvmlab.runner import Run

MACHINES = [Machine("auto")]

FORMS = ("emulated", "passed through")
# Stages of lab.h, and what happens in them.
WORK = {
    "attached": "",
    "read": "100 reads of a register",
    "impostor": "",
    "probed": "is it one, and does it live",
    "raised": "2 interrupts by way of a test",
    "factorial": "4 factorials",
    "dma": "6 transfers",
}


def during(run: Run, form: str, stage: str) -> list[Event]:
    stages = list(WORK)
    first, last = (run.all("stage", form=form, stage=name)[0].seq for name in (stages[stages.index(stage) - 1], stage))
    return [event for event in run.events if first < event.seq < last]


def is_of_the_lab(event: Event) -> bool:
    return event.kind == "exit" and event.get("device") in ("lab", "com1")


def exits(run: Run, form: str, stage: str) -> int:
    """Without those by which the guest speaks to its console and to the lab."""
    return sum(event.kind == "exit" and not is_of_the_lab(event) for event in during(run, form, stage))


def kvm_exits(run: Run, form: str, stage: str) -> int:
    """The same, but those that KVM has served itself, too: its own counter."""
    stages = list(WORK)
    first, last = (
        run.all("statistics", when=f"{form}, {name}")[0].exits for name in (stages[stages.index(stage) - 1], stage)
    )
    return int(last - first) - sum(map(is_of_the_lab, during(run, form, stage)))


def count(run: Run, form: str, stage: str, what: str) -> int:
    return sum(event.kind == "device" and event.what == what for event in during(run, form, stage))


def table(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield "", "doorbells", "interrupts", *(f"VMM: {form}" for form in FORMS), *(f"KVM: {form}" for form in FORMS)
    for run in runs:
        for stage, what in WORK.items():
            if what:
                rings = [count(run, FORMS[1], stage, kind) for kind in ("act", "interrupt")]
                costs = [cost(run, form, stage) for cost in (exits, kvm_exits) for form in FORMS]
                yield what, *rings, *costs
