"""What the guest of lesson 5 notes is what it does: without EPT, KVM sees each of these instructions."""

import contextlib
import re
from pathlib import Path

import pytest

from kvmlab import runner
from kvmlab.engine import Engine, Vmx
from kvmlab.runner import Run

BIT_63 = 1 << 63


@pytest.fixture(scope="module")
def run(build: Path, engines: dict[str, Engine]) -> Run:
    if "vmx" not in engines:
        pytest.skip("only vmx has PCIDs: --engines=vmx")
    with contextlib.closing(Vmx("ept=0", trace=True)) as engine:
        run = runner.run(runner.lesson_built(build, "05-tlb-tags"), seed=1, engine=engine)
    assert run.status == 0, run.errors
    return run


def traced(run: Run, point: str, pattern: str) -> list[int]:
    """The numbers that KVM's trace has where it says this."""
    found = (re.search(pattern, event.text) for event in run.all("trace", point=point))
    return [int(match[1], 16) for match in found if match]


def test_kvm_sees_each_invlpg_that_the_guest_notes(run: Run) -> None:
    noted = [event.gva for event in run.all("operation", operation="INVLPG")]
    assert len(noted) > 100
    assert traced(run, "kvm_exit", r"reason INVLPG .* info1 (0x\w+)") == noted


def test_kvm_sees_each_invpcid_that_the_guest_notes(run: Run) -> None:
    noted = run.all("operation", operation="INVPCID")
    assert len(noted) > 20
    assert len(run.all("trace", point="kvm_exit", reason="INVPCID")) == len(noted)


def test_kvm_sees_each_load_of_a_control_register_that_the_guest_notes(run: Run) -> None:
    loads = run.all("operation", operation="MOV to CR3")
    noted = [event.root | event.pcid | event.keep * BIT_63 for event in loads]
    assert len(noted) > 60
    assert traced(run, "kvm_cr", r"cr_write 3 = (0x\w+)")[-len(noted) :] == noted
    noted = [event.cr4 for event in run.all("operation", operation="MOV to CR4")]
    assert traced(run, "kvm_cr", r"cr_write 4 = (0x\w+)")[-len(noted) :] == noted


def test_an_old_translation_is_found_again_under_its_pcid(run: Run) -> None:
    """Which of the trials show the old frame on this machine: no global ones, and all that leave the entry
    with this PCID alone, but INVLPG, which drops it under all PCIDs here."""
    old = [event.name for event in run.all("tried", is_old=1)]
    assert old == [
        "nothing",
        "INVLPG of the next page",
        "INVPCID 0, another PCID",
        "INVPCID 1, another PCID",
        "CR3 with bit 63",
        "CR3 to another PCID and back",
        "global page, nothing",
    ]
