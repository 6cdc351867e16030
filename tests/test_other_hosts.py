"""Hosts whose KVM differs from this one's: played by a library between the VMM and the real KVM."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Call, Guest, make, one_line, only_plain

from kvmlab import events

Environment = Callable[[str], dict[str, str]]

# The sanitizers want to be the first library.
pytestmark = only_plain


@pytest.fixture(scope="session", params=["plain"])
def vmm(build: Path) -> Path:
    """The VMM linked dynamically: no library comes between a static one and the C library."""
    return make(build, "tests/shims/vmm")


@pytest.fixture(scope="session")
def host(build: Path) -> Environment:
    """The environment in which the VMM meets this variant of tests/shims/kvm.c."""
    library = make(build, "tests/shims/kvm.so")
    return lambda variant: os.environ | {"LD_PRELOAD": str(library), "KVM_SHIM": variant}


REFUSALS = {
    "no_sync_regs": "lacks KVM_CAP_SYNC_REGS",
    "fail_entry": "the CPU refused the VM entry: hardware reason 0x80000021",
    "run_fails": "KVM_RUN failed at rip 0x",
    "no_memory": ": the host has no memory behind gpa 0x7654000",
}


@pytest.mark.parametrize("variant", REFUSALS)
def test_a_kvm_that_refuses_gets_one_line_and_status_5(
    variant: str, call: Call, host: Environment, guest: Guest
) -> None:
    done = call(guest("hello").image, env=host(variant))
    assert (done.returncode, done.stdout) == (5, b"")
    one_line(done.stderr, REFUSALS[variant])


def test_a_memory_fault_whose_gpa_kvm_knows_is_an_exit_with_that_gpa(
    call: Call, host: Environment, guest: Guest, tmp_path: Path
) -> None:
    record = tmp_path / "events"
    call(f"--events={record}", guest("hello").image, env=host("no_memory"))
    (exit_,) = (event for event in events.read(record) if event.kind == "exit")
    assert (exit_.reason, exit_.reason_number, exit_.gpa) == ("MEMORY_FAULT", 39, 0x7654000)


def test_an_exit_of_unknown_reason_is_loud_and_fatal(
    call: Call, host: Environment, guest: Guest, tmp_path: Path
) -> None:
    record = tmp_path / "events"
    done = call(f"--events={record}", guest("hello").image, env=host("unknown_exit"))
    assert done.returncode == 3
    one_line(done.stderr, "KVM exits with reason 12345, which this VMM does not know, at rip 0x")
    *_, exit_, _statistics, end = events.read(record)
    assert (exit_.reason, exit_.reason_number, end.how) == ("?", 12345, "unknown exit")


@pytest.mark.parametrize(
    "case", ["empty_idt", "empty_idt_after_a_line", "fault_behind_an_exit", "enter_empty_space", "absent_gates"]
)
def test_a_triple_fault_is_explained_even_where_kvm_resets_the_registers(
    case: str, call: Call, host: Environment, guest: Guest, tmp_path: Path
) -> None:
    arguments = [f"--append=case={case}", guest("crash").image]
    here = call(f"--events={tmp_path}/here", *arguments)
    there = call(f"--events={tmp_path}/events", *arguments, env=host("reset"))
    assert b"triple fault; it began with" in here.stderr
    # Single-stepping may leave RFLAGS.RF in another state.
    texts = [re.sub(rb"rflags \w+", b"", done.stderr).decode() for done in (there, here)]
    assert texts[0] == texts[1]
    assert (there.returncode, there.stdout) == (here.returncode, here.stdout)
    record = events.read(tmp_path / "events")
    fault, *behind = record[-3:]
    assert [fault.kind, *(event.kind for event in behind)] == ["triple_fault", "statistics", "end"]
    assert fault.fields.keys() >= {"rip", "symbol", "vector", "error_code", "cr2"}
    (fault_here,) = (event for event in events.read(tmp_path / "here") if event.kind == "triple_fault")
    own = {"seq", "ns"}
    assert fault.fields | dict.fromkeys(own) == fault_here.fields | dict.fromkeys(own)
    assert "DEBUG" not in [event.get("reason") for event in record], "the repetition is not part of the record"


def test_a_kvm_that_keeps_no_counters_leaves_none(call: Call, host: Environment, guest: Guest, tmp_path: Path) -> None:
    record = tmp_path / "events"
    assert call(f"--events={record}", guest("hello").image, env=host("no_counters")).returncode == 0
    (statistics,) = (event for event in events.read(record) if event.kind == "statistics")
    assert set(statistics.fields) == {"seq", "ns", "kind", "when"}
