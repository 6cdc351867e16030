"""The pytest side of the harness: the fixtures that lessons and tests share."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmlab import runner
from kvmlab.lesson import Lesson, load
from kvmlab.runner import Built, Run

ROOT = Path(__file__).resolve().parents[2]

# A run that `make run` has already made: the checks judge it instead of making their own.
RECORDED = pytest.StashKey[Run]()
SEEDS = pytest.StashKey[list[int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvmlab")
    group.addoption("--build", default=str(ROOT / "build"), help="where `make` has built things")
    group.addoption("--seeds", default="", help="seeds to run each lesson with, separated by commas")


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist must collect the same tests: they get the seeds of the first process.
    given = getattr(config, "workerinput", {}).get("seeds") or config.getoption("--seeds")
    # Three fixed seeds, and one that is new each time: the header names it.
    seeds = [int(seed) for seed in given.split(",")] if given else [1, 2, 3, secrets.randbelow(1 << 32)]
    config.stash[SEEDS] = seeds


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # a type of xdist's, which need not be installed
    node.workerinput["seeds"] = ",".join(map(str, node.config.stash[SEEDS]))


def pytest_report_header(config: pytest.Config) -> str:
    return "lesson seeds: " + ", ".join(str(seed) for seed in config.stash[SEEDS])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames and metafunc.definition.path.name == "test_lesson.py":
        seeds = metafunc.config.stash[SEEDS]
        metafunc.parametrize("run", seeds, indirect=True, scope="module", ids=lambda seed: f"seed {seed}")


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """Where `make` has built things."""
    return Path(request.config.getoption("--build"))


@pytest.fixture(scope="module")
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """The lesson whose folder a test lies in."""
    return load(request.path.parent)


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, build: Path, lesson: Lesson) -> Run:
    """One run of the lesson, with the seed of this round."""
    recorded = request.config.stash.get(RECORDED, None)
    return recorded or runner.run(runner.lesson_built(build, lesson.name), seed=request.param)


@pytest.fixture(scope="session")
def vmm(build: Path) -> Path:
    """The VMM without a host half."""
    return build / "vmm" / "vmm"


@pytest.fixture(scope="session")
def guest(build: Path, vmm: Path) -> Callable[[str], Built]:
    """A guest of tests/guests by its name, with the plain VMM."""
    return lambda name: Built(vmm, build / "tests" / f"{name}.elf")
