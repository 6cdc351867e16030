"""The checks of lesson 12: what the tables and the IOTLB of an IOMMU answer, held against a model of both; and what a
device has done behind one, in hardware on svm and in software elsewhere: the ioctls of VFIO, the interrupts that the
guest has heard, the memory, and what the IOMMU has reported."""

import errno

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.runner import Run
from kvmlab.shared_memory import SharedMemory, Window, expect_memory

PAGE = 4096
SHARED_SIZE = 16 * PAGE
WINDOW_SIZE = 2 * PAGE
SOURCE, DESTINATION, OTHER = range(3)
VICTIM = 12 << 20
READS = 100
REGISTERS_SLOT = 5

# iommu.h
READ, WRITE = 1, 2
NAMES = {0: "nothing", READ: "read", WRITE: "write", READ | WRITE: "read and write"}
IOVA_BITS, IOTLB_ENTRIES = 39, 8
ADDRESS = 0x000F_FFFF_FFFF_F000
IO_LEVELS = ("level3", "level2", "level1")

# <linux/vfio.h>
TYPE1V2_IOMMU = 3
LINE, MESSAGE = 0, 1
INTERRUPTS = {LINE: "VFIO_PCI_INTX_IRQ_INDEX", MESSAGE: "VFIO_PCI_MSI_IRQ_INDEX"}
DATA_NONE, DATA_BOOL, DATA_EVENTFD = 0x01, 0x02, 0x04
ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER = 0x08, 0x10, 0x20
FLAGS = {
    DATA_NONE: "DATA_NONE",
    DATA_BOOL: "DATA_BOOL",
    DATA_EVENTFD: "DATA_EVENTFD",
    ACTION_MASK: "ACTION_MASK",
    ACTION_UNMASK: "ACTION_UNMASK",
    ACTION_TRIGGER: "ACTION_TRIGGER",
}
GET_STATUS, SET_CONTAINER, SET_IOMMU, GET_DEVICE_FD = (
    "VFIO_GROUP_GET_STATUS",
    "VFIO_GROUP_SET_CONTAINER",
    "VFIO_SET_IOMMU",
    "VFIO_GROUP_GET_DEVICE_FD",
)
GET_REGION_INFO = "VFIO_DEVICE_GET_REGION_INFO"
SET_IRQS, MAP_DMA, UNMAP_DMA = "VFIO_DEVICE_SET_IRQS", "VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"

# Stages of lab.h.
STAGES = (
    *("attached", "read", "probed", "messages", "line", "raised", "acknowledged"),
    *("moved", "read only", "outside", "unmapped", "again"),
)
HEARD_PORT, HEARD_MESSAGE, HEARD_LINE = 0x606, 0, 1


# ---- the exercise: tables and IOTLB, without a device ----


class Iommu:
    """What the tables and the IOTLB must answer, when they have been told what this has been told."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int]] = {}  # iova of the page: hpa and permissions
        self.entries: dict[tuple[int, ...], int] = {}  # of levels 3 and 2, by the indices on the way: what they permit
        self.tables = 2  # the exercise's root, and the device's
        self.iotlb: dict[int, tuple[int, int, int]] = {}  # place: page, hpa and permissions

    @staticmethod
    def way(iova: int, level: int = 2) -> tuple[int, ...]:
        """The indices that lead to the entry of this level."""
        return (iova >> 30 & 511, iova >> 21 & 511)[: 4 - level]

    def map(self, iova: int, hpa: int, permissions: int) -> None:
        for level in (3, 2):
            way = self.way(iova, level)
            if not self.entries.get(way):
                self.entries = {other: value for other, value in self.entries.items() if other[: len(way)] != way}
                self.entries[way] = READ | WRITE
                self.pages = {page: at for page, at in self.pages.items() if self.way(page, level) != way}
                self.tables += 1
        self.pages[iova] = (hpa, permissions)

    def walk(self, iova: int) -> tuple[int, int, int]:
        """Permissions, hpa, and how many entries it takes to know."""
        if iova >> IOVA_BITS:
            return 0, 0, 0
        hpa, permissions = self.pages.get(iova & ~(PAGE - 1), (0, 0))
        permits, reads = READ | WRITE, 0
        for entry in (self.entries.get(self.way(iova, 3), 0), self.entries.get(self.way(iova, 2), 0), permissions):
            permits &= entry
            reads += 1
            if not permits:
                return 0, 0, reads
        return permits, hpa, reads

    def translate(self, iova: int, need: int) -> tuple[bool, int, int]:
        """Is it permitted; the hpa; and how many entries are read."""
        page, place, reads = iova & ~(PAGE - 1), iova // PAGE % IOTLB_ENTRIES, 0
        if self.iotlb.get(place, (None,))[0] != page:
            permissions, hpa, reads = self.walk(page)
            if not permissions:
                return False, 0, reads
            self.iotlb[place] = (page, hpa, permissions)
        _, hpa, permissions = self.iotlb[place]
        is_permitted = bool(permissions & need)
        return is_permitted, hpa + iova % PAGE if is_permitted else 0, reads

    def invalidate(self, iova: int, size: int) -> None:
        self.iotlb = {place: entry for place, entry in self.iotlb.items() if not iova <= entry[0] < iova + size}


class Tried:
    """One thing that the exercise has tried, and what should have come of it."""

    def __init__(self, event: Event, iommu: Iommu) -> None:
        self.event = event
        if event.what == "map":
            iommu.map(event.iova, event.hpa, event.permissions)
        elif event.what == "unmap":
            iommu.pages.pop(event.iova, None)
        elif event.what == "restrict":
            iommu.entries[iommu.way(event.iova, event.level)] = event.permissions
        elif event.what == "invalidate":
            iommu.invalidate(event.iova, event.size)
        elif event.what == "walk":
            self.permissions, self.hpa, self.reads = iommu.walk(event.iova)
        elif event.what == "translate":
            self.is_permitted, self.hpa, self.reads = iommu.translate(event.iova, event.need)
        self.tables = iommu.tables


def tried(run: Run, what: str, part: str) -> list[Tried]:
    """All of one kind, in one part of the exercise."""
    __tracebackhide__ = True
    require(run, f"the exercise comes to {what}, in its part {part}", "io", what=what, part=part)
    iommu = Iommu()
    found = [Tried(event, iommu) for event in run.all("io")]
    return [one for one in found if (one.event.what, one.event.part) == (what, part)]


def expect_no_strays(run: Run, function: str, one: Tried) -> None:
    __tracebackhide__ = True
    what = f"{function}() for {one.event.iova:#x}: accesses to what is no table"
    expect(run, what, expected=0, seen=one.event.strays, near=one.event)


def expect_walk(run: Run, one: Tried) -> None:
    __tracebackhide__ = True
    expect_no_strays(run, "io_walk", one)
    what = f"io_walk() for {one.event.iova:#x}: "
    seen = NAMES.get(one.event.permissions, f"{one.event.permissions:#x}")
    expect(run, what + "what is permitted", expected=NAMES[one.permissions], seen=seen, near=one.event)
    expect(run, what + "hpa", expected=one.hpa, seen=one.event.hpa, near=one.event)
    expect(run, what + "entries read", expected=one.reads, seen=one.event.reads, near=one.event)


def expect_maps(run: Run, part: str) -> None:
    __tracebackhide__ = True
    for one in tried(run, "map", part):
        what = f"io_map() for {one.event.iova:#x}: "
        expect_no_strays(run, "io_map", one)
        path = next(event for event in run.all("path") if event.seq > one.event.seq)
        for level in IO_LEVELS[:2]:
            seen = path.get(level)
            shown = "none" if seen is None else NAMES[seen & (READ | WRITE)]
            expect(run, f"{what}the entry of {level} permits", expected=NAMES[READ | WRITE], seen=shown, near=path)
        expected = one.event.hpa | one.event.permissions
        expect(run, what + "the entry of level1", expected=expected, seen=path.get("level1"), near=path)
        expect(run, what + "tables in use", expected=one.tables, seen=one.event.tables, near=one.event)


def expect_walks(run: Run, part: str, *, permitted: tuple[bool, ...] = (True, False)) -> None:
    __tracebackhide__ = True
    expect_maps(run, "map")
    for one in tried(run, "walk", part):
        if bool(one.permissions) in permitted:
            expect_walk(run, one)


def test_page_gets_an_entry_on_each_level(run: Run) -> None:
    expect_maps(run, "map")


def test_walk_finds_the_page_and_what_it_permits(run: Run) -> None:
    expect_walks(run, "walk", permitted=(True,))


def test_walk_ends_where_nothing_is_present(run: Run) -> None:
    expect_walks(run, "walk", permitted=(False,))


def test_what_is_permitted_is_what_all_levels_permit(run: Run) -> None:
    expect_walks(run, "restrict")


def expect_unmaps(run: Run) -> None:
    __tracebackhide__ = True
    expect_maps(run, "map")
    for one in tried(run, "unmap", "unmap"):
        expect_no_strays(run, "io_unmap", one)
        what = f"io_unmap() for {one.event.iova:#x}: tables in use"
        expect(run, what, expected=one.tables, seen=one.event.tables, near=one.event)
    expect_walks(run, "unmap")


def test_page_that_is_unmapped_leads_nowhere_and_others_still_do(run: Run) -> None:
    expect_unmaps(run)


def expect_translations(run: Run, part: str, *, permitted: tuple[bool, ...] = (True, False)) -> None:
    __tracebackhide__ = True
    for one in tried(run, "translate", part):
        if one.is_permitted not in permitted:
            continue
        what, event = f"iotlb_translate() for {one.event.iova:#x}, to {NAMES[one.event.need]}: ", one.event
        expect(run, what + "is it permitted", expected=one.is_permitted, seen=bool(event.is_permitted), near=event)
        expect(run, what + "entries read", expected=one.reads, seen=event.reads, near=event)
        expect(run, what + "hpa", expected=one.hpa, seen=event.hpa, near=event)


def test_what_was_translated_before_is_not_walked_again(run: Run) -> None:
    expect_translations(run, "translate", permitted=(True,))


def test_access_that_is_not_permitted_is_refused(run: Run) -> None:
    expect_translations(run, "translate", permitted=(False,))


def test_what_is_invalidated_is_forgotten_and_nothing_else(run: Run) -> None:
    tried(run, "invalidate", "invalidate")
    expect_translations(run, "invalidate")


def expect_made_anew(run: Run) -> None:
    __tracebackhide__ = True
    expect_maps(run, "again")
    expect_walks(run, "again")


def test_table_that_is_not_present_is_made_anew(run: Run) -> None:
    expect_made_anew(run)


@pytest.fixture
def iommu(run: Run) -> None:
    """It is right: only then is it known what a device behind it does."""
    for part in ("walk", "restrict"):
        expect_walks(run, part)
    expect_unmaps(run)
    for part in ("translate", "invalidate"):
        expect_translations(run, part)
    expect_made_anew(run)


# ---- the device ----


@pytest.fixture
def plan(run: Run) -> Event:
    return require(run, "the lab is set up", "plan")


def stage(run: Run, name: str) -> Event:
    __tracebackhide__ = True
    lost = run.one("lost")
    if lost and not run.one("stage", stage=name):
        fail(run, f'the device is lost before the end of the stage "{name}": {lost.why}', near=lost)
    return require(run, f'the guest comes to the end of the stage "{name}"', "stage", stage=name)


def during(run: Run, name: str) -> list[Event]:
    """What happened in this stage, up to its end or to that of the run."""
    number = STAGES.index(name)
    before = run.one("stage", stage=STAGES[number - 1]) if number else None
    end = run.one("stage", stage=name)
    if number and not before:
        return []
    first = before.seq if before else 0
    return [event for event in run.events if first < event.seq and (not end or event.seq < end.seq)]


def asked(run: Run, of: str) -> list[Event]:
    return [event for event in run.all("vfio") if event.of == of]


def error_of(event: Event) -> str:
    return errno.errorcode.get(event.error, str(event.error)) if event.error else "none"


def request_of(event: Event) -> str:
    return f"{event.request} of the {event.file}" + (f", refused: {error_of(event)}" if event.error else "")


def test_group_that_is_not_viable_is_left_alone(run: Run) -> None:
    requests = asked(run, "exercise")
    require(run, "device_open() asks VFIO", "vfio", of="exercise")
    what = "device_open(), for a group that is not viable: what it asks for"
    expected = [f"{GET_STATUS} of the group"]
    expect(run, what, expected=expected, seen=[request_of(event) for event in requests], near=requests[-1])


def test_device_is_reached_by_way_of_group_and_container(run: Run) -> None:
    require(run, "device_open() asks VFIO for the guest's device", "vfio", of="device")
    requests = [event for event in during(run, "attached") if event.kind == "vfio" and event.of == "device"]
    expected = [f"{GET_STATUS} of the group", f"{SET_CONTAINER} of the group", f"{SET_IOMMU} of the container"]
    expected.append(f"{GET_DEVICE_FD} of the group")
    seen = [request_of(event) for event in requests]
    expect(run, "device_open(): what it asks for", expected=expected, seen=seen[:4], near=requests[0])
    what = f"device_open(): the type for {SET_IOMMU}"
    expect(run, what, expected=TYPE1V2_IOMMU, seen=requests[2].type, near=requests[2])
    opened = require(run, "device_open() comes back", "opened")
    expect(run, "device_open(): its answer is the device", expected=True, seen=bool(opened.is_device), near=opened)


def exits(run: Run, bar: int, name: str) -> list[Event]:
    """Accesses to the BAR that have left the guest."""
    found = [event for event in during(run, name) if event.kind == "exit" and event.get("gpa") is not None]
    return [event for event in found if bar <= event.gpa < bar + (1 << 20)]


def test_registers_are_the_guests_memory_and_reading_costs_no_exit(run: Run, plan: Event) -> None:
    require(run, "device_open() comes back with the device", "opened", is_device=1)
    what = "registers_map(): the region of the registers"
    region = require(run, what, "vfio", request=GET_REGION_INFO)
    expect(run, what + ": error", expected="none", seen=error_of(region), near=region)
    slot = require(run, "the slot in which the guest has the device's registers", "slot", slot=REGISTERS_SLOT)
    expect(run, "the slot of the registers: gpa", expected=plan.bar, seen=slot.gpa, near=slot)
    expect(run, "the slot of the registers: size", expected=region.size, seen=slot.size, near=slot)
    stage(run, "attached")
    stage(run, "read")
    left = exits(run, plan.bar, "read")
    what = f"the exits of {READS} reads of a register"
    expect(run, what, expected="0", seen=str(len(left)), near=left[0] if left else None)
    stage(run, "probed")


def orders(run: Run, name: str) -> list[Event]:
    """But those of the lab, which take an interrupt away."""
    found = [event for event in during(run, name) if event.kind == "vfio" and event.request == SET_IRQS]
    return [event for event in found if (event.count, event.fields["flags"]) != (0, DATA_NONE | ACTION_TRIGGER)]


def flags_of(flags: int) -> str:
    return " | ".join(name for flag, name in FLAGS.items() if flags & flag) or "none"


def expect_order(run: Run, what: str, found: Event, index: int, flags: int) -> None:
    __tracebackhide__ = True
    expect(run, what + ": index", expected=INTERRUPTS[index], seen=INTERRUPTS.get(found.index, "others"), near=found)
    expect(run, what + ": flags", expected=flags_of(flags), seen=flags_of(found.fields["flags"]), near=found)
    expect(run, what + ": count", expected="1", seen=str(found.count), near=found)
    expect(run, what + ": error", expected="none", seen=error_of(found), near=found)


def heard(run: Run, name: str, which: int) -> int:
    """How often the guest's handler has said so."""
    found = [event for event in during(run, name) if event.kind == "exit" and event.get("port") == HEARD_PORT]
    return sum(event.data == f"{which:02x}" for event in found)


def test_message_interrupts_once_for_each_cause(run: Run) -> None:
    stage(run, "probed")
    found = orders(run, "messages")
    what = f"message_connect(): {SET_IRQS}"
    if not found:
        fail(run, what, "expected one", "seen     none")
    expect_order(run, what, found[0], MESSAGE, DATA_EVENTFD | ACTION_TRIGGER)
    end = stage(run, "messages")
    seen = heard(run, "messages", HEARD_MESSAGE)
    expect(run, "messages that the guest has had", expected="2", seen=str(seen), near=end)


def test_line_interrupts_until_it_is_acknowledged(run: Run, plan: Event) -> None:
    stage(run, "messages")
    found = orders(run, "line")
    wanted = (ACTION_TRIGGER, "whom the device signals"), (ACTION_UNMASK, "who unmasks the line")
    for number, (action, meaning) in enumerate(wanted):
        what = f"line_connect(): {SET_IRQS}, {meaning}"
        if len(found) <= number:
            fail(run, what, "expected one", "seen     none")
        expect_order(run, what, found[number], LINE, DATA_EVENTFD | action)
    what = "interrupts by the line until the guest has acknowledged what it was about"
    seen = heard(run, "line", HEARD_LINE)
    expect(run, what, expected=str(plan.line_rounds), seen=str(seen), near=run.one("stage", stage="line"))
    stage(run, "line")


def test_line_is_masked_until_it_is_unmasked(run: Run) -> None:
    stage(run, "line")
    wanted = {"raised": "1", "masked": "0", "unmasked": "1", "acknowledged": "0"}
    for when, count in wanted.items():
        signals = require(run, f"the line by hand, {when}", "signals", when=when)
        if when in ("unmasked", "acknowledged"):
            what = f"line_unmask(): {SET_IRQS}"
            found = orders(run, "raised" if when == "unmasked" else when)
            expect(run, what + ": how many", expected="1", seen=str(len(found)), near=signals)
            expect_order(run, what, found[0], LINE, DATA_NONE | ACTION_UNMASK)
        what = f"signals of the line since the last look, {when}"
        expect(run, what, expected=count, seen=str(signals.count), near=signals)


# ---- memory ----


@pytest.fixture
def windows(run: Run) -> list[Event]:
    return run.all("window")


def memory(run: Run, *numbers: int) -> SharedMemory:
    """As it is at the beginning, by iova of these windows."""
    found = [run.all("window")[number] for number in numbers]
    return SharedMemory(run, SHARED_SIZE, [Window(event.iova, WINDOW_SIZE, event.offset) for event in found])


def moved(run: Run, plan: Event, *numbers: int) -> SharedMemory:
    """What the transfers that are permitted leave: from the source's first window to each of these."""
    expected = memory(run, SOURCE, DESTINATION, OTHER)
    data = expected.read(expected.windows[SOURCE].address + plan.get("from"), plan.get("count"))
    for number in numbers:
        other = memory(run, number)
        other.bytes = expected.bytes
        other.write(other.windows[0].address + plan.to, data)
    return expected


def expect_left(run: Run, plan: Event, name: str, what: str, *numbers: int) -> None:
    """The memory at the end of this stage: what was moved into these windows, and nothing else."""
    __tracebackhide__ = True
    end = stage(run, name)
    expect_memory(run, what, moved(run, plan, *numbers), memory(run, SOURCE, DESTINATION, OTHER).advance(end), end)
    what = "the guest's RAM, which no device was given, is as it was"
    expect(run, what, expected=True, seen=bool(end.ram_is_unchanged), near=end)


def expect_map(run: Run, number: int, found: Event | None, flags: int) -> None:
    __tracebackhide__ = True
    window = run.all("window")[number]
    what = f"window_map() for window {number}: {MAP_DMA}"
    if not found:
        fail(run, what, "expected one", "seen     none")
    expect(run, what + ": iova", expected=window.iova, seen=found.iova, near=found)
    expect(run, what + ": vaddr, as an offset in the file", expected=window.offset, seen=found.offset, near=found)
    expect(run, what + ": size", expected=WINDOW_SIZE, seen=found.size, near=found)
    expect(run, what + ": flags", expected=NAMES[flags], seen=NAMES.get(found.fields["flags"], "others"), near=found)
    expect(run, what + ": error", expected="none", seen=error_of(found), near=found)


def expect_maps_of_windows(run: Run) -> None:
    __tracebackhide__ = True
    stage(run, "acknowledged")
    found = [event for event in during(run, "moved") if event.kind == "vfio" and event.request == MAP_DMA]
    for number, event in zip((SOURCE, DESTINATION), [*found, None, None], strict=False):
        expect_map(run, number, event, READ | (WRITE if number == DESTINATION else 0))


def test_window_is_mapped_at_the_address_that_the_device_uses(run: Run) -> None:
    expect_maps_of_windows(run)


@pytest.mark.usefixtures("iommu")
def test_data_goes_through_the_iommu_and_comes_back(run: Run, plan: Event) -> None:
    expect_left(run, plan, "moved", "what the transfers have left in the shared memory", DESTINATION)


@pytest.mark.usefixtures("iommu")
def test_page_that_may_only_be_read_is_not_written_to(run: Run, plan: Event) -> None:
    what = "what a transfer to a page that may only be read has left"
    expect_left(run, plan, "read only", what, DESTINATION)


@pytest.mark.usefixtures("iommu")
def test_address_that_was_never_mapped_leads_nowhere(run: Run, plan: Event) -> None:
    what = "what a transfer to an address that is not mapped has left"
    expect_left(run, plan, "outside", what, DESTINATION)


def expect_fault(run: Run, name: str, address: int) -> None:
    __tracebackhide__ = True
    end = stage(run, name)
    found = [event for event in during(run, name) if event.kind == "fault"]
    shown = [f"{'write' if event.is_write else 'read'} {event.address:#x}" for event in found]
    what = f'what the IOMMU has reported in the stage "{name}"'
    expect(run, what, expected=[f"write {address:#x}"], seen=shown, near=found[0] if found else end)


@pytest.mark.usefixtures("iommu")
def test_what_is_blocked_is_reported_with_its_address(run: Run, plan: Event, windows: list[Event]) -> None:
    expect_maps_of_windows(run)  # where more is blocked, Linux does not report all of it
    expect_fault(run, "read only", (windows[SOURCE].iova + PAGE + plan.get("from")) & ~(PAGE - 1))
    expect_fault(run, "outside", VICTIM)


@pytest.mark.usefixtures("iommu")
def test_window_that_was_taken_away_is_out_of_reach(run: Run, plan: Event, windows: list[Event]) -> None:
    stage(run, "outside")
    what = f"window_unmap(): {UNMAP_DMA}"
    found = next((event for event in during(run, "unmapped") if event.get("request") == UNMAP_DMA), None)
    if not found:
        fail(run, what, "expected one", "seen     none")
    expect(run, what + ": iova", expected=windows[DESTINATION].iova, seen=found.iova, near=found)
    expect(run, what + ": size", expected=WINDOW_SIZE, seen=found.size, near=found)
    expect(run, what + ": error", expected="none", seen=error_of(found), near=found)
    what = "what a transfer to the window that was taken away has left"
    expect_left(run, plan, "unmapped", what, DESTINATION)
    expect_fault(run, "unmapped", windows[DESTINATION].iova)


@pytest.mark.usefixtures("iommu")
def test_address_that_is_mapped_again_leads_to_the_new_memory(run: Run, plan: Event) -> None:
    stage(run, "unmapped")
    found = [event for event in during(run, "again") if event.kind == "vfio" and event.request == MAP_DMA]
    expect_map(run, OTHER, found[0] if found else None, READ | WRITE)
    what = "what a transfer to the same address, which is another window's now, has left"
    expect_left(run, plan, "again", what, DESTINATION, OTHER)
