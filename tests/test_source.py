"""`make check` says where in the student's code it went wrong."""

import re
from collections.abc import Callable

import pytest
from variants import Variant

from kvmlab.engine import Engine

pytest_plugins = ["variants"]

StartVariant = Callable[[str], Variant]

FIRST = "01-vm-exit"


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


def test_make_check_names_the_line_at_which_the_host_half_crashed(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("host.c", "memcpy(bytes, element, access->size);", "*(volatile char *)0 = 0;")
    output = checked(student)
    assert "vmm: the VMM itself crashed: signal 11" in output
    number = line_of(student, "host.c", "*(volatile char *)0 = 0;").rpartition(":")[2]
    assert re.search(rf"^ {{13}}vmm: that is in lab_access, host\.c:{number}$", output, re.MULTILINE), output


def test_a_check_that_misses_an_event_shows_how_the_run_ended(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("guest.c", "    halt();\n", "")
    output = checked(student)
    assert re.search(
        r"^ {13}seen     none\n +the run ended by: exit .*\n(?:   .*\n)+ +> #\d+ end ", output, re.MULTILINE
    ), output
