"""The pytest side of the harness: the fixtures that lessons and tests share."""

import contextlib
import functools
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvmlab import runner
from kvmlab.cache import ROOT as ROOT
from kvmlab.engine import ENGINES, Engine, kvm_problem, one_vmx
from kvmlab.lesson import Lesson, load
from kvmlab.runner import Built, Run


class Round(NamedTuple):
    """One run of a lesson."""

    engine: str
    seed: int

    def __repr__(self) -> str:
        return f"{self.engine} with seed {self.seed}"


# A run that `make run` has already made: the checks judge it instead of making their own.
RECORDED = pytest.StashKey[Run]()
# The engines of this session, by name; those that nobody has used yet are not there.
OPENED = pytest.StashKey[dict[str, Engine]]()
ROUNDS = pytest.StashKey[list[Round]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvmlab")
    group.addoption("--build", default=str(ROOT / "build"), help="where `make` has built things")
    group.addoption("--seeds", default="", help="seeds to run each lesson with, separated by commas")
    group.addoption("--engines", default="", help="engines to run lessons on: kvm,svm,vmx (kvm if it works, else svm)")


def pytest_configure(config: pytest.Config) -> None:
    opened: dict[str, Engine] = config.stash.setdefault(OPENED, {})
    # Workers of xdist must collect the same tests: they get what the first process has decided.
    decided = getattr(config, "workerinput", {})
    given = decided.get("seeds") or config.getoption("--seeds")
    # Three fixed seeds, and one that is new each time: the header names it.
    seeds = [int(seed) for seed in given.split(",")] if given else [1, 2, 3, secrets.randbelow(1 << 32)]
    given = decided.get("engines") or config.getoption("--engines")
    engines = given.split(",") if given else ["svm" if kvm_problem() else "kvm"]
    config.stash[ROUNDS] = [Round(engine, seed) for engine in engines for seed in seeds]
    if "vmx" in engines and "vmx" not in opened and not decided and not config.option.collectonly:
        # The workers of xdist share it, and what they call.
        closing = contextlib.ExitStack()
        closing.enter_context(one_vmx())
        config.add_cleanup(closing.close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # a type of xdist's, which need not be installed
    rounds = node.config.stash[ROUNDS]
    node.workerinput["seeds"] = ",".join(dict.fromkeys(str(round_.seed) for round_ in rounds))
    node.workerinput["engines"] = ",".join(dict.fromkeys(round_.engine for round_ in rounds))


def pytest_unconfigure(config: pytest.Config) -> None:
    for engine in config.stash[OPENED].values():
        engine.close()


def pytest_report_header(config: pytest.Config) -> str:
    return f"lessons run on: {config.stash[ROUNDS]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames and metafunc.definition.path.name == "test_lesson.py":
        rounds: list[Round] = metafunc.config.stash[ROUNDS]
        metafunc.parametrize("run", rounds, indirect=True, scope="module", ids=str)


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """Where `make` has built things."""
    return Path(request.config.getoption("--build"))


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest) -> dict[str, Engine]:
    """The engines that this session runs lessons on, by name."""
    opened = request.config.stash[OPENED]
    for round_ in request.config.stash[ROUNDS]:
        opened.setdefault(round_.engine, ENGINES[round_.engine]())
    return opened


@pytest.fixture(scope="module")
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """The lesson whose folder a test lies in."""
    return load(request.path.parent)


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, build: Path, lesson: Lesson, engines: dict[str, Engine]) -> Run:
    """One run of the lesson, with the seed of this round."""
    recorded = request.config.stash.get(RECORDED, None)
    if recorded:
        return recorded
    name, seed = request.param
    if name in lesson.not_on:
        pytest.skip(lesson.not_on[name])
    built = runner.lesson_built(build, lesson.name)
    made = runner.run(built, seed=seed, trace=lesson.trace, vfio=lesson.vfio, engine=engines[name])
    if made.lacking:
        pytest.skip(made.lacking)
    return made


@pytest.fixture(scope="module")
def rerun(run: Run, build: Path, lesson: Lesson, engines: dict[str, Engine]) -> Callable[..., Run]:
    """Run the lesson once more, with the same seed on the same engine, but on another machine: options
    of the VMM, as in rerun("--irqchip=split"). Once for all checks that ask for the same."""

    @functools.cache
    def rerun(*options: str) -> Run:
        built = runner.lesson_built(build, lesson.name)
        trace, vfio, engine = lesson.trace, lesson.vfio, engines[run.engine]
        return runner.run(built, options, seed=run.seed, trace=trace, vfio=vfio, engine=engine)

    return rerun


@pytest.fixture(scope="session")
def vmm(build: Path) -> Path:
    """The VMM without a host half."""
    return build / "vmm" / "vmm"


@pytest.fixture(scope="session")
def guest(build: Path, vmm: Path) -> Callable[[str], Built]:
    """A guest of tests/guests by its name, with the plain VMM."""
    return lambda name: Built(vmm, build / "tests" / f"{name}.elf")
