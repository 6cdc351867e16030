"""Grade a submission: its files in the trusted tree, built and run in a sandbox, judged outside of it.

Nothing that comes out of a sandbox is believed but the events, and these only if they agree with what was
seen from outside (witness.py). tools/grading.md says what that is worth.
"""

import dataclasses
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from kvmlab import engine as engines
from kvmlab import events, handout, judge, markers, sandbox, submission, witness
from kvmlab.engine import CannotRun, Engine, Kvm, Svm, Unable, Vmx
from kvmlab.grades import CheckResult, Grade, LessonResult
from kvmlab.lesson import Lesson, load_all
from kvmlab.machine import Job, MachineError, Outcome, read_result
from kvmlab.plugin import ROOT
from kvmlab.runner import EVENTS

BUILD_LIMIT = 120.0
# Beyond the VMM's own time limit, by which it ends the run itself if nothing keeps it from that.
LATE = 10.0
CONFINE = "confine"  # tools/sandbox/confine.c
CONFINE_TOO_LATE = 124
LINES_MOST = 200_000  # of a record: lines of the VMM's own are longer than what this leaves for each
JUDGE_LIMIT = 300.0
JUDGE_MEMORY = 8 << 30


class DistrustedError(MachineError):
    """What was seen from outside of the sandbox is not what the record says."""


class _LateError(MachineError):
    """The VMM did not end by itself."""


def _did_not_end(job: Job) -> str:
    return f"the time limit: the VMM did not end within {job.time_limit + LATE:.0f} seconds"


# ---- engines for code that is not to be trusted ----


class _SandboxedKvm(Kvm):
    def run(self, job: Job) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
            record = Path(scratch) / EVENTS
            record.touch()
            given = {f"/job/{name}": path for name, path in job.files.items()}
            place = sandbox.Place("/job", given, {f"/job/{EVENTS}": record}, kvm=True)
            ended = sandbox.run(job.command, place, job.time_limit + LATE, job.stdin, is_witnessed=True)
            content = read_result(record)
        if ended.is_late:
            raise _LateError(_did_not_end(job))
        _agree(content, job, witness.seen_by_strace(ended.witness))
        return Outcome(ended.status, ended.output, ended.errors, {EVENTS: content})


class _SvmSandbox(Svm):
    """The emulated machine is the sandbox: it has no network, and each run has one that no other has used. In it the
    VMM is not root, so that it cannot write to the kernel's trace."""

    def run(self, job: Job) -> Outcome:
        return _traced(super().run(dataclasses.replace(_confined(job), vfio=True)), job)


class _VmxSandbox(Vmx):
    """The same, but with one machine for all runs of a lesson."""

    def run(self, job: Job) -> Outcome:
        return _traced(super().run(_confined(job)), job)


def _confined(job: Job) -> Job:
    limit = job.time_limit + LATE
    confine = job.files["image.elf"].parents[2] / CONFINE
    command = [f"./{CONFINE}", f"{limit:.0f}", EVENTS, *job.command]
    return dataclasses.replace(job, command=command, files={**job.files, CONFINE: confine}, trace=True)


def _traced(outcome: Outcome, job: Job) -> Outcome:
    if outcome.status == CONFINE_TOO_LATE:
        raise _LateError(_did_not_end(job))
    _agree(outcome.results.get(EVENTS, b""), job, witness.seen_by_kernel(outcome.trace))
    if not job.trace:
        outcome.trace = ""
    return outcome


def _agree(record: bytes, job: Job, seen: witness.Seen) -> None:
    seed = next(int(word.partition("=")[2]) for word in job.command if word.startswith("--seed="))
    if (lines := record.count(b"\n") + record.count(b"\r")) > LINES_MOST:
        raise DistrustedError(f"the record of the run (seed {seed}) is too long to be judged: {lines} lines")
    try:
        found = events.parse(record)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DistrustedError(f"the record of the run (seed {seed}) is not one of the VMM's: {error!r:.200}") from None
    if found and (objection := witness.objection(found, seed, seen)):
        raise DistrustedError(f"the record of the run (seed {seed}) is not to be trusted: {objection}")


_SANDBOXED: dict[str, type[Engine]] = {"kvm": _SandboxedKvm, "svm": _SvmSandbox, "vmx": _VmxSandbox}


def _choose(lesson: Lesson, wanted: str) -> tuple[Engine, str]:
    """As for any run, but where there is no sandbox the emulated machines must do."""
    no_sandbox = sandbox.problem(kvm=True)
    not_on = lesson.not_on | ({"kvm": no_sandbox} if no_sandbox else {})
    chosen, line = engines.choose(dataclasses.replace(lesson, not_on=not_on), wanted, "", False)
    return _SANDBOXED[chosen.name](), line


# ---- the tree that a submission is built in ----
#
# It is what a student starts from: where a file is not in the submission its stubs stand, and no solution lies where
# a file of the submission could include it.


def student_files(lessons: Iterable[Lesson]) -> set[str]:
    """The files in which students of these lessons write, as paths from the project's root."""
    return {str(path.relative_to(ROOT)) for each in lessons for path in each.sources if markers.parts_of(path)}


def _make(tree: Path, lesson: Lesson) -> str:
    """Build a lesson in the sandbox; why it cannot be built, or ""."""
    halves = f"build/lessons/{lesson.name}"
    vmm = f"{halves}/vmm" if (lesson.folder / "host.c").exists() else "build/vmm/vmm"
    targets = [f"{halves}/image.elf", vmm, f"build/{CONFINE}"]
    ended = sandbox.build(["make", "-s", *targets], tree, tree / "build", BUILD_LIMIT)
    if ended.is_late:
        return f"the time limit: it was not built within {BUILD_LIMIT:.0f} seconds"
    said = ended.errors.decode(errors="replace").splitlines()
    error = next((line for line in said if "error" in line), said[-1] if said else f"status {ended.status}")
    return f"it does not build: {error}" if ended.status else ""


# ---- judging ----


def _judged(lesson: Lesson, build: Path, engine: str, seeds: list[int]) -> LessonResult:
    """On the first engine that turns out to be able to."""
    is_again = False
    while True:
        try:
            chosen, _ = _choose(lesson, engine)
        except CannotRun as error:
            return nothing(lesson, engine, seeds, str(error))
        try:
            return _result(lesson, chosen.name, seeds, judge.judge(lesson, build, chosen, seeds))
        except Unable as error:
            lesson = dataclasses.replace(lesson, not_on=lesson.not_on | {error.engine: error.reason})
        except judge.HostError as error:
            first = next(iter(str(error).splitlines()), "")
            return nothing(lesson, chosen.name, seeds, f"the VMM ended before it recorded anything: {first}")
        except (OSError, MachineError) as error:
            # Of an emulated machine that breaks nobody knows whose fault it is.
            if is_again or isinstance(error, (DistrustedError, _LateError)):
                return nothing(lesson, chosen.name, seeds, str(error))
            is_again = True
        finally:
            chosen.close()


def _result(lesson: Lesson, engine: str, seeds: list[int], verdicts: list[judge.Verdict]) -> LessonResult:
    checks = []
    for check, worth in lesson.points.items():
        failed = next((each for each in verdicts if each.check == check and not each.passed), None)
        if failed:
            checks.append(CheckResult(check, worth, False, failed.message, failed.seed))
        else:
            checks.append(CheckResult(check, worth, True))
    return LessonResult(lesson.number, lesson.name, lesson.title, engine, seeds, checks)


def nothing(lesson: Lesson, engine: str, seeds: list[int], problem: str) -> LessonResult:
    """No points, and one line that says why."""
    checks = [CheckResult(check, worth, passed=False) for check, worth in lesson.points.items()]
    line = " ".join(problem.split())[:500]
    return LessonResult(lesson.number, lesson.name, lesson.title, engine, seeds, checks, line)


def _apart(work: Callable[[], LessonResult], otherwise: Callable[[str], LessonResult], scratch: Path) -> LessonResult:
    """Do it in a process of its own, with limits: no record that a submission leaves takes the grader with it."""
    ours, its = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=(work, its, scratch))
    process.start()
    its.close()
    try:
        if ours.poll(JUDGE_LIMIT):
            found: LessonResult = ours.recv()
            return found
        return otherwise(f"the time limit: it was not judged within {JUDGE_LIMIT:.0f} seconds")
    except EOFError:
        process.join()
        return otherwise(f"the process that judged it ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _in_process(work: Callable[[], LessonResult], answer: Connection, scratch: Path) -> None:
    tempfile.tempdir = str(scratch)  # of a process that is killed, somebody else must remove what it leaves
    resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY, JUDGE_MEMORY))
    answer.send(work())


# ---- a submission ----


def grade(path: str, lessons: list[Lesson], engine: str, seeds: list[int]) -> Grade:
    """The grade of a submission."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
        tree = Path(scratch) / "tree"
        handout.copy(ROOT, tree)
        (tree / "build").mkdir()
        # All of them, whatever is graded: one lesson may use what students of another have written in the runtime.
        try:
            files = submission.read(path, student_files(load_all(ROOT / "lessons")), ROOT)
        except submission.RefusedError as error:
            results = [nothing(lesson, engine, seeds, f"refused: {error}") for lesson in lessons]
        else:
            for name, content in files.items():
                (tree / name).write_bytes(content)
            results = [_grade_lesson(lesson, tree, engine, seeds) for lesson in lessons]
    return Grade(path, results, round(time.monotonic() - began, 1))


def _grade_lesson(lesson: Lesson, tree: Path, engine: str, seeds: list[int]) -> LessonResult:
    def otherwise(problem: str) -> LessonResult:
        return nothing(lesson, engine, seeds, problem)

    try:
        if problem := _make(tree, lesson):
            return otherwise(problem)
        return _apart(lambda: _judged(lesson, tree / "build", engine, seeds), otherwise, tree.parent)
    except OSError as error:  # no space, no memory: there must be a result all the same
        return otherwise(f"the grader could not do its work: {error}")


def must_be_able(lessons: list[Lesson], engine: str) -> str:
    """Say now what a submission is not to blame for; the line that names the engine of the first lesson."""
    return _choose(lessons[0], engine)[1]
