"""The checks of lesson 3. A machine without a TLB does what the script says, in a few lines of Python: what
it reads, where it faults, which bits it sets. The inner program must have seen the same, under each policy.
And whenever the guest has served a trap, the host half has looked at addresses of its own choice: in the
inner tables, in the shadow that CR3 points to, and by KVM_TRANSLATE."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, how_it_ended, require
from kvmlab.random import stream
from kvmlab.runner import Run

PAGE = 4096
INNER_MEMORY = 64 * PAGE
ADDRESS = 0x000F_FFFF_FFFF_F000
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, NO_EXECUTE = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 63

# plan.h: enum policy, enum op_kind, and what the roles of the inner pages are
POLICIES = DROP, CACHE, RESYNC = 0, 1, 2
POLICY_NAMES = ("drop", "cache", "resync")
READ, WRITE, EXECUTE, LOAD_CR3, INVLPG = "reads", "writes", "executes", "loads CR3 with", "invalidates"
ROOTS = range(3)
SHARED_TABLES = range(12, 15)
FIRST_WINDOW = 4  # of the shared region: behind code, stack, script and results it has all tables
DATA = 20

# SDM 3A "Page-Fault Error Code"
ERROR_PRESENT, ERROR_WRITE, ERROR_USER, ERROR_RESERVED, ERROR_FETCH = 1, 2, 4, 8, 16
PAGE_FAULT = 14


# ---- the inner machine, as it should be ----


class InnerFault(Exception):
    """The inner CPU takes a page fault."""

    def __init__(self, error: int) -> None:
        super().__init__(hex(error))
        self.error = error


@dataclass
class InnerMachine:
    """It has no TLB: the script flushes wherever that might make a difference."""

    seed: int
    cr3: int
    data: set[int]  # the pages that are filled with words of the seed
    memory: dict[int, int] = field(default_factory=dict)

    def word(self, at: int) -> int:
        if at not in self.memory and at // PAGE * PAGE in self.data:
            return stream(self.seed ^ at, 2).next()
        return self.memory.get(at, 0)

    def translate(self, gva: int, attempt: int) -> int:
        """The inner gpa, with the bits set that such an access sets. It is ring 3's."""
        attempt |= ERROR_USER
        table, path, permits = self.cr3, [], WRITABLE | USER
        for shift in (39, 30, 21, 12):
            if table >= INNER_MEMORY:
                raise InnerFault(attempt | ERROR_PRESENT | ERROR_RESERVED)
            path.append(table + (gva >> shift & 511) * 8)
            entry = self.word(path[-1])
            if not entry & PRESENT:
                raise InnerFault(attempt)
            permits = permits & entry & ~NO_EXECUTE | (permits | entry) & NO_EXECUTE
            table = entry & ADDRESS
        if table >= INNER_MEMORY:
            raise InnerFault(attempt | ERROR_PRESENT | ERROR_RESERVED)
        is_forbidden = not permits & USER or (attempt & ERROR_WRITE and not permits & WRITABLE)
        if is_forbidden or (attempt & ERROR_FETCH and permits & NO_EXECUTE):
            raise InnerFault(attempt | ERROR_PRESENT)
        for at in path:
            self.memory[at] = self.word(at) | ACCESSED
        if attempt & ERROR_WRITE:
            self.memory[path[-1]] |= DIRTY
        return table + gva % PAGE

    def step(self, op: Event) -> tuple[int, int]:
        """Do this operation: what the program gets to see, and the error code of its fault, or 0."""
        try:
            if op.what == READ:
                return self.word(self.translate(op.gva, 0)), 0
            if op.what == WRITE:
                self.memory[self.translate(op.gva, ERROR_WRITE)] = op.fields["value"]
            if op.what == EXECUTE:
                self.translate(op.gva, ERROR_FETCH)
            if op.what == LOAD_CR3:
                self.cr3 = op.gva
        except InnerFault as fault:
            return op.fields["value"], fault.error
        return op.fields["value"], 0


# ---- what happened ----


@dataclass
class Trap:
    """A trap that the guest has served, and what the host half saw then. event: None at the end of the program."""

    event: Event | None
    policy: int
    root: int  # the space that the inner program is in
    probes: list[Event] = field(default_factory=list)

    @property
    def is_page_fault(self) -> bool:
        return self.event is not None and self.event.vector == PAGE_FAULT


class Lab:
    """The record of a run, by policy and by operation."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.plan = require(run, "the plan of this seed", "plan")
        self.pages = [self.plan.fields[f"page_{role:02}"] for role in range(DATA + 38)]
        self.ops = run.all("op")
        self.results = {(event.policy, event.op): event for event in run.all("result")}
        self.begun = [event.policy for event in run.all("policy")]
        self.traps: list[Trap] = []
        for event in run.events:
            self._follow(event)
        self.expected = self._expected()

    def _follow(self, event: Event) -> None:
        if event.kind in ("trap", "over"):
            trap = event if event.kind == "trap" else None
            self.traps.append(Trap(trap, event.policy, self._root(event.get("op", len(self.ops)), trap)))
        elif event.kind == "probe" and self.traps:
            self.traps[-1].probes.append(event)

    def _root(self, op: int, trap: Event | None) -> int:
        """Which space the program is in, when it has done this many operations and trapped."""
        upto = op + 1 if trap and trap.vector != PAGE_FAULT else op
        loads = [event.gva for event in self.ops[:upto] if event.what == LOAD_CR3]
        return self.pages.index(loads[-1]) if loads else 0

    def _expected(self) -> list[tuple[int, int]]:
        machine = InnerMachine(self.run.seed, self.pages[0], set(self.pages[DATA:]))
        machine.memory = {event.at: event.fields["value"] for event in self.run.all("word")}
        return [machine.step(op) for op in self.ops]

    def scene(self, *scenes: str) -> Iterator[int]:
        """The operations of these scenes, by number."""
        found = [op.op for op in self.ops if op.scene in scenes]
        assert found, f"no operation is of {scenes}"
        return iter(found)

    def traps_of(self, policy: int, op: int) -> list[Trap]:
        """The page faults during an operation."""
        return [trap for trap in self.traps if trap.is_page_fault and (trap.policy, trap.event.op) == (policy, op)]  # type: ignore[union-attr]

    def says(self, policy: int, op: int) -> str:
        event = self.ops[op]
        return f"policy {POLICY_NAMES[policy]}, operation {op} ({event.what} {event.on}, gva {event.gva:#x})"


@pytest.fixture(scope="module")
def lab(run: Run) -> Lab:
    return Lab(run)


def result(lab: Lab, policy: int, op: int) -> Event:
    """What the inner program has noted of this operation."""
    __tracebackhide__ = True
    if (policy, op) not in lab.results:
        ended_early(lab, policy, op)
    return lab.results[policy, op]


def ended_early(lab: Lab, policy: int, op: int) -> NoReturn:
    """Show the first trap of the operation at which the run ended."""
    __tracebackhide__ = True
    done = sum(1 for key in lab.results if key[0] == policy)
    where = lab.says(policy, done) if policy in lab.begun and done < len(lab.ops) else "a policy before"
    last = [trap.event for trap in lab.traps if trap.event and (trap.policy, trap.event.op) == (policy, done)]
    how = f"{how_it_ended(lab.run)}, in {where}"
    fail(lab.run, lab.says(policy, op), "expected to be done", how, near=last[0] if last else None)


def expect_result(lab: Lab, policy: int, op: int) -> None:
    """The inner program has seen what it must, and has faulted where it must and nowhere else."""
    __tracebackhide__ = True
    seen, (value, error) = result(lab, policy, op), lab.expected[op]
    what = lab.says(policy, op)
    expect(lab.run, f"{what}: the page fault that it sees", expected=fault(error), seen=fault(seen.error), near=seen)
    if not error and lab.ops[op].what == READ:
        expect(lab.run, f"{what}: the word that it reads", expected=value, seen=seen.fields["value"], near=seen)


def fault(error: int) -> str:
    return f"error code {error:#x}" if error else "none"


def begun(lab: Lab, *policies: int) -> list[int]:
    """Of these policies those that were tried, and the first in any case."""
    return [policy for policy in policies if policy in lab.begun or policy == policies[0]]


def expect_scenes(lab: Lab, *scenes: str, policies: tuple[int, ...] = POLICIES) -> None:
    __tracebackhide__ = True
    for policy in begun(lab, *policies):
        for op in lab.scene(*scenes):
            expect_result(lab, policy, op)


def probes(lab: Lab, *scenes: str, policies: tuple[int, ...] = POLICIES) -> Iterator[tuple[Trap, Event]]:
    """What the host half saw of pages that were in the shadow, at the traps of these scenes."""
    __tracebackhide__ = True
    ops = [*lab.scene(*scenes)]
    seen = 0
    for policy in begun(lab, *policies):
        for trap in (trap for trap in lab.traps if trap.policy == policy and trap.event and trap.event.op in ops):
            for probe in (probe for probe in trap.probes if probe.shadow_mapped):
                seen += 1
                yield trap, probe
    if seen < 20:
        fail(lab.run, "the pages in the shadow where the host half looked", "expected 20 at least", f"seen     {seen}")


def expect_agreement(lab: Lab, probe: Event) -> None:
    """A page in the shadow is where the inner tables say, and KVM finds it there."""
    __tracebackhide__ = True
    what = f"gva {probe.gva:#x} is mapped by the inner tables, as it is in the shadow"
    expect(lab.run, what, expected=True, seen=bool(probe.inner_mapped), near=probe)
    what = f"gva {probe.gva:#x} leads, by the inner tables and page_at(), to gpa {probe.inner_gpa:#x}"
    expect(lab.run, f"{what}; in the shadow", expected=probe.inner_gpa, seen=probe.shadow_gpa, near=probe)
    seen = probe.kvm_gpa if probe.kvm_valid else None
    expect(lab.run, f"{what}; by KVM_TRANSLATE", expected=probe.inner_gpa, seen=seen, near=probe)


# ---- page faults ----


def test_inner_program_reads_and_writes_the_right_memory(lab: Lab) -> None:
    expect_scenes(lab, "touch")


def test_shadow_leads_where_the_inner_tables_lead(lab: Lab) -> None:
    for _, probe in probes(lab, "touch", "fault"):
        expect_agreement(lab, probe)


def test_shadow_permits_no_more_than_the_inner_tables(lab: Lab) -> None:
    for _, probe in probes(lab, "touch", "fault"):
        for permission in ("writable", "user", "executable"):
            if probe.fields[f"shadow_{permission}"] and not probe.fields[f"inner_{permission}"]:
                what = f"gva {probe.gva:#x} is {permission} in the shadow"
                expect(lab.run, f"{what}; the inner tables do not permit it", expected=False, seen=True, near=probe)


def inner_faults(lab: Lab) -> Iterator[tuple[str, int, Event]]:
    """Where the inner machine must fault: in words, the operation, and what the program has seen."""
    __tracebackhide__ = True
    for policy in begun(lab, *POLICIES):
        for op in lab.scene("fault"):
            if lab.expected[op][1]:
                yield lab.says(policy, op), op, result(lab, policy, op)


def test_inner_faults_are_reflected(lab: Lab) -> None:
    for where, op, seen in inner_faults(lab):
        what = f"{where}: CR2 of the page fault that it sees"
        expect(lab.run, what, expected=lab.ops[op].gva, seen=seen.cr2 if seen.error else None, near=seen)


def test_reflected_error_codes_tell_of_the_inner_tables(lab: Lab) -> None:
    for where, op, seen in inner_faults(lab):
        what = f"{where}: error code (1 present, 2 write, 4 user, 8 reserved, 16 fetch)"
        expect(lab.run, what, expected=hex(lab.expected[op][1]), seen=hex(seen.error), near=seen)


def test_shadow_misses_are_hidden_from_the_inner_program(lab: Lab) -> None:
    for policy in begun(lab, *POLICIES):
        for op in lab.scene("touch", "fault"):
            if not lab.expected[op][1]:
                seen = result(lab, policy, op)
                what = f"{lab.says(policy, op)}: the page fault that it sees"
                expect(lab.run, what, expected="none", seen=fault(seen.error), near=seen)


# ---- accessed and dirty ----


def expect_bits(lab: Lab, bit: int, name: str, ops: list[int], policies: tuple[int, ...] = POLICIES) -> None:
    """The program finds this bit in its entries as a CPU would have left it."""
    __tracebackhide__ = True
    for policy in begun(lab, *policies):
        for op in ops:
            seen, (value, _) = result(lab, policy, op), lab.expected[op]
            entry = seen.fields["value"]
            expected, found = bool(value & bit), bool(entry & bit)
            what = f"{lab.says(policy, op)}: the entry is {entry:#x}, its {name} bit"
            if expected and bit == DIRTY and not write_seen(lab, policy, op):
                what += " (the write made no page fault, so nobody could set it)"
            expect(lab.run, what, expected=expected, seen=found, near=seen)


def write_seen(lab: Lab, policy: int, read: int) -> bool:
    """The last write to A before this operation was a page fault."""
    write = [op.op for op in lab.ops[:read] if (op.what, op.on) == (WRITE, "A")][-1]
    return bool(lab.traps_of(policy, write))


def bit_reads(lab: Lab) -> list[int]:
    return [op for op in lab.scene("bits") if lab.ops[op].what == READ and "entry" in lab.ops[op].on]


def test_accessed_bits_are_set_along_the_path(lab: Lab) -> None:
    expect_bits(lab, ACCESSED, "accessed", bit_reads(lab)[:6])
    for _, probe in probes(lab, "touch", "fault"):
        what = f"gva {probe.gva:#x} is in the shadow; all its inner entries have the accessed bit"
        expect(lab.run, what, expected=True, seen=bool(probe.inner_accessed), near=probe)


def test_dirty_bit_is_set_by_the_first_write_and_not_before(lab: Lab) -> None:
    expect_bits(lab, DIRTY, "dirty", bit_reads(lab)[:6])
    for _, probe in probes(lab, "touch", "fault"):
        if probe.shadow_writable:
            what = f"gva {probe.gva:#x} is writable in the shadow; its inner leaf has the dirty bit"
            expect(lab.run, what, expected=True, seen=bool(probe.inner_dirty), near=probe)


def test_cleared_bits_are_set_again_by_the_next_access(lab: Lab) -> None:
    expect_bits(lab, ACCESSED, "accessed", bit_reads(lab)[6:], (DROP, CACHE))
    expect_bits(lab, DIRTY, "dirty", bit_reads(lab)[6:], (DROP, CACHE))


# ---- changes of the inner tables ----


def table_writes(lab: Lab, *scenes: str) -> list[int]:
    """The operations that write to an entry of a table of the space that the program is in."""
    ops = (lab.ops[op] for op in lab.scene(*scenes))
    return [op.op for op in ops if op.what == WRITE and "entry" in op.on]


def test_inner_tables_are_not_writable_in_the_shadow(lab: Lab) -> None:
    for policy in begun(lab, DROP, CACHE):
        for op in table_writes(lab, "bits", "change"):
            expect_trap(lab, policy, op)
    for trap, probe in probes(lab, "bits", "change", policies=(DROP, CACHE)):
        number = (probe.gva - lab.plan.shared_gva) // PAGE - FIRST_WINDOW
        if number in (ROOTS[trap.root], *SHARED_TABLES):
            what = f"gva {probe.gva:#x} is the window on a table that the shadow is made of; it is writable"
            expect(lab.run, what, expected=False, seen=bool(probe.shadow_writable), near=probe)


def expect_trap(lab: Lab, policy: int, op: int) -> None:
    """The write to a table was seen by the hypervisor."""
    __tracebackhide__ = True
    seen = result(lab, policy, op)
    writes = [trap for trap in lab.traps_of(policy, op) if trap.event and trap.event.error_code & ERROR_WRITE]
    what = f"{lab.says(policy, op)}: the page fault by which the hypervisor learns of it"
    expect(lab.run, what, expected="one", seen="one" if writes else "none: the table was writable", near=seen)


def test_writes_to_inner_tables_take_effect(lab: Lab) -> None:
    expect_scenes(lab, "change", "kept", "redirect", policies=(DROP, CACHE))
    for _, probe in probes(lab, "bits", "change", "redirect", "batch", policies=(DROP, CACHE)):
        expect_agreement(lab, probe)


def test_entries_above_the_leaf_forbid_too(lab: Lab) -> None:
    expect_scenes(lab, "path")


def test_other_entries_keep_their_shadow(lab: Lab) -> None:
    """One entry was changed, and one page invalidated: another page of the same table is still there."""
    for policy in begun(lab, *POLICIES):
        for op in lab.scene("kept"):
            expect_result(lab, policy, op)
            expect_no_trap(lab, policy, op)


def expect_no_trap(lab: Lab, policy: int, op: int) -> None:
    __tracebackhide__ = True
    traps = lab.traps_of(policy, op)
    what = f"{lab.says(policy, op)}: the page faults that it costs"
    expect(lab.run, what, expected="0", seen=str(len(traps)), near=traps[0].event if traps else None)


def test_page_that_becomes_a_table_is_protected(lab: Lab) -> None:
    """It was data, and writable in the shadow, when an entry was made to point to it as a table."""
    *_, last = table_writes(lab, "spare")
    for policy in begun(lab, DROP, CACHE):
        expect_trap(lab, policy, last)
    expect_scenes(lab, "spare", policies=(DROP, CACHE))


# ---- CR3, and the policies ----


def cr3_loads(lab: Lab, policy: int) -> list[Trap]:
    traps = [trap for trap in lab.traps if trap.policy == policy and trap.event and not trap.is_page_fault]
    return [trap for trap in traps if trap.event and lab.ops[trap.event.op].what == LOAD_CR3]


def test_cr3_load_leads_to_the_other_space(lab: Lab) -> None:
    expect_scenes(lab, "spaces", "again", "synced", "return", "return again", policies=(DROP, CACHE))
    for policy in begun(lab, DROP, CACHE):
        roots: dict[int, int] = {}
        for trap in cr3_loads(lab, policy):
            assert trap.event
            others = {root for space, root in roots.items() if space != trap.root}
            what = f"{lab.says(policy, trap.event.op)}: CR3 is the shadow of another space"
            expect(lab.run, what, expected=False, seen=trap.event.cr3 in others, near=trap.event)
            roots[trap.root] = trap.event.cr3


def test_drop_policy_starts_from_nothing_at_a_cr3_load(lab: Lab) -> None:
    result(lab, DROP, [*lab.scene("return again")][-1])
    for trap in cr3_loads(lab, DROP):
        for probe in trap.probes:
            what = f"gva {probe.gva:#x} is in the shadow right after a CR3 load"
            expect(lab.run, what, expected=False, seen=bool(probe.shadow_mapped), near=probe)


def test_cache_policy_finds_the_shadow_of_an_old_root(lab: Lab) -> None:
    """Where the program has been before and changes nothing, it costs nothing but the CR3 load itself."""
    for op in lab.scene("return", "return again"):
        expect_result(lab, CACHE, op)
        expect_no_trap(lab, CACHE, op)
    seen: dict[int, int] = {}
    for trap in cr3_loads(lab, CACHE):
        assert trap.event
        what = f"{lab.says(CACHE, trap.event.op)}: the shadow in CR3"
        expect(lab.run, what, expected=seen.setdefault(trap.root, trap.event.cr3), seen=trap.event.cr3)


def test_table_out_of_sync_costs_one_page_fault(lab: Lab) -> None:
    writes = table_writes(lab, "bits", "change", "batch")
    result(lab, RESYNC, writes[-1])
    faults = [trap.event for op in writes for trap in lab.traps_of(RESYNC, op)]
    what = f"policy resync: the page faults of {len(writes)} writes to one page table"
    expect(lab.run, what, expected="1", seen=str(len(faults)), near=faults[-1] if len(faults) > 1 else None)


def test_invlpg_shows_what_the_table_says_now(lab: Lab) -> None:
    """Under resync nobody but INVLPG tells the hypervisor which entry has changed."""
    expect_scenes(lab, "bits", "change", "kept", "spare", "redirect", "batch", policies=(RESYNC,))
    for trap in (trap for trap in lab.traps if trap.policy == RESYNC and trap.event):
        assert trap.event
        op = lab.ops[trap.event.op]
        for probe in trap.probes:
            if not trap.is_page_fault and op.what == INVLPG and probe.gva == op.gva and probe.shadow_mapped:
                expect_agreement(lab, probe)


def test_table_is_in_sync_again_after_a_cr3_load(lab: Lab) -> None:
    expect_scenes(lab, "spaces", "again", "synced", "return", "return again", policies=(RESYNC,))
    for trap in cr3_loads(lab, RESYNC):
        for probe in (probe for probe in trap.probes if probe.shadow_mapped):
            expect_agreement(lab, probe)
    for op in table_writes(lab, "again", "synced"):
        expect_trap(lab, RESYNC, op)
    for op in lab.scene("return again"):  # all that was out of sync is in sync since the load before
        expect_no_trap(lab, RESYNC, op)
