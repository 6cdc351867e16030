"""The VMM's own 8259As, for machines where KVM has none, do as KVM's do: tests/hosts/lines."""

import pytest
from support import Halves

from kvmlab import runner
from kvmlab.runner import Built

STEPS = 400
FIRST_LINE, LAST_LINE = 0x60, 0x6F


@pytest.fixture(scope="session")
def lines(halves: Halves) -> Built:
    return halves("lines")


def reports(lines: Built, irqchip: str, seed: int, *options: str) -> list[int]:
    """What the guest has seen: the edge/level registers, and after each step the registers of both chips."""
    run = runner.run(lines, [f"--irqchip={irqchip}", *options], seed=seed, time_limit=60)
    assert (run.status, run.errors) == (0, "")
    values = run.all("exit", reason="IO", device="report")
    return [int.from_bytes(bytes.fromhex(event.data), "little") for event in values]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_vmms_interrupt_controllers_show_what_kvms_show(lines: Built, seed: int) -> None:
    kvms = reports(lines, "kernel", seed)
    assert len(kvms) == 1 + 2 * STEPS
    taken = {value >> 24 for value in kvms[1::2]} - {0}
    assert len(taken) > 8, "too few lines interrupt for a comparison"
    assert all(FIRST_LINE <= vector <= LAST_LINE for vector in taken)
    for irqchip in ("none", "split"):
        seen = reports(lines, irqchip, seed)
        wrong = next((i for i, pair in enumerate(zip(kvms, seen, strict=True)) if len(set(pair)) > 1), None)
        assert wrong is None, f"report {wrong} is {seen[wrong or 0]:#x} on {irqchip}, {kvms[wrong or 0]:#x} in KVM"


@pytest.mark.parametrize("irqchip", ["none", "split", "kernel"])
def test_an_interrupt_and_an_nmi_before_the_same_entry_are_both_taken(lines: Built, irqchip: str) -> None:
    assert reports(lines, irqchip, 1, "--append=nmi=1") == [FIRST_LINE + 4 | 1 << 8]
