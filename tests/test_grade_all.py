"""Many submissions: side by side, resumed after an interruption, whatever one of them or its grader does."""

import csv
import errno
import html.parser
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import one_line

from kvmlab import grade_all, whole_file
from kvmlab.formats import formatted
from kvmlab.grade_all import Graders, Result, Work
from kvmlab.grades import CheckResult, Grade, LessonResult
from kvmlab.lesson import UsageError
from kvmlab.page import page
from kvmlab.plugin import ROOT

# Stands for `python -m kvmlab grade`: a submission's file `do` says what to do, and the log who was graded.
STAND_IN = """
import argparse, os, pathlib, signal, sys, tempfile
sys.path.insert(0, {tools!r})
from kvmlab.formats import formatted
from kvmlab.grades import NOT_JUDGED, CheckResult, Grade, LessonResult

parser = argparse.ArgumentParser()
parser.add_argument("--submission", type=pathlib.Path)
parser.add_argument("--output", type=pathlib.Path)
parser.add_argument("--format", choices=["json"], required=True)
parser.add_argument("--lesson")
options = parser.parse_args()
with open({log!r}, "a") as log:
    print(os.fsencode(options.submission.name), file=log)
do = (options.submission / "do").read_text() if options.submission.is_dir() else ""
if do == "crash":
    os.write(2, b"Traceback: \\x1b[2J it crashed \\xff\\n")
    sys.exit(1)
if do == "lie":
    print("all went well")
    options.output.write_text('{{"version": 2, "points": 999}}')
    sys.exit(0)
if do == "die":
    tempfile.mkdtemp()
    os.kill(os.getpid(), signal.SIGKILL)
if do == "hang":
    pathlib.Path({log!r} + ".hangs").touch()
    signal.alarm(60)
    signal.pause()
checks = [CheckResult("first", 2, True), CheckResult("second", 3, do == "all", "" if do == "all" else "<b>" + do, 7)]
lessons = [LessonResult(2, "02-paging", "Paging", "kvm", [7], checks)]
if do == "all":
    lessons.insert(0, LessonResult(1, "01-vm-exit", "Exits", "kvm", [7], checks))
if do == "fault":
    print("kvmlab: lesson 3 was not judged: Permission denied: '/cache/svm.lock'", file=sys.stderr)
    lessons.append(LessonResult(3, "03-shadow-paging", "Shadows", "svm", [7], checks, NOT_JUDGED, True))
options.output.write_text(formatted(Grade(str(options.submission), lessons), "json"))
if do == "fault":
    sys.exit(5)
sys.exit(0 if do == "all" else 1)
"""


class Course:
    """A folder of submissions, and a stand-in that grades them."""

    def __init__(self, folder: Path) -> None:
        self.submissions, self.results = folder / "submissions", folder / "results"
        self.submissions.mkdir()
        self.log = folder / "log"
        self.stand_in = folder / "grade.py"
        self.stand_in.write_text(STAND_IN.format(tools=str(ROOT / "tools"), log=str(self.log)))
        self.grader = (sys.executable, "-B", str(self.stand_in))

    def hand_in(self, name: str, do: str = "") -> Path:
        submission = self.submissions / name
        submission.mkdir(exist_ok=True)
        (submission / "do").write_text(do)
        return submission

    def work(self, *options: str, course: str = "") -> Work:
        return Work(self.submissions, self.results, (*self.grader, *options), course)

    def graded(self) -> list[str]:
        """Who was graded since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(line[2:-1] for line in lines)

    def rows(self) -> list[list[str]]:
        with (self.results / "points.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def command(self, *arguments: str) -> list[str]:
        """`kvmlab grade-all`, but for the grader."""
        script = f"from kvmlab import grade_all, __main__; grade_all.GRADER = {self.grader!r}; exit(__main__.main())"
        return [sys.executable, "-B", "-c", script, *arguments, f"--results={self.results}"]

    def say(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
        command = self.command(*arguments)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    made = Course(tmp_path)
    monkeypatch.setattr(grade_all, "GRADER", made.grader)
    return made


# ---- what is graded, and when again ----


def test_every_submission_is_graded_once(course: Course) -> None:
    for name in ("alice", "bob", "carol"):
        course.hand_in(name)
    (course.submissions / ".hidden").mkdir()
    results = grade_all.grade_all(course.work(), jobs=2)
    assert [str(result) for result in results] == [f"{name}: 2 of 5 points" for name in ("alice", "bob", "carol")]
    assert course.graded() == ["alice", "bob", "carol"]
    assert grade_all.grade_all(course.work(), jobs=2) == results
    assert course.graded() == []


def lead_elsewhere(link: Path) -> None:
    link.unlink()
    link.symlink_to("do")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file's text": lambda path: (path / "do").write_text("x"),
    "a new file": lambda path: (path / "new").touch(),
    "a file's name": lambda path: (path / "kept").rename(path / "named"),
    "a new folder": lambda path: (path / "folder").mkdir(),
    "a link": lambda path: (path / "new").symlink_to("do"),
    "where a link leads": lambda path: lead_elsewhere(path / "link"),
    "a file in a folder": lambda path: (path / "deep/er/file").write_text("other"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_submission_that_has_changed_is_graded_again(course: Course, change: Callable[[Path], object]) -> None:
    alice = course.hand_in("alice")
    (alice / "kept").touch()
    (alice / "link").symlink_to("kept")
    (alice / "deep/er").mkdir(parents=True)
    (alice / "deep/er/file").write_text("text")
    course.hand_in("bob")
    grade_all.grade_all(course.work(), jobs=1)
    course.graded()
    change(alice)
    grade_all.grade_all(course.work(), jobs=1)
    assert course.graded() == ["alice"]


def test_an_archive_that_has_changed_is_graded_again(course: Course) -> None:
    archive = course.submissions / "alice.zip"
    for text, graded in (("one", ["alice.zip"]), ("one", []), ("two", ["alice.zip"])):
        archive.write_text(text)
        grade_all.grade_all(course.work(), jobs=1)
        assert course.graded() == graded


def test_grades_of_other_options_are_not_replaced(course: Course) -> None:
    course.hand_in("alice")
    course.hand_in("bob")
    grade_all.grade_one(course.work("--lesson=2"), 1)
    there = (course.results / "grades" / "bob.json").read_text()
    course.graded()
    for options, wanted in ((), "no LESSON, ENGINE or SEEDS"), (("--lesson=3",), "LESSON=3"):
        with pytest.raises(UsageError, match=f"has grades of LESSON=2, not of {wanted}: name another folder"):
            grade_all.grade_all(course.work(*options), jobs=1)
        with pytest.raises(UsageError, match=f"not of {wanted}"):
            grade_all.grade_one(course.work(*options), 1)
    assert (course.results / "grades" / "bob.json").read_text() == there
    assert course.graded() == []


def test_after_a_change_of_the_course_all_are_graded_again(course: Course) -> None:
    course.hand_in("alice")
    for version, graded in (("one", ["alice"]), ("one", []), ("two", ["alice"])):
        grade_all.grade_all(course.work(course=version), jobs=1)
        assert course.graded() == graded


@pytest.mark.parametrize(
    ("changed", "matters"),
    [
        ("lessons/01-vm-exit/test_lesson.py", True),
        ("lessons/01-vm-exit/new.h", True),
        ("guest/boot.asm", True),
        ("vmm/vmm.c", True),
        ("include/host.h", True),
        ("Makefile", True),
        ("lessons/01-vm-exit/README.md", False),
        ("tests/test_images.py", False),
    ],
)
def test_a_change_of_the_course_is_one_of_what_decides_on_points(tmp_path: Path, changed: str, matters: bool) -> None:
    for name in ("lessons/01-vm-exit/test_lesson.py", "guest/boot.asm", "vmm/vmm.c", "include/host.h", "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    before = grade_all.digest_of_course(tmp_path)
    (tmp_path / changed).parent.mkdir(exist_ok=True)
    (tmp_path / changed).write_text("other")
    assert (grade_all.digest_of_course(tmp_path) != before) == matters


def test_a_torn_result_is_no_result(course: Course) -> None:
    course.hand_in("alice")
    for tear in ("", "{", "[]", '{"name": "alice"}'):
        grade_all.grade_all(course.work(), jobs=1)
        (course.results / "grades" / "alice.json").write_text(tear)
        course.graded()
        assert str(grade_all.grade_one(course.work(), 0)) == "alice: 2 of 5 points"
        assert course.graded() == ["alice"], tear


# ---- graders that fail ----

LOCKED = "Permission denied: '/cache/svm.lock'"


@pytest.mark.parametrize(
    ("do", "why"),
    [
        ("crash", "the grader ended with status 1: Traceback: \\x1b[2J it crashed \\udcff"),
        ("lie", "the grader ended with status 0: not a grade as JSON: KeyError('submission')"),
        ("die", "the grader was ended by SIGKILL"),
        ("fault", "the grader ended with status 5: kvmlab: lesson 3 was not judged: " + LOCKED),
    ],
)
def test_a_grader_that_crashes_has_a_row_that_says_so(course: Course, do: str, why: str) -> None:
    course.hand_in("alice", do)
    course.hand_in("bob")
    grade_all.grade_all(course.work(), jobs=2)
    assert course.rows() == [
        ["student", "02-paging", "points", "total", "seeds", "submission", "problem"],
        ["alice", "", "", "", "", "alice", why],
        ["bob", "2", "2", "5", "7", "bob", ""],
    ]
    shown = (course.results / "pages" / "alice.html").read_text()
    assert "It could not be graded: tell your instructor" in shown
    assert why not in shown, "it may name what is on the grader's machine"


def test_a_grader_that_dies_leaves_no_temporary_files(
    course: Course, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    course.hand_in("alice", "die")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    grade_all.grade_all(course.work(), jobs=1)
    assert course.graded() == ["alice"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("do", ["crash", "fault"])
def test_a_grader_that_failed_is_tried_again(course: Course, do: str) -> None:
    course.hand_in("alice", do)
    for _ in range(2):
        grade_all.grade_all(course.work(), jobs=1)
        assert course.graded() == ["alice"]


def test_a_grader_that_hangs_is_ended(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    course.hand_in("alice", "hang")
    monkeypatch.setattr(grade_all, "TOO_LONG", 0.5)
    [result] = grade_all.grade_all(course.work(), jobs=1)
    assert result.problem == "the grader was ended: it took longer than 0 minutes"


def test_a_submission_that_cannot_be_read_has_a_row_that_says_so(course: Course) -> None:
    (course.submissions / "alice").symlink_to("nowhere")
    [result] = grade_all.grade_all(course.work(), jobs=1)
    assert result.problem.startswith("it cannot be read: [Errno 2] No such file or directory")
    assert course.rows()[1][0] == "alice"


# ---- interruptions ----


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_ends_the_graders_and_keeps_what_is_there(
    course: Course, number: signal.Signals, status: int
) -> None:
    course.hand_in("alice")
    course.hand_in("bob", "hang")
    course.hand_in("carol")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    command = course.command("grade-all", str(course.submissions), "--jobs=1")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("engine: ")
        assert process.stdout.readline() == "[1/3] alice: 2 of 5 points\n"
        hangs = Path(f"{course.log}.hangs")
        while not hangs.exists():
            assert process.poll() is None
        process.send_signal(number)
        try:
            assert process.wait(30) == status
        finally:
            process.kill()
    assert subprocess.run(["pgrep", "-f", course.stand_in], check=False).returncode == 1, "a grader goes on"
    assert [path.name for path in (course.results / "grades").iterdir()] == ["alice.json"]
    assert course.graded() == ["alice", "bob"]
    course.hand_in("bob")
    assert course.say("grade-all", str(course.submissions)).returncode == 0
    assert course.graded() == ["bob", "carol"]


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "result"
    whole_file.write(file, "old")
    with pytest.raises(UnicodeEncodeError):
        whole_file.write(file, "new\udc80")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("old", [file])


def test_a_full_disk_is_named_by_the_file_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/result'") as raised:
        whole_file.write(tmp_path / "result", "text")
    assert (raised.value.errno, list(tmp_path.iterdir())) == (errno.ENOSPC, [])


# ---- hostile names and texts ----

NAMES = {
    "an option": "-rf",
    "a formula": "=cmd|' !A0",
    "a terminal's": "\x1b[2J\x07",
    "two lines": "a\nb",
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "markup": "<script>alert(1)<script>",
    "percent": "%41",
    "long": "n" * 255,
    "long and wide": "é" * 127,
}


def test_names_of_submissions_harm_nothing(course: Course) -> None:
    for name in NAMES.values():
        course.hand_in(name, "all")
    results = grade_all.grade_all(course.work(), jobs=2)
    assert {result.name for result in results} == set(NAMES.values())
    assert all(result.grade for result in results), [str(result) for result in results]
    for folder in ("grades", "pages"):
        files = {path.name for path in (course.results / folder).iterdir()}
        assert len(files) == len(NAMES)
        assert all(name.isascii() and name.isprintable() and len(name) < 250 for name in files)
    course.graded()
    grade_all.grade_all(course.work(), jobs=2)
    assert course.graded() == []
    assert "'=cmd|' !A0" in [row[0] for row in course.rows()]


def test_no_two_submissions_share_a_result(course: Course) -> None:
    names = ["a b", "a_b", "a%20b", "A B", "a.zip", "a", "x" * 250, "x" * 251]
    files = {course.work().file("grades", Path(name), ".json") for name in names}
    assert len(files) == len(names)


class Tags(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [name for name, _ in attributes if name in ("src", "href") or name.startswith("on")]


def test_a_page_shows_what_a_submission_says_as_text() -> None:
    attack = "</pre><script>alert(1)</script><img src=x onerror=y>\x1b\udcff"
    lesson = LessonResult(1, "01", "Exits", "kvm", [7], [CheckResult("a_check", 1, False, attack, 7)], problem=attack)
    raw = page(attack, Grade(attack, [lesson])).encode().decode()
    seen = Tags()
    seen.feed(raw)
    assert seen.tags <= set("html head meta title style body h1 h2 p table tr td pre".split())
    assert seen.loaded == []
    assert "default-src 'none'" in raw
    assert "&lt;script&gt;" in raw
    assert "a check" in raw


def test_a_page_says_why_a_check_failed_and_how_to_see_that_run() -> None:
    lesson = LessonResult(3, "03", "Shadows", "kvm", [7], [CheckResult("a_check", 1, False, "seen none", 7)])
    assert "seen none\nto see that run: make run LESSON=3 SEED=7</pre>" in page("alice", Grade("alice", [lesson]))


# ---- points ----


def test_points_have_a_row_for_each_submission_and_a_column_for_each_lesson(course: Course) -> None:
    course.hand_in("bob", "all")
    course.hand_in("alice")
    grade_all.grade_all(course.work(), jobs=2)
    assert course.rows() == [
        ["student", "01-vm-exit", "02-paging", "points", "total", "seeds", "submission", "problem"],
        ["alice", "", "2", "2", "5", "7", "alice", ""],
        ["bob", "5", "5", "10", "10", "7", "bob", ""],
    ]


@pytest.mark.parametrize(
    ("submission", "student"),
    [
        ("alice.zip", "alice"),
        ("alice.tar.gz", "alice"),
        ("alice.TGZ", "alice"),
        ("alice.b.tar", "alice.b"),
        ("a.b@example.org", "a.b@example.org"),
        (".zip", ".zip"),
    ],
)
def test_a_gradebook_finds_the_student_without_the_end_of_an_archive(submission: str, student: str) -> None:
    row = grade_all.points([Result(submission, Grade("", []))]).splitlines()[1]
    assert row == f"{student},0,0,,{submission},"


def test_a_lesson_that_could_not_be_judged_says_why_in_the_row() -> None:
    lesson = LessonResult(1, "01-vm-exit", "Exits", "kvm", [7], [CheckResult("a", 1, False)], "it does not build")
    text = grade_all.points([Result("alice", Grade("alice", [lesson]))])
    assert text.splitlines()[1] == "alice,0,0,1,7,alice,01-vm-exit: it does not build"


# ---- the commands ----


def test_off_a_terminal_each_submission_is_a_line(course: Course) -> None:
    course.hand_in("alice")
    course.hand_in("bob", "crash")
    done = course.say("grade-all", str(course.submissions), "--jobs=1")
    assert done.returncode == 5
    assert done.stdout.splitlines()[1:] == [
        "[1/2] alice: 2 of 5 points",
        "[2/2] bob: the grader ended with status 1: Traceback: \\x1b[2J it crashed \\udcff",
        f"2 submissions, 1 of them without a grade; points: {course.results}/points.csv",
    ]
    one_line(done.stderr, "kvmlab: bob: the grader ended with status 1")


def test_on_a_terminal_there_is_a_bar(course: Course) -> None:
    course.hand_in("alice")
    course.hand_in("bob")
    ours, theirs = pty.openpty()
    command = course.command("grade-all", str(course.submissions), "--jobs=1")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "COLUMNS": "60"}
    status = subprocess.run(command, env=environment, stdout=theirs, check=False, timeout=60).returncode
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        shown = terminal.read(10_000).decode()
    assert status == 0
    bar = f"\r\x1b[K[{'#' * 15}{' ' * 15}] 1/2 alice: 2 of 5 points"
    assert bar in shown
    assert f"\r\x1b[K[{'#' * 30}] 2/2 bob: 2 of 5 points" in shown


def test_an_item_is_a_submission_by_its_place_in_sorted_order(course: Course) -> None:
    for name in ("b", "a", "c"):
        course.hand_in(name)
    done = course.say("grade-item", "1", str(course.submissions))
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["b: 2 of 5 points"])
    assert course.graded() == ["b"]
    assert course.say("grade-all", str(course.submissions)).returncode == 0
    assert course.graded() == ["a", "c"], "what other machines have graded is not graded again"


def test_an_item_without_a_grade_fails(course: Course) -> None:
    course.hand_in("a", "crash")
    done = course.say("grade-item", "0", str(course.submissions))
    assert done.returncode == 5
    assert done.stdout.splitlines()[1].startswith("a: the grader ended with status 1: ")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["grade-all"], "which submissions? say SUBMISSIONS=dir"),
        (["grade-all", "{}/nowhere"], "is no folder"),
        (["grade-all", "{}"], "there is no submission in"),
        (["grade-all", "{}", "--jobs=0"], "JOBS=0: expected a number from 1 on"),
        (["grade-all", "{}", "--jobs=x"], "JOBS=x: expected a number from 1 on"),
        (["grade-all", "{}", "--seeds=1,x"], "SEEDS=x: expected a number"),
        (["grade-all", "{}", "--lesson=99"], "there is no lesson 99"),
        (["grade-item", "3", "{}"], "there is no submission in"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(course: Course, arguments: list[str], why: str) -> None:
    done = course.say(*(argument.format(course.submissions) for argument in arguments))
    assert done.returncode == 2
    one_line(done.stderr, why)


def test_an_engine_that_there_is_not_is_said_once_and_grades_nothing(course: Course) -> None:
    course.hand_in("a")
    course.hand_in("b")
    done = course.say("grade-all", str(course.submissions), "--engine=x")
    assert done.returncode == 2
    one_line(done.stderr, "ENGINE=x: there are auto, kvm, svm, vmx")
    assert course.graded() == []
    assert not course.results.exists()


def test_results_lie_beside_the_submissions(course: Course) -> None:
    """Not in build/, which `make clean` removes, and where two courses would meet."""
    course.hand_in("a")
    course.results = Path(f"{course.submissions}-grades")
    command = course.command("grade-all", f"{course.submissions}/")[:-1]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT / "tools")}, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0
    assert course.rows()[1][0] == "a"


@pytest.mark.parametrize("index", [-1, 1])
def test_an_item_that_is_not_there_is_refused(course: Course, index: int) -> None:
    course.hand_in("a")
    with pytest.raises(UsageError, match=f"there is no submission {index}: they are numbered from 0 to 0"):
        grade_all.grade_one(course.work(), index)


def test_results_among_the_submissions_are_refused(course: Course) -> None:
    course.hand_in("a")
    with pytest.raises(UsageError, match="lies among the submissions"):
        Work(course.submissions, course.submissions / "results").items()


def test_the_grader_is_asked_as_it_asks_to_be(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(_: Graders, command: list[str], __: Path, ___: object) -> int:
        asked.extend(command)
        Path(command[-1].removeprefix("--output=")).write_text(formatted(Grade("a", []), "json"))
        return 0

    monkeypatch.setattr(Graders, "run", run)
    alice = course.hand_in("alice")
    grade_all.grade_one(course.work("--lesson=2"), 0)
    assert asked[:-1] == [*course.grader, "--lesson=2", f"--submission={alice}", "--format=json"]
    assert json.loads((course.results / "grades" / "alice.json").read_text())["name"] == "alice"
