"""Grade a submission: its files in the trusted tree, built and run in a sandbox, judged outside of it.

Nothing that comes out of a sandbox is believed but the events, and these only if they agree with what was
seen from outside (witness.py). tools/grading.md says what that is worth.
"""

import contextlib
import dataclasses
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from kvmlab import engine as engines
from kvmlab import events, handout, judge, markers, runner, sandbox, submission, witness
from kvmlab.engine import CannotRun, Engine, Kvm, Svm, Unable, Vmx
from kvmlab.formats import one_line
from kvmlab.grades import NOT_JUDGED, CheckResult, Grade, LessonResult
from kvmlab.lesson import Lesson, load_all
from kvmlab.machine import Job, MachineError, Outcome, read_result
from kvmlab.plugin import ROOT
from kvmlab.runner import EVENTS, Built

BUILD_LIMIT = 120.0
# Beyond the VMM's own time limit, by which it ends the run itself if nothing keeps it from that.
LATE = 10.0
CONFINE = "confine"  # tools/sandbox/confine.c
CONFINE_TOO_LATE = 124
CONTROL = "tests/hello.elf"  # a guest that is nobody's submission
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
    confine = next(path for folder in job.files["image.elf"].parents if (path := folder / CONFINE).exists())
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


def _name(lesson: Lesson, wanted: str) -> str:
    """The engine that would be taken."""
    try:
        return _choose(lesson, wanted)[0].name
    except CannotRun:
        return wanted


# ---- the tree that a submission is built in ----
#
# It is what a student starts from: where a file is not in the submission its stubs stand, and no solution lies where
# a file of the submission could include it.


def student_files(lessons: Iterable[Lesson]) -> set[str]:
    """The files in which students of these lessons write, as paths from the project's root."""
    return {str(path.relative_to(ROOT)) for each in lessons for path in each.sources if markers.parts_of(path)}


def _prepare(tree: Path) -> None:
    """Before anything of a submission is in it, build what is none of its: that this can be done, and that CONTROL
    runs, says of what goes wrong later that it is the submission's doing."""
    handout.copy(ROOT, tree)
    (tree / "build").mkdir()
    if problem := _make(tree, "build/vmm/vmm", "build/vmm/edu.a", f"build/{CONFINE}", f"build/{CONTROL}"):
        raise MachineError(f"the lessons' own tree: {problem}")
    shutil.rmtree(tree / "build" / "guest")  # where a file of the submission may come


def _build(tree: Path, lesson: Lesson) -> str:
    """Build a lesson; why the submission does not let it be built, or ""."""
    halves = f"build/lessons/{lesson.name}"
    vmm = f"{halves}/vmm" if (lesson.folder / "host.c").exists() else "build/vmm/vmm"
    problem = _make(tree, f"{halves}/image.elf", vmm)
    if problem and (ours := _make(tree, "--always-make", f"build/{CONFINE}")):
        raise MachineError(f"nothing can be built: {ours}")
    return problem


def _make(tree: Path, *targets: str) -> str:
    """Build this in the sandbox; why it cannot be built, or ""."""
    ended = sandbox.build(["make", "-s", *targets], tree, tree / "build", BUILD_LIMIT)
    if ended.is_late:
        return f"the time limit: it was not built within {BUILD_LIMIT:.0f} seconds"
    said = ended.errors.decode(errors="replace").splitlines()
    error = next((line for line in said if "error" in line), said[-1] if said else f"status {ended.status}")
    return f"it does not build: {error}" if ended.status else ""


# ---- judging ----


def _judged(lesson: Lesson, build: Path, engine: str, seeds: list[int]) -> LessonResult:
    """On the first engine that turns out to be able to. Where there is no run to judge, it is the submission's doing
    if CONTROL runs in the same sandbox; of an emulated machine that breaks, if it does so once more."""
    is_again, name = False, engine
    while True:
        try:
            chosen, _ = _choose(lesson, engine)
            name = chosen.name
        except CannotRun as error:
            return nothing(lesson, name, seeds, str(error))
        try:
            return _result(lesson, chosen.name, seeds, judge.judge(lesson, build, chosen, seeds))
        except Unable as error:
            lesson = dataclasses.replace(lesson, not_on=lesson.not_on | {error.engine: error.reason})
        except _LateError as error:
            return nothing(lesson, name, seeds, str(error))
        except (judge.HostError, OSError, MachineError) as error:
            if fault := _fault_of_grader(name, build):
                return _not_judged(lesson, name, seeds, fault)
            if is_again or isinstance(error, (DistrustedError, judge.HostError)):
                return nothing(lesson, name, seeds, _problem(error))
            is_again = True
        finally:
            chosen.close()


def _problem(error: Exception) -> str:
    if isinstance(error, judge.HostError):
        return f"the VMM ended before it recorded anything: {next(iter(str(error).splitlines()), '')}"
    # Not the name of a file, which is one of the grader's machine.
    return str((isinstance(error, OSError) and error.strerror) or error)


def _fault_of_grader(engine: str, build: Path) -> Exception | None:
    """What goes wrong also without the submission."""
    try:
        with contextlib.closing(_SANDBOXED[engine]()) as chosen:
            run = runner.run(Built(build / "vmm" / "vmm", build / CONTROL), engine=chosen)
    except (OSError, MachineError) as error:
        return error
    return MachineError(f"on {engine} not even {CONTROL} runs: {run.errors}") if run.status else None


def _result(lesson: Lesson, engine: str, seeds: list[int], verdicts: list[judge.Verdict]) -> LessonResult:
    checks = []
    for check, worth in lesson.points.items():
        if failed := judge.first_failure(verdicts, check):
            checks.append(CheckResult(check, worth, False, failed.message, failed.seed))
        else:
            checks.append(CheckResult(check, worth, True))
    return LessonResult(lesson.number, lesson.name, lesson.title, engine, seeds, checks)


def nothing(lesson: Lesson, engine: str, seeds: list[int], problem: str) -> LessonResult:
    """No points, and one line that says why."""
    checks = [CheckResult(check, worth, passed=False) for check, worth in lesson.points.items()]
    line = " ".join(problem.split())[:500]
    return LessonResult(lesson.number, lesson.name, lesson.title, engine, seeds, checks, line)


def _not_judged(lesson: Lesson, engine: str, seeds: list[int], error: Exception) -> LessonResult:
    """The grader's own fault: why is for the instructor alone."""
    print(f"kvmlab: lesson {lesson.number} was not judged: {one_line(str(error))}", file=sys.stderr, flush=True)
    return dataclasses.replace(nothing(lesson, engine, seeds, NOT_JUDGED), is_fault_of_grader=True)


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
    try:
        with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
            results = _grade_lessons(path, lessons, Path(scratch) / "tree", engine, seeds)
    except submission.RefusedError as error:
        results = [nothing(lesson, _name(lesson, engine), seeds, f"refused: {error}") for lesson in lessons]
    except (OSError, MachineError) as error:  # no space, no memory: there must be a result all the same
        results = [_not_judged(lesson, _name(lesson, engine), seeds, error) for lesson in lessons]
    return Grade(path, results, round(time.monotonic() - began, 1))


def _grade_lessons(path: str, lessons: list[Lesson], tree: Path, engine: str, seeds: list[int]) -> list[LessonResult]:
    # Of all lessons, whatever is graded: one may use what students of another have written in the runtime.
    files = submission.read(path, student_files(load_all(ROOT / "lessons")), ROOT)
    _prepare(tree)
    for name, content in files.items():
        (tree / name).write_bytes(content)
    return [_grade_lesson(lesson, tree, engine, seeds) for lesson in lessons]


def _grade_lesson(lesson: Lesson, tree: Path, engine: str, seeds: list[int]) -> LessonResult:
    def otherwise(problem: str) -> LessonResult:
        return nothing(lesson, _name(lesson, engine), seeds, problem)

    try:
        if problem := _build(tree, lesson):
            return otherwise(problem)
        return _apart(lambda: _judged(lesson, tree / "build", engine, seeds), otherwise, tree.parent)
    except (OSError, MachineError) as error:
        return _not_judged(lesson, _name(lesson, engine), seeds, error)


def must_be_able(lessons: list[Lesson], engine: str) -> str:
    """Say now what a submission is not to blame for; the line that names the engine of the first lesson."""
    return _choose(lessons[0], engine)[1]
