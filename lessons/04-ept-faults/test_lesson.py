"""The checks of lesson 4: which accesses exited, what was served where, what KVM's log and slots say, and
what the guest has read in the memory that it was given."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.random import stream
from kvmlab.runner import Run

PAGE = 4096
BLOCK = 16 * PAGE
ONES = (1 << 64) - 1
LOG_DIRTY_PAGES, READONLY = 1, 2  # KVM_MEM_*
COPIES_MAX = 256  # of host.c

# Stages and regions of lab.h.
TOUCH, DEVICE, ABSENT, ON_DEMAND, BLOCKS, COW = "touch", "device", "absent", "page", "block", "copy on write"
SETTLE, DIRTY = "settle", ("dirty", "dirty 2", "dirty 3")
PLACED, MOVED, REMOVED, GIVEN, TAKEN = "placed", "moved", "removed", "given", "taken"
REGION_TOUCH, REGION_DEVICE, REGION_ABSENT, REGION_PAGE, REGION_BLOCK, REGION_COW = 0, 1, 2, 5, 6, 7
REGION_DIRTY, REGION_MOVING, REGION_TAKEN, REGION_MOVED = 13, 14, 15, 16
ABSENT_REGIONS, COW_REGIONS = 3, 6


@dataclass(frozen=True)
class Region:
    """Pages of the guest that have one story."""

    gpa: int
    pages: int

    def __contains__(self, gpa: int) -> bool:
        return self.gpa <= gpa < self.gpa + self.size

    @property
    def size(self) -> int:
        return self.pages * PAGE

    def page(self, gpa: int) -> int:
        return (gpa - self.gpa) // PAGE


def region(run: Run, number: int) -> Region:
    found = require(run, "the lab is set up", "region", region=number)
    return Region(found.gpa, found.pages)


def stage_begin(run: Run, name: str) -> Event:
    __tracebackhide__ = True
    return require(run, f'the stage "{name}" begins', "begin", stage=name)


def slots_before(run: Run, begin: Event) -> list[Event]:
    """The slots that were set to prepare a stage."""
    before = [event.seq for event in run.all("over") if event.seq < begin.seq]
    return within(run, before[-1] if before else 0, begin.seq, "slot")


class Stage:
    """A stage that was played to its end."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        over = require(run, f'the stage "{name}" is played to its end', "over", stage=name)
        begin = stage_begin(run, name)
        later = [event for event in run.events if event.kind == "begin" and event.seq > over.seq]
        end = later[0].seq if later else run.events[-1].seq
        self.name = name
        self.begin = begin
        self.accesses = run.all("access", stage=name)
        self.exits = [event for event in within(run, begin.seq, over.seq, "exit") if event.reason != "IO"]
        self.prepared = slots_before(run, begin)
        self.slots = within(run, begin.seq, over.seq, "slot")
        # What is recorded when it is over: what the second thread has done, and what the lab has looked at.
        self.after = [event for event in run.events if over.seq < event.seq <= end]

    def all(self, *kinds: str) -> list[Event]:
        return [event for event in self.after if event.kind in kinds]

    def pages(self, kind: str) -> set[int]:
        """The pages of a bitmap that the lab has recorded."""
        found = self.run.one(kind) if kind in ("early", "taken") else next(iter(self.all(kind)), None)
        if found is None:
            fail(self.run, f'the stage "{self.name}"', f"expected an event: {kind}", "seen     none", near=self.begin)
        spans = re.findall(r"(\d+)(?: to (\d+))?", found.pages)
        return {page for first, last in spans for page in range(int(first), int(last or first) + 1)}


def within(run: Run, first: int, last: int, kind: str) -> list[Event]:
    return [event for event in run.all(kind) if first < event.seq < last]


def content(run: Run, gpa: int) -> int:
    """The word that the lab has put at this gpa, or source_at() has in its place."""
    return stream(run.seed ^ gpa, 2).next()


def page_of(event: Event) -> int:
    """The number of its page, counted from gpa 0."""
    return int(event.gpa) // PAGE


def block_of(event: Event) -> int:
    return int(event.gpa) // BLOCK


def numbers(pages: set[int]) -> str:
    """Page numbers in words: "3, 5 to 9"."""
    spans: list[list[int]] = []
    for page in sorted(pages):
        if spans and spans[-1][-1] == page - 1:
            spans[-1][1:] = [page]
        else:
            spans.append([page])
    return ", ".join(" to ".join(map(str, span)) for span in spans) or "none"


def expect_pages(run: Run, what: str, *, expected: set[int], seen: set[int], near: Event | None = None) -> None:
    """Both are the same pages of a region, counted from 0."""
    __tracebackhide__ = True
    expect(run, f"{what}, by their numbers", expected=numbers(expected), seen=numbers(seen), near=near)


def expect_exits(stage: Stage, what: str, accesses: list[Event], reason: str = "MMIO") -> None:
    """These accesses of the guest have exited, in this order, and no others."""
    __tracebackhide__ = True

    def named(event: Event) -> str:
        return f"{event.get('reason', reason)} {'write' if event.is_write else 'read'} {event.gpa:#x}"

    expected, seen = [named(access) for access in accesses], [named(event) for event in stage.exits]
    same = 0
    while same < len(seen) and seen[: same + 1] == expected[: same + 1]:
        same += 1
    near = [*stage.exits[same:], *stage.exits[-1:], stage.begin][0]
    expect(stage.run, f"{what} (the exits of the stage)", expected=expected, seen=seen, near=near)


def expect_reads(stage: Stage, initial: Callable[[int], int], memory: dict[int, int] | None = None) -> dict[int, int]:
    """The guest has read what it had written, and elsewhere what was there. What is in memory then."""
    __tracebackhide__ = True
    memory = memory if memory is not None else {}
    for access in stage.accesses:
        if access.is_write:
            memory[access.gpa] = access.value
            continue
        written = access.gpa in memory
        what = f"the word that the guest reads at gpa {access.gpa:#x}"
        what += ", where it has written before" if written else ", where it has not written yet"
        expected = memory[access.gpa] if written else initial(access.gpa)
        expect(stage.run, what, expected=expected, seen=access.value, near=access)
    return memory


def expect_slot(run: Run, slots: list[Event], of: Region, what: str, flags: int = 0, near: Event | None = None) -> None:
    """One of these slots is this region, neither more nor less, and nobody else's."""
    __tracebackhide__ = True
    wanted = (of.gpa, of.size, flags)
    slots = [event for event in slots if event.size]  # those of size 0 are removed
    told = [(event.gpa, event.size, event.get("flags")) for event in slots]
    if wanted in told:
        return
    closest = [event for event in slots if event.gpa in of or event.gpa + event.size - 1 in of]
    slot = next(iter(closest or slots), None)
    seen = f"gpa {slot.gpa:#x}, size {slot.size:#x}, flags {slot.get('flags'):#x}" if slot else "no slot"
    expected = f"gpa {of.gpa:#x}, size {of.size:#x}, flags {flags:#x}"
    fail(run, what, f"expected {expected}", f"seen     {seen}", near=slot or near)


def first_touches(accesses: list[Event], of: Callable[[Event], int]) -> list[Event]:
    """The first access to each of what `of` counts."""
    firsts: dict[int, Event] = {}
    for access in accesses:
        firsts.setdefault(of(access), access)
    return list(firsts.values())


# ---- slots, and what is none ----


def test_slot_makes_memory_of_gpas(run: Run) -> None:
    slots = run.all("slot")
    first = require(run, "the host half sets a slot", "slot")
    expect_slot(run, slots[:1], region(run, REGION_TOUCH), "the first slot")
    stage = Stage(run, TOUCH)
    expect_exits(stage, "an access to a slot is none of the VMM's business", [])
    expect_reads(stage, lambda _: 0)
    expect(run, "the number of slots that are set for this stage", expected=1, seen=len(stage.prepared), near=first)


def test_device_exits_at_every_access(run: Run) -> None:
    Stage(run, TOUCH)
    stage = Stage(run, DEVICE)
    expect_exits(stage, "a gpa without a slot exits again and again", stage.accesses)
    for access in stage.accesses:
        if not access.is_write:
            what = "what the guest reads from the device"
            expect(run, what, expected=content(run, access.gpa), seen=access.value, near=access)


def absent_regions(run: Run) -> list[Region]:
    return [region(run, REGION_ABSENT + i) for i in range(ABSENT_REGIONS)]


def test_slot_that_is_added_makes_the_next_access_memory(run: Run) -> None:
    stage = Stage(run, ABSENT)
    regions = absent_regions(run)
    for of in regions:
        what = "the slot that is added for a region without one"
        expect_slot(run, stage.slots, of, what, near=[*stage.exits, stage.begin][0])
    firsts = first_touches(stage.accesses, lambda access: next(of.gpa for of in regions if access.gpa in of))
    expect_exits(stage, "only the first access to each region exits", firsts)


def test_access_that_has_exited_is_done_by_the_vmm(run: Run) -> None:
    stage = Stage(run, ABSENT)
    for exit_ in stage.exits:
        if not exit_.is_write:
            what = "the bytes that the VMM gives KVM for the read that has exited"
            expected = content(run, exit_.gpa).to_bytes(8, "little").hex()
            expect(run, what, expected=expected, seen=exit_.data, near=exit_)
    expect_reads(stage, lambda gpa: content(run, gpa))


# ---- userfaultfd ----


def served(stage: Stage) -> list[tuple[Event, list[Event]]]:
    """Each fault that the second thread was told of, with what it did then."""
    found: list[tuple[Event, list[Event]]] = []
    for event in stage.all("fault", "copy", "gave up", "unserved"):
        if event.kind == "fault":
            found.append((event, []))
        elif found:
            found[-1][1].append(event)
    for fault, done in found:
        if done and done[-1].kind == "unserved":
            what = f"the page at gpa {fault.gpa:#x} is there when its fault has been served"
            seen = "no page: nobody would wake the guest any more (the lab gave it a page of zeros)"
            lines = ["expected a page", f"seen     {seen}"]
            copies = [event for event in done if event.kind == "copy"]
            if copies:
                lines.append(f"the last UFFDIO_COPY for this fault: {copy_of(copies[-1])}")
            if any(event.kind == "gave up" for event in done):
                lines.append(f"uffd_copy() gave up after {COPIES_MAX} copies: a loop that waits for success?")
            fail(stage.run, what, *lines, near=[fault, *copies][-1])
    return found


def place_of(event: Event) -> str:
    """Where UFFDIO_COPY was to put a page."""
    gpa = event.get("gpa")
    return f"gpa {gpa:#x}" if gpa is not None else f"dst {event.dst:#x}, an hva in no region"


def copy_of(event: Event) -> str:
    return f"{place_of(event)}, size {event.size:#x}: {event.result}"


def expect_faults(stage: Stage, what: str, expected: list[int]) -> None:
    """The pages for which the guest had to wait."""
    __tracebackhide__ = True
    faults = [fault for fault, _ in served(stage)]
    odd = [fault for i, fault in enumerate(faults) if expected[i : i + 1] != [fault.gpa]]
    near = [*odd, *faults[-1:], stage.begin][0]
    expect(stage.run, what, expected=expected, seen=[fault.gpa for fault in faults], near=near)


def test_missing_page_is_supplied_once_when_it_is_touched(run: Run) -> None:
    stage = Stage(run, ON_DEMAND)
    faults = served(stage)
    expected = [access.gpa & -PAGE for access in first_touches(stage.accesses, page_of)]
    expect_faults(stage, "the faults: one for each page, when it is touched first", expected)
    for fault, done in faults:
        what = f"what UFFDIO_COPY did for the page at gpa {fault.gpa:#x}"
        seen = [copy_of(event) for event in done if event.kind == "copy" for _ in range(event.get("times", 1))]
        expect(run, what, expected=[f"gpa {fault.gpa:#x}, size {PAGE:#x}: done"], seen=seen, near=fault)


def test_page_that_is_supplied_is_the_one_of_its_gpa(run: Run) -> None:
    stage = Stage(run, ON_DEMAND)
    served(stage)
    expect_reads(stage, lambda gpa: content(run, gpa))


def test_pages_that_nobody_touches_do_not_come(run: Run) -> None:
    stage = Stage(run, ON_DEMAND)
    served(stage)
    of = region(run, REGION_PAGE)
    touched = {of.page(access.gpa) for access in stage.accesses}
    expect_pages(run, "the pages of the region that are there", expected=touched, seen=stage.pages("there"))
    expect_exits(stage, "the second thread serves the fault, and the VMM sees nothing of it", [])


def block_pages(of: Region, gpa: int) -> set[int]:
    """The pages of a region that lie in the block around a gpa."""
    start = gpa & -BLOCK
    return {of.page(page) for page in range(start, start + BLOCK, PAGE) if page in of}


def test_fault_brings_its_whole_block(run: Run) -> None:
    stage = Stage(run, BLOCKS)
    of, early = region(run, REGION_BLOCK), stage.pages("early")
    missing = [access for access in stage.accesses if of.page(access.gpa) not in early]
    firsts = first_touches(missing, block_of)
    expected = [access.gpa & -PAGE for access in firsts]
    expect_faults(stage, "the faults: one for each block, when it is touched first", expected)
    whole = set[int]().union(*(block_pages(of, access.gpa) for access in firsts))
    expect_pages(run, "the pages of the region that are there", expected=whole | early, seen=stage.pages("there"))


def test_block_ends_with_its_region(run: Run) -> None:
    stage = Stage(run, BLOCKS)
    of = region(run, REGION_BLOCK)
    for fault, done in served(stage):
        wanted = {of.gpa + page * PAGE for page in block_pages(of, fault.gpa)}
        copies = [event for event in done if event.kind == "copy"]
        for event in copies:
            gpa = event.get("gpa", ONES)
            outside = sorted(set(range(gpa, gpa + max(event.size, PAGE), PAGE)) - wanted)
            what = f"where UFFDIO_COPY puts pages for the fault at gpa {fault.gpa:#x}"
            if outside:
                first, last = min(wanted), max(wanted)
                expected = f"pages from {first:#x} to {last:#x}, its block as far as it lies in the region"
                seen = f"a page at {f'gpa {outside[0]:#x}' if gpa < ONES else place_of(event)}"
                fail(run, what, f"expected {expected}", f"seen     {seen}", near=event)
        copied = {event.gpa for event in copies}
        what = f"the pages of the block around gpa {fault.gpa:#x} that UFFDIO_COPY was asked to make"
        early = {of.gpa + page * PAGE for page in stage.pages("early")}
        near = [fault, *done][-1]
        expect(run, what, expected=wanted - early, seen=copied & (wanted - early), near=near)


def test_pages_that_were_there_stay_as_they_are(run: Run) -> None:
    stage = Stage(run, BLOCKS)
    served(stage)
    of, early = region(run, REGION_BLOCK), stage.pages("early")

    def initial(gpa: int) -> int:
        page_gpa, offset = gpa & -PAGE, gpa % PAGE
        return content(run, (~page_gpa & ONES) + offset & ONES if of.page(gpa) in early else gpa)

    expect_reads(stage, initial)


# ---- read-only slots ----


def cow_regions(run: Run) -> list[Region]:
    return [region(run, REGION_COW + i) for i in range(COW_REGIONS)]


def test_write_to_a_read_only_slot_exits_once(run: Run) -> None:
    stage = Stage(run, COW)
    for of in cow_regions(run):
        expect_slot(run, stage.prepared, of, "a slot that shares its frame", READONLY)
    writes = [access for access in stage.accesses if access.is_write]
    firsts = first_touches(writes, page_of)
    expect_exits(stage, "reads do not exit, and of the writes to a page only the first", firsts)


def test_page_that_was_written_has_a_frame_of_its_own(run: Run) -> None:
    stage = Stage(run, COW)
    written = {access.gpa & -PAGE for access in stage.accesses if access.is_write}
    for of in cow_regions(run):
        if of.gpa in written:
            expect_slot(run, stage.slots, of, "the slot of a page that the guest has written to")
    shared = region(run, REGION_COW).gpa
    expect_reads(stage, lambda gpa: content(run, shared + gpa % PAGE))
    for event in run.all("region after", function="write_serve"):
        what = f"is region->hva still the shared frame after write_serve() for gpa {event.gpa:#x}?"
        expect(run, what, expected=False, seen=bool(event.is_shared), near=event)


def test_other_pages_go_on_sharing(run: Run) -> None:
    stage = Stage(run, COW)
    written = {access.gpa & -PAGE for access in stage.accesses if access.is_write}
    for event in stage.slots:
        if event.size and event.gpa not in written:
            seen = f"a slot at gpa {event.gpa:#x}, which nobody has written to"
            fail(run, "the slots that change", "expected those of pages written", f"seen     {seen}", near=event)
    (shared,) = stage.all("shared")
    what = "the frame that all shared is as it was"
    expect(run, what, expected=True, seen=bool(shared.is_unchanged), near=shared)
    expect(run, "the number of frames from frame_alloc()", expected=len(written), seen=shared.frames, near=shared)


# ---- the dirty log ----


def expect_dirty(run: Run, name: str) -> None:
    """The log of this round has the pages that the guest has written to in this round."""
    __tracebackhide__ = True
    stage = Stage(run, name)
    of = region(run, REGION_DIRTY)
    written = {of.page(access.gpa) for access in stage.accesses if access.is_write}
    what = f'the log of the stage "{name}": the pages that the guest has written to, but none that it has only read'
    expect_pages(run, what, expected=written, seen=stage.pages("dirty"), near=next(iter(stage.all("dirty")), None))


def test_dirty_log_has_the_pages_that_were_written(run: Run) -> None:
    stage = Stage(run, SETTLE)
    expect_slot(run, stage.prepared, region(run, REGION_DIRTY), "the slot with a log", LOG_DIRTY_PAGES)
    expect_exits(stage, "KVM keeps the log by itself", [])
    expect_dirty(run, SETTLE)


def test_next_dirty_log_has_only_what_is_new(run: Run) -> None:
    for name in DIRTY:
        expect_dirty(run, name)


# ---- slots that move, and go ----


def expect_region(run: Run, function: str, **fields: int) -> None:
    """This function has left the region so."""
    __tracebackhide__ = True
    event = require(run, f"{function}() has come back", "region after", function=function)
    for name, value in fields.items():
        what = f"region->{name} after {function}(), by which the lab finds the region"
        expect(run, what, expected=value, seen=event.get(name), near=event)


def test_slot_that_moves_takes_its_memory_along(run: Run) -> None:
    old, new = region(run, REGION_MOVING), region(run, REGION_MOVED)
    placed, moved = stage_begin(run, PLACED), stage_begin(run, MOVED)
    slots = slots_before(run, moved)
    expect_slot(run, slots, new, "the slot at its new gpa")
    what = "the slots that are set to move the region: the one that it has, and once"
    its_own = [event.slot for event in slots_before(run, placed)]
    expect(run, what, expected=its_own, seen=[event.slot for event in slots], near=slots[0])
    expect_region(run, "region_move", gpa=new.gpa, size=new.size)
    before, stage = Stage(run, PLACED), Stage(run, MOVED)
    memory = expect_reads(before, lambda gpa: content(run, gpa))
    memory = {gpa - old.gpa + new.gpa: word for gpa, word in memory.items()}
    stage.accesses = [access for access in stage.accesses if access.gpa in new]
    expect_reads(stage, lambda gpa: content(run, gpa - new.gpa + old.gpa), memory)


def expect_empty(stage: Stage, of: Region) -> None:
    """Nothing is there: each access exits, and a read gives what an empty bus does."""
    __tracebackhide__ = True
    there = [access for access in stage.accesses if access.gpa in of]
    expect_exits(stage, f"every access to [{of.gpa:#x}, {of.gpa + of.size:#x}) exits", there)
    for access in there:
        if not access.is_write:
            what = f"the word that the guest reads at gpa {access.gpa:#x}, where nothing is"
            expect(stage.run, what, expected=ONES, seen=access.value, near=access)


def test_place_that_a_slot_has_left_is_empty(run: Run) -> None:
    expect_exits(Stage(run, PLACED), "the slot is still there", [])
    expect_empty(Stage(run, MOVED), region(run, REGION_MOVING))


def test_slot_that_is_removed_leaves_nothing(run: Run) -> None:
    expect_empty(Stage(run, REMOVED), region(run, REGION_MOVED))
    expect_region(run, "region_remove", size=0)


# ---- memory that the host has taken away ----


def missed_pages(run: Run, stage: Stage) -> list[int]:
    """The gpas of the pages that were taken away and that the guest touches, in order."""
    of, taken = region(run, REGION_TAKEN), stage.pages("taken")
    missed = [access for access in stage.accesses if of.page(access.gpa) in taken]
    return [access.gpa & -PAGE for access in first_touches(missed, page_of)]


def test_memory_fault_is_mended_page_by_page(run: Run) -> None:
    for event in run.all("memory fault", is_mended=0):
        seen = "false from fault_mend()"
        if event.in_a_row > 1:
            seen = f"the same page missed {event.in_a_row} times in a row: what fault_mend() does is not enough"
        what = f"the page at gpa {event.gpa:#x} is given back"
        fail(run, what, "expected the guest to go on", f"seen     {seen}", near=event)
    stage = Stage(run, TAKEN)
    missed = missed_pages(run, stage)
    reasons = [exit_.reason for exit_ in stage.exits]
    what = "the exits: one for each page that was taken away and that the guest misses"
    expect(run, what, expected=["MEMORY_FAULT"] * len(missed), seen=reasons, near=[*stage.exits, stage.begin][0])
    expect(run, "their gpas", expected=missed, seen=[event.gpa for event in run.all("memory fault")])
    of = region(run, REGION_TAKEN)
    left = stage.pages("taken") - {of.page(gpa) for gpa in missed}
    what = "the pages that are still away, since nobody misses them"
    expect_pages(run, what, expected=left, seen=stage.pages("still taken"))
    nowhere = require(run, "fault_mend() is asked for a gpa of no region", "nowhere")
    what = f"fault_mend() of gpa {nowhere.gpa:#x}, which is in no region"
    expect(run, what, expected=False, seen=bool(nowhere.is_mended), near=nowhere)


def test_page_that_is_given_back_has_kept_its_content(run: Run) -> None:
    before, stage = Stage(run, GIVEN), Stage(run, TAKEN)
    expect_exits(before, "the memory is still there", [])
    memory = expect_reads(before, lambda gpa: content(run, gpa))
    expect_reads(stage, lambda gpa: content(run, gpa), memory)
