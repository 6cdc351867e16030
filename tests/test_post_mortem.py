"""When a guest dies or hangs: what the VMM says, and what it records."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from images import assemble, pvh
from support import Call, Guest, one_line

from kvmlab import runner
from kvmlab.events import Event
from kvmlab.runner import Run

UNMAPPED_GVA = (5 << 39) + 0x81234
MAPPED_GVA = (6 << 39) + 0x5000


def crash(guest: Guest, case: str, *options: str, time_limit: float = 20) -> Run:
    return runner.run(guest("crash"), [f"--append=case={case}", *options], time_limit=time_limit)


def first_line(run: Run) -> str:
    return run.errors.partition("\n")[0]


def only(run: Run, kind: str) -> Event:
    """The one event of this kind."""
    (event,) = run.all(kind)
    return event


def walks(run: Run) -> list[list[str]]:
    """Each page walk that was printed: its lines, the first one names the gva."""
    blocks = re.findall(r"^  (page walk of gva .*)\n((?:    .*\n)+)", run.errors, re.MULTILINE)
    return [[head, *map(str.strip, lines.splitlines())] for head, lines in blocks]


def backtrace(run: Run) -> list[str]:
    """The functions of the backtrace, innermost first."""
    text = run.errors.partition("  backtrace:\n")[2]
    return [line.partition("(")[2].partition("+")[0] for line in text.splitlines() if line.startswith("    0x")]


# ---- exceptions that no handler takes ----

EXCEPTIONS = {
    # case: (vector, error code, how the message begins)
    "undefined_instruction": (6, 0, "#UD (invalid opcode), error code 0x0"),
    "divide_by_zero": (0, 0, "#DE (divide error), error code 0x0"),
    "write_not_canonical": (13, 0, "#GP (general protection), error code 0x0"),
    "load_bad_selector": (13, 0x1230, "#GP (general protection), error code 0x1230"),
    "lose_the_stack": (8, 0, "#DF (double fault), error code 0x0"),
    "write_unmapped": (14, 2, "#PF (page fault), error code 0x2 (write by the kernel, page not present)"),
    "read_unmapped": (14, 0, "#PF (page fault), error code 0x0 (read by the kernel, page not present)"),
    "write_read_only": (
        14,
        3,
        "#PF (page fault), error code 0x3 (write by the kernel, page present, but not permitted)",
    ),
    "read_reserved_bit": (
        14,
        9,
        "#PF (page fault), error code 0x9 (read by the kernel, a reserved bit is set on the walk)",
    ),
}


@pytest.mark.parametrize("case", EXCEPTIONS)
def test_an_unhandled_exception_is_named_with_its_place(case: str, guest: Guest) -> None:
    vector, error_code, text = EXCEPTIONS[case]
    run = crash(guest, case)
    assert (run.status, run.end.how) == (3, "panic")
    place = re.fullmatch(
        rf"vmm: the guest crashed: unhandled exception {re.escape(text)} at rip (0x\w+) \({case}\+0x\w+\)",
        first_line(run),
    )
    assert place, first_line(run)
    event = only(run, "panic")
    assert (event.reason, event.vector, event.error_code) == ("exception", vector, error_code)
    assert event.rip == int(place[1], 16)
    assert event.symbol.startswith(f"{case}+0x")
    assert backtrace(run)[0] == case
    assert backtrace(run)[-1].startswith("pvh_entry")


FETCHES = {
    "fetch_unmapped": (0x10, UNMAPPED_GVA, "instruction fetch by the kernel, page not present"),
    "fetch_no_execute": (0x11, MAPPED_GVA, "instruction fetch by the kernel, page present, but not permitted"),
}


@pytest.mark.parametrize("case", FETCHES)
def test_a_jump_to_nowhere_is_told_by_its_address_and_its_caller(case: str, guest: Guest) -> None:
    error_code, gva, text = FETCHES[case]
    run = crash(guest, case)
    assert first_line(run).endswith(f"#PF (page fault), error code {error_code:#x} ({text}) at rip {gva:#x}")
    event = only(run, "panic")
    assert (event.vector, event.error_code, event.rip, event.cr2, event.symbol) == (14, error_code, gva, gva, "")


def test_a_fault_of_ring_3_says_so(guest: Guest) -> None:
    run = crash(guest, "read_from_ring_3")
    assert "error code 0x5 (read by ring 3, page present, but not permitted)" in first_line(run)
    assert walks(run)[0][-1].endswith(", writable, kernel only, executable")
    event = only(run, "panic")
    assert (event.error_code, event.rip & ~0xFFF) == (5, MAPPED_GVA)


def test_a_page_fault_comes_with_the_walk_that_stopped_it(guest: Guest) -> None:
    run = crash(guest, "write_unmapped")
    assert only(run, "panic").cr2 == UNMAPPED_GVA
    ((head, entry, end),) = walks(run)
    cr3 = re.fullmatch(rf"page walk of gva {UNMAPPED_GVA:#x} from cr3 0x(\w+) \(P present, .*\):", head)
    assert cr3, head
    gpa = int(cr3[1], 16) + 8 * 5
    assert entry == f"PML4[  5] at gpa {gpa:#010x} is 0000000000000000 ---X"
    assert end == "the walk stops here: bit 0 (present) is clear"


def test_a_walk_that_succeeds_shows_all_levels_and_what_they_permit(guest: Guest) -> None:
    ((_, *entries, end),) = walks(crash(guest, "write_read_only"))
    shown = re.findall(r"^(\w+)\[ *(\d+)\] at gpa 0x(\w+) is (\w{16}) (....)$", "\n".join(entries), re.MULTILINE)
    levels = [(name, int(index), letters) for name, index, _, _, letters in shown]
    assert levels == [("PML4", 6, "PWUX"), ("PDPT", 0, "PWUX"), ("PD", 0, "PWUX"), ("PT", 5, "P--X")]
    # Each entry stands in the table that the one before points to.
    address = 0x000FFFFFFFFFF000
    for (*_, value, _), (_, index, gpa, _, _) in pairwise(shown):
        assert int(gpa, 16) == (int(value, 16) & address) + 8 * int(index)
    frame = int(shown[-1][3], 16) & address
    assert end == f"mapped to gpa {frame:#x}, read-only, kernel only, executable"


def test_a_walk_knows_no_execute(guest: Guest) -> None:
    assert walks(crash(guest, "fetch_no_execute"))[0][-1].endswith("read-only, kernel only, no-execute")


def test_a_walk_knows_the_reserved_bit(guest: Guest) -> None:
    *_, entry, end = walks(crash(guest, "read_reserved_bit"))[0]
    assert entry.startswith("PML4[  5]")
    assert end.startswith("the walk stops here: ")
    assert "reserved" in end


def test_a_walk_of_a_large_page_ends_one_level_early(guest: Guest) -> None:
    ((_, *entries, end),) = walks(crash(guest, "write_read_only_large"))
    assert [entry.partition("[")[0] for entry in entries] == ["PML4", "PDPT", "PD"]
    assert entries[-1].endswith("P--X  large page")
    assert end == "mapped to gpa 0x812345, read-only, kernel only, executable"


def test_a_walk_knows_that_a_large_page_is_aligned(guest: Guest) -> None:
    run = crash(guest, "read_misaligned_large")
    assert "error code 0x9 (read by the kernel, a reserved bit is set on the walk)" in first_line(run)
    *_, entry, end = walks(run)[0]
    assert entry.startswith("PD[")
    assert "reserved" in end


def test_registers_are_those_of_the_exception(guest: Guest) -> None:
    run = crash(guest, "write_unmapped")
    registers = dict(re.findall(r"(\w+) +([0-9a-f]{8,16})(?= |$)", run.errors, re.MULTILINE))
    assert int(registers["cr2"], 16) == UNMAPPED_GVA
    assert int(registers["rip"], 16) == only(run, "panic").rip
    assert UNMAPPED_GVA in [int(registers[name], 16) for name in ("rax", "rcx", "rdx", "rsi", "rdi")]
    assert registers.keys() >= {"rbx", "rbp", "rsp", "r8", "r15", "rflags", "cr0", "cr3", "cr4"}


def test_a_double_fault_shows_the_stack_that_was_lost(guest: Guest) -> None:
    """Its frame is on a stack of its own: rsp is the interrupted one, not that."""
    run = crash(guest, "lose_the_stack")
    assert f"rsp {UNMAPPED_GVA:016x}" in run.errors


def test_an_interrupt_that_no_handler_takes_is_told(guest: Guest) -> None:
    run = crash(guest, "stray_interrupt", "--irqchip=split")
    assert run.status == 3
    assert "vector 64" in first_line(run)
    assert "(stray_interrupt+0x" in first_line(run)
    assert only(run, "panic").vector == 0x40


# ---- panics ----


def test_a_panic_shows_its_message_and_place(guest: Guest) -> None:
    run = crash(guest, "give_up")
    assert (run.status, run.end.how) == (3, "panic")
    assert re.fullmatch(r"vmm: the guest panicked: out of ideas \(tests/guests/crash\.c:\d+\)", first_line(run))
    event = only(run, "panic")
    assert (event.reason, event.message) == ("message", "out of ideas")
    assert event.location in first_line(run)
    assert "give_up" in backtrace(run)


def test_a_todo_is_no_crash_but_says_what_to_write_and_where(guest: Guest) -> None:
    run = crash(guest, "not_written")
    assert (run.status, run.end.how) == (1, "todo")
    assert re.fullmatch(r'vmm: tests/guests/crash\.c:\d+: not written yet: write the "other" half', first_line(run))
    event = only(run, "panic")
    assert (event.reason, event.message) == ("todo", 'write the "other" half')


def test_a_message_of_any_bytes_is_valid_json(call: Call, guest: Guest, tmp_path: Path) -> None:
    record = tmp_path / "events"
    done = call(f"--events={record}", "--append=case=panic_unprintable", guest("crash").image)
    assert done.returncode == 3
    assert record.read_bytes().isascii()
    panic = [event for line in record.read_text().splitlines() if (event := json.loads(line))["kind"] == "panic"]
    assert [event["message"] for event in panic] == ['"quoted" back\\slash \n\t\x01\x7f\x80\xff end']


def test_a_message_without_an_end_is_cut(guest: Guest) -> None:
    run = crash(guest, "panic_endless_message")
    assert run.status == 3
    message = only(run, "panic").message
    assert 100 < len(message) < 4096
    assert set(message) == {"x"}


@pytest.mark.parametrize(
    ("case", "gva"), [("panic_nowhere", "0xfffffff0"), ("panic_8_bits", "0x40"), ("panic_unknown_kind", "0x1")]
)
def test_a_panic_that_is_none_is_told_in_one_line(case: str, gva: str, guest: Guest) -> None:
    run = crash(guest, case)
    assert (run.status, run.end.how, only(run, "panic").reason) == (3, "panic", "?")
    one_line(run.errors, f"vmm: the guest crashed: it wrote {gva}", " to the panic port", "no panic")


def test_a_panic_of_an_exception_that_is_none_is_told_in_one_line(guest: Guest) -> None:
    run = crash(guest, "panic_wild_frame")
    assert (run.status, run.end.how) == (3, "panic")
    one_line(run.errors, f"its panic names a trap frame at unmapped gva {UNMAPPED_GVA:#x}")
    assert only(run, "panic").get("vector") is None


def test_a_panic_without_readable_strings_is_a_panic(guest: Guest) -> None:
    run = crash(guest, "panic_wild_strings")
    assert (run.status, run.end.how) == (3, "panic")
    assert (only(run, "panic").message, only(run, "panic").location) == ("", "")


def test_reading_the_panic_port_is_no_panic(guest: Guest) -> None:
    run = crash(guest, "panic_read")
    assert (run.status, run.errors) == (0, "")


# ---- triple faults ----

TRIPLE_FAULTS = {
    # case: (vector, error code, what stops the delivery)
    "enter_empty_space": (14, 0x10, "the walk stops here: bit 0 (present) is clear"),
    "enter_nearly_full_space": (14, 0x10, "the walk stops here: bit 0 (present) is clear"),
    "enter_reserved_space": (14, 0x19, "(reserved bit)"),
    "enter_space_outside_memory": (14, 0x10, "the walk stops here: the next table is outside guest memory"),
    "empty_idt": (6, 0, "it could not be delivered: the IDT's limit 0x0 leaves no gate for vector 6"),
    "unmapped_idt": (6, 0, f"it could not be delivered: its gate, in the IDT at gva {UNMAPPED_GVA & ~0xFFF:#x}, is"),
    "absent_gates": (6, 0, f"through its gate 000000000000028000080e0000081234 to handler {UNMAPPED_GVA:#x}"),
}
NAMES = {6: "#UD (invalid opcode)", 14: "#PF (page fault)"}


@pytest.mark.parametrize("case", TRIPLE_FAULTS)
def test_a_triple_fault_tells_the_exception_that_it_began_with(case: str, guest: Guest) -> None:
    vector, error_code, reason = TRIPLE_FAULTS[case]
    run = crash(guest, case)
    assert (run.status, run.end.how) == (3, "triple fault")
    begin = f"vmm: the guest crashed: triple fault; it began with {NAMES[vector]}, error code {error_code:#x}"
    assert first_line(run).startswith(begin), first_line(run)
    assert re.search(rf" at rip 0x\w+ \({case}\+0x\w+\)$", first_line(run)), first_line(run)
    assert reason in run.errors
    event = only(run, "triple_fault")
    assert (event.vector, event.error_code) == (vector, error_code)
    assert event.symbol.startswith(f"{case}+0x")
    if vector == 14:
        assert event.cr2 == event.rip, "the fetch of the next instruction is what failed"
        assert backtrace(run)[0] == case
        assert len(walks(run)) == 2, "of the address at fault, and of the gate"
    assert run.all("exit")[-1].reason == "SHUTDOWN"


def test_a_triple_fault_without_any_page_table_shows_the_walk(guest: Guest) -> None:
    run = crash(guest, "enter_root_outside_memory")
    assert (run.status, run.end.how) == (3, "triple fault")
    assert re.fullmatch(
        r"vmm: the guest crashed: triple fault at rip 0x\w+ \(enter_root_outside_memory\+0x\w+\)", first_line(run)
    )
    ((head, end),) = walks(run)
    assert "from cr3 0x7fff0000" in head
    assert end == "the walk stops here: the next table is outside guest memory"
    assert only(run, "triple_fault").get("vector") is None


def test_a_triple_fault_without_room_for_a_rescue_shows_the_walk(guest: Guest) -> None:
    run = crash(guest, "enter_quite_full_space")
    assert (run.status, run.end.how) == (3, "triple fault")
    assert re.search(r": triple fault at rip 0x\w+ \(enter_quite_full_space\+0x\w+\)$", first_line(run))
    ((_, _, end),) = walks(run)
    assert end == "the walk stops here: bit 0 (present) is clear"


def test_a_triple_fault_outside_long_mode_shows_what_is_known(call: Call, tmp_path: Path) -> None:
    """A guest of another kind, in 32-bit protected mode, without an IDT and without paging."""
    image = tmp_path / "image"
    image.write_bytes(pvh(code=assemble("lidt [none]\n ud2\n none: dw 0\n dd 0")))
    done = call(image)
    assert done.returncode == 3
    first, walk, end, *_ = done.stderr.decode().splitlines()
    assert first == "vmm: the guest crashed: triple fault at rip 0x100007"
    assert walk.startswith("  page walk of gva 0x100007 from cr3 0x0 ")
    assert end.startswith("    mapped to gpa 0x100007, ")


def test_asking_the_cpu_again_leaves_no_trace(guest: Guest) -> None:
    """The VMM borrows a slot of the PML4 and runs the vCPU once more: neither shows."""
    run = crash(guest, "unmapped_idt_above")
    ((_, entry, end),) = walks(run)
    assert entry.startswith("PML4[511]")
    assert end == "the walk stops here: bit 0 (present) is clear"
    assert "cr2 0000000000000000" in run.errors, "a #UD sets none"
    assert len(run.all("exit")) == 1


def test_going_step_by_step_tells_of_the_same_fault(guest: Guest) -> None:
    """What the VMM does by itself where KVM resets the vCPU at a triple fault."""
    at_once = crash(guest, "empty_idt_after_a_line")
    stepped = crash(guest, "empty_idt_after_a_line", "--step-after=5")
    assert first_line(stepped) == first_line(at_once)
    assert backtrace(stepped) == backtrace(at_once)
    assert (stepped.status, stepped.output, stepped.end.how) == (3, "a line\n", "triple fault")
    steps = stepped.all("exit", reason="DEBUG")
    assert steps[0].exit > 5
    # The last one stopped before the instruction that failed.
    assert steps[-1].rip == only(stepped, "triple_fault").rip
    assert at_once.all("exit", reason="DEBUG") == []


def test_asking_for_steps_after_the_fault_changes_nothing(guest: Guest) -> None:
    assert first_line(crash(guest, "empty_idt", "--step-after=99")) == first_line(crash(guest, "empty_idt"))


def test_a_fault_of_the_first_step_is_explained(guest: Guest) -> None:
    """The last exit before the fault, from which the VMM repeats the run on AMD, may be the instruction before it."""
    run = crash(guest, "fault_behind_an_exit")
    stepped = crash(guest, "fault_behind_an_exit", f"--step-after={run.end.exits - 1}")
    assert "triple fault; it began with #UD" in first_line(run)
    assert first_line(stepped) == first_line(run)


# ---- accesses that no device answers ----

UNKNOWN = {
    "read_unknown_port": ("2-byte read of port 0x1234", "port", 0x1234, 0, 2),
    "write_unknown_port": ("1-byte write to port 0xed", "port", 0xED, 1, 1),
    "read_unknown_gpa": ("4-byte read of gpa 0xd0001000", "gpa", 0xD0001000, 0, 4),
    "write_unknown_gpa": ("4-byte write to gpa 0xd0001000", "gpa", 0xD0001000, 1, 4),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_access_to_no_device_is_loud_and_fatal(case: str, guest: Guest) -> None:
    text, space, address, is_write, size = UNKNOWN[case]
    run = crash(guest, case)
    assert (run.status, run.end.how) == (3, "unknown access")
    assert re.fullmatch(
        rf"vmm: the guest crashed: {text}, where there is no device, at rip 0x\w+ \({case}\+0x\w+\)", first_line(run)
    )
    assert "--unknown-io=ignore" in run.errors
    assert backtrace(run)[0] == case
    event = only(run, "unknown")
    assert (event.space, event.address, event.is_write, event.size) == (space, address, is_write, size)
    access = run.all("exit")[-1]
    assert (access.get(space), access.is_write, access.size, access.get("device")) == (address, is_write, size, None)


def test_an_instruction_that_kvm_cannot_emulate_is_shown(guest: Guest) -> None:
    run = crash(guest, "emulate_x87")
    assert (run.status, run.end.how) == (3, "emulation failure")
    assert re.match(
        r"vmm: the guest crashed: KVM cannot emulate the instruction at rip 0x\w+ \(emulate_x87\+0x\w+\)",
        first_line(run),
    )
    assert re.search(r"^  bytes at rip: db [0-9a-f]{2} ", run.errors, re.MULTILINE), "fld m80 is DB /5"
    event = only(run, "emulation_failure")
    assert event.symbol.startswith("emulate_x87+0x")
    assert backtrace(run)[0] == "emulate_x87"


# ---- hangs ----


def test_a_hang_says_where_and_that_interrupts_were_off(guest: Guest) -> None:
    run = crash(guest, "hang_with_interrupts_off", time_limit=0.2)
    assert (run.status, run.end.how, run.output) == (4, "time limit", "hanging\n")
    assert re.fullmatch(
        r"vmm: the guest hangs: it was still running after 0.2 s, at rip 0x\w+ \(hang_with_interrupts_off\+0x\w+\)",
        first_line(run),
    )
    assert "  interrupts are off (RFLAGS.IF = 0); waiting to be delivered: nothing\n" in run.errors
    for reason in ("IO", "INTR"):
        assert re.search(rf"^ +{len(run.all('exit', reason=reason))} {reason}$", run.errors, re.MULTILINE)
    assert only(run, "hang").symbol.startswith("hang_with_interrupts_off+0x")
    assert backtrace(run)[0] == "hang_with_interrupts_off"


def test_a_hang_says_that_interrupts_were_on(guest: Guest) -> None:
    run = crash(guest, "hang_with_interrupts_on", time_limit=0.2)
    assert run.status == 4
    assert "  interrupts are on; waiting to be delivered: nothing\n" in run.errors
    assert run.all("exit")[-1].if_flag == 1


def test_a_halt_with_interrupts_on_is_a_hang_at_once(guest: Guest) -> None:
    run = crash(guest, "halt_with_interrupts_on", time_limit=60)
    assert (run.status, run.end.how) == (4, "halt")
    assert run.end.ns < 30e9
    assert re.match(r"vmm: the guest hangs: .*hlt.* at rip 0x\w+ \(halt_with_interrupts_on\+0x", first_line(run))
    assert only(run, "hang").symbol.startswith("halt_with_interrupts_on+0x")


@pytest.mark.parametrize("irqchip", ["split", "kernel"])
def test_a_halt_inside_kvm_ends_at_the_time_limit(irqchip: str, guest: Guest) -> None:
    run = crash(guest, "halt_with_interrupts_on", f"--irqchip={irqchip}", time_limit=0.2)
    assert (run.status, run.end.how) == (4, "time limit")
    assert "(halt_with_interrupts_on+0x" in first_line(run)


def test_a_halt_with_interrupts_off_is_an_end(guest: Guest) -> None:
    run = crash(guest, "halt_with_interrupts_off")
    assert (run.status, run.end.how, run.errors) == (0, "halt", "")
    assert run.all("exit")[-1].if_flag == 0


def test_a_failure_that_the_guest_reports_is_passed_on(guest: Guest) -> None:
    run = crash(guest, "exit_with_7")
    assert (run.status, run.end.how, run.errors) == (1, "exit", "vmm: the guest reports failure 7\n")
