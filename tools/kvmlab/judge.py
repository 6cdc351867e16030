"""Apply a lesson's checks and say what came out: the verdict of `make run` and `make check`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmlab import plugin, runner, source
from kvmlab.engine import Engine, Unable
from kvmlab.events import Event
from kvmlab.expect import CheckFailed
from kvmlab.lesson import Lesson, UsageError
from kvmlab.machine import MachineError
from kvmlab.runner import Run

# The events that say where a guest was that did not end well.
_ENDS = ("panic", "triple_fault", "emulation_failure", "hang")


class HostError(Exception):
    """There is no run to judge: the VMM could not start, and said why."""


@dataclass(frozen=True)
class Verdict:
    """One check applied to the run of one seed."""

    check: str
    seed: int
    passed: bool
    message: str = ""
    event: Event | None = None  # has the rip at which it went wrong, as far as that is known
    errors: str = ""  # what the VMM said


class _Collector:
    """A pytest plugin that keeps the outcome of every check."""

    def __init__(self, engine: Engine, recorded: Run | None) -> None:
        self.engine = engine
        self.recorded = recorded
        self.verdicts: list[Verdict] = []
        self.errors: list[str] = []
        self.not_run: Exception | None = None

    @pytest.hookimpl(tryfirst=True)  # before the plugin starts an emulated machine because it sees none
    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[plugin.OPENED] = {self.engine.name: self.engine}
        if self.recorded:
            config.stash[plugin.RECORDED] = self.recorded

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(str(report.longrepr))

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> None:
        if call.excinfo is None and call.when != "call":
            return
        run = item.funcargs.get("run")
        error = call.excinfo.value if call.excinfo else None
        if isinstance(run, Run) and not run.events:
            self.not_run = HostError(run.errors.strip() or f"vmm: ended with status {run.status}, and said nothing")
        elif isinstance(error, pytest.skip.Exception) and call.when == "setup":
            self.not_run = Unable(self.engine.name, str(error.msg))
        elif isinstance(error, MachineError | UsageError | OSError):
            self.not_run = error
        if self.not_run:
            item.session.shouldstop = str(self.not_run)
        seed = item.callspec.params["run"].seed  # type: ignore[attr-defined]
        assert isinstance(seed, int)
        if error is None:
            message = ""
        elif isinstance(error, CheckFailed):
            message = str(error)
        else:
            message = f"the check itself failed: {call.excinfo.exconly() if call.excinfo else ''}"
        if error and not self.recorded and isinstance(run, Run):
            message += _said_by_vmm(run)
        check = (item.originalname or item.name).removeprefix("test_")
        event, errors = (_event(run, error), run.errors) if error and isinstance(run, Run) else (None, "")
        self.verdicts.append(Verdict(check, seed, error is None, message, event, errors))


def _event(run: Run, error: BaseException) -> Event | None:
    """Where it went wrong: the event that the check has shown, or the one that ended the run."""
    near = error.near if isinstance(error, CheckFailed) else None
    events = [near] if near else []
    events += [event for kind in _ENDS if (event := run.one(kind))]
    if run.one("end", how="unknown access"):
        events += run.all("exit")[-1:]
    return next((event for event in events if isinstance(event.get("rip"), int)), None)


def _said_by_vmm(run: Run) -> str:
    """Why a run that nobody watched ended early, without the registers and walks that explain it."""
    lines = source.CALLS.sub("", run.errors).splitlines() if run.status else []
    return "".join("\n" + line for line in lines if line.startswith("vmm: "))


def judge(
    lesson: Lesson, build: Path, engine: Engine, seeds: Iterable[int], recorded: Run | None = None
) -> list[Verdict]:
    """The verdict of every check for every seed; recorded: a run to judge instead of making one."""
    collector = _Collector(engine, recorded)
    # A lesson may lie outside the project: name what pytest would else look for around it.
    project = ["-c", str(plugin.ROOT / "pyproject.toml"), f"--rootdir={plugin.ROOT}"]
    project += ["--noconftest", "-p", "kvmlab.plugin"]
    options = [*project, "-p", "no:terminal", "-p", "no:cacheprovider", f"--build={build}"]
    options += [f"--engines={engine.name}", "--seeds=" + ",".join(map(str, seeds))]
    if pytest.main([str(lesson.tests), *options], plugins=[collector]) == pytest.ExitCode.INTERRUPTED:
        raise collector.not_run or KeyboardInterrupt
    if collector.errors or not collector.verdicts:
        raise UsageError(f"{lesson.tests} cannot be used" + "".join(f":\n{error}" for error in collector.errors))
    if differing := lesson.points.keys() ^ {verdict.check for verdict in collector.verdicts}:
        raise UsageError(f"lesson.toml and {lesson.tests} do not name the same checks: {', '.join(sorted(differing))}")
    return collector.verdicts


def points(lesson: Lesson, verdicts: list[Verdict]) -> int:
    """A check gives its points if it holds for every seed."""
    failed = {verdict.check for verdict in verdicts if not verdict.passed}
    return sum(worth for check, worth in lesson.points.items() if check not in failed)


def first_failure(verdicts: list[Verdict], check: str) -> Verdict | None:
    """Of all seeds, the first for which this check does not hold."""
    return next((verdict for verdict in verdicts if verdict.check == check and not verdict.passed), None)


def _explained(lesson: Lesson, build: Path, failed: Verdict) -> Iterator[str]:
    """All there is to say of a check that fails."""
    yield from failed.message.splitlines()
    built = runner.lesson_built(build, lesson.name)
    if place := source.of_host(built.vmm, failed.errors):
        yield place
    if failed.event and (place := source.of_student(lesson, built.image, failed.event)):
        yield f"the guest was at {place}"
    yield f"(seed {failed.seed})"


def report(lesson: Lesson, build: Path, verdicts: list[Verdict]) -> str:
    """One line for each check, and for the first that fails all there is to say."""
    lines = []
    explained = False
    for check, worth in lesson.points.items():
        failed = first_failure(verdicts, check)
        title = check.replace("_", " ")
        lines.append(f"  {'FAIL' if failed else 'pass'}  {0 if failed else worth}/{worth}  {title}")
        if failed and not explained:
            explained = True
            lines += [f"             {line}" for line in _explained(lesson, build, failed)]
    total = sum(lesson.points.values())
    lines.append(f"lesson {lesson.number}: {points(lesson, verdicts)} of {total} points")
    return "\n".join(lines)
