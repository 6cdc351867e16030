"""Each lesson holds what it promises: wrong solutions are caught, stubs say what is missing, and what
is only printed is worth nothing."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from variants import NAMES, Region, Shown, Variant, is_done, regions, write_stubs

from kvmlab import lesson, markers, runner
from kvmlab.engine import ENGINES, Engine
from kvmlab.events import Event
from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]
pytestmark = pytest.mark.spread

MUTANTS = sorted((ROOT / "tests" / "mutants").glob("*/*.patch"))
ALL_REGIONS = [region for name in NAMES for region in regions(name)]

StartVariant = Callable[[str], Variant]
Engines = dict[str, Engine]

CANNOT = 77  # the exit status where an engine lacks what the lesson needs


def skip_for_want_of_an_engine(name: str) -> NoReturn:
    pytest.skip(f"no engine of this session can run {name}: --engines={','.join(ENGINES)}")


# ---- mutants: wrong solutions ----


def said_by(patch: Path, field: str) -> list[str]:
    """What the lines before the diff say: Killed-by, Status and Says."""
    return re.findall(rf"^{field}: (.*)$", patch.read_text().partition("\n--- ")[0], re.MULTILINE)


def engines_for(number: int, engines: list[str]) -> list[str]:
    """This machine's KVM takes all. Of the two emulated engines vmx takes each fourth and svm the others, as both
    would take too long, and vmx most of it: a run there takes two to three times as long as on svm, and the workers
    wait for each other, for they share its one machine. With --engines=svm or --engines=vmx that one takes all."""
    emulated = [engine for engine in engines if engine != "kvm"]
    if "kvm" not in engines or len(emulated) < 2:
        return engines
    return ["kvm", "svm" if number % 4 else "vmx"]


@pytest.mark.parametrize("name", NAMES)
def test_each_engine_takes_some_wrong_solutions_of_each_lesson(name: str) -> None:
    numbers = [number for number, patch in enumerate(MUTANTS) if patch.parent.name == name]
    assert {engine for number in numbers for engine in engines_for(number, list(ENGINES))} == set(ENGINES)


@pytest.mark.parametrize("patch", MUTANTS, ids=lambda patch: f"{patch.parent.name}/{patch.stem}")
def test_a_wrong_solution_is_caught_by_the_checks_it_names(
    variant: StartVariant, engines: Engines, patch: Path
) -> None:
    """And on every engine by the same checks, with the same status and the same words."""
    mutant = variant(patch.parent.name)
    mutant.patch(patch.stem)
    mutant.make_all()
    # On vmx a guest that spins with interrupts off cannot be stopped (tests/deviations.toml).
    able = [engine for engine in engines if engine != "vmx" or said_by(patch, "Status") != ["4"]]
    chosen = engines_for(MUTANTS.index(patch), able)
    verdicts = verdicts_on(chosen, mutant, patch)
    if not verdicts:  # the lesson needs what only the other engine has
        verdicts = verdicts_on([engine for engine in able if engine not in chosen], mutant, patch)
    if not verdicts:
        skip_for_want_of_an_engine(patch.parent.name)
    assert len(set(map(str, verdicts.values()))) == 1, f"the engines differ: {verdicts}"


def verdicts_on(engines: list[str], mutant: Variant, patch: Path) -> dict[str, dict[str, bool]]:
    shown = {engine: mutant.run(engine=engine) for engine in engines}
    return {engine: expect_caught(patch, run) for engine, run in shown.items() if run.status != CANNOT}


def expect_caught(patch: Path, shown: Shown) -> dict[str, bool]:
    killers = said_by(patch, "Killed-by")
    assert [check for check in killers if check not in shown.failed] == [], f"these checks let it pass:\n{shown}"
    assert shown.failed[0] == killers[0], f"what the student reads first is about another check:\n{shown}"
    assert str(shown.status) in (said_by(patch, "Status") or ["1"]), str(shown)
    (phrase,) = said_by(patch, "Says")
    assert phrase in shown.output + shown.errors, f"expected {phrase!r} in:\n{shown}"
    assert "the check itself failed" not in shown.output, str(shown)
    return shown.verdicts


@pytest.mark.parametrize("name", NAMES)
def test_every_check_is_proved_by_a_wrong_solution(name: str) -> None:
    proved = {check for patch in MUTANTS if patch.parent.name == name for check in said_by(patch, "Killed-by")}
    assert proved == set(lesson.load(ROOT / "lessons" / name).points)


# ---- stubs: what a student starts from ----


def stub_lines(variant: Variant) -> dict[str, str]:
    """Where the stubs are, "file:line", and what they ask for."""
    found = {}
    for path in variant.sources:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if task := re.search(r'TODO\("(.*)"\);', line):
                found[f"{path}:{number}"] = task[1]
    return found


def expect_stub_named(variant: Variant, shown: Shown) -> None:
    named = re.search(r"^vmm: (\S+:\d+): not written yet: (.*)$", shown.errors, re.MULTILINE)
    assert named, f"no stub is named:\n{shown}"
    assert stub_lines(variant).get(named[1]) == named[2], f"expected one of {stub_lines(variant)}:\n{shown}"


@pytest.mark.parametrize("name", NAMES)
def test_the_student_version_builds_gets_no_points_and_says_where_to_begin(
    variant: StartVariant, engines: Engines, name: str
) -> None:
    student = variant(name)
    for path in student.sources:
        path.write_text(markers.student_version(path.read_text(), str(path)))
    student.make_all()
    runs = [shown for engine in engines if (shown := student.run(engine=engine)).status != CANNOT]
    for shown in runs:
        assert (shown.status, shown.points, list(shown.verdicts)) == (1, 0, shown.failed), str(shown)
        expect_stub_named(student, shown)
    if not runs:
        skip_for_want_of_an_engine(name)


@pytest.mark.parametrize("name", NAMES)
def test_make_check_names_the_stub_too(variant: StartVariant, name: str) -> None:
    student = variant(name)
    write_stubs(student, regions(name))
    student.make_all()
    shown = student.kvmlab("check", name)
    assert shown.status == 1, str(shown)
    lines = [f"vmm: {place}: not written yet: {task}" for place, task in stub_lines(student).items()]
    assert any(line in shown.output for line in lines), f"expected one of {lines}:\n{shown}"


@pytest.mark.parametrize("missing", ALL_REGIONS, ids=str)
def test_one_missing_part_builds_costs_points_and_is_named(variant: StartVariant, missing: Region) -> None:
    student = variant(missing.lesson)
    write_stubs(student, [missing])
    student.make_all()
    shown = student.run()
    assert shown.failed, str(shown)
    if "TODO(" in missing.stub:
        expect_stub_named(student, shown)
    else:
        assert "vmm: the guest crashed" in shown.errors, str(shown)


@pytest.mark.parametrize("region", ALL_REGIONS, ids=str)
def test_the_word_todo_tells_a_stub_from_a_solution(region: Region) -> None:
    assert ("TODO" in region.stub, "TODO" in region.solution) == (True, False)


@pytest.mark.parametrize("name", NAMES)
def test_points_grow_with_each_part_that_is_written(variant: StartVariant, name: str) -> None:
    parts = regions(name)
    earned = []
    student = variant(name)
    pristine = {path: path.read_text() for path in student.sources}
    for written in range(len(parts) + 1):
        for path, text in pristine.items():
            path.write_text(text)
        write_stubs(student, parts[written:])
        student.make_all()
        earned.append(student.run().points)
    assert earned == sorted(earned), f"points after 0, 1, ... parts: {earned}"
    assert earned[0] == 0
    assert earned[-1] == sum(lesson.load(ROOT / "lessons" / name).points.values())


# ---- guests that only talk ----


def recorded(solutions: Path, engines: Engines, name: str, seed: int = 1) -> runner.Run:
    """What the solution did with this seed, on the first engine that can run it."""
    for engine in engines.values():
        run = runner.run(runner.lesson_built(solutions / "build", name), seed=seed, engine=engine)
        if not run.lacking:
            assert is_done(run, name), run.errors
            return run
    skip_for_want_of_an_engine(name)


def guest_with_body(variant: Variant, body: str) -> None:
    """Another guest.c with the same includes and the same machine."""
    path = variant.folder / "guest.c"
    head = re.findall(r"^#include .*$|^MACHINE\([^;]*\);$", path.read_text(), re.MULTILINE)
    path.write_text("\n".join([*head, "void guest_main(void) {", body, "}", ""]))


def c_string(text: str) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'


@pytest.mark.parametrize("end", ["", "halt();"], ids=["exit", "halt"])
@pytest.mark.parametrize("name", NAMES)
def test_a_guest_that_prints_the_same_gets_no_points(
    variant: StartVariant, solutions: Path, engines: Engines, name: str, end: str
) -> None:
    output = recorded(solutions, engines, name).output
    printer = variant(name)
    guest_with_body(printer, f'    printf("%s", {c_string(output)});\n    {end}')
    printer.make_all()
    shown = printer.run()
    assert output in shown.output, str(shown)
    assert (shown.points, list(shown.verdicts)) == (0, shown.failed), str(shown)


def test_a_guest_that_reports_work_it_has_not_done_gets_no_points(
    variant: StartVariant, solutions: Path, engines: Engines
) -> None:
    """Every byte that lesson 2's guest sent to any port, sent again: but no page table is there."""
    sent = recorded(solutions, engines, "02-paging").all("exit", reason="IO", is_write=1)
    assert {event.device for event in sent} >= {"lab checkpoint", "lab report", "com1"}
    liar = variant("02-paging")
    calls = [f"    {send(event)}" for event in sent if event.device != "exit"]
    guest_with_body(liar, "\n".join(calls))
    liar.make_all()
    shown = liar.run()
    assert (shown.points, list(shown.verdicts)) == (0, shown.failed), str(shown)


def send(event: Event) -> str:
    value = int.from_bytes(bytes.fromhex(event.data), "little")
    return f"out{8 * event.size}({event.port:#x}, {value:#x});"


# ---- seeds ----


def told(run: runner.Run) -> Iterator[dict[str, object]]:
    """The events without what differs from run to run, and without the seed itself: times, KVM's counters,
    and where the guest was when an interrupt window opened (tests/deviations.toml: late-interrupt-window)."""
    is_window = False
    for event in run.events:
        if event.kind == "exit":
            is_window = event.reason == "IRQ_WINDOW_OPEN"
        differing = {"ns", "guest_ns", "vmm_ns"} | ({"rip", "symbol"} if is_window else set())
        if event.kind not in ("start", "statistics"):
            yield {name: value for name, value in event.fields.items() if name not in differing}


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_all_that_happens(solutions: Path, engines: Engines, name: str) -> None:
    first, again, other = (list(told(recorded(solutions, engines, name, seed))) for seed in (1, 1, 2))
    assert first == again, "two runs with one seed differ"
    assert first != other, "two seeds do the same"


def test_two_seeds_share_no_address(solutions: Path, engines: Engines) -> None:
    first, other = (recorded(solutions, engines, "02-paging", seed).one("plan") for seed in (1, 2))
    assert first
    assert other
    places = [name for name in first.fields if "_gva" in name or "_gpa" in name]
    assert len(places) > 20
    assert [name for name in places if first.fields[name] == other.fields[name]] == []


# ---- lesson.toml ----


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_complete(name: str) -> None:
    folder = ROOT / "lessons" / name
    assert re.fullmatch(r"\d\d-[a-z0-9-]+", name)
    for file in ("README.md", "guest.c", "test_lesson.py", "quotes.py"):
        assert (folder / file).is_file(), f"{name} has no {file}"
    this = lesson.load(folder)
    assert this.title
    assert this.not_on.keys() < ENGINES.keys()
    assert all(this.not_on.values()), "an engine is excluded for no reason"
    assert all(worth > 0 for worth in this.points.values())


@pytest.mark.parametrize("name", NAMES)
def test_points_are_given_for_the_checks_and_nothing_else(name: str) -> None:
    this = lesson.load(ROOT / "lessons" / name)
    functions = [node.name for node in ast.parse(this.tests.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert list(this.points) == [function[5:] for function in functions if function.startswith("test_")]


@pytest.mark.parametrize("name", NAMES)
def test_every_part_has_hints_in_three_tiers(name: str) -> None:
    this = lesson.load(ROOT / "lessons" / name)
    for hint in this.hints:
        assert len(hint.tiers) == len(set(hint.tiers)) == 3, hint.task
        assert all(len(tier) > 20 for tier in hint.tiers), hint.task
    tasks = " ".join(hint.task for hint in this.hints)
    without = [region.function for region in regions(name) if not re.search(rf"\b{region.function}\b", tasks)]
    assert without == [], "no hint names these functions in its task"
