"""Run an image in the VMM and collect all that can be known about the run."""

import functools
import os
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmlab import events as record
from kvmlab import source
from kvmlab.engine import Engine, Kvm
from kvmlab.events import Event
from kvmlab.lesson import Lesson
from kvmlab.machine import TIME_LIMIT, Job, Outcome
from kvmlab.trace import merge

EVENTS = "events.jsonl"


@dataclass
class Run:
    """What one run of the VMM left: its status, what it printed, and what it recorded."""

    status: int
    output: str
    errors: str
    kernel_log: str = ""
    seed: int = 0
    engine: str = Kvm.name
    kvm_params: str = ""  # how its KVM was loaded
    events: list[Event] = field(default_factory=list)
    # What the emulator itself has counted (emulator_log.py), where it was asked to.
    emulator: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def _by_kind(self) -> dict[str, list[Event]]:
        """A record may have thousands of events, and checks ask for a few of them hundreds of times."""
        found = defaultdict(list)
        for event in self.events:
            found[event.kind].append(event)
        return found

    def _matching(self, kind: str, fields: dict[str, object]) -> Iterator[Event]:
        for event in self._by_kind.get(kind, []):
            if all(event.get(name) == value for name, value in fields.items()):
                yield event

    def all(self, kind: str, /, **fields: object) -> list[Event]:
        """The events of this kind whose fields have these values."""
        return list(self._matching(kind, fields))

    def count(self, kind: str, /, **fields: object) -> int:
        return len(self.all(kind, **fields))

    def one(self, kind: str, /, **fields: object) -> Event | None:
        """The first of them, or None."""
        return next(self._matching(kind, fields), None)

    @property
    def lacking(self) -> str:
        """What the lesson has found to be missing on this machine; "" if nothing."""
        found = self.one("cannot") or self.one("panic", reason="cannot")
        return str(found.message) if found else ""

    @property
    def end(self) -> Event:
        """How the run ended, which only a VMM that was killed does not say."""
        found = self.one("end")
        assert found, f"the record has no end: the VMM was killed (status {self.status})"
        return found


@dataclass(frozen=True)
class Built:
    """A lesson or a test guest, ready to run: the image, and the VMM that its host half is in."""

    vmm: Path
    image: Path


def status_of(run: Run, lesson: Lesson) -> int:
    """The VMM's status; but 0 where the run ended in the crash that the lesson is about."""
    end = run.one("end")
    return 0 if end and end.how == lesson.ends else run.status


def lesson_built(build: Path, name: str) -> Built:
    folder = build / "lessons" / name
    own = folder / "vmm"
    return Built(own if own.exists() else build / "vmm" / "vmm", folder / "image.elf")


def run(
    built: Built,
    options: Sequence[str] = (),
    *,
    seed: int = 0,
    stdin: bytes = b"",
    time_limit: float = TIME_LIMIT,
    trace: bool = False,
    vfio: bool = False,
    engine: Engine | None = None,
) -> Run:
    """Run the image to its end, with everything captured; on this machine's KVM if no engine is named."""
    engine = engine or Kvm()
    trace = trace or engine.trace
    options = [*options, f"--time-limit={time_limit}"]
    job = _job(built, engine, options, seed, stdin=stdin, time_limit=time_limit, trace=trace, vfio=vfio)
    outcome = engine.run(job)
    return _run(outcome, seed, engine, _events(outcome))


def run_on_terminal(
    built: Built, *, seed: int, events: Path, trace: bool = False, vfio: bool = False, engine: Engine
) -> Run:
    """Run the image with the user's own terminal as its console, and leave the events in this file."""
    options = ["--summary", f"--time-limit={TIME_LIMIT}"]
    trace = trace or engine.trace
    outcome = engine.run(_job(built, engine, options, seed, watched=True, trace=trace, vfio=vfio))
    run = _run(outcome, seed, engine, _events(outcome, events))
    sys.stdout.flush()
    sys.stderr.write(shown_errors(built, run.errors))
    sys.stderr.flush()
    return run


def _job(built: Built, engine: Engine, options: Sequence[str], seed: int, **how: Any) -> Job:
    command = ["./vmm", f"--seed={seed}", f"--events={EVENTS}"]
    # `make cover` wants what the guest sends of its counters (guest/coverage.c). The emulated machines do
    # not have this folder.
    streams = os.environ.get("KVMLAB_GUEST_COVERAGE")
    if streams and engine.name == Kvm.name:
        command.append(f"--debugcon={streams}/{uuid.uuid4()}")
    return Job([*command, *options, "image.elf"], {"vmm": built.vmm, "image.elf": built.image}, [EVENTS], **how)


def _events(outcome: Outcome, path: Path | None = None) -> list[Event]:
    """The record of the run, with the trace of its engine merged in; left in this file, if there is one."""
    lines = outcome.results.get(EVENTS, b"")
    if lines and outcome.trace:
        lines = merge(lines, outcome.trace)
    if path and lines:
        path.write_bytes(lines)
    return record.parse(lines)


def _run(outcome: Outcome, seed: int, engine: Engine, events: list[Event]) -> Run:
    # As a shell has it: 128 and the number of the signal.
    status = outcome.status if outcome.status >= 0 else 128 - outcome.status
    output, errors = (text.decode(errors="replace") for text in (outcome.output, outcome.errors))
    by = engine.name, engine.params
    return Run(status, output, errors, outcome.kernel_log, seed, *by, events, outcome.emulator)


def shown_errors(built: Built, errors: str) -> str:
    """What the VMM said, with a line of C in place of the calls that it has listed."""
    place = source.of_host(built.vmm, errors)
    return source.CALLS.sub(lambda _: f"\nvmm: {place}" if place else "", errors)
