"""The table of clauses is complete, and what it says of the tests is true."""

import subprocess

from virtio.clauses import CLAUSES, all_tests, covering, proved_by

from kvmlab.plugin import ROOT

STRENGTHS = {"MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "text"}
# "Conformance / Device Conformance", for any device, MMIO devices and console devices; RING_RESET's are below them.
CONFORMANCE = {
    "Device Status Field",
    "Feature Bits",
    "Device Reset",
    "Device Configuration Space",
    "Virtqueue Reset",
    "Virtqueue Re-enable",
    "Split: Message Framing",
    "Split: The Virtqueue Descriptor Table",
    "Split: Indirect Descriptors",
    "Split: Used Buffer Notification Suppression",
    "Split: The Virtqueue Used Ring",
    "Split: Available Buffer Notification Suppression",
    "Packed: Virtqueues",
    "Packed: The Virtqueue Descriptor Table",
    "Packed: Scatter-Gather Support",
    "Shared Memory Regions",
    "Reserved Feature Bits",
    "MMIO Device Register Layout",
    "Console Device: Device Initialization",
    "Console Device: Multiport Device Operation",
}


def test_every_clause_is_proved_by_a_test_or_does_not_apply() -> None:
    covered = covering()
    assert [str(clause) for clause in CLAUSES if not covered[clause] and not clause.not_here] == []
    assert [str(clause) for clause in CLAUSES if covered[clause] and clause.not_here] == []


def test_every_section_of_device_requirements_is_in_the_table() -> None:
    required = {clause.section for clause in CLAUSES if clause.strength != "text"}
    assert required == CONFORMANCE
    assert {clause.strength for clause in CLAUSES} == STRENGTHS
    assert len(set(CLAUSES)) == len(CLAUSES)


def test_a_test_that_proves_a_clause_names_its_section() -> None:
    silent = [
        f"{function.__name__}: {clause.section}"
        for function in all_tests()
        for clause in proved_by(function)
        if f'"{clause.section}"' not in (function.__doc__ or "")
    ]
    assert silent == []


def test_make_list_clauses_shows_each_clause_with_its_tests_or_the_reason() -> None:
    command = ["make", "-s", "list-clauses"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for clause, names in covering().items():
        assert f" {clause.says}\n" in shown
        for line in names or [f"does not apply: {clause.not_here}"]:
            assert f"      {line}\n" in shown
