"""The API of host halves (include/host.h), used well and badly."""

import re
import subprocess
from pathlib import Path

import pytest
from support import HOSTS, Halves, Host, half_command, one_line, only_plain

from kvmlab import runner, source
from kvmlab.runner import Built, Run

API = HOSTS / "api"


@pytest.fixture(scope="session")
def api(halves: Halves) -> Built:
    """Both halves of tests/hosts/api."""
    return halves("api")


def run(api: Built, name: str, *words: str, time_limit: float = 20, seed: int = 0) -> Run:
    append = " ".join([f"command={half_command('api', name)}", *words])
    return runner.run(api, [f"--append={append}"], time_limit=time_limit, seed=seed)


def lines_of(text: str) -> list[int]:
    lines = (API / "host.c").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if text in line]


# ---- claims ----


@pytest.mark.parametrize("seed", [0, 1])
def test_ranges_that_only_touch_others_or_memory_are_claimed(seed: int, host: Host, build: Path) -> None:
    run = runner.run(Built(host("claims"), build / "tests" / "hello.elf"), seed=seed)
    assert (run.status, run.errors) == (0, "")


BAD_CLAIMS = {
    2: "com1 and mine both claim port 0x3ff",
    3: "exit and mine both claim port 0xf0",
    4: "both claim port 0x0",
    5: "mine and mine both claim gpa 0xd0000fff",
    6: "0x0 ports from 0x500",
    7: "0x2 ports from 0xffff",
    8: "0x9 gpas from 0xfffffffffffffff8",
    9: "mine claims gpa 0xffffff, which is memory",
    10: "0x0 gpas from 0xfee00000",
    12: "mine claims one range too many",
}


@pytest.mark.parametrize("seed", BAD_CLAIMS)
def test_a_bad_claim_gets_one_line_and_status_5(seed: int, host: Host, build: Path) -> None:
    run = runner.run(Built(host("claims"), build / "tests" / "hello.elf"), seed=seed)
    assert (run.status, run.output) == (5, "")
    one_line(run.errors, BAD_CLAIMS[seed])


# ---- what a host half sees ----


def test_host_memory_gives_what_lies_in_memory_and_nothing_else(api: Built) -> None:
    seen = {(event.at, event.get("bytes")): event.given for event in run(api, "MEMORY").all("memory")}
    end, most = 16 << 20, (1 << 64) - 1
    inside = [(0, 0), (0, end), (end - 1, 1), (end, 0)]
    outside = [(end, 1), (end - 1, 2), (0, end + 1), (1, most), (most, 1), (most, most), (most - end + 1, 2 * end)]
    assert seen == dict.fromkeys(inside, 1) | dict.fromkeys(outside, 0)


def test_walk_and_translation_agree(api: Built) -> None:
    recorded = run(api, "WALK", seed=5)
    (registers,) = recorded.all("registers")
    (access,) = recorded.all("exit", device="command")
    assert (registers.rip, registers.seed) == (access.rip, 5)
    mapped, empty, not_canonical = recorded.all("walk")
    # The boot mapping is gva = gpa, in 2 MiB pages: three entries.
    assert (mapped.mapped, mapped.steps, mapped.gpa, mapped.page_size) == (1, 3, registers.rip, 2 << 20)
    assert (mapped.kvm_valid, mapped.kvm_gpa) == (1, registers.rip)
    assert (empty.mapped, empty.steps, empty.kvm_valid) == (0, 1, 0)
    assert (not_canonical.mapped, not_canonical.steps) == (0, 0)


def test_a_host_half_knows_the_machine_as_it_was_built(api: Built) -> None:
    append = f"--append=command={half_command('api', 'MACHINE')}"
    recorded = runner.run(api, ["--irqchip=split", "--memory=17", append], time_limit=20)
    assert (recorded.status, recorded.output) == (0, "done\n"), recorded.errors
    (machine,) = recorded.all("machine")
    assert (machine.irqchip, machine.memory_mib) == (1, 17)


def test_events_of_the_host_half_are_escaped(api: Built) -> None:
    (event,) = run(api, "STRINGS").all("strings")
    assert event.odd == '"\\\n\x01\x7f\xff/'
    assert (event.empty, event.get("bytes"), event.no_bytes) == ("", "000fff", "")
    assert (event.most, event.hex) == ((1 << 64) - 1, (1 << 64) - 1)


def memory_writes(recorded: Run) -> object:
    (end,) = recorded.all("host_end")
    return end.memory_writes


def test_memory_event_serves_an_access_and_the_run_goes_on(api: Built) -> None:
    recorded = run(api, "NOTHING", "memory=3")
    assert (recorded.status, recorded.output) == (0, "memory 12345678\n" * 3 + "done\n")
    assert recorded.all("unknown") == []
    data = [event.data for event in recorded.all("exit", reason="MMIO")]
    assert data == ["00000000", "78563412", "01000000", "78563412", "02000000", "78563412"]
    assert memory_writes(recorded) == 3


def test_memory_event_may_refuse_an_access(api: Built) -> None:
    recorded = run(api, "NOTHING", "memory=1", "behind=1")
    assert recorded.status == 3
    assert "4-byte write to gpa 0xd0001000, where there is no device" in recorded.errors
    assert memory_writes(recorded) == 1


@pytest.mark.parametrize("words", [(), ("hang=1",)])
def test_end_is_called_once_and_before_entry_before_each_entry(words: tuple[str, ...], api: Built) -> None:
    recorded = run(api, "NOTHING", *words, time_limit=0.3)
    assert (recorded.status, recorded.end.how) == ((4, "time limit") if words else (0, "exit"))
    (event,) = recorded.all("host_end")
    assert event.entries == recorded.end.exits
    assert event.seq == recorded.end.seq - 1


def test_a_halt_that_the_host_half_does_nothing_about_is_a_hang_at_once(api: Built) -> None:
    recorded = run(api, "NOTHING", "halt=1", time_limit=60)
    assert (recorded.status, recorded.end.how) == (4, "halt")
    assert "the host half neither injects an event nor asks for an interrupt window" in recorded.errors
    assert [event.if_flag for event in recorded.all("exit", reason="HLT")] == [1]


# ---- a host half with bugs ----

CRASHES = {
    "NULL_POINTER": (11, "/* the crash */"),
    "DIVIDE": (8, "/* the division */"),
    "RECURSE": (11, "/* the end of the stack */"),  # by a store or by a call, as the stack happens to lie
}


@only_plain  # the sanitizers report it themselves
@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_of_the_host_half_names_the_line(name: str, api: Built) -> None:
    signal, line = CRASHES[name]
    recorded = run(api, name)
    assert recorded.status == 5
    one_line(recorded.errors, f"the VMM itself crashed: signal {signal}, address ")
    place = source.of_host(api.vmm, recorded.errors)
    assert any(f"host.c:{number}, in " in place for number in lines_of(line)), place


@only_plain  # the sanitizers report it themselves
def test_a_crash_of_the_host_half_keeps_the_record_up_to_it(api: Built) -> None:
    recorded = run(api, "NULL_POINTER", "memory=2")
    assert recorded.output == "memory 12345678\n" * 2
    assert recorded.events[-1].get("device") == "command"
    assert recorded.all("end") == []


@pytest.mark.parametrize("name", ["LOOP", "LOOP_IN_END"])
def test_a_host_half_that_loops_is_found_by_the_time_limit(name: str, api: Built) -> None:
    recorded = run(api, name, time_limit=0.2)
    assert recorded.status == 4
    one_line(recorded.errors, "stuck", "host.c")
    assert re.search(r"^the host half was at \S+/host\.c:\d+, in loop\b", source.of_host(api.vmm, recorded.errors))


def test_a_host_half_that_loops_in_its_setup_is_found_by_the_time_limit(host: Host, build: Path) -> None:
    recorded = runner.run(Built(host("claims"), build / "tests" / "hello.elf"), seed=11, time_limit=0.2)
    assert recorded.status == 4
    one_line(recorded.errors, "stuck", "host.c")


def test_a_todo_of_the_host_half_says_what_to_write_and_where(api: Built) -> None:
    recorded = run(api, "TODO")
    assert (recorded.status, recorded.end.status, recorded.end.how) == (1, 1, "todo")
    (line,) = lines_of('HOST_TODO("serve the command")')
    text = rf"^vmm: \S*host\.c:{line}: not written yet: serve the command$"
    assert re.search(text, recorded.errors, re.MULTILINE), recorded.errors


def test_a_host_half_may_say_what_the_machine_lacks(api: Built) -> None:
    recorded = run(api, "CANNOT")
    assert (recorded.status, recorded.end.how) == (77, "cannot")
    one_line(recorded.errors, "vmm: this machine cannot run the lesson: it has no such thing")
    assert recorded.lacking == "it has no such thing"


def test_a_host_half_may_record_kvms_counters_at_any_moment(api: Built) -> None:
    moment, end = run(api, "STATISTICS").all("statistics")
    assert (moment.when, end.when) == ('a "moment"', "end")
    assert moment.fields.keys() == end.fields.keys() >= {"exits", "mmio_exits", "pf_taken", "tlb_flush", "pages_4k"}
    assert moment.exits < end.exits, "between the two there is the guest's console output"


def test_without_a_record_there_are_no_counters_either(api: Built) -> None:
    append = f"--append=command={half_command('api', 'STATISTICS')}"
    done = subprocess.run([api.vmm, append, api.image], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_event_that_a_todo_leaves_open_is_closed(api: Built) -> None:
    unfinished, end = run(api, "TODO").events[-2:]
    assert (unfinished.kind, unfinished.before, end.kind) == ("unfinished", 1, "end")


# ---- a slot without memory behind it ----


@pytest.fixture(scope="session")
def faults(halves: Halves) -> Built:
    return halves("faults")


def run_with_a_fault(faults: Built, name: str, time_limit: float = 20) -> Run:
    return runner.run(faults, [f"--append=command={half_command('faults', name)}"], time_limit=time_limit)


def test_a_memory_fault_that_the_host_half_mends_is_an_exit_and_the_run_goes_on(faults: Built) -> None:
    recorded = run_with_a_fault(faults, "MEND")
    assert (recorded.status, recorded.output) == (0, "read 12345678\n"), recorded.errors
    (exit_,) = recorded.all("exit", reason="MEMORY_FAULT")
    assert exit_.reason_number == 39
    (fault,) = recorded.all("fault")
    assert (fault.seq, fault.is_known) == (exit_.seq + 1, int(exit_.get("gpa") is not None))
    assert exit_.get("gpa", 0x20001000) == 0x20001000


def test_a_memory_fault_that_nobody_mends_ends_the_vmm_with_one_line(faults: Built) -> None:
    recorded = run_with_a_fault(faults, "REFUSE")
    assert (recorded.status, recorded.end.how) == (5, "host failure")
    one_line(recorded.errors, "KVM_RUN failed at rip 0x", ": the host has no memory behind ")
    assert len(recorded.all("exit", reason="MEMORY_FAULT")) == 1


def test_a_memory_fault_that_is_not_mended_comes_again_until_the_time_limit(faults: Built) -> None:
    recorded = run_with_a_fault(faults, "LIE", time_limit=0.2)
    assert (recorded.status, recorded.end.how) == (4, "time limit")
    assert len(recorded.all("exit", reason="MEMORY_FAULT")) > 2


def test_slots_of_the_host_half_are_recorded_and_those_of_the_vmm_are_out_of_its_reach(faults: Built) -> None:
    recorded = run_with_a_fault(faults, "SLOT_AGAIN")
    slots = [(event.slot, event.gpa, event.size, event.get("flags")) for event in recorded.all("slot")]
    assert slots == [(2, 0x20000000, 0x2000, 0), (2, 0x20002000, 0x2000, 0), (2, 0, 0, 0)]
    recorded = run_with_a_fault(faults, "NOT_MINE")
    assert recorded.status == 5
    one_line(recorded.errors, "slot 1 is the VMM's own: the host half's begin with HOST_SLOT_FIRST, 2")
