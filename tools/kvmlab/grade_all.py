"""Many submissions: graded side by side, each by a grader of its own, and kept so that nothing is graded twice.

A folder of results has `grades/`, one file for each submission, then `points.csv` and `pages/`, which are made of
those; all of them were graded with the same options. Machines that share both folders can each grade some: an item is
a submission's place in sorted order.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from kvmlab import handout, whole_file
from kvmlab.formats import FormatError, formatted, from_json, one_line
from kvmlab.grades import Grade
from kvmlab.lesson import UsageError
from kvmlab.page import page
from kvmlab.progress_bar import Progress

GRADER = (sys.executable, "-m", "kvmlab", "grade")
# The grader has limits of its own: this is for one that hangs all the same.
TOO_LONG = 3600.0
GRACE = 5.0


@dataclass(frozen=True)
class Work:
    """What is to be graded, how, and where the results go."""

    submissions: Path
    results: Path
    grader: tuple[str, ...] = GRADER  # with the options that hold for all submissions
    course: str = ""  # the digest of what they are graded by: digest_of_course()

    @property
    def options(self) -> str:
        """As the user has said them."""
        words = (option.removeprefix("--").partition("=") for option in self.grader[len(GRADER) :])
        return " ".join(f"{name.upper()}={value}" for name, _, value in words)

    def items(self) -> list[Path]:
        """In sorted order, as `ls` counts them: what is hidden is none."""
        if not self.submissions.is_dir():
            raise UsageError(f"{self.submissions} is no folder: SUBMISSIONS=dir names one that holds the submissions")
        if self.results.resolve().is_relative_to(self.submissions.resolve()):
            raise UsageError(f"{self.results} lies among the submissions: name another folder with RESULTS=dir")
        found = sorted(path for path in self.submissions.iterdir() if not path.name.startswith("."))
        if not found:
            raise UsageError(f"there is no submission in {self.submissions}")
        return found

    def file(self, folder: str, submission: Path, suffix: str) -> Path:
        return self.results / folder / (_file_name(submission.name) + suffix)


@dataclass(frozen=True)
class Result:
    """What came of one submission: a grade or a problem."""

    name: str
    grade: Grade | None = None
    problem: str = ""
    digest: str = ""  # of the submission and of the course,
    options: str = ""  # and what the grader was told

    def __str__(self) -> str:
        outcome = f"{self.grade.points} of {self.grade.total} points" if self.grade else self.problem
        return f"{one_line(self.name)}: {outcome}"


class Stopped(Exception):
    """The work was interrupted before this submission was graded."""


def grade_all(work: Work, jobs: int) -> list[Result]:
    """Grade what has not been graded yet, and write points and pages of all."""
    items = work.items()
    for item in items:  # before the first is graded
        _kept(work, item)
    results: dict[Path, Result] = {}
    progress = Progress(len(items))
    with _running() as graders, ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = {pool.submit(grade_item, work, item, graders): item for item in items}
            for future in as_completed(waiting):
                results[waiting[future]] = future.result()
                progress.step(str(future.result()))
        except BaseException:
            graders.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            progress.close()
    ordered = [results[item] for item in items]
    for item, result in zip(items, ordered, strict=True):
        whole_file.write(work.file("pages", item, ".html"), page(result.name, result.grade))
    whole_file.write(work.results / "points.csv", points(ordered))
    return ordered


def grade_one(work: Work, index: int) -> Result:
    """The work item of this number, for a machine that does nothing else."""
    items = work.items()
    if not 0 <= index < len(items):
        raise UsageError(f"there is no submission {index}: they are numbered from 0 to {len(items) - 1}")
    with _running() as graders:
        return grade_item(work, items[index], graders)


def grade_item(work: Work, submission: Path, graders: "Graders") -> Result:
    """The result that is there, if the submission is still the same; a grader that crashed is tried again."""
    try:
        digest = _digest(submission, work.course)
    except OSError as error:
        return Result(submission.name, problem=one_line(f"it cannot be read: {error}"))
    kept = _kept(work, submission)
    if kept and kept.digest == digest and kept.grade:
        return kept
    result = dataclasses.replace(_graded(work, submission, graders), digest=digest, options=work.options)
    whole_file.write(work.file("grades", submission, ".json"), _as_json(result))
    return result


# ---- graders ----


class Graders:
    """The processes that are grading now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, command: list[str], scratch: Path, said: IO[bytes]) -> int | None:
        """The exit status; None if it took too long. In a process group of its own, so that it can be ended with all
        that it started; what it leaves then lies in scratch."""
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, "process_group": 0}
        with self._lock:
            if self._stopped:
                raise Stopped
            process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(scratch)}, **how)
            self._running.add(process)
        is_late = False
        try:
            process.wait(TOO_LONG)
        except subprocess.TimeoutExpired:
            is_late = True
            _end(process)
        with self._lock:
            self._running.remove(process)
            if self._stopped:
                raise Stopped
        return None if is_late else process.returncode

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            running = set(self._running)
        for process in running:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


@contextlib.contextmanager
def _running() -> Iterator[Graders]:
    """Graders that are ended with us, also when a batch system or a closed terminal ends us."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    graders = Graders()
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield graders
    except BaseException:
        graders.stop()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _graded(work: Work, submission: Path, graders: Graders) -> Result:
    # A compiler that was not ended yet may still write there.
    folder = tempfile.TemporaryDirectory(prefix="kvmlab-grade-", ignore_cleanup_errors=True)
    with folder as scratch, tempfile.TemporaryFile() as said:
        output = Path(scratch) / "grade.json"
        ask = [f"--submission={submission}", "--format=json", f"--output={output}"]
        status = graders.run([*work.grader, *ask], Path(scratch), said)
        try:
            grade = from_json(output.read_bytes())
        except (FormatError, OSError) as error:
            return Result(submission.name, problem=_problem(status, error, said))
        if grade.is_fault_of_grader:
            return Result(submission.name, problem=_problem(status, None, said))
    return Result(submission.name, dataclasses.replace(grade, submission=submission.name))


def _problem(status: int | None, error: Exception | None, said: IO[bytes]) -> str:
    """What is wrong with what the grader wrote, or, where it gave up by itself, the last that it said."""
    if status is None:
        return f"the grader was ended: it took longer than {TOO_LONG / 60:.0f} minutes"
    if status < 0:
        return f"the grader was ended by {signal.Signals(-status).name}"
    said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
    lines = said.read().decode(errors="surrogateescape").splitlines()
    why = str(error) if isinstance(error, FormatError) else lines[-1] if lines else "it wrote no grade"
    return one_line(f"the grader ended with status {status}: {why}")


# ---- results ----


def _file_name(name: str) -> str:
    """A name that every file system can hold, and that no other submission has."""
    safe = re.sub(rb"[^A-Za-z0-9._@+-]", lambda found: b"%%%02X" % found[0][0], os.fsencode(name)).decode()
    return safe if len(safe) <= 200 else safe[:150] + "%" + hashlib.sha256(safe.encode()).hexdigest()


def digest_of_course(tree: Path) -> str:
    """Of what decides, with the submission, on its points: the lessons and all that they are built of."""
    parts = ("Makefile", "guest/", "include/", "lessons/", "vmm/")
    digest = hashlib.sha256()
    for name in sorted(handout.files(tree)):
        if name.startswith(parts) and not name.endswith(".md"):
            digest.update(repr(name).encode() + _digest_of_file(tree / name))
    return digest.hexdigest()


def _digest(submission: Path, course: str) -> str:
    """Of all that the grader is given: names, kinds and contents."""
    digest = hashlib.sha256(course.encode())
    for path in _files(submission):
        status = path.lstat() if path != submission else path.stat()
        digest.update(repr((os.fsencode(path.relative_to(submission)), stat.S_IFMT(status.st_mode))).encode())
        if stat.S_ISLNK(status.st_mode):
            digest.update(repr(os.readlink(path)).encode())
        elif stat.S_ISREG(status.st_mode):
            digest.update(_digest_of_file(path))
    return digest.hexdigest()


def _digest_of_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _files(submission: Path) -> Iterator[Path]:
    def fail(error: OSError) -> NoReturn:
        raise error

    yield submission
    if not submission.is_dir():
        return
    for folder, folders, files in os.walk(submission, onerror=fail):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(folders + files))


def _as_json(result: Result) -> str:
    grade = json.loads(formatted(result.grade, "json")) if result.grade else None
    return json.dumps(vars(result) | {"grade": grade}, indent=1) + "\n"


def _kept(work: Work, submission: Path) -> Result | None:
    """What is no result, or one of another version, is not there. One of other options is not ours to replace."""
    try:
        data = json.loads(work.file("grades", submission, ".json").read_bytes())
        grade = from_json(json.dumps(data["grade"])) if data["grade"] else None
        kept = Result(data["name"], grade, data["problem"], data["digest"], data["options"])
    except (OSError, ValueError, KeyError, TypeError, FormatError):
        return None
    if kept.options != work.options:
        there, wanted = (options or "no LESSON, ENGINE or SEEDS" for options in (kept.options, work.options))
        why = f"{work.results} has grades of {there}, not of {wanted}"
        raise UsageError(one_line(f"{why}: name another folder with RESULTS=dir, or remove it"))
    return kept


# ---- points ----

_ARCHIVE = re.compile(r"(?<=.)\.(zip|tar(\.\w+)?|tgz|tbz2?|txz)$", re.IGNORECASE)


def points(results: list[Result]) -> str:
    """A row for each submission, a column for each lesson. A submission without a grade has no points, not 0. A
    gradebook finds the student by the submission's name, without what an archive's ends in."""
    numbers = {lesson.name: lesson.number for result in results if result.grade for lesson in result.grade.lessons}
    lessons = sorted(numbers, key=lambda name: numbers[name])
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["student", *lessons, "points", "total", "seeds", "submission", "problem"])
    for result in results:
        of_lesson = {lesson.name: lesson for lesson in result.grade.lessons} if result.grade else {}
        cells = [of_lesson[name].points if name in of_lesson else "" for name in lessons]
        sums: tuple[object, object] = (result.grade.points, result.grade.total) if result.grade else ("", "")
        problems = [f"{lesson.name}: {lesson.problem}" for lesson in of_lesson.values() if lesson.problem]
        why = "; ".join([result.problem] if result.problem else problems)
        seeds = ",".join(map(str, next((lesson.seeds for lesson in of_lesson.values()), [])))
        student = _ARCHIVE.sub("", result.name)
        rows.writerow([_cell(student), *cells, *sums, seeds, _cell(result.name), _cell(why)])
    return text.getvalue()


def _cell(text: str) -> str:
    """A spreadsheet would run a text that begins like a formula."""
    line = one_line(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
