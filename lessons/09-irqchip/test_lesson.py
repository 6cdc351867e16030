"""The checks of lesson 9: what the interrupt controller holds, in KVM and in the VMM, whenever the guest
touches a device, and what each way to interrupt costs in exits."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.runner import Run

# enum device of lab.h
SELF, TIMER, LOW, HIGH, EDGE, LEVEL, BELL, NMI = range(8)
NAMES = ("self", "timer", "low", "high", "edge", "level", "bell", "nmi")

# enum stage of lab.h
STAGES = (
    "the guest has interrupted itself",
    "the timer has run down",
    "the message devices have sent",
    "the task priority holds a message back",
    "it holds nothing back any more",
    "a message was an NMI",
    "the redirection entries are written",
    "the edge device has interrupted",
    "the level device has interrupted",
    "both lines are masked",
    "both lines are unmasked again",
    "the bell is about to ring, through the VMM",
    "the bell is about to ring, inside KVM",
    "the end",
)
(
    AFTER_SELF,
    AFTER_TIMER,
    AFTER_MESSAGES,
    HELD_BACK,
    RELEASED,
    AFTER_NMI,
    AFTER_LINES,
    AFTER_EDGE,
    AFTER_LEVEL,
    MASKED,
    UNMASKED,
    BEFORE_BELL,
    BEFORE_FAST_BELL,
    AT_THE_END,
) = range(1, 15)

TAKE = 0x610
LAPIC_EOI, LAPIC_ICR_LOW = 0xFEE000B0, 0xFEE00300
LOGICAL, ACTIVE_LOW, REMOTE_IRR, LEVEL_TRIGGERED, IS_MASKED = 1 << 11, 1 << 13, 1 << 14, 1 << 15, 1 << 16
RINGS = 100

Rerun = Callable[..., Run]


@dataclass(frozen=True)
class Plan:
    """What the seed asks for (lab.h), as the host half recorded it."""

    event: Event

    def vector(self, device: int) -> int:
        return bytes.fromhex(self.event.vectors)[device]

    def __getattr__(self, name: str) -> int:
        value: int = getattr(self.event, name)
        return value

    @property
    def address(self) -> int:
        """Of a message to this CPU."""
        return 0xFEE00000 | self.logical_id << 12 | 1 << 2

    def data(self, device: int) -> int:
        return self.vector(device) | (3 << 14 if device == LEVEL else 0)

    def entry(self, device: int) -> int:
        """The redirection entry of a line."""
        return self.logical_id << 56 | LOGICAL | self.vector(device) | (LEVEL_TRIGGERED if device == LEVEL else 0)


def vectors(field: str) -> list[int]:
    return list(bytes.fromhex(field))


def stage(run: Run, number: int) -> Event:
    return require(run, f"the guest reaches stage {number}: {STAGES[number - 1]}", "stage", stage=number)


def since(run: Run, first: int, last: int) -> list[Event]:
    """What happened between these two stages; up to the end of the run if it did not reach the second."""
    start, end = stage(run, first), run.one("stage", stage=last)
    return [event for event in run.events if start.seq < event.seq and (not end or event.seq < end.seq)]


def taken(events: list[Event]) -> list[Event]:
    """The guest has served a device; the state of its local APIC at that moment."""
    return [event for event in events if event.kind == "taken"]


def served_in(events: list[Event]) -> list[str]:
    """The devices that were served, in order; of an interrupt that is no device's, the vector."""
    served = {event.seq: NAMES[event.device] for event in events if event.kind == "taken"}
    strays = {event.seq: f"vector {event.vector:#x}, of no device" for event in events if event.kind == "stray"}
    return [name for _, name in sorted((served | strays).items())]


def expect_in_service(run: Run, events: list[Event]) -> None:
    """Its vector was in service then. A KVM without VMX and SVM does not show it (tests/deviations.toml)."""
    __tracebackhide__ = True
    for event in events if run.engine != "kvm" else []:
        what = f"the vectors in service while device {NAMES[event.device]} was served"
        expect(run, what, expected=[event.vector], seen=vectors(event.in_service), near=event)


# ---- the end of an interrupt ----


def outcome(events: list[Event], take: int) -> list[str]:
    """What the guest did about an interrupt, as the exits tell: it served the device, it ended the interrupt."""
    done = []
    for event in events:
        if event.kind == "exit" and event.get("port") == take:
            done.append("served")
        elif event.kind == "exit" and event.get("gpa") == LAPIC_EOI:
            done.append("ended")
    return done


def expect_ended(run: Run, plan: Plan) -> None:
    """run: with the local APIC in the VMM, where each write to its EOI register is an exit."""
    __tracebackhide__ = True
    require(run, "with --irqchip=none: the guest has interrupted itself", "inject", type="interrupt")
    marks = [event for event in run.events if event.kind in ("inject", "stage", "end") and event.get("type") != "nmi"]
    devices = {plan.vector(device): device for device in range(NMI)}
    for mark, following in pairwise(marks):
        device = devices.get(mark.get("vector"), BELL)
        if device == BELL:  # is only counted
            continue
        between = [event for event in run.events if mark.seq < event.seq < following.seq]
        what = f"with --irqchip=none: what the guest did about vector {mark.vector:#x}, of device {NAMES[device]}"
        seen = outcome(between, TAKE + 4 * device)
        expect(run, what, expected="served, ended", seen=", ".join(seen) or "neither served nor ended", near=mark)


@pytest.fixture
def user_space(rerun: Rerun) -> Run:
    """The same guest with the whole interrupt controller in the VMM."""
    return rerun("--irqchip=none")


@pytest.fixture
def plan(run: Run, user_space: Run) -> Plan:
    """The plan, if interrupts are ended: where one is not, nothing that follows it is worth a look."""
    found = Plan(require(run, "the plan of this seed", "plan"))
    expect_ended(user_space, found)
    return found


def test_every_interrupt_is_served_and_then_ended(run: Run, user_space: Run, plan: Plan) -> None:
    expect_ended(user_space, plan)
    expect(run, "the vectors in service afterwards", expected=[], seen=vectors(stage(run, AFTER_SELF).in_service))
    expect_in_service(run, run.all("taken", device=SELF))


# ---- the local APIC ----


def test_self_interrupt_arrives_once(run: Run, user_space: Run, plan: Plan) -> None:
    stage(run, AFTER_SELF)
    sent = [event for event in user_space.all("exit", gpa=LAPIC_ICR_LOW) if event.is_write]
    data = [int.from_bytes(bytes.fromhex(event.data), "little") for event in sent]
    # Fixed delivery, to self; of edge and level, asserted or not, only an edge means anything here.
    what = "with --irqchip=none: the writes to the ICR, without bit 14"
    expect(run, what, expected=[1 << 18 | plan.vector(SELF)], seen=[value & ~(1 << 14) for value in data])
    first = [event for event in run.events if event.seq < stage(run, AFTER_SELF).seq]
    expect(run, "the devices served in this stage", expected=["self"], seen=served_in(first))


def test_timer_runs_down_and_interrupts_once(run: Run, plan: Plan) -> None:
    stage(run, AFTER_TIMER)
    timer = require(run, "the state of the timer", "timer")
    expect(run, "the timer's entry in the local vector table", expected=plan.vector(TIMER), seen=timer.lvt, near=timer)
    expect(run, "the initial count", expected=plan.timer_count, seen=timer.initial, near=timer)
    expect(run, "the divide configuration (0xb: by 1)", expected=0xB, seen=timer.divide, near=timer)
    seen = served_in(since(run, AFTER_SELF, AFTER_TIMER))
    expect(run, "the devices served in this stage", expected=["timer"], seen=seen)


def test_message_arrives_at_the_vector_it_names(run: Run, plan: Plan) -> None:
    events = since(run, AFTER_TIMER, AFTER_MESSAGES)
    stage(run, AFTER_MESSAGES)
    sent = [event for event in events if event.kind == "message"]
    expected = [LOW, HIGH] * plan.messages
    for message, device in zip(sent, expected, strict=False):
        what = f"the message of device {NAMES[device]}: its "
        expect(run, what + "address", expected=plan.address, seen=message.address, near=message)
        expect(run, what + "data", expected=plan.data(device), seen=message.get("data"), near=message)
        expect(run, what + "acceptance by a local APIC", expected=True, seen=bool(message.accepted), near=message)
    expect(run, "the devices served", expected=[NAMES[device] for device in expected], seen=served_in(events))
    expect_in_service(run, taken(events))


def test_task_priority_holds_back_its_class_and_those_below(run: Run, plan: Plan) -> None:
    held, released = stage(run, HELD_BACK), stage(run, RELEASED)
    seen = served_in(since(run, AFTER_MESSAGES, HELD_BACK))
    what = "the devices served: low has sent first, then high, and low is to be held back"
    expect(run, what, expected=["high"], seen=seen, near=held)
    seen_class = held.task_priority >> 4
    expect(run, "the class of the task priority", expected=plan.vector(LOW) >> 4, seen=seen_class, near=held)
    expect(run, "the vectors requested", expected=[plan.vector(LOW)], seen=vectors(held.requested), near=held)
    seen = served_in(since(run, HELD_BACK, RELEASED))
    expect(run, "the devices served when nothing is held back", expected=["low"], seen=seen, near=released)


@pytest.mark.usefixtures("plan")
def test_message_can_be_an_nmi(run: Run) -> None:
    stage(run, AFTER_NMI)
    events = since(run, RELEASED, AFTER_NMI)
    messages = [event for event in events if event.kind == "message"]
    (message,) = messages
    what = "the delivery mode in the message's data, bits 10:8 (4: NMI)"
    expect(run, what, expected=4, seen=message.get("data") >> 8 & 7, near=message)
    expect(run, "the devices served, with interrupts off", expected=["nmi"], seen=served_in(events))
    (served,) = taken(events)
    entry = next(event for event in events if event.kind == "entry" and event.seq > served.seq)
    expect(run, "NMIs are masked while it is served", expected=1, seen=entry.nmi_masked, near=entry)


# ---- lines ----


def test_redirection_entries_say_what_the_lines_are(run: Run, plan: Plan) -> None:
    state = stage(run, AFTER_LINES)
    for name, device in (("edge", EDGE), ("level", LEVEL)):
        what = f"the redirection entry of pin {plan.event.fields[name + '_pin']}, of the {name} device"
        expect(run, what, expected=plan.entry(device), seen=state.fields[name + "_entry"], near=state)


def test_each_pulse_is_one_interrupt(run: Run, plan: Plan) -> None:
    stage(run, AFTER_EDGE)
    events = since(run, AFTER_LINES, AFTER_EDGE)
    what = f"the devices served, after {plan.edges} pulses"
    expect(run, what, expected=["edge"] * plan.edges, seen=served_in(events))
    expect_in_service(run, taken(events))


def expect_level_interrupts(run: Run, plan: Plan) -> None:
    __tracebackhide__ = True
    events = [event for event in taken(since(run, AFTER_EDGE, AFTER_LEVEL)) if event.device == LEVEL]
    useful = [event for event in events if not event.has_nothing]
    what = f"the interrupts of the level device, which has {plan.requests} requests"
    near = events[-1] if events else None
    expect(run, what, expected=str(plan.requests), seen=str(len(useful)), near=near)
    for event in useful:
        is_level = event.vector in vectors(event.level_triggered)
        expect(run, "the interrupt came level-triggered (TMR)", expected=True, seen=is_level, near=event)
    expect_in_service(run, useful)


def expect_level_low(run: Run) -> None:
    __tracebackhide__ = True
    events = [event for event in taken(since(run, AFTER_EDGE, AFTER_LEVEL)) if event.device == LEVEL]
    if not events:
        fail(run, "the interrupts of the level device", "expected some", "seen     none")
    in_vain = [event for event in events if event.has_nothing]
    what = "the interrupts of the level device that found nothing to be taken"
    expect(run, what, expected="0", seen=str(len(in_vain)), near=in_vain[0] if in_vain else None)
    state = stage(run, AFTER_LEVEL)
    expect(run, "the level line is high", expected=False, seen=bool(state.level_is_high), near=state)
    seen = bool(state.level_entry & REMOTE_IRR)
    expect(run, "its redirection entry waits for the end of an interrupt", expected=False, seen=seen, near=state)


def test_level_line_interrupts_until_its_device_is_served(run: Run, plan: Plan) -> None:
    expect_level_interrupts(run, plan)


@pytest.mark.usefixtures("plan")
def test_level_line_stays_low_when_nothing_is_left(run: Run) -> None:
    expect_level_low(run)


def test_masked_edge_is_lost_and_masked_level_waits(run: Run, plan: Plan) -> None:
    """If the level line works without a mask: where it does not, what it does with one differs by kernel."""
    expect_level_interrupts(run, plan)
    expect_level_low(run)
    masked = stage(run, MASKED)
    for name in ("edge", "level"):
        is_masked = bool(masked.fields[name + "_entry"] & IS_MASKED)
        expect(run, f"the pin of the {name} device is masked", expected=True, seen=is_masked, near=masked)
    stage(run, UNMASKED)
    seen = served_in(since(run, MASKED, UNMASKED))
    what = "the devices served: both had something while their pins were masked"
    expect(run, what, expected=["level"], seen=seen)


# ---- the I/O APIC in the VMM ----


def test_split_machine_sends_redirection_entries_as_messages(rerun: Rerun, plan: Plan) -> None:
    split = rerun("--irqchip=split")
    stage(split, UNMASKED)
    sent = [(event.address, event.get("data")) for event in split.all("message", **{"from": "I/O APIC"})]
    devices = [EDGE] * plan.edges + [LEVEL] * (plan.requests + 1)
    what = "with --irqchip=split: the messages of the I/O APIC, address and data"
    expect(split, what, expected=[(plan.address, plan.data(device)) for device in devices], seen=sent)
    seen = served_in(since(split, AFTER_LINES, UNMASKED))
    what = "with --irqchip=split: the devices served"
    expect(split, what, expected=[NAMES[device] for device in devices], seen=seen)


def test_only_the_split_machine_exits_at_the_end_of_level_interrupts(run: Run, rerun: Rerun, plan: Plan) -> None:
    stage(run, AT_THE_END)
    expect(run, "exits IOAPIC_EOI", expected="0", seen=str(len(run.all("exit", reason="IOAPIC_EOI"))))
    split = rerun("--irqchip=split")
    stage(split, AT_THE_END)
    what = f"with --irqchip=split: exits IOAPIC_EOI, for {plan.requests + 1} level-triggered interrupts"
    seen = len(split.all("exit", reason="IOAPIC_EOI"))
    expect(split, what, expected=str(plan.requests + 1), seen=str(seen))


# ---- what an interrupt costs ----


def exits(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind == "exit"]


def test_100_interrupts_cost_200_exits_in_user_space_and_100_in_the_kernel(
    run: Run, user_space: Run, plan: Plan
) -> None:
    """Those that begin and end the stage are not among them."""
    stage(run, BEFORE_FAST_BELL)
    events = since(run, BEFORE_BELL, BEFORE_FAST_BELL)
    accepted = [event for event in events if event.kind == "message" and event.accepted]
    expect(run, "the messages accepted", expected=str(RINGS), seen=str(len(accepted)))
    in_kernel = len(exits(events)) - 1
    expect(run, "the exits for 100 interrupts", expected=str(RINGS), seen=str(in_kernel))
    stage(user_space, AT_THE_END)
    events = since(user_space, BEFORE_BELL, AT_THE_END)
    injected = [event for event in events if event.kind == "inject" and event.vector == plan.vector(BELL)]
    expect(run, "with --irqchip=none: the interrupts injected", expected=str(RINGS), seen=str(len(injected)))
    ends = [event for event in exits(events) if event.get("gpa") == LAPIC_EOI]
    expect(run, "with --irqchip=none: exits that end an interrupt", expected=str(RINGS), seen=str(len(ends)))


def test_irqfd_delivers_100_interrupts_without_an_exit(run: Run, plan: Plan) -> None:
    end = stage(run, AT_THE_END)
    what = "the vectors requested when the bell rings once more, with interrupts off"
    expect(run, what, expected=[plan.vector(BELL)], seen=vectors(end.requested), near=end)
    heard = require(run, "how often the guest has heard the bell", "heard")
    expect(run, "the interrupts of the bell", expected=str(2 * RINGS), seen=str(heard.count), near=heard)
    seen = len(exits(since(run, BEFORE_FAST_BELL, AT_THE_END))) - 1
    expect(run, "the exits for the second 100 of them", expected="0", seen=str(seen))
