"""The checks of lesson 8: what went into the guest at which entry, and in which order it was served."""

from typing import NoReturn

from kvmlab.events import Event
from kvmlab.expect import expect, fail, how_it_ended, require
from kvmlab.runner import Run

NMI = 2
# Ports of plan.h, by which the guest says where it is.
BEGIN, FAULTED, END, FRAME = 0x601, 0x602, 0x603, 0x604

# Scenes of plan.h.
NMI_ALONE = "an NMI"
BURST = "a burst of NMIs"
NMIS_IN_NMI = "NMIs in an NMI handler"
HALT = "an NMI in a halt"
NMI_KICKED = "an NMI, a kick, an NMI"
TWO_INTERRUPTS = "two interrupts"
BOTH_ON = "both, IF on"
BOTH_OFF = "both, IF off"
NMI_IN_WINDOW = "an NMI in the window"
NMI_IN_INTERRUPT = "an NMI in an interrupt handler"
INTERRUPT_IN_NMI = "an interrupt in an NMI handler"
INTERRUPT_KICKED = "an interrupt, a kick, both"
FAULT_FIRST = "a fault, an NMI"
NMI_FIRST = "an NMI, a fault"
NMI_SCENES = (NMI_ALONE, BURST, NMIS_IN_NMI, HALT, NMI_KICKED)
INTERRUPT_SCENES = (
    TWO_INTERRUPTS,
    BOTH_ON,
    BOTH_OFF,
    NMI_IN_WINDOW,
    NMI_IN_INTERRUPT,
    INTERRUPT_IN_NMI,
    INTERRUPT_KICKED,
)
FAULT_SCENES = (FAULT_FIRST, NMI_FIRST)


def scene_begin(run: Run, name: str) -> Event:
    """The event; after an interrupt with IF = 0 there is none to rely on: Intel's CPUs refuse that entry."""
    __tracebackhide__ = True
    start = require(run, f'the scene "{name}" begins', "scene", name=name)
    over = run.one("over", name=name)
    for event in run.all("inject", type="interrupt", if_flag=0):
        if over is None or event.seq < over.seq:
            fail_not_ready(run, event)
    return start


def fail_not_ready(run: Run, event: Event) -> NoReturn:
    """Fail: this KVM_INTERRUPT came when the guest could not take an interrupt."""
    __tracebackhide__ = True
    why = "KVM still had an event to deliver" if event.if_flag else "RFLAGS.IF was 0"
    seen = f"{event_name(event.vector)} was injected while {why}"
    expected = "ready_for_interrupt_injection to be 1"
    fail(run, "KVM_INTERRUPT", f"expected {expected}", f"seen     {seen}", near=event)


def played(run: Run, *names: str) -> list[str]:
    """These scenes in the order in which the seed has them played; those that never began come last."""
    began = [scene.name for scene in run.all("scene") if scene.name in names]
    return began + [name for name in names if name not in began]


class Scene:
    """The events of one scene, which was played to its end."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.name = name
        start = scene_begin(run, name)
        over = require(run, f'the scene "{name}" is played to its end', "over", name=name)
        self.events = [event for event in run.events if start.seq <= event.seq <= over.seq]

    def all(self, kind: str, **fields: object) -> list[Event]:
        found = self.run.all(kind, **fields)
        return [event for event in found if self.events[0].seq <= event.seq <= self.events[-1].seq]

    def at(self, port: int) -> list[Event]:
        return self.all("exit", reason="IO", port=port, is_write=1)

    def served(self, vector: int) -> list[Event]:
        """The exits by which handlers of this vector say that they begin."""
        return [event for event in self.at(BEGIN) if handled(event) == vector]

    def ended(self, vector: int) -> list[Event]:
        return [event for event in self.at(END) if handled(event) == vector]

    def injected(self, kind: str) -> list[Event]:
        return self.all("inject", type=kind)

    def story(self) -> list[str]:
        """What the handlers did, in order: "NMI begins", "interrupt 81 ends"."""
        said = {BEGIN: "begins", END: "ends"}
        exits = [event for event in self.all("exit", reason="IO") if event.port in said]
        return [f"{event_name(handled(event))} {said[event.port]}" for event in exits]


def handled(event: Event) -> int:
    """The vector that a handler has written to a port of the lab."""
    return int(event.data[:2], 16)


def event_name(vector: int) -> str:
    return "NMI" if vector == NMI else f"interrupt {vector}"


def entry_after(run: Run, event: Event) -> Event:
    """The entry by which the guest goes on after this exit."""
    after = [entry for entry in run.all("entry") if entry.seq > event.seq]
    return after[0] if after else require(run, f"an entry after event #{event.seq}", "entry", after=event.seq)


def expect_served(scene: Scene, vector: int, times: int) -> None:
    """So many handlers of this vector ran in the scene."""
    __tracebackhide__ = True
    seen = scene.served(vector)
    what = f'how often the {event_name(vector)} is served in the scene "{scene.name}"'
    raised = scene.all("raise", type="nmi") if vector == NMI else scene.all("raise", vector=vector)
    near = seen[times] if len(seen) > times else raised[0]
    expect(scene.run, what, expected=times, seen=len(seen), near=near)


def expect_injected(scene: Scene, vectors: list[int]) -> None:
    """KVM_INTERRUPT was called for these vectors in this order, and for no others."""
    __tracebackhide__ = True
    injected = scene.injected("interrupt")
    what = f'the vectors of KVM_INTERRUPT in the scene "{scene.name}", in order'
    seen = [str(event.vector) for event in injected]
    near = injected[0] if injected else scene.events[0]
    expect(scene.run, what, expected=[str(vector) for vector in vectors], seen=seen, near=near)


def expect_interrupts_after_the_nmi(scene: Scene) -> None:
    """No KVM_INTERRUPT before the NMI's handler was through."""
    __tracebackhide__ = True
    ends = scene.ended(NMI)
    for event in scene.injected("interrupt"):
        served = [end for end in ends if end.seq < event.seq]
        if not served:
            what = f'which goes first in the scene "{scene.name}"'
            expected = "the NMI, and the interrupt when it was served"
            seen = f"{event_name(event.vector)} was injected before the NMI was served (event #{event.seq})"
            fail(scene.run, what, f"expected {expected}", f"seen     {seen}", near=event)
    what = f'the number of interrupts injected in the scene "{scene.name}"'
    expect(scene.run, what, expected=1, seen=len(scene.injected("interrupt")), near=scene.events[0])


# ---- the decision ----


def kvms_decision(now: Event) -> str:
    """The order of kvm_check_and_inject_events()."""
    if now.nmi_injected:
        return "the NMI again"
    if now.interrupt_injected:
        return "the interrupt again"
    if (now.nmi_waits or now.nmi_pending) and not now.nmi_masked:
        return "an NMI"
    if now.interrupt_waits and now.ready:
        return "an interrupt"
    return "nothing"


def described(now: Event) -> str:
    facts = {
        "nmi_injected": "an NMI was injected and not delivered",
        "interrupt_injected": "an interrupt was injected and not delivered",
        "nmi_waits": "an NMI waits",
        "nmi_pending": "KVM holds a pending NMI",
        "nmi_masked": "NMIs are blocked",
        "interrupt_waits": "an interrupt waits",
        "ready": "the vCPU is ready for an interrupt",
    }
    held = [words for name, words in facts.items() if now.fields[name]]
    return "; ".join(held) or "nothing has happened"


def test_decision_is_the_one_that_kvm_makes(run: Run) -> None:
    require(run, "something is raised, so that there is something to decide", "raise")
    situations = run.all("situation")
    expect(run, "the number of situations", expected=str(128), seen=str(len(situations)))
    # The plainest first: what is wrong shows best where little else is going on.
    names = [name for name in situations[0].fields if name.startswith(("nmi_", "interrupt_")) or name == "ready"]
    situations.sort(key=lambda now: len([name for name in names if now.fields[name]]))
    for now in [*run.all("decision"), *situations]:
        what = f"what goes into the guest when {described(now)}"
        near = now if now.kind == "decision" else None
        expect(run, what, expected=kvms_decision(now), seen=now.decision, near=near)


# ---- NMIs ----


def fail_not_handed_over(run: Run, waiting: Event, told: list[Event]) -> NoReturn:
    """Fail: NMIs wait when the guest is entered, with what was injected before."""
    __tracebackhide__ = True
    if told:
        seen = f"waiting.nmis is still {waiting.nmis}: at the next entry the same NMI would be handed over again"
        fail(run, "KVM has been given the NMI", "expected waiting.nmis to be 0", f"seen     {seen}", near=waiting)
    seen = f"the guest is entered with waiting.nmis = {waiting.nmis}; no exit will say when to try again"
    fail(run, "an NMI waits", "expected a KVM_NMI before the next entry", f"seen     {seen}", near=waiting)


def test_nmi_is_handed_over_once_and_at_the_next_entry(run: Run) -> None:
    for event in run.all("inject", type="interrupt", vector=NMI):
        seen = "KVM_INTERRUPT with vector 2: the handler runs, but nothing blocks the next NMI"
        fail(run, "how an NMI is injected", "expected KVM_NMI", f"seen     {seen}", near=event)
    nmi_waits, told = 0, list[Event]()  # at the last decision; what was injected since
    for event in run.events:
        if event.kind == "decision":
            nmi_waits, told = event.nmi_waits, []
        elif event.kind == "inject":
            told.append(event)
            if event.type == "nmi" and not nmi_waits:
                fail(run, "KVM_NMI", "expected none, since no NMI waits", "seen     a call", near=event)
        elif event.kind == "waiting" and event.nmis:
            fail_not_handed_over(run, event, told)
    for name in played(run, *NMI_SCENES):
        require(run, f'the scene "{name}" begins', "scene", name=name)


def test_nmi_arrives_while_interrupts_are_off(run: Run) -> None:
    scene = Scene(run, NMI_ALONE)
    raised = scene.all("raise")[0]
    injected = scene.all("inject")
    if not injected:
        seen = "no ioctl has injected anything before the scene was over"
        fail(run, "an NMI is raised while IF is 0", "expected a KVM_NMI", f"seen     {seen}", near=raised)
    expect(run, "how it is injected", expected="nmi", seen=injected[0].type, near=injected[0])
    expect(run, "RFLAGS.IF at that moment", expected=0, seen=injected[0].if_flag, near=injected[0])
    expect_served(scene, NMI, 1)


def test_nmis_are_blocked_while_their_handler_runs(run: Run) -> None:
    for name in played(run, *NMI_SCENES):
        scene = Scene(run, name)
        handlers = [*scene.served(NMI), *scene.ended(NMI)]
        if not handlers:
            fail(run, f'the NMI of the scene "{name}"', "expected a handler", "seen     none", near=scene.events[0])
        for event in handlers:
            entry = entry_after(run, event)
            what = "nmi.masked, with which the guest goes on in the handler of vector 2"
            expect(run, what, expected=1, seen=entry.nmi_masked, near=entry)


def test_burst_of_nmis_is_served_once(run: Run) -> None:
    scene = Scene(run, BURST)
    raised = scene.all("raise")[0].count
    served = len(scene.served(NMI))
    what = f"how often the handler runs after {raised} NMIs were raised at once"
    expect(run, what, expected=1, seen=served, near=scene.injected("nmi")[-1] if served else scene.events[0])


def test_nmis_in_the_handler_are_held_and_served_once_after_it(run: Run) -> None:
    scene = Scene(run, NMIS_IN_NMI)
    what = f'the order of events in the scene "{NMIS_IN_NMI}"'
    expected = ["NMI begins", "NMI ends", "NMI begins", "NMI ends"]
    expect(run, what, expected=expected, seen=scene.story(), near=scene.events[0])
    entry = entry_after(run, scene.served(NMI)[0])
    what = "nmi.pending and nmi.masked, with which the guest goes on in the first handler"
    expect(run, what, expected=[1, 1], seen=[entry.nmi_pending, entry.nmi_masked], near=entry)


def test_nmi_wakes_a_halted_cpu(run: Run) -> None:
    require(run, f'the scene "{HALT}" begins', "scene", name=HALT)
    raised = require(run, "an NMI is raised while the guest halts", "raise", scene=HALT)
    what = "the guest goes on behind its HLT, although IF is 0: the scene is played to its end"
    if run.one("over", name=HALT) is None:
        fail(run, what, "expected a KVM_NMI", f"seen     {how_it_ended(run)}", near=raised)
    scene = Scene(run, HALT)
    expect_served(scene, NMI, 1)
    (halt,) = scene.all("exit", reason="HLT")
    expect(run, "RFLAGS.IF at the halt", expected=0, seen=halt.if_flag, near=halt)


def test_nmi_that_kvm_holds_stands_for_the_next_one_too(run: Run) -> None:
    scene = Scene(run, NMI_KICKED)
    kicks = scene.all("exit", reason="INTR")
    expect(run, "the number of entries that were kicked", expected=1, seen=len(kicks), near=scene.events[0])
    again = [event for event in scene.injected("nmi") if event.seq > kicks[0].seq]
    served = len(scene.served(NMI))
    what = "how often the handler runs: the second NMI was raised while the first was pending in KVM"
    expect(run, what, expected=1, seen=served, near=again[0] if again else kicks[0])


# ---- interrupts, and both ----


def test_interrupt_is_injected_only_when_the_vcpu_is_ready(run: Run) -> None:
    Scene(run, TWO_INTERRUPTS)
    injected = run.all("inject", type="interrupt")
    for event in injected:
        if not event.ready:
            fail_not_ready(run, event)
    if not injected:
        fail(run, "interrupts are raised", "expected a KVM_INTERRUPT", "seen     none", near=run.all("raise")[-1])


def test_window_is_requested_while_an_interrupt_waits_and_only_then(run: Run) -> None:
    for name in played(run, *INTERRUPT_SCENES):
        Scene(run, name)
    waiting = None
    for event in run.events:
        if event.kind == "waiting":
            waiting = event
        elif event.kind == "entry" and waiting:
            what = f"request_interrupt_window at an entry (interrupts that wait: {waiting.interrupts})"
            expect(run, what, expected=int(waiting.interrupts > 0), seen=event.window, near=event)
            waiting = None
    require(run, "an entry with an interrupt window requested", "entry", window=1)


def test_each_interrupt_is_served_once(run: Run) -> None:
    for name in played(run, *INTERRUPT_SCENES):
        scene = Scene(run, name)
        for raised in scene.all("raise", type="interrupt"):
            expect_served(scene, raised.vector, 1)
    scene = Scene(run, TWO_INTERRUPTS)
    expected = sorted((event.vector for event in scene.all("raise")), reverse=True)
    expect_injected(scene, expected)


def test_nmi_goes_before_an_interrupt(run: Run) -> None:
    for name in played(run, BOTH_ON, BOTH_OFF):
        scene = Scene(run, name)
        expect_served(scene, NMI, 1)
        expect_interrupts_after_the_nmi(scene)


def test_nmi_comes_first_in_an_open_window(run: Run) -> None:
    scene = Scene(run, NMI_IN_WINDOW)
    windows = scene.all("exit", reason="IRQ_WINDOW_OPEN")
    if not windows:
        seen = "no exit with IRQ_WINDOW_OPEN"
        fail(run, "an interrupt waits while IF is 0", "expected a window", f"seen     {seen}", near=scene.events[0])
    expect_served(scene, NMI, 1)
    expect_interrupts_after_the_nmi(scene)
    again = [event for event in windows if event.seq > scene.ended(NMI)[0].seq]
    what = "the window opens again for the interrupt when the NMI was served"
    expect(run, what, expected=True, seen=bool(again), near=scene.ended(NMI)[0])


def test_nmi_interrupts_an_interrupt_handler(run: Run) -> None:
    scene = Scene(run, NMI_IN_INTERRUPT)
    vector = scene.all("raise", type="interrupt")[0].vector
    interrupt = event_name(vector)
    expected = [f"{interrupt} begins", "NMI begins", "NMI ends", f"{interrupt} ends"]
    what = f'the order of events in the scene "{NMI_IN_INTERRUPT}"'
    expect(run, what, expected=expected, seen=scene.story(), near=scene.events[0])
    nmi = scene.served(NMI)[0]
    expect(run, "nmi.masked in the NMI handler", expected=1, seen=entry_after(run, nmi).nmi_masked, near=nmi)


def test_interrupt_waits_for_the_nmi_handler_to_return(run: Run) -> None:
    scene = Scene(run, INTERRUPT_IN_NMI)
    expect_interrupts_after_the_nmi(scene)
    (injected,) = scene.injected("interrupt")
    entry = entry_after(run, injected)
    what = "nmi.masked at the entry with the interrupt: the NMI handler has returned"
    expect(run, what, expected=0, seen=entry.nmi_masked, near=entry)
    expect_served(scene, NMI, 1)


def test_injected_interrupt_is_delivered_before_all_else(run: Run) -> None:
    scene = Scene(run, INTERRUPT_KICKED)
    first, second = (event.vector for event in scene.all("raise", type="interrupt"))
    (kick,) = scene.all("exit", reason="INTR")
    entry = entry_after(run, kick)
    what = f"the vector that goes in at the entry after the kick: {first} was injected and not delivered"
    expect(run, what, expected=str(first), seen=str(entry.get("interrupt")), near=entry)
    for vector in (first, NMI, second):
        expect_served(scene, vector, 1)
    expect_injected(scene, [first, second])


# ---- an exception in an NMI handler ----


def nested(run: Run, name: str) -> list[Event]:
    """The exits by which the two NMIs of a scene say that they were taken; the second inside the first."""
    __tracebackhide__ = True
    start = scene_begin(run, name)
    over = run.one("over", name=name)
    last = over.seq if over else run.events[-1].seq
    within = [event for event in run.all("exit", reason="IO") if start.seq < event.seq <= last]
    if not any(event.port == FAULTED for event in within):
        seen = "the handler has not run into its exception: nmi_serve() was not called, or not finished"
        fail(run, f'the scene "{name}"', "expected an exception in the handler", f"seen     {seen}", near=start)
    return within


def test_frame_of_the_first_nmi_stays_intact(run: Run) -> None:
    for name in played(run, *FAULT_SCENES):
        exits = nested(run, name)
        taken = [event for event in exits if event.port == FRAME]
        ends = [event for event in exits if event.port == END]
        inside = [event for event in taken[1:] if not ends or event.seq < ends[0].seq]
        if not inside:
            what = f'a second NMI is taken in the handler of the first, in the scene "{name}"'
            fail(run, what, "expected it behind the exception", "seen     none there", near=taken[0])
        frames = [event for event in run.all("frame") if exits[0].seq <= event.seq <= exits[-1].seq + 1]
        for frame in frames:
            what = f"the rip in the frame of the first NMI, at gva {frame.gva:#x}, to which its IRET returns"
            expect(run, what, expected=frame.rip_taken, seen=frame.rip, near=frame)


def test_second_nmi_is_not_served_inside_the_first(run: Run) -> None:
    for name in played(run, *FAULT_SCENES):
        nested(run, name)
        story = Scene(run, name).story()
        at = next((i for i in range(1, len(story)) if story[i] == story[i - 1]), None)
        if at is not None:
            seen = ", ".join(story[: at + 1])
            expected = "NMI begins, NMI ends, NMI begins, NMI ends"
            fail(run, f'the order of events in the scene "{name}"', f"expected {expected}", f"seen     {seen}")


def test_second_nmi_is_served_after_the_first(run: Run) -> None:
    for name in played(run, *FAULT_SCENES):
        nested(run, name)
        scene = Scene(run, name)
        expect_served(scene, NMI, 2)
    faulted = Scene(run, FAULT_FIRST).at(FAULTED)[0]
    what = "nmi.masked, with which the guest goes on in the handler after the exception's IRET"
    expect(run, what, expected=0, seen=entry_after(run, faulted).nmi_masked, near=faulted)
