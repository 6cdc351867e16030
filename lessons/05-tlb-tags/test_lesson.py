"""The checks of lesson 5. The guest notes what it tells the MMU; a model of the TLB is led through the notes, and
knows at each look which entries a CPU may still hold. It holds what the manual permits, not what this engine
does: SDM 3A "Process-Context Identifiers (PCIDs)", "Caching Translation Information", "Operations that Invalidate
TLBs and Paging-Structure Caches"."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.runner import Run

PAGE = 4096
ADDRESS = 0x000FFFFFFFFFF000
PRESENT, WRITABLE, ACCESSED, DIRTY, GLOBAL = 1 << 0, 1 << 1, 1 << 5, 1 << 6, 1 << 8
PGE, PCIDE = 1 << 7, 1 << 17  # of CR4
FREE = ACCESSED | DIRTY | GLOBAL  # of an entry: the CPU's own, and what other checks are about
GLOBAL_TAG = -1  # in the place of a PCID: the entry serves all of them

# enum stage of plan.h
ENABLE, SWITCH, REMAP, FORGET, KERNEL, KERNEL_ALL, MIXED, TRIALS = range(1, 9)
STAGES = {
    ENABLE: "enable",
    SWITCH: "switch",
    REMAP: "remap",
    FORGET: "forget",
    KERNEL: "kernel, single pages",
    KERNEL_ALL: "kernel, all pages",
    MIXED: "mixed",
    TRIALS: "trials",
}


def many(plan: Event, name: str) -> list[int]:
    return [value for member, value in plan.fields.items() if member.rpartition("_")[0] == name]


def page_of(gva: int) -> int:
    return gva & -PAGE


def named(operation: Event, gva: int | None = None) -> str:
    """An operation in words: "INVPCID type 0, PCID 5, gva 0x1000". gva: to be named in place of its own."""
    gva = operation.get("gva", 0) if gva is None else gva
    if operation.operation == "INVLPG":
        return f"INVLPG {gva:#x}"
    if operation.operation == "INVPCID":
        needed = {0: f", PCID {operation.pcid}, gva {gva:#x}", 1: f", PCID {operation.pcid}"}
        return f"INVPCID type {operation.type}" + needed.get(operation.type, "")
    if operation.operation == "MOV to CR3":
        return f"MOV to CR3 with PCID {operation.pcid}, bit 63 = {operation.keep}"
    return f"MOV to CR4 of {operation.cr4:#x}"


@dataclass(frozen=True)
class Held:
    """What a TLB entry was made from: the tables it belongs to, and the event that wrote there."""

    root: int
    entry: Event

    @property
    def gpa(self) -> int:
        return int(self.entry.value & ADDRESS)


@dataclass
class Tlb:
    """All that a TLB may hold. A CPU may fetch a translation at any time, not only for a look, so whatever the
    current tables say is held; and it may drop any entry at any time, so each may be gone."""

    shared: set[int]  # pages whose tables all spaces share
    root: int = 0
    pcid: int = 0
    cr4: int = 0
    tables: dict[tuple[int, int], Event] = field(default_factory=dict)  # root (0: shared) and gva
    entries: dict[tuple[int, int], set[Held]] = field(default_factory=dict)  # gva and PCID

    def place(self, root: int, gva: int) -> tuple[int, int]:
        return (0 if page_of(gva) in self.shared else root), page_of(gva)

    def write(self, entry: Event) -> None:
        self.tables[self.place(entry.root, entry.gva)] = entry
        self.fill()

    def fill(self) -> None:
        for (root, gva), entry in self.tables.items():
            if root in (0, self.root) and entry.value & PRESENT:
                is_global = entry.value & GLOBAL and self.cr4 & PGE
                tag = GLOBAL_TAG if is_global else self.pcid
                self.entries.setdefault((gva, tag), set()).add(Held(root, entry))

    def answers(self, gva: int) -> set[Held]:
        """The entries that an access to this page may find."""
        return self.entries.get((gva, self.pcid), set()) | self.entries.get((gva, GLOBAL_TAG), set())

    def now(self, gva: int) -> Event | None:
        """What was last written to the entry of this page, in the current tables."""
        return self.tables.get(self.place(self.root, gva))

    def old(self, gva: int) -> list[Held]:
        """Of these entries, those that lead to another frame than the tables do now; the oldest first."""
        now = self.now(gva)
        old = [held for held in self.answers(gva) if now is None or held.gpa != now.value & ADDRESS]
        return sorted(old, key=lambda held: int(held.entry.seq))

    def drop(self, is_dropped: Callable[[int, int], object]) -> None:
        self.entries = {tag: held for tag, held in self.entries.items() if not is_dropped(*tag)}

    def obey(self, operation: Event) -> None:
        """The instruction is executed. What it must drop is gone; what the tables say may be back at once."""
        match operation.operation:
            case "INVLPG":
                self.drop(lambda gva, pcid: gva == page_of(operation.gva) and pcid in {self.pcid, GLOBAL_TAG})
            case "INVPCID":
                self.invpcid(operation)
            case "MOV to CR3":
                self.root, self.pcid = operation.root, operation.pcid if self.cr4 & PCIDE else 0
                if not (operation.keep and self.cr4 & PCIDE):
                    self.drop(lambda _, pcid: pcid == self.pcid)
            case "MOV to CR4":
                if (self.cr4 ^ operation.cr4) & PGE or self.cr4 & ~operation.cr4 & PCIDE:
                    self.entries = {}
                self.cr4 = operation.cr4
        self.fill()

    def invpcid(self, operation: Event) -> None:
        match operation.type:
            case 0:
                self.drop(lambda gva, pcid: gva == page_of(operation.gva) and pcid == operation.pcid)
            case 1:
                self.drop(lambda _, pcid: pcid == operation.pcid)
            case 2:
                self.entries = {}
            case 3:
                self.drop(lambda _, pcid: pcid != GLOBAL_TAG)


@dataclass
class Step:
    """A step of the plan, as the guest took it."""

    planned: Event
    begin: Event
    current: int | None  # the space when it began
    had_pcid: bool  # the space that the step is about, before it
    is_recycled: bool  # it gets the PCID of another one
    pcid: int | None  # what that space should have
    lost: tuple[str, ...]  # to whom it has lost the PCID that it had before, in words
    entries: list[Event] = field(default_factory=list)
    operations: list[Event] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"step {self.planned.step}, {self.planned.what}"

    @property
    def done(self) -> list[str]:
        """Its operations in words, each with the first gva of the page that it means."""
        return [named(operation, page_of(operation.get("gva", 0))) for operation in self.operations]


@dataclass(frozen=True)
class Finding:
    """Something that the guest did wrong."""

    about: str
    stage: int
    what: str
    lines: tuple[str, ...]
    near: Event


class Replay:
    """The run once more, with the model of the TLB beside it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.plan = require(run, "the plan of this seed", "plan")
        self.planned = run.all("planned")
        kernel = many(self.plan, "kernel_gva")
        self.tlb = Tlb({*kernel, self.plan.global_gva})
        self.roots: dict[int, int] = {}  # number of each space by its root
        self.steps: list[Step] = []
        self.findings: list[Finding] = []
        self.tried: dict[int, set[bool]] = {}  # of each trial: could its look find the old entry?
        self.trial: Event | None = None
        self.given = 0  # PCIDs that should have been given away so far
        self.pcids: dict[int, int] = {}
        self.lost: dict[int, str] = {}  # of each space without a PCID: to whom it has lost it
        # The frame that each page should have, by number of the space (None: the kernel) and page.
        self.frames: dict[tuple[int | None, int], int] = {}
        # At the end of each stage: these frames, and the entries that were noted.
        self.at_end: dict[int, tuple[dict[tuple[int | None, int], int], dict[tuple[int, int], Event]]] = {}
        for space, gpa in enumerate(many(self.plan, "first_gpa")):
            self.assign(space, gpa, len(many(self.plan, "page_gva")))
        for event in run.events:
            if follow := getattr(self, f"on_{event.kind}", None):
                follow(event)

    def assign(self, space: int | None, gpa: int, pages: int, first: int = 0) -> None:
        for page in range(pages):
            self.frames[space, first + page] = gpa + page * PAGE

    @property
    def stage(self) -> int:
        return int(self.steps[-1].planned.stage) if self.steps else ENABLE

    @property
    def current(self) -> int | None:
        return self.roots.get(self.tlb.root)

    def root_of(self, space: int) -> int:
        return next((root for root, number in self.roots.items() if number == space), 0)

    def find(self, about: str, what: str, *lines: str, near: Event) -> None:
        self.findings.append(Finding(about, self.stage, what, lines, near))

    # ---- what the guest did ----

    def on_space(self, event: Event) -> None:
        self.roots[event.root] = event.space

    def on_step(self, event: Event) -> None:
        self.step_end()
        planned = self.planned[event.step]
        had_pcid, lost = planned.space in self.pcids, self.lost.get(planned.space)
        is_recycled = False
        if planned.what == "switch" and not had_pcid:
            is_recycled = self.give_pcid(planned)
        pcid = self.pcids.get(planned.space)
        self.steps.append(Step(planned, event, self.current, had_pcid, is_recycled, pcid, (lost,) if lost else ()))
        match planned.what:
            case "remap":
                self.assign(planned.space, planned.frame_gpa, 1, planned.page)
            case "forget":
                self.assign(planned.space, planned.frame_gpa, len(many(self.plan, "page_gva")))
            case "kernel page":
                self.assign(None, planned.frame_gpa, 1, planned.page)
            case "kernel all":
                self.assign(None, planned.frame_gpa, len(many(self.plan, "kernel_gva")))

    def give_pcid(self, planned: Event) -> bool:
        """As pcid_assign() should: the next in turn. True: another space has lost it."""
        all_pcids = many(self.plan, "pcid")
        pcid = all_pcids[self.given % len(all_pcids)]
        self.given += 1
        owner = next((space for space, had in self.pcids.items() if had == pcid), None)
        if owner is not None:
            del self.pcids[owner]
            self.lost[owner] = f"space {owner} has lost PCID {pcid} to space {planned.space} at step {planned.step}"
        self.pcids[planned.space] = pcid
        self.lost.pop(planned.space, None)
        return owner is not None

    def step_end(self) -> None:
        """Has the step written the entry that it should, and noted it? Bit G is the affair of another check."""
        step = self.steps[-1] if self.steps else None
        if step is None or step.planned.what not in ("remap", "kernel page"):
            return
        is_kernel = step.planned.what == "kernel page"
        root = 0 if is_kernel else self.root_of(step.planned.space)
        gva = many(self.plan, "kernel_gva" if is_kernel else "page_gva")[step.planned.page]
        value = step.planned.frame_gpa | PRESENT | WRITABLE | (GLOBAL if is_kernel else 0)
        noted = [(self.tlb.place(entry.root, entry.gva), entry.value & ~FREE) for entry in step.entries]
        if noted[-1:] != [((root, gva), value & ~FREE)]:
            whose = "that all spaces share" if is_kernel else f"of space {step.planned.space}, at {root:#x}"
            what = f"{step.name}: the entry of gva {gva:#x} in the tables {whose}"
            seen = "nothing: an entry is changed with mmu_entry_write(), which notes it"
            if step.entries:
                entry = step.entries[-1]
                seen = f"{entry.value:#x}, for gva {entry.gva:#x} in the tables at {entry.root:#x}"
            lines = f"expected {value:#x}: frame and flags", f"seen     {seen}"
            self.find("entry", what, *lines, near=step.entries[-1] if step.entries else step.begin)

    def on_stage(self, event: Event) -> None:
        self.at_end[event.stage] = dict(self.frames), dict(self.tlb.tables)

    def on_entry(self, event: Event) -> None:
        self.tlb.write(event)
        if self.steps:
            self.steps[-1].entries.append(event)

    def on_operation(self, event: Event) -> None:
        self.tlb.obey(event)
        if self.steps and self.trial is None:
            self.steps[-1].operations.append(event)

    def on_trial(self, event: Event) -> None:
        self.trial = event

    def on_try(self, _: Event) -> None:
        if self.trial is None:
            return
        self.tried.setdefault(self.trial.trial, set()).add(bool(self.tlb.old(self.trial.gva)))
        self.trial = None

    # ---- what it saw ----

    def on_look(self, event: Event) -> None:
        now, at = self.tlb.now(event.gva), self.page_at(event.gva)
        if now is None or at is None:
            return
        if old := self.tlb.old(event.gva):
            self.stale(event, old[0], now)
            return
        gpa, seen = self.frames.get(at, 0), event.get("frame_gpa", 0)
        if seen != gpa:
            what = f"{self.steps[-1].name}: space {self.current} looks at gva {event.gva:#x}"
            lines = f"expected frame {gpa:#x}", f"seen     {f'frame {seen:#x}' if seen else 'no frame of the lab'}"
            self.find("frame", what, *lines, near=event)

    def page_at(self, gva: int) -> tuple[int | None, int] | None:
        """Which page of the current space this is, or of the kernel (None)."""
        for owner, gvas in ((None, many(self.plan, "kernel_gva")), (self.current, many(self.plan, "page_gva"))):
            if gva in gvas and self.current is not None:
                return owner, gvas.index(gva)
        return None

    def stale(self, look: Event, held: Held, now: Event) -> None:
        """An entry of before may still be there: the guest has not dropped it."""
        is_global = held.entry.value & GLOBAL
        tag = "global" if is_global else f"PCID {self.tlb.pcid}"
        what = f"{self.steps[-1].name}: space {self.current} looks at gva {look.gva:#x}, with PCID {self.tlb.pcid}"
        gpa = now.value & ADDRESS
        shown, other = "right", "wrong"
        if look.get("frame_gpa") != gpa:
            shown, other = other, shown
        lines = (
            f"expected frame {gpa:#x} and no other: the entry says so since event #{now.seq}",
            f"seen     frame {held.gpa:#x} is permitted, too: the TLB may hold (gva {look.gva:#x}, {tag}), made from "
            f"what event #{held.entry.seq} wrote",
            self.remedy(look.gva, held, now),
            f"(This machine has shown the {shown} frame; another may show the {other} one.)",
        )
        self.find(self.cause(held, now), what, *lines, near=look)

    def changer(self, now: Event) -> Step:
        """The step that has written this entry."""
        return [step for step in self.steps if step.begin.seq < now.seq][-1]

    def cause(self, held: Held, now: Event) -> str:
        if held.root and held.root != self.tlb.root:
            return "private" if held.entry.value & GLOBAL else "reuse"
        planned = self.changer(now).planned
        where = " here" if planned.space == self.changer(now).current else " elsewhere"
        return str(planned.what) + (where if planned.what == "remap" else "")

    def remedy(self, gva: int, held: Held, now: Event) -> str:
        pcid, owner, cause = self.tlb.pcid, self.roots.get(held.root), self.cause(held, now)
        if cause == "private":
            return f"A global entry serves all PCIDs. This one is of space {owner}'s own page"
        if cause == "reuse":
            return f"PCID {pcid} was space {owner}'s before: its first load for another one must flush"
        operations = self.changer(now).operations
        if operations and operations[-1].seq < now.seq:
            done = named(operations[-1])
            return f"{done} was executed before the entry was written: the CPU may have fetched the old one again"
        if cause == "kernel page":
            return f"INVLPG {gva:#x} drops it; if its bit G is 1, whatever PCID is current"
        if cause == "kernel all":
            return "INVPCID type 2 drops it; so does a change of CR4.PGE"
        if cause == "forget":
            return f"INVPCID type 1 with PCID {pcid} drops it; so does a load of this PCID with bit 63 = 0"
        return f"INVLPG {gva:#x} drops it while PCID {pcid} is current, and INVPCID type 0 with this PCID"


@pytest.fixture(scope="module")
def replay(run: Run) -> Replay:
    return Replay(run)


# ---- what all checks need ----


def complete(run: Run, replay: Replay, stage: int) -> Event:
    """The stage was played to its end, step by step."""
    __tracebackhide__ = True
    what = f"the run comes to the end of stage {stage} ({STAGES[stage]})"
    end = require(run, what, "stage", stage=stage)
    planned = [event.step for event in replay.planned if event.stage <= stage]
    taken = [step.planned.step for step in replay.steps if step.planned.stage <= stage]
    expect(run, "the steps that were taken, in order", expected=planned, seen=taken, near=end)
    return end


def nothing_found(run: Run, replay: Replay, stage: int, *abouts: str) -> None:
    __tracebackhide__ = True
    for finding in replay.findings:
        if finding.stage == stage and finding.about in (*abouts, "entry", "frame"):
            fail(run, finding.what, *finding.lines, near=finding.near)


def steps_of(replay: Replay, what: str) -> Iterator[Step]:
    return (step for step in replay.steps if step.planned.what == what)


def fail_step(run: Run, step: Step, what: str, expected: str) -> NoReturn:
    __tracebackhide__ = True
    seen = "; ".join(named(operation) for operation in step.operations) or "nothing"
    fail(run, f"{step.name}: {what}", f"expected {expected}", f"seen     {seen}", near=step.begin)


def tables_after(run: Run, replay: Replay, stage: int) -> list[Event]:
    """The host half's looks at the tables at the end of the stage."""
    end = complete(run, replay, stage)
    following = [event.seq for event in run.all("stage") if event.seq > end.seq]
    return [event for event in run.all("probe") if end.seq < event.seq < min(following, default=event.seq + 1)]


def expect_frames(run: Run, replay: Replay, stage: int) -> None:
    """Every page has the entry that was noted last, and the frame that the plan has given it last, by a walk and
    by KVM's own."""
    __tracebackhide__ = True
    gvas = {"page": many(replay.plan, "page_gva"), "kernel page": many(replay.plan, "kernel_gva")}
    probes = tables_after(run, replay, stage)
    frames, tables = replay.at_end[stage]
    for probe in probes:
        page_gva = probe.gva & ~(PAGE - 1)
        if noted := tables.get(replay.tlb.place(replay.root_of(probe.space), page_gva)):
            entry = noted.value & ~(ACCESSED | DIRTY)
            if probe.entry != entry:
                what = f"space {probe.space}: the entry of gva {page_gva:#x} in the tables"
                seen = f"{probe.entry:#x}: it was changed, but not noted. Use mmu_entry_write()"
                fail(run, what, f"expected {entry:#x}, as noted last", f"seen     {seen}", near=noted)
        at = None if probe.what == "kernel page" else probe.space, gvas[probe.what].index(page_gva)
        if at in frames:
            what = f"space {probe.space}: gva {probe.gva:#x} translates to gpa"
            gpa = frames[at] + probe.gva - page_gva
            expect(run, what, expected=gpa, seen=probe.gpa if probe.mapped else None, near=probe)
            expect(run, what + ", says KVM_TRANSLATE", expected=gpa, seen=probe.get("kvm_gpa", gpa), near=probe)


# ---- PCIDs ----


def test_pcids_and_global_pages_are_on(run: Run, replay: Replay) -> None:
    complete(run, replay, ENABLE)
    for end in run.all("stage"):
        what = f"at the end of stage {end.stage} ({STAGES[end.stage]}), CR4."
        expect(run, what + "PCIDE", expected=1, seen=end.cr4 >> 17 & 1, near=end)
        expect(run, what + "PGE", expected=1, seen=end.cr4 >> 7 & 1, near=end)
        noted = [load.cr4 for load in run.all("operation", operation="MOV to CR4") if load.seq < end.seq]
        expect_noted(run, "CR4", noted, end)


def expect_noted(run: Run, register: str, noted: list[int], end: Event) -> None:
    """The register is at the end of the stage what was noted last."""
    __tracebackhide__ = True
    seen = end.fields[register.lower()]
    if noted[-1:] != [seen]:
        what = f"{register} at the end of stage {end.stage} ({STAGES[end.stage]}), as the VMM sees it"
        expected = f"{noted[-1]:#x}, as noted last" if noted else "a value that was noted"
        why = f"{register} was changed, but not noted. Use mmu_{register.lower()}_write()"
        fail(run, what, f"expected {expected}", f"seen     {seen:#x}: {why}", near=end)


def switches(run: Run, replay: Replay) -> Iterator[tuple[Step, Event]]:
    """The steps that go to another space, and the load of CR3 that does it."""
    __tracebackhide__ = True
    complete(run, replay, SWITCH)
    for step in (step for step in replay.steps if step.planned.what == "switch"):
        loads = [operation for operation in step.operations if operation.operation == "MOV to CR3"]
        if len(loads) != 1:
            fail_step(run, step, "what it takes", "one MOV to CR3")
        yield step, loads[0]


def test_cr3_holds_the_tables_and_the_pcid_of_the_space(run: Run, replay: Replay) -> None:
    for step, load in switches(run, replay):
        what, root = f"{step.name} to space {step.planned.space}", replay.root_of(step.planned.space)
        expect(run, f"{what}: the tables in CR3", expected=root, seen=load.root, near=load)
        why = ", ".join(["it has none now", *step.lost, "so the next in turn"])
        why = "it has it still" if step.had_pcid else why
        expect(run, f"{what}: its PCID ({why})", expected=f"{step.pcid}", seen=f"{load.pcid}", near=load)
    for end in run.all("stage"):
        loads = [load for load in run.all("operation", operation="MOV to CR3") if load.seq < end.seq]
        expect_noted(run, "CR3", [load.root | load.pcid for load in loads], end)
    expect_frames(run, replay, SWITCH)


def test_recycled_pcid_is_flushed_when_it_is_loaded_first(run: Run, replay: Replay) -> None:
    for step, load in switches(run, replay):
        if step.is_recycled and load.keep:
            what = f"{step.name} to space {step.planned.space}, which gets PCID {load.pcid}"
            seen = "1: what another space has left in the TLB with this PCID becomes its own"
            expected = "expected bit 63 of CR3's new value to be 0"
            fail(run, what, expected, f"seen     {seen}", *step.lost, near=load)
    for finding in replay.findings:
        if finding.about == "reuse":
            fail(run, finding.what, *finding.lines, near=finding.near)


def test_space_that_still_has_its_pcid_keeps_its_entries(run: Run, replay: Replay) -> None:
    for step, load in switches(run, replay):
        if step.had_pcid and not load.keep:
            what = f"{step.name} to space {step.planned.space}, which still has PCID {step.pcid}"
            seen = "0: all that the TLB holds of the space is dropped, and nothing of it was wrong"
            fail(run, what, "expected bit 63 of CR3's new value to be 1", f"seen     {seen}", near=load)


# ---- what changes in a space ----


def test_page_of_the_current_space_is_dropped_when_it_changes(run: Run, replay: Replay) -> None:
    nothing_found(run, replay, REMAP, "remap here")
    expect_frames(run, replay, REMAP)


def test_page_of_another_space_is_dropped_under_its_own_pcid(run: Run, replay: Replay) -> None:
    nothing_found(run, replay, REMAP, "remap elsewhere", "private")
    expect_frames(run, replay, REMAP)


def test_change_of_one_page_drops_one_entry(run: Run, replay: Replay) -> None:
    complete(run, replay, REMAP)
    for step in steps_of(replay, "remap"):
        gva = many(replay.plan, "page_gva")[step.planned.page]
        space, done = step.planned.space, step.done
        by_pcid = f"INVPCID type 0, PCID {step.pcid}, gva {gva:#x}"
        if not step.had_pcid:
            if done:
                fail_step(run, step, f"space {space} has no PCID now, so no entry can be its own", "nothing")
        elif step.current == space:
            if done not in ([f"INVLPG {gva:#x}"], [by_pcid]):
                fail_step(run, step, f"a page of space {space}, the current one, changes", f"INVLPG {gva:#x}")
        elif done != [by_pcid]:
            fail_step(run, step, f"a page of space {space}, which is not the current one, changes", by_pcid)


def test_all_pages_of_a_space_are_dropped_at_once(run: Run, replay: Replay) -> None:
    nothing_found(run, replay, FORGET, "forget")
    complete(run, replay, FORGET)
    for step in steps_of(replay, "forget"):
        space, done = step.planned.space, step.done
        by_pcid = f"INVPCID type 1, PCID {step.pcid}"
        reload = f"MOV to CR3 with PCID {step.pcid}, bit 63 = 0"
        if not step.had_pcid:
            if done:
                fail_step(run, step, f"space {space} has no PCID now, so no entry can be its own", "nothing")
        elif done != [by_pcid] and not (done == [reload] and step.current == space):
            fail_step(run, step, f"all pages of space {space} change", by_pcid)
    expect_frames(run, replay, FORGET)


# ---- global pages ----


def test_kernel_pages_are_global_and_no_others(run: Run, replay: Replay) -> None:
    nothing_found(run, replay, KERNEL, "private")
    for probe in tables_after(run, replay, KERNEL):
        is_kernel = probe.what == "kernel page"
        what = f"the {probe.what} at gva {probe.gva:#x} in the tables of space {probe.space}: bit G"
        expect(run, what, expected=int(is_kernel), seen=probe.entry >> 8 & 1, near=probe)


def test_kernel_page_is_dropped_for_all_spaces(run: Run, replay: Replay) -> None:
    nothing_found(run, replay, KERNEL, "kernel page")
    expect_frames(run, replay, KERNEL)
    mapped: set[int] = set()
    for step in steps_of(replay, "kernel page"):
        gva = many(replay.plan, "kernel_gva")[step.planned.page]
        done = step.done
        if done != [f"INVLPG {gva:#x}"] and (done or gva in mapped):
            fail_step(run, step, "a page of the kernel changes", f"INVLPG {gva:#x}")
        mapped.add(gva)


def test_all_kernel_pages_are_dropped_with_one_flush(run: Run, replay: Replay) -> None:
    nothing_found(run, replay, KERNEL_ALL, "kernel all")
    complete(run, replay, KERNEL_ALL)
    for step in steps_of(replay, "kernel all"):
        kinds = [
            (operation.operation, operation.get("type"), operation.get("changes_pge")) for operation in step.operations
        ]
        if kinds not in ([("INVPCID", 2, None)], [("MOV to CR4", None, 1)] * 2):
            fail_step(run, step, "all pages of the kernel change", "INVPCID type 2 (or CR4.PGE to 0 and back to 1)")
    expect_frames(run, replay, KERNEL_ALL)


def test_no_look_can_find_an_old_frame_in_any_order(run: Run, replay: Replay) -> None:
    for finding in replay.findings:
        fail(run, finding.what, *finding.lines, near=finding.near)
    expect_frames(run, replay, MIXED)


# ---- what drops which entry ----


def dropped(now: Event) -> bool:
    """Must this operation drop the entry with this tag? (It was made while CR4.PGE and CR4.PCIDE were 1.)"""
    is_page = page_of(now.gva) == now.tag_gva
    is_context = now.pcid == now.tag_pcid and not now.tag_is_global
    match now.operation, now.type:
        case "INVLPG", _:
            return is_page and bool(now.tag_is_global or now.tag_pcid == now.current_pcid)
        case "INVPCID", 0:
            return is_context and is_page
        case "INVPCID", 1:
            return is_context
        case "INVPCID", 2:
            return True
        case "INVPCID", _:
            return not now.tag_is_global
        case "MOV to CR3", _:
            return is_context and not now.keep
    return bool(now.changes_pge)


def described(now: Event) -> str:
    page = f"page {now.tag_gva:#x}"
    entry = f"a global entry of {page}" if now.tag_is_global else f"the entry of {page} with PCID {now.tag_pcid}"
    bit = f" that changes PGE: {now.changes_pge}" if now.operation == "MOV to CR4" else ""
    what = bit if now.operation == "MOV to CR4" else named(now).removeprefix(now.operation)
    return f"does {now.operation}{what}, while PCID {now.current_pcid} is current, drop {entry}"


def expect_situations(run: Run, replay: Replay, *operations: str) -> None:
    __tracebackhide__ = True
    complete(run, replay, TRIALS)
    situations = [now for now in run.all("situation") if now.operation in operations]
    expect(run, "there are situations", expected=True, seen=bool(situations))
    for now in situations:
        expect(run, described(now), expected=dropped(now), seen=bool(now.drops))


def test_invlpg_and_invpcid_drop_what_their_operands_name(run: Run, replay: Replay) -> None:
    expect_situations(run, replay, "INVLPG", "INVPCID")


def test_mov_to_cr3_and_mov_to_cr4_drop_what_they_must(run: Run, replay: Replay) -> None:
    expect_situations(run, replay, "MOV to CR3", "MOV to CR4")


def test_trials_show_an_old_frame_only_where_it_is_permitted(run: Run, replay: Replay) -> None:
    complete(run, replay, TRIALS)
    trials = run.all("tried")
    expect(run, "the number of trials", expected=str(len(replay.tried)), seen=str(len(trials)))
    for trial in trials:
        what = f'after "{trial.name}"'
        may_be_old = any(replay.tried[trial.trial])
        expect(
            run,
            f"{what}: must the entry be gone, says the host half",
            expected=not may_be_old,
            seen=bool(trial.drops),
            near=trial,
        )
        if trial.is_neither or (trial.is_old and not may_be_old):
            seen = "a word that is in neither frame" if trial.is_neither else "that of the old frame"
            fail(run, what, "expected the word of the new frame", f"seen     {seen}", near=trial)
