"""`make hint` and `make list`: where a student stands, and what helps."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from variants import ENVIRONMENT, NAMES, Variant, command, regions, write_first, write_parts

from kvmlab import lesson, markers
from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]

StartVariant = Callable[[str], Variant]

FIRST = "01-vm-exit"


# ---- make hint ----


def hint(home: Path, name: str) -> list[str]:
    shown = Variant(home, name).make("hint", f"LESSON={name}")
    assert (shown.status, shown.errors) == (0, ""), str(shown)
    return shown.output.splitlines()


def about(this: lesson.Hint, tier: int) -> list[str]:
    left = ["(2 more: ask again)", "(1 more: ask again)", "(there are no more)"]
    return [f"  {this.task}, hint {tier} of 3:", f"    {this.tiers[tier - 1]}", f"    {left[tier - 1]}"]


@pytest.mark.parametrize("name", NAMES)
def test_each_hint_says_more_of_the_first_part_until_all_is_said(student_home: Path, name: str) -> None:
    """Nothing need be built for it, and nothing be known of earlier hints. The hints stand in the order of the work,
    which need not be that of the files."""
    expected = lesson.load(ROOT / "lessons" / name).hints[0]
    first = next(each for each in regions(name) if each.function == re.split(r"\W", expected.task)[0])
    for tier in (1, 2, 3, 3):
        where, *said = hint(student_home, name)
        place = re.fullmatch(rf"lesson {int(name[:2])}: the next part to write is (\w+), (.*):(\d+)", where)
        assert place, where
        assert (place[1], place[2]) == (first.function, str(student_home / first.file))
        assert Path(place[2]).read_text().splitlines()[int(place[3]) - 1].strip() == markers.BEGIN
        assert said == about(expected, tier)


def test_the_hints_of_each_task_are_counted_apart(student_home: Path) -> None:
    answer, access = lesson.load(ROOT / "lessons" / FIRST).hints
    seen = []
    for written in (0, 0, 1, 0, 1):
        write_parts(student_home, FIRST, written)
        seen.append(hint(student_home, FIRST)[1:])
    assert seen == [about(answer, 1), about(answer, 2), about(access, 1), about(answer, 3), about(access, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_when_every_part_is_written_each_task_has_its_next_hint(tmp_path: Path, name: str) -> None:
    this = lesson.load(ROOT / "lessons" / name)
    for tier in (1, 2, 3, 3):
        shown = command("make", "hint", f"LESSON={name}", f"BUILD={tmp_path}/build")
        lines = [f"lesson {this.number}: every part is written; the next hint of each task"]
        for each in this.hints:
            lines += about(each, tier)
        assert (shown.status, shown.output.splitlines(), shown.errors) == (0, lines, "")


@pytest.mark.parametrize("text", [b"", b"2", b"[1]", b'{"x": "y"', b'{"challenge_answer (guest.c)": "y"}', b"\xff\0"])
def test_a_count_of_hints_that_makes_no_sense_is_begun_anew(student_home: Path, text: bytes) -> None:
    place = Variant(student_home, FIRST).build / "lessons" / FIRST / "hints-given"
    place.parent.mkdir(parents=True)
    place.write_bytes(text)
    assert [hint(student_home, FIRST)[1].split()[-3] for _ in range(2)] == ["1", "2"]


def test_a_part_whose_markers_are_gone_is_no_part(student_home: Path) -> None:
    """A student may take them away, or one of them, or save something that is no text."""
    guest, host = Variant(student_home, FIRST).sources
    guest.write_text("".join(line for line in guest.read_text().splitlines(True) if "SOLUTION" not in line))
    assert "lab_access, " in hint(student_home, FIRST)[0]
    guest.write_bytes(b"/* BEGIN SOLUTION */\n\xff\0")
    assert "lab_access, " in hint(student_home, FIRST)[0]
    host.unlink()
    assert "every part is written" in hint(student_home, FIRST)[0]


# ---- make list ----


def listed(home: Path, name: str = FIRST) -> str:
    shown = Variant(home, name).make("list")
    assert (shown.status, shown.errors) == (0, ""), str(shown)
    return shown.output.splitlines()[NAMES.index(name)]


def test_make_list_shows_what_there_is_to_do(student_home: Path) -> None:
    lines = Variant(student_home, FIRST).make("list").output.splitlines()
    lessons = lesson.load_all(student_home / "lessons")
    assert len(lines) == len(lessons) == len(NAMES)
    for line, this in zip(lines, lessons, strict=True):
        points, parts = f"-/{sum(this.points.values())}", f"0/{len(regions(this.name))}"
        assert line == f"{this.number:3} {points:>6} points {parts:>6} parts  {this.title}  ({this.folder})"


@pytest.mark.parametrize("arguments", [["list"], ["hint", "1"], ["check", "1", "--seed=7"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(variant: StartVariant, arguments: list[str]) -> None:
    """As in `make list | head -2`."""
    ours = variant(FIRST)
    environment = ENVIRONMENT | {"PYTHONPATH": "tools", "PYTHONDONTWRITEBYTECODE": "1"}
    reads, writes = os.pipe()
    os.close(reads)
    call = ours.call(*arguments)
    done = subprocess.run(call, cwd=ROOT, env=environment, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command_name", ["run", "check"])
def test_make_list_shows_what_was_reached(variant: StartVariant, command_name: str) -> None:
    student = variant(FIRST)
    write_first(student, 1)
    begin = r"  1 +{}/12 points +1/2 parts  What a VM exit is  \(\S+/01-vm-exit{}\)\n"

    def expect_listed(points: str, since: str = "") -> None:
        shown = student.make("list").output
        assert re.fullmatch(begin.format(points, since), shown), shown

    expect_listed("-")
    assert student.make(command_name, "LESSON=1").points == 3
    expect_listed("3")
    host = student.folder / "host.c"
    before = host.read_text()
    host.write_text(before.replace("lab half", "lab's half") + "\n")
    expect_listed("3", "; changed since")
    host.write_text(before)
    expect_listed("3")


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"points": "x", "sources": ""}', b'{"points": 1, "x": 1}', b"\xff"]
)
def test_a_record_of_progress_that_makes_no_sense_is_none(student_home: Path, text: bytes) -> None:
    place = Variant(student_home, FIRST).build / "lessons" / FIRST / "progress.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(text)
    assert listed(student_home).startswith("  1   -/12 points    0/2 parts  ")
