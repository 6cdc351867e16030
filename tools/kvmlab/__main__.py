"""The commands behind the targets of the Makefile."""

import argparse
import contextlib
import dataclasses
import errno
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kvmlab import engine as engines
from kvmlab import hints, progress, reset, trace, watch, whole_file
from kvmlab import lesson as lessons
from kvmlab.engine import CannotRun, Engine, Unable
from kvmlab.lesson import Lesson, UsageError
from kvmlab.machine import MachineError
from kvmlab.markers import MarkerError
from kvmlab.progress import Progress

if TYPE_CHECKING:
    from kvmlab import grade_all
    from kvmlab.judge import Verdict

CHECK_SEEDS = 3


def _lesson(arguments: argparse.Namespace) -> Lesson:
    if not arguments.lesson:
        raise UsageError(f"which lesson? say LESSON=n, as in: make {arguments.command} LESSON=1")
    return lessons.find(arguments.lessons, arguments.lesson)


def _seed_chosen(arguments: argparse.Namespace) -> int:
    """The one that the user asks for, or else a new one."""
    seed: int = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    return seed


def _run(arguments: argparse.Namespace) -> int:
    return _on_some_engine(arguments, _run_lesson, [_seed_chosen(arguments)])


def _run_lesson(arguments: argparse.Namespace, lesson: Lesson, seeds: list[int]) -> int:
    from kvmlab import judge, runner

    sources = progress.sources_hash(lesson)
    built = runner.lesson_built(arguments.build, lesson.name)
    events = arguments.events or arguments.build / "lessons" / lesson.name / "events.jsonl"
    _must_be_writable(events)
    with _engine(lesson, arguments) as engine:
        how = {"trace": lesson.trace, "vfio": lesson.vfio}
        run = runner.run_on_terminal(built, seed=seeds[0], events=events, engine=engine, **how)
        if not run.events or run.status > 128:
            return run.status
        if run.lacking:
            raise Unable(engine.name, run.lacking)
        verdicts = judge.judge(lesson, arguments.build, engine, seeds, run)
    if engine.trace:
        _say(trace.summary(run.events))
    _report(arguments, lesson, verdicts, sources)
    status = runner.status_of(run, lesson)
    if any(not verdict.passed for verdict in verdicts):
        _say(f"all events: {events}; what to try: make hint LESSON={lesson.number}")
        return status or 1
    return status


def _on_some_engine(
    arguments: argparse.Namespace, command: Callable[[argparse.Namespace, Lesson, list[int]], int], seeds: list[int]
) -> int:
    """Do it on the first engine that turns out to be able to."""
    lesson = _lesson(arguments)
    _announce(lesson, seeds)
    while True:
        try:
            return command(arguments, lesson, seeds)
        except Unable as error:
            lesson = dataclasses.replace(lesson, not_on=lesson.not_on | {error.engine: error.reason})


def _announce(lesson: Lesson, seeds: list[int]) -> None:
    shown = f"SEED={seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    _say(f"lesson {lesson.number}: {lesson.title} ({shown})")


@contextlib.contextmanager
def _engine(lesson: Lesson, arguments: argparse.Namespace) -> Iterator[Engine]:
    """The engine to run on, announced."""
    chosen, line = engines.choose(lesson, arguments.engine, arguments.kvm_params, arguments.trace)
    _say(line)
    with contextlib.closing(chosen):
        yield chosen


def _must_be_writable(events: Path) -> None:
    try:
        events.open("wb").close()
    except OSError as error:
        raise MachineError(f"cannot write the events to {events}: {error.strerror}") from None


def _check(arguments: argparse.Namespace) -> int:
    count = CHECK_SEEDS if arguments.seed is None else 1
    return _on_some_engine(arguments, _check_lesson, [_seed_chosen(arguments) for _ in range(count)])


def _check_lesson(arguments: argparse.Namespace, lesson: Lesson, seeds: list[int]) -> int:
    from kvmlab import judge

    sources = progress.sources_hash(lesson)
    try:
        with _engine(lesson, arguments) as engine:
            verdicts = judge.judge(lesson, arguments.build, engine, seeds)
    except judge.HostError as error:
        print(error, file=sys.stderr)
        return 5
    _report(arguments, lesson, verdicts, sources)
    failed = next((verdict for verdict in verdicts if not verdict.passed), None)
    if failed:
        _say(f"to see that run: make run LESSON={lesson.number} SEED={failed.seed}")
    return 1 if failed else 0


def _report(arguments: argparse.Namespace, lesson: Lesson, verdicts: "list[Verdict]", sources: str) -> None:
    """Show the verdict, and keep what `make list` says of it."""
    from kvmlab import judge

    progress.keep(lesson, arguments.build, Progress(judge.points(lesson, verdicts), sources))
    _say(judge.report(lesson, arguments.build, verdicts))


def _compare(arguments: argparse.Namespace) -> int:
    return _on_some_engine(arguments, _compare_lesson, [_seed_chosen(arguments)])


def _compare_lesson(arguments: argparse.Namespace, lesson: Lesson, seeds: list[int]) -> int:
    from kvmlab import compare

    try:
        for line in compare.compare(lesson, arguments.build, arguments.engine, seeds[0]):
            print(line, flush=True)
    except compare.UnfinishedError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


def _debug(arguments: argparse.Namespace) -> int:
    from kvmlab import debug, runner

    lesson = _lesson(arguments)
    debug.admit(lesson, arguments.engine)
    seed = _seed_chosen(arguments)
    _announce(lesson, [seed])
    return debug.debug(runner.lesson_built(arguments.build, lesson.name), seed)


def _list(arguments: argparse.Namespace) -> int:
    return _show(progress.table(lessons.load_all(arguments.lessons), arguments.build))


def _hint(arguments: argparse.Namespace) -> int:
    return _show(hints.next_hints(_lesson(arguments), arguments.build))


def _show(lines: Iterable[str]) -> int:
    """All is done before anything is shown."""
    _say("\n".join(lines))
    return 0


def _say(text: str) -> None:
    """A reader may have seen enough: `make list | head -2`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _stop_printing()


def _stop_printing() -> None:
    """Python would try again when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _watch(arguments: argparse.Namespace) -> int:
    watch.watch(_lesson(arguments), arguments.build)


def _reset(arguments: argparse.Namespace) -> int:
    return _show(reset.reset(_lesson(arguments)))


def _handout(arguments: argparse.Namespace) -> int:
    from kvmlab import handout

    if not arguments.destination:
        raise UsageError("where to? say DEST=dir, as in: make handout DEST=../mine")
    missing = handout.write(Path.cwd(), Path(arguments.destination))
    print(f"the student tree is in {arguments.destination}")
    if missing:
        print(f"kvmlab: it is no git repository, so that `make reset` cannot work there: {missing}", file=sys.stderr)
    return 0


def _grade(arguments: argparse.Namespace) -> int:
    from kvmlab import formats, grade

    if not arguments.submission:
        raise UsageError("whose? say SUBMISSION=path, a folder, a tar or zip file, or a revision of git")
    chosen = _graded_lessons(arguments)
    if arguments.output and arguments.output.is_dir():
        raise UsageError(f"OUTPUT={arguments.output} is a folder: name a file")
    seeds = arguments.seeds or [secrets.randbelow(1 << 32) for _ in range(CHECK_SEEDS)]
    print(grade.must_be_able(chosen, arguments.engine), file=sys.stderr)
    print(f"to see the same again: SEEDS={','.join(map(str, seeds))}", file=sys.stderr, flush=True)
    graded = grade.grade(arguments.submission, chosen, arguments.engine, seeds)
    text = formats.formatted(graded, arguments.format)
    status = 5 if graded.is_fault_of_grader else 0 if graded.points == graded.total else 1
    if not arguments.output:
        print(text, end="")
        return status
    try:
        whole_file.write(arguments.output, text)
    except OSError:
        print(text, end="")  # that it took minutes to find out
        raise
    return status


def _graded_lessons(arguments: argparse.Namespace) -> list[Lesson]:
    folder = Path("lessons").absolute()  # the trusted tree's
    return [lessons.find(folder, arguments.lesson)] if arguments.lesson else lessons.load_all(folder)


def _gradescope(arguments: argparse.Namespace) -> int:
    from kvmlab import gradescope

    file = arguments.build / "gradescope.zip"
    lesson = lessons.find(arguments.lessons, arguments.lesson).name if arguments.lesson else ""
    gradescope.write(Path.cwd(), file, lesson)
    print(f"the autograder for Gradescope is {file}")
    return 0


def _grade_all(arguments: argparse.Namespace) -> int:
    from kvmlab import grade_all

    results = grade_all.grade_all(_work(arguments), arguments.jobs)
    bad = [result for result in results if not result.grade]
    print(f"{len(results)} submissions, {len(bad)} of them without a grade; points: {arguments.results}/points.csv")
    for result in bad:
        print(f"kvmlab: {result}", file=sys.stderr)
    return 5 if bad else 0


def _grade_item(arguments: argparse.Namespace) -> int:
    from kvmlab import grade_all

    result = grade_all.grade_one(_work(arguments), arguments.index)
    print(result)
    return 0 if result.grade else 5


def _work(arguments: argparse.Namespace) -> "grade_all.Work":
    from kvmlab import grade, grade_all

    if not arguments.submissions:
        raise UsageError("which submissions? say SUBMISSIONS=dir, as in: make grade-all SUBMISSIONS=../handed-in")
    submissions = Path(arguments.submissions)
    arguments.results = arguments.results or Path(f"{submissions.resolve()}-grades")
    chosen = _graded_lessons(arguments)
    seeds = ",".join(map(str, arguments.seeds or []))
    given = {"lesson": chosen[0].name if arguments.lesson else "", "engine": arguments.engine, "seeds": seeds}
    options = [f"--{name}={value}" for name, value in given.items() if value]
    course = grade_all.digest_of_course(Path.cwd())
    work = grade_all.Work(submissions, arguments.results, (*grade_all.GRADER, *options), course)
    # What no grader could do is to be said once, not for each submission.
    work.items()
    print(grade.must_be_able(chosen, arguments.engine or "auto"), flush=True)
    return work


def _seed(text: str, name: str = "SEED") -> int:
    try:
        seed = int(text, 0)
    except ValueError:
        seed = -1
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"{name}={text}: expected a number from 0 to {(1 << 64) - 1}")
    return seed


def _seeds(text: str) -> list[int]:
    return [_seed(each, "SEEDS") for each in text.split(",")]


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"JOBS={text}: expected a number from 1 on")
    return int(text)


def _format(text: str) -> str:
    from kvmlab import formats

    if text not in formats.FORMATS:
        raise UsageError(f"FORMAT={text}: there are {', '.join(formats.FORMATS)}")
    return text


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; make help lists the commands")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvmlab", description=__doc__)
    parser.add_argument("--lessons", type=Path, default=Path("lessons"))
    parser.add_argument("--build", type=Path, default=Path("build"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    of_lesson = {
        "run": _run,
        "check": _check,
        "watch": _watch,
        "compare": _compare,
        "debug": _debug,
        "hint": _hint,
        "reset": _reset,
    }
    for name, function in of_lesson.items():
        command = commands.add_parser(name)
        command.set_defaults(function=function, command=name)
        command.add_argument("lesson", nargs="?", help="1, 01 or 01-vm-exit")
        if name in ("run", "check", "compare", "debug"):
            command.add_argument("--seed", type=_seed)
            command.add_argument("--engine", default="auto")
        if name in ("run", "check"):
            command.add_argument("--kvm-params", default="")
            command.add_argument("--trace", action="store_true")
        if name == "run":
            command.add_argument("--events", type=Path)
    command = commands.add_parser("grade")
    command.set_defaults(function=_grade)
    command.add_argument("--submission", default="")
    command.add_argument("--lesson", default="")
    command.add_argument("--engine", default="auto")
    command.add_argument("--seeds", type=_seeds)
    command.add_argument("--format", default="table", type=_format)
    command.add_argument("--output", type=Path)
    commands.add_parser("list").set_defaults(function=_list)
    command = commands.add_parser("handout")
    command.set_defaults(function=_handout)
    command.add_argument("destination", nargs="?")
    command = commands.add_parser("gradescope")
    command.set_defaults(function=_gradescope)
    command.add_argument("--lesson", default="")
    for name, function in {"grade-all": _grade_all, "grade-item": _grade_item}.items():
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if name == "grade-item":
            command.add_argument("index", type=int, help="in sorted order, from 0 on")
        else:
            command.add_argument("--jobs", type=_jobs, default=os.cpu_count() or 1)
        command.add_argument("submissions", nargs="?")
        command.add_argument("--results", type=Path)
        command.add_argument("--lesson", default="")
        command.add_argument("--engine", default="")
        command.add_argument("--seeds", type=_seeds)
    return parser


def main() -> int:
    try:
        arguments = _parser().parse_args()
        status: int = arguments.function(arguments)
        return status
    except (UsageError, MarkerError) as error:
        return _said(error, 2)
    except MachineError as error:
        return _said(error, 5)
    except CannotRun as error:
        return _said(error, 77)
    except BrokenPipeError:
        _stop_printing()
        return 128 + signal.SIGPIPE
    except OSError as error:
        is_temporary = error.errno == errno.ENOSPC and not error.filename
        where = f" (temporary files are in {tempfile.gettempdir()})" if is_temporary else ""
        return _said(f"{error}{where}", 5)
    except KeyboardInterrupt:
        return _said("interrupted", 128 + signal.SIGINT)


def _said(error: object, status: int) -> int:
    print(f"kvmlab: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
