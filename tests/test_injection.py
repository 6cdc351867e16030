"""What a host half can put into the guest, and what the record says of it: tests/hosts/interrupts."""

import pytest
from support import Halves, half_command, one_line

from kvmlab import runner
from kvmlab.runner import Built, Run

VECTOR, ERROR_CODE, NMI, GP = 0x31, 0x18, 2, 13


@pytest.fixture(scope="session")
def interrupts(halves: Halves) -> Built:
    return halves("interrupts")


def command(interrupts: Built, name: str) -> Run:
    return runner.run(interrupts, [f"--append=command={half_command('interrupts', name)}"], time_limit=20)


def delivered(run: Run) -> list[tuple[int, int]]:
    """The vectors and error codes that reached a handler."""
    values = [int.from_bytes(bytes.fromhex(event.data), "little") for event in run.all("exit", device="report")]
    return [(value & 0xFF, value >> 8) for value in values]


def told(run: Run, kind: str, *names: str) -> list[tuple[object, ...]]:
    return [tuple(event.get(name) for name in names) for event in run.all(kind)]


def test_an_interrupt_is_delivered_and_recorded(interrupts: Built) -> None:
    run = command(interrupts, "INTERRUPT")
    assert (run.status, run.output, delivered(run)) == (0, "done\n", [(VECTOR, 0)])
    assert told(run, "inject", "type", "vector", "error_code") == [("interrupt", VECTOR, None)]
    (entry,) = run.all("entry", interrupt=VECTOR)
    (inject,) = run.all("inject")
    assert entry.seq == inject.seq + 1
    assert (inject.if_flag, inject.ready) == (1, 1)
    assert (entry.if_flag, entry.ready, entry.window, entry.get("exception")) == (1, 1, 0, None)


def test_a_window_opens_once_interrupts_are_on(interrupts: Built) -> None:
    run = command(interrupts, "WINDOW")
    assert (run.status, delivered(run)) == (0, [(VECTOR, 0)])
    (exit_,) = run.all("exit", reason="IRQ_WINDOW_OPEN")
    assert exit_.if_flag == 1
    asking = run.all("entry", window=1)
    assert [(entry.if_flag, entry.ready) for entry in asking] == [(0, 0)]
    assert asking[0].entry == exit_.exit
    assert told(run, "inject", "vector", "if_flag", "ready") == [(VECTOR, 1, 1)]


def test_every_entry_is_recorded_and_numbered_like_the_exit_that_ends_it(interrupts: Built) -> None:
    run = command(interrupts, "WINDOW")
    exits = [event.exit for event in run.all("exit")]
    assert [event.entry for event in run.all("entry")] == exits == list(range(1, len(exits) + 1))


@pytest.mark.parametrize("name", ["HALT_INTERRUPT", "HALT_WINDOW"])
def test_a_halt_with_interrupts_on_ends_by_an_interrupt(name: str, interrupts: Built) -> None:
    run = command(interrupts, name)
    assert (run.status, run.output, delivered(run)) == (0, "done\n", [(VECTOR, 0)])
    assert [event.if_flag for event in run.all("exit", reason="HLT")] == [1]


def test_a_halt_with_interrupts_off_ends_by_an_nmi(interrupts: Built) -> None:
    run = command(interrupts, "HALT_NMI")
    assert (run.status, run.output, delivered(run)) == (0, "done\n", [(NMI, 0)])
    assert told(run, "inject", "type", "vector", "if_flag") == [("nmi", NMI, 0)]
    assert [entry.entry for entry in run.all("entry", nmi_pending=1)] == [run.all("exit", reason="HLT")[0].exit + 1]
    (in_handler,) = run.all("entry", nmi_masked=1)
    (report,) = run.all("exit", device="report")
    assert in_handler.entry == report.exit + 1


def test_a_halt_with_interrupts_off_that_nothing_ends_is_the_end(interrupts: Built) -> None:
    run = command(interrupts, "HALT_NOTHING")
    assert (run.status, run.end.how, run.output, run.errors) == (0, "halt", "", "")
    assert run.all("entry")[-1].entry == run.end.exits, "an entry is recorded that there was not"


def test_a_halt_is_not_ended_by_what_was_injected_before_an_earlier_entry(interrupts: Built) -> None:
    run = command(interrupts, "ONE_ONLY")
    assert (run.status, run.end.how, delivered(run)) == (4, "halt", [(VECTOR, 0)])


def test_an_exception_is_delivered_with_its_error_code(interrupts: Built) -> None:
    run = command(interrupts, "EXCEPTION")
    assert (run.status, delivered(run)) == (0, [(GP, ERROR_CODE)])
    assert told(run, "inject", "type", "vector", "error_code") == [("exception", GP, ERROR_CODE)]
    assert len(run.all("entry", exception=GP)) == 1


def test_a_triple_fault_that_began_with_an_injected_exception_names_it(interrupts: Built) -> None:
    run = command(interrupts, "PAGE_FAULT_WITHOUT_IDT")
    assert (run.status, run.end.how) == (3, "triple fault")
    (fault,) = run.all("triple_fault")
    assert (fault.injected, fault.vector, fault.error_code, fault.cr2) == (1, 14, 2, 0x123456789000)
    first, *rest = run.errors.splitlines()
    assert "triple fault; it began with the injected #PF (page fault), error code 0x2" in first
    assert any("page walk of gva 0x123456789000" in line for line in rest)
    assert any("the IDT's limit 0x0 leaves no gate for vector 14" in line for line in rest)


def test_an_injected_exception_that_is_handled_is_not_blamed_for_what_follows(interrupts: Built) -> None:
    run = command(interrupts, "PAGE_FAULT")
    assert (run.status, run.end.how) == (3, "panic")
    assert "unhandled exception #PF (page fault), error code 0x2" in run.errors


def test_what_was_there_before_is_not_recorded_as_injected(interrupts: Built) -> None:
    run = command(interrupts, "NO_EVENTS")
    assert (run.status, run.all("inject"), delivered(run)) == (0, [], [])


@pytest.mark.parametrize(
    ("name", "said"),
    {"BAD_VECTOR": "KVM_INTERRUPT failed: Invalid argument", "BAD_LINE": "KVM_IRQ_LINE failed: "}.items(),
)
def test_an_ioctl_that_kvm_refuses_gets_one_line_and_status_5(name: str, said: str, interrupts: Built) -> None:
    run = command(interrupts, name)
    assert run.status == 5
    one_line(run.errors, said)
