"""`make check` says where in the student's code it went wrong."""

import re
from collections.abc import Callable

import pytest
from variants import Variant

from kvmlab.engine import Engine

pytest_plugins = ["variants"]

StartVariant = Callable[[str], Variant]

FIRST = "01-vm-exit"
INDENT = "\n             "


def checked(student: Variant, engine: str = "auto") -> str:
    student.make_all()
    shown = student.kvmlab("check", student.name, "--seed=7", f"--engine={engine}")
    assert shown.status == 1, str(shown)
    return shown.output


def line_of(student: Variant, file: str, text: str) -> str:
    path = student.folder / file
    (number,) = [i for i, line in enumerate(path.read_text().splitlines(), start=1) if text in line]
    return f"{path}:{number}"


WRONG = {
    "a store to a device": ("mmio_write32(LAB_CHALLENGE_ANSWER, (", "mmio_write32(LAB_CHALLENGE_ANSWER, ~("),
    "a load from a device": ("uint32_t nonce = mmio_read32", "uint32_t nonce = *(volatile uint16_t *)"),
    "an exception": ("uint32_t name = ", "uint32_t name = *(volatile uint32_t *)0x7000000000 + "),
    "a device that is not there": ("uint32_t name = ", "uint32_t name = in32(0x600) + "),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG)
def test_make_check_names_the_line_of_the_students_code(
    variant: StartVariant, engines: dict[str, Engine], old: str, new: str
) -> None:
    student = variant(FIRST)
    student.change("guest.c", old, new)
    place = f"the guest was at {line_of(student, 'guest.c', new)}, in challenge_answer: "
    for engine in engines:
        output = checked(student, engine)
        (line,) = re.findall(r"^ {13}the guest was at .*$", output, re.MULTILINE)
        assert line.strip().startswith(place), output
        assert new in line


def test_a_line_that_no_student_writes_is_not_named(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("guest.c", "uint32_t name = ", "memcpy((void *)0x7000000000, &nonce, 4); uint32_t name = ")
    output = checked(student)
    assert "(memcpy+" in output
    assert "the guest was at" not in output


CRASHES = {
    "in the host half": ("*(volatile char *)0 = 0;", "crashed: signal 11"),
    "in the C library": ("memcpy((void *)access->address, element, access->size);", "crashed: signal 11"),
    "in the last call": ("return (void)memcpy((void *)access->address, element, 4);", "crashed: signal 11"),
    "by the host half's own will": ("__builtin_trap();", "crashed: signal 4"),
}


@pytest.mark.parametrize(("bug", "what"), CRASHES.values(), ids=CRASHES)
def test_make_check_names_the_line_at_which_the_host_half_was(variant: StartVariant, bug: str, what: str) -> None:
    student = variant(FIRST)
    student.change("host.c", "memcpy(bytes, element, access->size);", bug)
    output = checked(student)
    assert f"{INDENT}vmm: the VMM itself {what}" in output
    assert f"{INDENT}the host half was at {line_of(student, 'host.c', bug)}, in lab_access: {bug}\n" in output
    assert "called from" not in output


def test_make_run_names_it_too_and_no_address_but_the_one_at_fault(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("host.c", "memcpy(bytes, element, access->size);", CRASHES["in the C library"][0])
    shown = student.make("run", "LESSON=1")
    place = f"{line_of(student, 'host.c', 'memcpy((void *)access')}, in lab_access: "
    assert f"\nvmm: the host half was at {place}" in shown.errors, str(shown)
    assert "called from" not in shown.errors


@pytest.mark.parametrize(
    ("bug", "ending"),
    {
        "exit(0);": "left: a host half does not call exit() (status 0)",
        "raise(SIGKILL);": "was killed by signal 9 (status 137)",
    }.items(),
)
def test_a_vmm_that_does_not_live_to_record_the_end_is_told_from_one_that_does(
    variant: StartVariant, bug: str, ending: str
) -> None:
    student = variant(FIRST)
    student.change("host.c", "#include <string.h>", "#include <signal.h>\n#include <stdlib.h>\n#include <string.h>")
    student.change("host.c", "memcpy(bytes, element, access->size);", bug)
    assert f"{INDENT}the run has no end: the VMM {ending}\n" in checked(student)


def test_a_check_of_the_end_shows_what_came_before_and_what_a_host_half_left_undone(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("host.c", "memcpy(bytes, element, access->size);", "(void)bytes;")
    output = checked(student)
    assert re.search(
        r"the bytes in the registers at the end\n +expected [0-9a-f ]+\n +seen     (00 ){7}00\n"
        r"(?:   .*\n)+ +> #\d+ exit .* device=lab registers\n",
        output,
    ), output


def test_a_check_that_misses_an_event_shows_how_the_run_ended(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("guest.c", "    halt();\n", "")
    output = checked(student)
    assert re.search(
        r"^ {13}seen     none\n +the run ended by: exit .*\n(?:   .*\n)+ +> #\d+ end ", output, re.MULTILINE
    ), output
