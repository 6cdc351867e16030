"""The checks of lesson 11: what the driver does to a device whose every register access is an exit, and what the
same driver and the same device do when nobody stands between them: what the device has seen, what it has left in
the memory that it was given, and what that has cost in exits."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import factorial

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.runner import Run
from kvmlab.shared_memory import SharedMemory, Window, expect_memory

PAGE = 4096
SHARED_SIZE = 16 * PAGE
READS = 100
EMULATED, PASSED_THROUGH = "emulated", "passed through"
ATTACHED, READ, IMPOSTOR, PROBED, RAISED, FACTORIALS, DMA, OUTSIDE, UNMAPPED = STAGES = (
    "attached",
    "read",
    "impostor",
    "probed",
    "raised",
    "factorial",
    "dma",
    "outside",
    "unmapped",
)

# include/edu_registers.h
BAR_SIZE, DOORBELL, BUFFER = 1 << 20, 0x1000, 0x40000
ID, LIVENESS, FACTORIAL, STATUS, INTERRUPT_STATUS, RAISE, ACKNOWLEDGE = 0, 4, 8, 0x20, 0x24, 0x60, 0x64
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
NAMES = {
    ID: "id",
    LIVENESS: "liveness",
    FACTORIAL: "factorial",
    STATUS: "status",
    INTERRUPT_STATUS: "interrupt status",
    RAISE: "interrupt raise",
    ACKNOWLEDGE: "interrupt acknowledge",
    SOURCE: "DMA source",
    DESTINATION: "DMA destination",
    COUNT: "DMA count",
    COMMAND: "DMA command",
    DOORBELL: "doorbell",
}
ACTING = (LIVENESS, FACTORIAL, RAISE, ACKNOWLEDGE, COMMAND)
STATUS_INTERRUPT, INTERRUPT_FACTORIAL, INTERRUPT_DMA = 0x80, 1, 0x100
START, TO_RAM, INTERRUPTS = 1, 2, 4
MASK = (1 << 32) - 1
RESULT_PORT, SUM_PORT, ID_PORT, PART_PORT, ANSWER_PORT = 0x608, 0x60C, 0x610, 0x614, 0x618
REGISTERS_SLOT, PART_SLOT = 4, 5
EDU_ID = 0x010000ED  # of vmm/edu/model.c
MSI_ADDRESS, MSI_ASSERT = 0xFEE00000, 1 << 14
RAM_SAFE = "the guest's RAM, which no device was given, is as it was"


def name_of(offset: int) -> str:
    return NAMES.get(offset, f"offset {offset:#x}")


# ---- what the record says of one form of the device ----


@dataclass(frozen=True)
class Access:
    """The guest's access to a register that has left it."""

    event: Event
    offset: int
    is_write: bool
    value: int

    def __str__(self) -> str:
        return f"{'write' if self.is_write else 'read'} {name_of(self.offset)}"


class Form:
    """One of the two devices."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.name = name
        self.bar = int(require(run, "the lab is set up", "edu", form=name).bar)

    def asked(self, what: str) -> list[int]:
        return [int(event.value) for event in self.run.all("task", form=self.name, what=what)]

    @property
    def transfers(self) -> list[Event]:
        return self.run.all("task", form=self.name, what="transfer")

    def stage(self, name: str) -> Event:
        __tracebackhide__ = True
        what = f'{self.name}: the guest comes to the end of the stage "{name}"'
        return require(self.run, what, "stage", form=self.name, stage=name)

    def reached(self, name: str) -> Event | None:
        return self.run.one("stage", form=self.name, stage=name)

    def during(self, name: str) -> list[Event]:
        """What happened in this stage, up to its end or to that of the run."""
        before = self.reached(STAGES[STAGES.index(name) - 1])
        end = self.reached(name)
        if not before:
            return []
        return [event for event in self.run.events if before.seq < event.seq and (not end or event.seq < end.seq)]

    def accesses(self, name: str) -> list[Access]:
        """Those that the VMM has seen."""
        return list(self._accesses(self.during(name)))

    def all_accesses(self) -> list[Access]:
        return list(self._accesses(self.run.events))

    def _accesses(self, events: list[Event]) -> Iterator[Access]:
        for event in events:
            gpa = event.get("gpa") if event.kind == "exit" else None
            if gpa is not None and self.bar <= gpa < self.bar + BAR_SIZE:
                value = int.from_bytes(bytes.fromhex(event.data), "little")
                yield Access(event, gpa - self.bar, bool(event.is_write), value)

    def device(self, name: str, what: str) -> list[Event]:
        """What the device says it has done in this stage."""
        return [event for event in self.during(name) if event.kind == "device" and event.what == what]

    def acts(self, name: str, register: int) -> list[int]:
        return [int(event.value) for event in self.device(name, "act") if event.register == register]

    def told(self, name: str, port: int) -> list[int]:
        """What the guest has reported."""
        events = [event for event in self.during(name) if event.kind == "exit" and event.get("port") == port]
        return [int.from_bytes(bytes.fromhex(event.data), "little") for event in events]


def memory_at(form: Form, end: Event) -> SharedMemory:
    """What was in the file that the windows are parts of, by gpa, at the end of this stage."""
    windows = [Window(event.gpa, event.size, event.offset) for event in form.run.all("window")]
    return SharedMemory(form.run, SHARED_SIZE, windows).advance(end)


# ---- the driver, as the accesses to the emulated device show it ----


def expect_doorbells(form: Form) -> None:
    """After each write to a register that acts its doorbell, and no others."""
    __tracebackhide__ = True
    accesses = form.all_accesses()
    for access, following in zip(accesses, [*accesses[1:], None], strict=True):
        if access.is_write and access.offset in ACTING:
            is_rung = (
                following and following.is_write and (following.offset, following.value) == (DOORBELL, access.offset)
            )
            what = f"emulated: what follows the write to the {name_of(access.offset)} register, which acts"
            seen = f"{following}, value {following.value:#x}" if following else "nothing"
            wanted = f"write doorbell, value {access.offset:#x}"
            expect(form.run, what, expected=wanted, seen=wanted if is_rung else seen, near=access.event)
    for access, before in zip(accesses, [None, *accesses[:-1]], strict=True):
        if access.is_write and access.offset == DOORBELL:
            is_due = before and before.is_write and before.offset == access.value and before.offset in ACTING
            what = "emulated: what comes before a ring of the doorbell"
            wanted = "a write to the register whose offset is rung, which acts"
            seen = f"{before}, value {before.value:#x}" if before else "nothing"
            expect(form.run, what, expected=wanted, seen=wanted if is_due else seen, near=access.event)
    written = [access for access in accesses if access.is_write]
    ids = read_ids(form)
    if ids and not written:
        id_ = f"{ids[0].value:#010x}"
        what = f"emulated: what edu_probe() makes of an id that reads as {id_} (EDU_ID_MASK of it counts)"
        took = "it takes it for none, and writes nothing to it"
        expect(form.run, what, expected="it takes it for an edu device", seen=took, near=ids[0].event)
    expect(form.run, "emulated: the driver rings doorbells", expected=True, seen=bool(written))


def read_ids(form: Form) -> list[Access]:
    return [access for access in form.accesses(PROBED) if (access.offset, access.is_write) == (ID, False)]


def expect_impostor_known(form: Form) -> None:
    """The answer, and that nothing was written to it."""
    __tracebackhide__ = True
    form.stage(IMPOSTOR)
    (id_,) = form.asked("impostor")
    what = f"emulated: edu_probe() of a device whose id reads as {id_:#010x}, which is no edu device: "
    seen = form.told(IMPOSTOR, ANSWER_PORT)
    expect(form.run, what + "its answer", expected=[False], seen=[bool(answer) for answer in seen])
    written = [access for access in form.accesses(IMPOSTOR) if access.is_write]
    near = written[0].event if written else None
    shown = str(written[0]) if written else "nothing"
    expect(form.run, what + "what it writes to it", expected="nothing", seen=shown, near=near)


def expect_probe(form: Form) -> None:
    __tracebackhide__ = True
    form.stage(READ)
    expect(form.run, "emulated: the driver looks at the id", expected=True, seen=bool(read_ids(form)))
    expect_impostor_known(form)
    (number,) = form.asked("liveness")
    lives = [access for access in form.accesses(PROBED) if access.offset == LIVENESS]
    what = "emulated: the liveness register: what is written to it, and what it is read as, until all of it is right"
    seen = [("write" if access.is_write else "read", access.value) for access in lives]
    looks = [*form.asked("early"), ~number & MASK]
    expected = [f"write {number:#x}", *(f"read {value:#x}" for value in looks)]
    expect(form.run, what, expected=expected, seen=[f"{how} {value:#x}" for how, value in seen])
    form.stage(PROBED)


def acknowledgements(accesses: list[Access]) -> list[tuple[list[int], int]]:
    """What was acknowledged, and what had been read from the interrupt status before, since the last cause."""
    found: list[tuple[list[int], int]] = []
    statuses: list[int] = []
    for access in accesses:
        key = access.offset, access.is_write
        if key == (RAISE, True):
            statuses = []
        elif key == (INTERRUPT_STATUS, False):
            statuses.append(access.value)
        elif key == (ACKNOWLEDGE, True):
            found.append((list(statuses), access.value))
    return found


def expect_acknowledged(form: Form) -> None:
    __tracebackhide__ = True
    form.stage(PROBED)
    expected = form.asked("raise")
    accesses = form.accesses(RAISED)
    raised = next((access.event for access in accesses if (access.offset, access.is_write) == (RAISE, True)), None)
    seen = acknowledgements(accesses)
    what = "emulated: what is written to the interrupt acknowledge register when these bits have been raised"
    expect(form.run, what, expected=expected, seen=[value for _, value in seen], near=raised)
    what = "emulated: what has been read from the interrupt status register before that, one look for each interrupt"
    looks = [[value] for value in expected]
    expect(form.run, what, expected=looks, seen=[statuses for statuses, _ in seen], near=raised)
    what = "emulated: the second interrupt leaves in edu->causes what the first was for and nobody has waited for yet"
    expect(form.run, what, expected=True, seen=form.reached(RAISED) is not None, near=raised)
    end = form.stage(RAISED)
    expect(form.run, "emulated: the interrupt status in the end", expected=0, seen=end.interrupt_status, near=end)


def steps(accesses: list[Access], wanted: dict[tuple[int, bool], str]) -> list[str]:
    """The accesses to some registers, in words."""
    return [wanted[key] for access in accesses if (key := (access.offset, access.is_write)) in wanted]


def expect_factorials(form: Form) -> None:
    __tracebackhide__ = True
    form.stage(RAISED)
    accesses = form.accesses(FACTORIALS)
    words = {(FACTORIAL, True): "number", (ACKNOWLEDGE, True): "acknowledge", (FACTORIAL, False): "result"}
    near = accesses[0].event if accesses else None
    statuses = [access.value for access in accesses if (access.offset, access.is_write) == (STATUS, True)]
    what = "emulated: what is written to the status register"
    expect(form.run, what, expected=[STATUS_INTERRUPT] * max(1, len(statuses)), seen=statuses, near=near)
    numbers = form.asked("factorial")
    what = "emulated: number written, interrupt acknowledged, result read, for each factorial"
    expect(form.run, what, expected=list(words.values()) * len(numbers), seen=steps(accesses, words), near=near)
    expect_results(form)


def expect_results(form: Form) -> None:
    __tracebackhide__ = True
    end = form.stage(FACTORIALS)
    expected = [factorial(number) & MASK for number in form.asked("factorial")]
    what = f"{form.name}: the factorials that the driver has fetched"
    expect(form.run, what, expected=expected, seen=form.told(FACTORIALS, RESULT_PORT), near=end)


@dataclass(frozen=True)
class Transfer:
    """A transfer as the registers describe it when the command is written."""

    source: int
    destination: int
    count: int
    command: int

    def __str__(self) -> str:
        return f"{self.count:#x} bytes from {self.source:#x} to {self.destination:#x}, command {self.command:#x}"


def expected_transfers(form: Form) -> list[Transfer]:
    found = []
    for task in form.transfers:
        found.append(Transfer(task.get("from"), task.buffer, task.get("count"), START | INTERRUPTS))
        found.append(Transfer(task.buffer, task.to, task.get("count"), START | INTERRUPTS | TO_RAM))
    return found


def programmed_transfers(accesses: list[Access]) -> list[Transfer]:
    registers = dict.fromkeys((SOURCE, DESTINATION, COUNT), 0)
    found = []
    for access in accesses:
        if access.is_write and access.offset in registers:
            registers[access.offset] = access.value
        elif access.is_write and access.offset == COMMAND:
            found.append(Transfer(registers[SOURCE], registers[DESTINATION], registers[COUNT], access.value))
    return found


def expect_transfers(form: Form) -> None:
    __tracebackhide__ = True
    form.stage(FACTORIALS)
    accesses = form.accesses(DMA)
    near = next((access.event for access in accesses if (access.offset, access.is_write) == (COMMAND, True)), None)
    expected, seen = expected_transfers(form), programmed_transfers(accesses)
    what = "emulated: what the DMA registers say when the command is written"
    for wanted, found in zip(expected, [*seen, *[None] * len(expected)], strict=False):
        expect(form.run, what, expected=str(wanted), seen=str(found) if found else "nothing", near=near)
    words = {(COMMAND, True): "command", (ACKNOWLEDGE, True): "acknowledge"}
    what = "emulated: command written, interrupt acknowledged, for each transfer"
    expect(form.run, what, expected=list(words.values()) * len(expected), seen=steps(accesses, words), near=near)
    form.stage(DMA)


def expect_data(form: Form) -> None:
    """From the first window into the device's buffer, and from there to the second."""
    __tracebackhide__ = True
    before, end = form.stage(ATTACHED), form.stage(DMA)
    seen = memory_at(form, end)
    expected = memory_at(form, before)
    sums = []
    for task in form.transfers:
        data = expected.read(task.get("from"), task.get("count"))
        expected.write(task.to, data)
        sums.append(sum(data))
    expect_memory(form.run, f"{form.name}: what the transfers have left in the shared memory", expected, seen, end)
    what = f"{form.name}: the sums of the bytes that have come, as the guest has read them"
    expect(form.run, what, expected=sums, seen=form.told(DMA, SUM_PORT), near=end)


@pytest.fixture
def emulated(run: Run) -> Form:
    return Form(run, EMULATED)


def test_register_that_acts_is_written_and_then_its_doorbell_rung(emulated: Form) -> None:
    expect_doorbells(emulated)


def test_driver_finds_out_what_the_device_is_and_that_it_lives(emulated: Form) -> None:
    expect_probe(emulated)


def test_interrupt_is_acknowledged_with_what_it_was_for(emulated: Form) -> None:
    expect_acknowledged(emulated)


def test_factorial_is_fetched_when_its_interrupt_has_come(emulated: Form) -> None:
    expect_factorials(emulated)


def test_transfer_is_programmed_then_started_then_waited_for(emulated: Form) -> None:
    expect_transfers(emulated)


def test_data_goes_to_the_emulated_device_and_comes_back(emulated: Form) -> None:
    expect_data(emulated)


# ---- the device that is passed through ----


@pytest.fixture
def passed(run: Run, emulated: Form) -> Form:
    """If the driver is right: with one that is not, what this device does depends on who is faster."""
    for judge in (expect_doorbells, expect_probe, expect_acknowledged, expect_factorials, expect_transfers):
        judge(emulated)
    return Form(run, PASSED_THROUGH)


def broken_conditions(claim: Event) -> list[str]:
    """What this claim does not keep: of the comment of claim_is_sound(), in its order."""
    flags = int(claim.fields["flags"])
    end = claim.area_offset + claim.area_size
    broken = {
        "flags: not READ": not flags & 1,
        "flags: not WRITE": not flags & 2,
        "flags: not MMAP": not flags & 4,
        "size is more than EDU_BAR_SIZE": claim.size > BAR_SIZE,
        "area_offset is not of whole pages": claim.area_offset % PAGE != 0,
        "area_size is not of whole pages": claim.area_size % PAGE != 0,
        "file_offset is not of whole pages": claim.file_offset % PAGE != 0,
        "area_size is 0": claim.area_size == 0,
        "not all of the part lies in the BAR": end > claim.size,
        "not all of the part lies in the file": claim.file_offset + end > claim.file_size,
        "the file is not sealed": not claim.is_sealed,
    }
    return [condition for condition, is_broken in broken.items() if is_broken]


def test_claims_are_believed_only_if_they_are_sound(run: Run, passed: Form) -> None:
    claims = run.all("claim")
    assert passed
    require(run, "claim_is_sound() is asked what it says of claims", "claim")
    for claim in claims:
        broken = broken_conditions(claim)
        what = f"claim_is_sound() of the claim of {claim.whose} ({', '.join(broken) or 'it keeps all conditions'})"
        expect(run, what, expected=not broken, seen=bool(claim.is_sound), near=claim)
    require(run, "claim_is_sound() is asked about the device that is there", "claim", whose="this device")


def expect_slot(passed: Form, what: str, number: int, part: Event) -> None:
    __tracebackhide__ = True
    slot = require(passed.run, what, "slot", slot=number)
    expect(passed.run, what + ": gpa", expected=passed.bar + part.area_offset, seen=slot.gpa, near=slot)
    expect(passed.run, what + ": size", expected=part.area_size, seen=slot.size, near=slot)


def expect_part(passed: Form) -> None:
    """It lies somewhere else in its BAR, and is larger."""
    __tracebackhide__ = True
    run = passed.run
    part = require(run, "the lab is set up", "part")
    what = "the slot in which the guest has a part that does not begin where its BAR does"
    expect_slot(passed, what, PART_SLOT, part)
    begin = part.file_offset + part.area_offset
    seen = [event for event in run.all("exit") if event.get("port") == PART_PORT]
    values = [int.from_bytes(bytes.fromhex(event.data), "little") for event in seen]
    what = "which words of the file the guest finds at the beginning and at the end of this part, by their offsets"
    expect(run, what, expected=[begin, begin + part.area_size - 4], seen=values, near=seen[0] if seen else None)


def expect_registers(passed: Form) -> None:
    __tracebackhide__ = True
    run = passed.run
    claim = require(run, "what the device claims", "claim", whose="this device")
    expect_slot(passed, "the slot in which the guest has the device's registers", REGISTERS_SLOT, claim)
    expect_part(passed)
    end = passed.stage(READ)
    what = "passed through: what the id register is for the guest"
    expect(run, what, expected=[EDU_ID], seen=passed.told(READ, ID_PORT), near=end)


def test_registers_of_the_device_are_the_guests_memory(run: Run, passed: Form) -> None:
    expect_registers(passed)
    what = "what the device finds in its liveness register when its doorbell rings: what the guest has written there"
    expect(run, what, expected=passed.asked("liveness"), seen=passed.acts(PROBED, LIVENESS))
    passed.stage(PROBED)


def exits(form: Form, *names: str) -> list[Access]:
    return [access for name in names for access in form.accesses(name)]


def test_reading_registers_costs_no_exit(run: Run, emulated: Form, passed: Form) -> None:
    passed.stage(READ)
    seen = len(exits(emulated, READ))
    expect(run, f"emulated: the exits of {READS} reads of a register", expected=str(READS), seen=str(seen))
    left = exits(passed, READ)
    what = f"passed through: the exits of {READS} reads of a register"
    expect(run, what, expected="0", seen=str(len(left)), near=left[0].event if left else None)


def rings(form: Form, *names: str) -> list[Event]:
    return [event for name in names for event in form.device(name, "act")]


def test_doorbell_reaches_the_device_without_an_exit(run: Run, passed: Form) -> None:
    passed.stage(PROBED)
    left = [access for access in passed.all_accesses() if access.offset == DOORBELL]
    what = "passed through: the exits of the doorbell"
    expect(run, what, expected="0", seen=str(len(left)), near=left[0].event if left else None)


def expect_message(passed: Form) -> None:
    """What KVM sends when the eventfd sets off the GSI. (Bit 14 of the data means nothing to an edge.)"""
    __tracebackhide__ = True
    run = passed.run
    edu = require(run, "the lab is set up", "edu", form=passed.name)
    what = "the GSI of the device, plan.gsi, stands for a message"
    require(run, what, "route", gsi=edu.gsi)
    route = run.all("route", gsi=edu.gsi)[-1]
    expect(run, what + ": address", expected=MSI_ADDRESS, seen=route.address, near=route)
    expect(run, what + ": data", expected=edu.vector, seen=route.fields["data"] & ~MSI_ASSERT, near=route)


def test_interrupt_reaches_the_guest_without_the_vmm(run: Run, passed: Form) -> None:
    passed.stage(PROBED)
    expect_message(passed)
    wanted = passed.asked("raise")
    interrupts = passed.device(RAISED, "interrupt")
    seen = [int(event.status) for event in interrupts]
    # What came after an interrupt that has not arrived depends on that.
    what = "passed through: the interrupts of the device, by what they are for"
    expect(run, what, expected=wanted[: len(seen)], seen=seen)
    what = "passed through: what the guest's handler has acknowledged"
    expect(run, what, expected=wanted, seen=passed.acts(RAISED, ACKNOWLEDGE))
    end = passed.stage(RAISED)
    expect(run, "passed through: the interrupt status in the end", expected=0, seen=end.interrupt_status, near=end)
    left = exits(passed, RAISED)
    what = "passed through: exits while the device interrupts and is answered"
    expect(run, what, expected="0", seen=str(len(left)), near=left[0].event if left else None)


def test_factorials_come_from_the_process(run: Run, passed: Form) -> None:
    passed.stage(RAISED)
    what = "passed through: the numbers that the device has been given"
    expect(run, what, expected=passed.asked("factorial"), seen=passed.acts(FACTORIALS, FACTORIAL))
    expect_results(passed)


def expect_windows(passed: Form) -> None:
    __tracebackhide__ = True
    run = passed.run
    passed.stage(FACTORIALS)
    for window, mapped in zip(run.all("window"), [*passed.device(DMA, "map"), None, None], strict=False):
        what = f"the DMA_MAP message for window {window.window}: "
        if mapped is None:
            fail(run, what + "the device has been sent one", "expected one", "seen     none")
        expect(run, what + "address", expected=window.gpa, seen=mapped.address, near=mapped)
        expect(run, what + "size", expected=window.size, seen=mapped.size, near=mapped)
        expect(run, what + "offset in the file", expected=window.offset, seen=mapped.offset, near=mapped)
        expect(run, what + "what became of it", expected="done", seen=mapped.result, near=mapped)
    expect_refusal_told(run, "window_map() of a window that the device has already", "mapped")


def expect_refusal_told(run: Run, what: str, kind: str) -> None:
    """It was called twice for window 0: the device refuses the second."""
    __tracebackhide__ = True
    calls = run.all(kind, gpa=run.all("window")[0].gpa)
    told = ["0" if call.error == 0 else "an errno" for call in calls]
    near = calls[-1] if calls else None
    expect(run, what + ": its answers, first and second", expected=["0", "an errno"], seen=told, near=near)


def test_window_is_where_the_guest_and_the_file_have_it(passed: Form) -> None:
    expect_windows(passed)


def test_data_goes_through_the_process_and_comes_back(run: Run, passed: Form) -> None:
    passed.stage(FACTORIALS)
    seen = [event.result for event in passed.device(DMA, "dma")]
    expect(
        run,
        "passed through: what became of the transfers",
        expected=["done"] * len(expected_transfers(passed)),
        seen=seen,
    )
    expect_data(passed)


def test_memory_outside_the_windows_stays_as_it_is(run: Run, passed: Form) -> None:
    before, end = passed.stage(DMA), passed.stage(OUTSIDE)
    for event in passed.device(OUTSIDE, "dma"):
        what = f"passed through: the transfer of {event.size:#x} bytes to {event.address:#x}, not all of it in a window"
        expect(run, what, expected="not mapped", seen=event.result, near=event)
    expected, seen = memory_at(passed, before), memory_at(passed, end)
    expect_memory(run, "passed through: what such transfers have left in the shared memory", expected, seen, end)
    expect(run, RAM_SAFE, expected=True, seen=bool(end.ram_is_unchanged), near=end)


def expect_unmapped(passed: Form) -> None:
    __tracebackhide__ = True
    run = passed.run
    passed.stage(OUTSIDE)
    window = run.all("window")[0]
    unmapped = passed.device(UNMAPPED, "unmap")
    what = "the DMA_UNMAP message for window 0: "
    if not unmapped:
        fail(run, what + "the device has been sent one", "expected one", "seen     none")
    expect(run, what + "address", expected=window.gpa, seen=unmapped[0].address, near=unmapped[0])
    expect(run, what + "size", expected=window.size, seen=unmapped[0].size, near=unmapped[0])
    expect(run, what + "what became of it", expected="done", seen=unmapped[0].result, near=unmapped[0])
    expect_refusal_told(run, "window_unmap() of a window that the device has no more", "unmapped")


def test_window_that_is_taken_away_is_out_of_reach(run: Run, passed: Form) -> None:
    expect_unmapped(passed)
    before, end = passed.stage(OUTSIDE), passed.stage(UNMAPPED)
    window = run.all("window")[0]
    for event in passed.device(UNMAPPED, "dma")[:2]:
        what = f"passed through: the transfer {'to' if event.is_to_ram else 'from'} the window that was taken away"
        expect(run, what, expected="not mapped", seen=event.result, near=event)
    expected, seen = memory_at(passed, before), memory_at(passed, end)
    what = "passed through: what is in the window that was taken away"
    is_same = expected.read(window.gpa, window.size) == seen.read(window.gpa, window.size)
    expect(run, what, expected="what was in it before", seen="what was in it before" if is_same else "more", near=end)


def test_other_window_is_still_the_devices(run: Run, passed: Form) -> None:
    expect_unmapped(passed)
    before, end = passed.stage(OUTSIDE), passed.stage(UNMAPPED)
    task = passed.transfers[1]
    last = passed.device(UNMAPPED, "dma")[-1]
    what = "passed through: the transfer to the window that was not taken away"
    expect(run, what, expected="done", seen=last.result, near=last)
    expected, seen = memory_at(passed, before), memory_at(passed, end)
    # The device's buffer has what it had: the transfer out of the other window was none.
    expected.write(task.to + 1, expected.read(task.get("from"), task.get("count")))
    expect_memory(run, what + ": what it has left", expected, seen, end)


def test_same_work_exits_in_one_form_only(run: Run, emulated: Form, passed: Form) -> None:
    work = STAGES[1:]
    passed.stage(UNMAPPED)
    asked = [[event.register for event in rings(form, *work)] for form in (emulated, passed)]
    names = [[name_of(register) for register in registers] for registers in asked]
    expect(run, "the registers that have acted, in both forms", expected=", ".join(names[0]), seen=", ".join(names[1]))
    expect(run, "emulated: there are exits", expected=True, seen=len(exits(emulated, *work)) > READS)
    left = exits(passed, *work)
    what = "passed through: the exits of all the work"
    expect(run, what, expected="0", seen=str(len(left)), near=left[0].event if left else None)
