"""The checks of lesson 7. The record says in which order lines rose, masks were set, EOI was said and
interrupts were injected; a controller that does as lab.h says is led through the same events, and at
each of them it is known what the host half should have done. When a window opens is not asserted:
that differs from engine to engine."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, how_it_ended, require
from kvmlab.runner import Run

LINES = 16
KINDS = ("calm", "off", "masked", "nested", "idle")
ROUNDS_OF_A_KIND = 5
LEAST_INTERRUPTS = 100
LAB_ROUND, LAB_STEP, LAB_HANDLER, LAB_WORK, LAB_LOOK = range(0x510, 0x515)
STI_HLT = "fbf4"
CHOICES = ("priority", "masked", "nested", "prompt", "window", "withdrawn")


@dataclass
class Round:
    """What happened in one round."""

    begin: Event
    risen: list[int] = field(default_factory=list)
    injected: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.risen) == self.begin.lines and not Counter(self.risen) - Counter(self.injected)


@dataclass
class Finding:
    """Something that should not have been done, or should have."""

    about: str
    what: str
    near: Event


def names(lines: Iterable[int]) -> str:
    listed = [str(line) for line in lines]
    if len(listed) == 1:
        return f"line {listed[0]}"
    return "lines " + ", ".join(listed[:-1]) + " and " + listed[-1]


def members(lines: int) -> list[int]:
    return [line for line in range(LINES) if lines >> line & 1]


class Replay:
    """The controller as it should be, led through the events of a run."""

    def __init__(self, run: Run) -> None:
        self.findings: list[Finding] = []
        self.rounds: list[Round] = []
        self.irr = self.isr = self.imr = 0
        self.base = 0
        self.rose: dict[int, Event] = {}  # the last time for each line
        self.taken: dict[int, Event] = {}
        self.injected: list[Event] = []  # since the last entry
        self.delivered: Event | None = None  # whose handler has not begun yet
        self.handlers: list[tuple[int, list[Event]]] = []  # nested; what rose while each worked
        self.last_change: Event | None = None  # of the controller
        self.differing: dict[tuple[str, int], str] = {}  # bits of the host half's registers: whose fault
        self.rescue: Event | None = None
        self.engine = run.engine
        for event in run.events:
            if follow := getattr(self, f"on_{event.kind}", None):
                follow(event)

    def find(self, about: str, what: str, near: Event) -> None:
        """What follows from registers that are wrong already is not held against the decisions."""
        if not (self.differing and about in CHOICES):
            self.findings.append(Finding(about, what, near))

    def about(self, about: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.about == about), None)

    def deliverable(self) -> int | None:
        """The line that the controller presents."""
        for line in range(LINES):
            if self.isr >> line & 1:
                return None
            if (self.irr & ~self.imr) >> line & 1:
                return line
        return None

    def on_plan(self, event: Event) -> None:
        self.base = event.base

    def on_round(self, event: Event) -> None:
        self.rounds.append(Round(event))

    def on_rise(self, event: Event) -> None:
        self.irr |= 1 << event.line
        self.rose[event.line] = self.last_change = event
        if self.rounds:
            self.rounds[-1].risen.append(event.line)
        if event.when == "work" and self.handlers:
            self.handlers[-1][1].append(event)

    def on_mask(self, event: Event) -> None:
        self.imr = event.imr

    # ---- injection ----

    def on_inject(self, event: Event) -> None:
        if event.type != "interrupt":
            self.find("vector", f"an event of type {event.type} was injected", event)
            return
        self.check_moment(event)
        self.injected.append(event)
        line = event.vector - self.base
        if not 0 <= line < LINES:
            lines = f"lines 0 to 15 have the vectors {self.base:#x} to {self.base + LINES - 1:#x}"
            self.find("vector", f"vector {event.vector:#x} was injected: {lines}", event)
            return
        self.check_choice(event, line)
        self.irr &= ~(1 << line)
        self.isr |= 1 << line
        self.taken[line] = self.last_change = event
        if self.rounds:
            self.rounds[-1].injected.append(line)

    def check_moment(self, event: Event) -> None:
        if not event.ready:
            why = "in an interrupt shadow: RFLAGS.IF was 1, ready_for_interrupt_injection was 0"
            why = why if event.if_flag else "while RFLAGS.IF was 0"
            self.find("ready", f"vector {event.vector:#x} was injected {why} (event {event.seq})", event)
        if self.injected:
            first = self.injected[0]
            what = f"vector {event.vector:#x} was injected (event {event.seq}) before vector {first.vector:#x}"
            self.find("one", f"{what} (event {first.seq}) had entered the guest: KVM has room for one", event)

    def check_choice(self, event: Event, line: int) -> None:
        """Was it this line's turn?"""
        first = self.deliverable()
        in_service = members(self.isr & ((2 << line) - 1))
        if not self.irr >> line & 1 and line not in self.rose:
            what = f"vector {event.vector:#x} was injected (event {event.seq})"
            self.find("vector", f"{what}, which is that of line {line}, but line {line} has never risen", event)
        elif not self.irr >> line & 1:
            what = f"line {line} was injected (event {event.seq}), but had not risen since it was last injected"
            self.find("twice", f"{what} (event {self.taken[line].seq})", event)
        elif self.imr >> line & 1:
            self.find("masked", f"line {line} was injected (event {event.seq}) while IMR had it masked", event)
        elif in_service:
            above = "it was itself" if in_service[0] == line else f"line {in_service[0]}, of higher priority, was"
            self.find("nested", f"line {line} was injected (event {event.seq}) while {above} in service", event)
        elif first is not None and first < line:
            rose = f"which rose at event {self.rose[first].seq}"
            earlier = " first" if self.rose[first].seq < self.rose[line].seq else ""
            what = f"line {line} was served (event {event.seq}) before line {first}"
            self.find("priority", f"{what}, {rose}{earlier} and has higher priority", event)

    # ---- entry ----

    def on_rescue(self, event: Event) -> None:
        self.rescue = event
        if self.engine != "svm":  # where the shadow of STI may be lost: tests/deviations.toml
            what = f"the guest slept with nothing to wake it (event {event.seq})"
            self.find("idle", f"{what}: what it waited for was served between its look and its HLT", event)

    def on_entry(self, event: Event) -> None:
        line = self.deliverable()
        if line is None and event.window and not self.rescue:
            self.find("withdrawn", f"an interrupt window was requested (event {event.seq}), {self.idleness()}", event)
        elif line is not None and not self.injected:
            what = f"line {line} waited (it rose at event {self.rose[line].seq}), and"
            if event.ready:
                self.find("prompt", f"{what} the guest was ready, but nothing was injected (event {event.seq})", event)
            elif not event.window:
                what = f"{what} the guest was not ready, but no interrupt window was requested (event {event.seq})"
                self.find("window", what, event)
        if self.injected:
            self.delivered = self.injected[-1]
        self.injected = []
        self.rescue = None

    def idleness(self) -> str:
        """Why there is nothing to wait for."""
        if not self.irr:
            return "but no line was waiting" + (" any more" if self.taken else "")
        if not self.irr & ~self.imr:
            return f"but {names(members(self.irr))} could not go: masked"
        served, waiting = members(self.isr)[0], members(self.irr & ~self.imr)
        return f"but {names(waiting)} had to wait for the EOI of line {served}, which was in service"

    # ---- what the guest does ----

    def on_exit(self, event: Event) -> None:
        if event.get("port") in (LAB_ROUND, LAB_STEP, LAB_LOOK):
            self.main_reached(event)
        if event.get("port") == LAB_HANDLER and event.is_write:
            self.handler_begin(event, int(event.data, 16))
        if event.get("port") == LAB_WORK and event.is_write:
            self.handler_work(event, int(event.data, 16))
        if event.reason == "HLT" and not event.if_flag:
            what = f"the guest halted while RFLAGS.IF was 0 (event {event.seq})"
            self.find("idle", f"{what}: no interrupt can wake it", event)

    def main_reached(self, event: Event) -> None:
        """The main code runs only when no handler does."""
        for line, _ in self.handlers:
            what = f"the handler of line {line} had returned (seen at event {event.seq})"
            self.find("eoi", f"{what}, and had not said EOI", event)
        self.handlers = []
        if event.port == LAB_LOOK and event.if_flag:
            what = f"the guest looked whether a line is due while RFLAGS.IF was 1 (event {event.seq})"
            self.find("idle", f"{what}: an interrupt between this look and the HLT is slept through", event)

    def handler_work(self, event: Event, line: int) -> None:
        if not event.if_flag:
            what = f"the handler of line {line} worked while RFLAGS.IF was 0 (event {event.seq})"
            self.find("interrupts", f"{what}: no line of higher priority can interrupt it", event)
        if not self.isr >> line & 1:
            what = f"the handler of line {line} worked (event {event.seq}) when it was not in service"
            self.find("eoi", f"{what}: EOI came first, and lets lower lines interrupt the work", event)

    def handler_begin(self, event: Event, line: int) -> None:
        self.handlers.append((line, []))
        wanted, self.delivered = self.delivered, None
        if wanted is None:
            what = f"the handler of line {line} began (event {event.seq})"
            self.find("vector", f"{what}, but nothing had been injected for it", event)
        elif wanted.vector - self.base != line:
            what = f"vector {wanted.vector:#x} was injected (event {wanted.seq})"
            self.find("vector", f"{what}, but the handler of line {line} began (event {event.seq})", event)

    def on_eoi(self, event: Event) -> None:
        line, risen = self.handlers.pop() if self.handlers else (None, [])
        if not self.isr:
            self.find("eoi", f"EOI was said (event {event.seq}), but no line was in service", event)
        elif event.if_flag:
            what = f"the handler of line {line} said EOI while RFLAGS.IF was 1 (event {event.seq})"
            self.find("eoi", f"{what}: lower lines can pile up on its stack", event)
        for rise in risen:
            if line is not None and rise.line < line and self.irr >> rise.line & 1:
                what = f"line {rise.line} rose while the handler of line {line} worked (event {rise.seq})"
                self.find("interrupts", f"{what}, and had not interrupted it when it said EOI", event)
        self.isr &= self.isr - 1
        self.last_change = event

    def on_halt(self, event: Event) -> None:
        if event.code != STI_HLT:
            what = f"the guest halted (event {event.seq}), and the instruction before HLT was not STI"
            self.find("idle", f"{what}: an interrupt between the two is slept through", event)

    # ---- the host half's registers ----

    def on_pic(self, event: Event) -> None:
        cause = self.last_change
        for name, seen, expected in (("IRR", event.irr, self.irr), ("ISR", event.isr, self.isr)):
            for line in members(seen ^ expected):
                what = f"{self.history(line)}: its bit in {name} should be {expected >> line & 1}"
                about = "eoi" if cause and cause.kind == "eoi" and name == "ISR" else "registers"
                about = self.differing.setdefault((name, line), about)
                self.find(about, f"{what}, and is {seen >> line & 1} (event {event.seq})", event)
            for line in members(~(seen ^ expected)):
                self.differing.pop((name, line), None)

    def history(self, line: int) -> str:
        """Where this line has got to."""
        done = [f"rose (event {self.rose[line].seq})"] if line in self.rose else []
        if line in self.taken and (not done or self.taken[line].seq > self.rose[line].seq):
            done.append(f"was injected (event {self.taken[line].seq})")
            if not self.isr >> line & 1:
                done.append("was ended by EOI")
        elif done:
            done.append("has not been injected since")
        return f"line {line} " + (", ".join(done) or "never rose")


@pytest.fixture(scope="module")
def replay(run: Run) -> Replay:
    return Replay(run)


def judge(run: Run, replay: Replay, about: str, upto: str) -> None:
    """Nothing of this sort was found, in a run that has come through all rounds up to this kind."""
    __tracebackhide__ = True
    if finding := replay.about(about):
        fail(run, finding.what, near=finding.near)
    come_through(run, replay, upto)


def come_through(run: Run, replay: Replay, upto: str) -> None:
    __tracebackhide__ = True
    for number in range(ROUNDS_OF_A_KIND * (KINDS.index(upto) + 1)):
        if number >= len(replay.rounds) or not replay.rounds[number].is_complete:
            incomplete(run, replay, number)


def incomplete(run: Run, replay: Replay, number: int) -> NoReturn:
    """The run ended early. What it did wrong may belong to another check."""
    __tracebackhide__ = True
    what = f"the run did not come through round {number} ({KINDS[number // ROUNDS_OF_A_KIND]})"
    begin = replay.rounds[number].begin.seq if number < len(replay.rounds) else 0
    since = [finding for finding in replay.findings if finding.near.seq > begin]
    for finding in [*since, *replay.findings]:
        fail(run, what, finding.what, near=finding.near)
    if number >= len(replay.rounds):
        require(run, what, "round", round=number)
    missing = set(replay.rounds[number].risen) - set(replay.rounds[number].injected)
    seen = f"never injected: {names(sorted(missing))}" if missing else "not all its lines rose"
    fail(run, what, seen, how_it_ended(run))


def test_injected_vector_calls_the_handler_of_its_line(run: Run, replay: Replay) -> None:
    judge(run, replay, "vector", "calm")


def test_nothing_is_injected_while_the_guest_is_not_ready(run: Run, replay: Replay) -> None:
    judge(run, replay, "ready", "off")


def test_one_interrupt_is_injected_for_an_entry(run: Run, replay: Replay) -> None:
    judge(run, replay, "one", "off")


def test_no_request_is_delivered_twice(run: Run, replay: Replay) -> None:
    judge(run, replay, "twice", "off")


def test_line_is_acknowledged_when_it_is_injected(run: Run, replay: Replay) -> None:
    judge(run, replay, "registers", "off")


def test_highest_priority_goes_first(run: Run, replay: Replay) -> None:
    judge(run, replay, "priority", "off")


def test_masked_lines_wait_until_they_are_unmasked(run: Run, replay: Replay) -> None:
    judge(run, replay, "masked", "masked")


def test_higher_line_interrupts_a_handler(run: Run, replay: Replay) -> None:
    judge(run, replay, "interrupts", "nested")


def test_line_in_service_holds_back_itself_and_lower_lines(run: Run, replay: Replay) -> None:
    judge(run, replay, "nested", "nested")


def test_eoi_ends_the_handler_that_began_last(run: Run, replay: Replay) -> None:
    judge(run, replay, "eoi", "nested")


def test_waiting_line_goes_as_soon_as_the_guest_is_ready(run: Run, replay: Replay) -> None:
    judge(run, replay, "prompt", "calm")


def test_window_is_requested_while_a_line_waits(run: Run, replay: Replay) -> None:
    judge(run, replay, "window", "off")


def test_window_request_is_withdrawn_when_nothing_can_go(run: Run, replay: Replay) -> None:
    judge(run, replay, "withdrawn", "masked")


def test_idle_guest_sleeps_through_no_interrupt(run: Run, replay: Replay) -> None:
    judge(run, replay, "idle", "idle")
    halts = run.all("exit", reason="HLT")
    if len(halts) < ROUNDS_OF_A_KIND:
        fail(run, "the idle guest sleeps", "expected HLT in each idle round", f"seen     {len(halts)} exits by HLT")


def test_every_request_is_served_once(run: Run, replay: Replay) -> None:
    come_through(run, replay, "idle")
    risen, injected = len(run.all("rise")), len(run.all("inject"))
    expect(run, "the number of interrupts injected", expected=str(risen), seen=str(injected))
    if injected < LEAST_INTERRUPTS:
        fail(run, f"only {injected} interrupts in the run")
