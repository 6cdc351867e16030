"""Variants of a lesson: a copy in a folder of its own, changed, built and judged as a student's is.

Tests import this and name it as their plugin, for its fixtures (so: PYTEST_DONT_REWRITE).
"""

import atexit
import functools
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmlab import markers
from kvmlab.lesson import load
from kvmlab.plugin import ROOT
from kvmlab.runner import Run, status_of

NAMES = sorted(path.parent.name for path in ROOT.glob("lessons/*/lesson.toml"))


def is_done(run: Run, name: str) -> bool:
    """The run of this lesson ended as it should: well, or in the crash that the lesson is about."""
    return status_of(run, load(ROOT / "lessons" / name)) == 0


# What a user's shell has: without what the `make` that runs the tests hands on to its children, and
# without what would hide that a line is flushed too late.
_NOT_THE_USERS = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONUNBUFFERED"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in _NOT_THE_USERS}


_PYTHON = {"PYTHONPATH": "tools", "PYTHONDONTWRITEBYTECODE": "1"}
TOO_LONG = 120.0


@dataclass(frozen=True)
class Shown:
    """What a command has shown, and how it ended."""

    status: int
    output: str
    errors: str

    @property
    def verdicts(self) -> dict[str, bool]:
        """The checks in the order shown: does each hold?"""
        lines = re.findall(r"^  (pass|FAIL)  \d+/\d+  (.+)$", self.output, re.MULTILINE)
        return {title.replace(" ", "_"): outcome == "pass" for outcome, title in lines}

    @property
    def failed(self) -> list[str]:
        return [check for check, holds in self.verdicts.items() if not holds]

    @property
    def points(self) -> int:
        found = re.search(r"^lesson \d+: (\d+) of \d+ points$", self.output, re.MULTILINE)
        assert found, f"no points in:\n{self}"
        return int(found[1])

    def __str__(self) -> str:
        return f"{self.output}{self.errors}(status {self.status})"


def command(*arguments: str | Path, folder: Path = ROOT, **environment: str) -> Shown:
    """Run a command to its end, as a user does in this folder."""
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TOO_LONG,
        check=False,
    )
    return Shown(done.returncode, done.stdout, done.stderr)


def git(folder: Path, *arguments: str) -> str:
    """What git says to a student."""
    who = ["-c", "user.name=Student", "-c", "user.email=student@localhost"]
    shown = command("git", *who, *arguments, folder=folder)
    assert shown.status == 0, str(shown)
    return shown.output


class Server:
    """tests/kvmlab_server.py: `python -m kvmlab`, over and over, without the time that it takes to start."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="kvmlab-")
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "kvmlab_server.py"],
            cwd=ROOT,
            env=ENVIRONMENT | _PYTHON,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, arguments: list[str]) -> Shown:
        assert self._process.stdin
        assert self._process.stdout
        output, errors = (Path(self._scratch.name) / name for name in ("output", "errors"))
        request = {"arguments": arguments, "folder": str(ROOT), "environment": ENVIRONMENT | _PYTHON}
        print(
            json.dumps(request | {"output": str(output), "errors": str(errors)}), file=self._process.stdin, flush=True
        )
        assert select.select([self._process.stdout], [], [], TOO_LONG)[0], f"this takes too long: {arguments}"
        status = int(self._process.stdout.readline())
        shown = Shown(status, output.read_text(), errors.read_text())
        output.unlink()
        errors.unlink()
        return shown

    def close(self) -> None:
        """The emulated machine ends with it."""
        self._process.communicate()
        self._scratch.cleanup()


@functools.cache
def server() -> Server:
    started = Server()
    atexit.register(started.close)
    return started


@dataclass(frozen=True)
class Variant:
    """A copy of one lesson and of what was built for it; and of guest/, if students of the lesson write there."""

    home: Path
    name: str

    @property
    def lessons(self) -> Path:
        return self.home / "lessons"

    @property
    def folder(self) -> Path:
        return self.lessons / self.name

    @property
    def build(self) -> Path:
        return self.home / "build"

    @property
    def sources(self) -> list[Path]:
        """The files in which students may write, in the order of the work."""
        return load(self.folder).sources

    def patch(self, name: str) -> None:
        """Put one of the wrong solutions of tests/mutants in the solution's place."""
        patch = ROOT / "tests" / "mutants" / self.name / f"{name}.patch"
        # The folder may lie in a repository: git must not look for the files there.
        shown = command("git", "apply", patch, folder=self.home, GIT_CEILING_DIRECTORIES=str(self.home.parent))
        assert shown.status == 0, f"the solution has changed, and {patch} does not fit any more:\n{shown}"

    def change(self, file: str, old: str, new: str) -> None:
        """Where the old text stands, once."""
        path = self.folder / file
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))

    def make(self, *arguments: str, path: str = ENVIRONMENT["PATH"]) -> Shown:
        own = [f"GUEST={self.home / 'guest'}"] if (self.home / "guest").exists() else []
        return command("make", f"LESSONS={self.lessons}", f"BUILD={self.build}", *own, *arguments, PATH=path)

    def make_all(self) -> None:
        """Build it, and expect the compiler to be silent."""
        shown = self.make("-s", "build-lesson", f"LESSON={self.name}")
        assert (shown.status, shown.output, shown.errors) == (0, "", ""), f"the variant does not build:\n{shown}"

    def kvmlab(self, *arguments: str) -> Shown:
        """What is behind `make run` and `make check`: its status is not hidden by make's."""
        return server().ask([f"--lessons={self.lessons}", f"--build={self.build}", *arguments])

    def call(self, *arguments: str) -> list[str]:
        """Its command line, for who does not want to wait for it; PYTHONPATH must name tools."""
        return [sys.executable, "-m", "kvmlab", f"--lessons={self.lessons}", f"--build={self.build}", *arguments]

    def run(self, seed: int = 1, engine: str = "auto") -> Shown:
        return self.kvmlab("run", self.name, f"--seed={seed}", f"--engine={engine}")


@pytest.fixture(scope="session")
def solutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All lessons as they are, built: lessons/ and build/ in one folder."""
    home = tmp_path_factory.mktemp("solutions")
    shutil.copytree(ROOT / "lessons", home / "lessons", ignore=shutil.ignore_patterns("__pycache__"))
    for name in NAMES:
        Variant(home, name).make_all()
    return home


@pytest.fixture
def variant(solutions: Path, tmp_path: Path) -> Iterator[Callable[[str], Variant]]:
    """A variant of the lesson of this name, as yet unchanged. With the times of its files, so that
    `make` builds again only what has been changed."""
    home = tmp_path / "variant"

    def start(name: str) -> Variant:
        shutil.copytree(solutions / "lessons" / name, home / "lessons" / name)
        # Not what was built for the other lessons: that is most of it.
        for part in ("guest", "vmm", f"lessons/{name}"):
            shutil.copytree(solutions / "build" / part, home / "build" / part)
        for folder in {path.split("/")[0] for path in load(home / "lessons" / name).also}:
            shutil.copytree(ROOT / folder, home / folder)
        return Variant(home, name)

    yield start
    shutil.rmtree(home / "build", ignore_errors=True)


# ---- the places where students write ----


@dataclass(frozen=True)
class Region:
    """One solution and its stub."""

    lesson: str
    file: str
    function: str
    solution: str
    stub: str

    def __str__(self) -> str:
        return f"{self.lesson}/{self.function}"


def regions(name: str) -> list[Region]:
    """The regions of a lesson, in the order of the work."""
    found = []
    for path in Variant(ROOT, name).sources:
        file = str(path.relative_to(ROOT))
        parts = markers.parts(path.read_text())
        found += [Region(name, file, part.function, part.text, part.stub) for part in parts]
    return found


def write_stubs(variant: Variant, stubs: list[Region]) -> None:
    """Put stubs in these places, and solutions without markers in all others."""
    wanted = {region.stub for region in stubs}
    for path in variant.sources:
        text = markers.PART.sub(lambda match: match["stub" if match["stub"] in wanted else "text"], path.read_text())
        path.write_text(text)


@pytest.fixture
def student_home(tmp_path: Path) -> Path:
    """The lessons and the runtime as students get them; nothing is built."""
    for folder in ("lessons", "guest"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in NAMES:
        for path in Variant(tmp_path, name).sources:
            path.write_text(markers.student_version(path.read_text()))
    return tmp_path


def write_parts(home: Path, name: str, count: int) -> None:
    """Write the first parts of a lesson, leave the stubs of the others."""
    this = Variant(home, name)
    for path in this.sources:
        shutil.copy(ROOT / path.relative_to(home), path)
    write_first(this, count)


def write_first(this: Variant, count: int) -> None:
    """The same for files that are as ours."""
    numbers = itertools.count()

    def keep(match: re.Match[str]) -> str:
        text = match["text" if next(numbers) < count else "stub"]
        return f"{markers.BEGIN}\n{text}{markers.STUDENT_END}\n"

    for path in this.sources:
        path.write_text(markers.PART.sub(keep, path.read_text()))
