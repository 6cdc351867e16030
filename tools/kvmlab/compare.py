"""`make compare`: a lesson on several machines, side by side. Which machines, and what of their runs stands in
the table, says the lesson's own compare.py:

    MACHINES = [Machine("svm"), Machine("svm", "npt=0")]

    def table(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
        yield "", "npt=1", "npt=0"
        yield "exits", *(run.all("statistics", when="end")[0].exits for run in runs)
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvmlab import engine as engines
from kvmlab import runner
from kvmlab.engine import Unable
from kvmlab.lesson import Lesson, UsageError
from kvmlab.runner import Run


@dataclass(frozen=True)
class Machine:
    """What a lesson is to run on. engine: its name, or auto; options: the VMM's. emulator_log: the run's
    `emulator` says what the emulator has counted, which only vmx can (emulator_log.py)."""

    engine: str
    kvm_params: str = ""
    options: tuple[str, ...] = ()
    emulator_log: bool = False


class UnfinishedError(Exception):
    """A run that did not come to its end has nothing to compare."""

    def __init__(self, run: Run, where: str) -> None:
        super().__init__(f"{run.errors.strip()}\nno table: on {where} the run ended with status {run.status}")
        self.status = run.status


def compare(lesson: Lesson, build: Path, wanted: str, seed: int) -> Iterator[str]:
    """The lines to print: each machine as its run begins, then the table. wanted: an engine, or auto for all."""
    module = lesson.module("compare")
    if not module:
        raise UsageError(f"lesson {lesson.number} has nothing to compare: no compare.py lies in {lesson.folder}")
    machines = [machine for machine in module.MACHINES if wanted in ("auto", machine.engine)]
    machines = machines or [replace(machine, engine=wanted) for machine in module.MACHINES if machine.engine == "auto"]
    if not machines:
        named = ", ".join(dict.fromkeys(machine.engine for machine in module.MACHINES))
        raise UsageError(f"ENGINE={wanted}: lesson {lesson.number} compares machines of {named}")
    on_vmx = [machine for machine in machines if machine.engine == "vmx"]
    keeps_log = any(machine.emulator_log for machine in on_vmx)
    with engines.one_vmx(keeps_log) if on_vmx else contextlib.nullcontext():
        runs = []
        for machine in machines:
            chosen, line = engines.choose(lesson, machine.engine, machine.kvm_params, trace=False)
            yield " ".join(filter(None, [line, machine.kvm_params, *machine.options]))
            with contextlib.closing(chosen):
                runs.append(_run(lesson, build, machine, chosen, seed))
    yield from aligned(module.table(runs))


def _run(lesson: Lesson, build: Path, machine: Machine, engine: engines.Engine, seed: int) -> Run:
    built = runner.lesson_built(build, lesson.name)
    trace = engine.name != "kvm"
    run = runner.run(built, machine.options, seed=seed, trace=trace, vfio=lesson.vfio, engine=engine)
    if run.lacking:
        raise Unable(engine.name, run.lacking)
    if runner.status_of(run, lesson):
        raise UnfinishedError(run, engine.name)
    return run


def aligned(rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Columns as wide as they must be: the first to the left, the others, which are numbers, to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    left, *right = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *numbers in cells:
        columns = [number.rjust(width) for number, width in zip(numbers, right, strict=True)]
        yield "  ".join([name.ljust(left), *columns]).rstrip()
