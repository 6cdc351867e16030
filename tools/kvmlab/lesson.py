"""The lessons: what lesson.toml says, and where a built lesson lies."""

import importlib.util
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


class UsageError(Exception):
    """The user asked for something that is not there: one line, exit status 2."""


@dataclass(frozen=True)
class Hint:
    """Three tiers of help with one task: a direction, a tool, nearly the answer."""

    task: str
    tiers: list[str]


@dataclass(frozen=True)
class Lesson:
    """One folder under lessons/."""

    folder: Path
    title: str
    not_on: dict[str, str]  # engines that cannot run it, and why
    points: dict[str, int]
    hints: list[Hint]
    ends: str = ""  # how a run ends that does all it should, if the VMM calls it a failure
    trace: bool = False  # record KVM's tracepoints in every run, where the engine can
    vfio: bool = False  # each run on svm wants the device for VFIO as if nobody had used it
    also: Sequence[str] = ()  # files outside of its folder in which students write, from the project's root

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def number(self) -> int:
        return int(self.name.split("-")[0])

    @property
    def root(self) -> Path:
        """The project, or what stands for it: what the files named in `also` are looked for in."""
        return self.folder.parent.parent

    @property
    def sources(self) -> list[Path]:
        """The files in which students may write, in the order of the work."""
        return [*(self.root / name for name in self.also), *sorted(self.folder.glob("*.c"))]

    @property
    def tests(self) -> Path:
        return self.folder / "test_lesson.py"

    def module(self, name: str) -> ModuleType | None:
        """A module that lies in the lesson's folder, if it has one of this name."""
        path = self.folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{self.folder.name}.{name}", path)
        if not path.exists() or not spec or not spec.loader:
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def load(folder: Path) -> Lesson:
    if not re.match(r"[0-9]+-", folder.name):
        raise UsageError(f"{folder} is no lesson: its name must begin with a number, as 01-vm-exit does")
    try:
        return _load(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{folder}/lesson.toml cannot be used: {error or type(error).__name__}") from None


def _load(folder: Path) -> Lesson:
    data = tomllib.loads((folder / "lesson.toml").read_text())
    hints = [Hint(hint["task"], hint["tiers"]) for hint in data["hints"]]
    not_on, ends = data.get("not_on", {}), data.get("ends", "")
    trace, vfio, also = data.get("trace", False), data.get("vfio", False), data.get("also", [])
    return Lesson(folder, data["title"], not_on, data["points"], hints, ends, trace, vfio, also)


def load_all(lessons: Path) -> list[Lesson]:
    return [load(path.parent) for path in sorted(lessons.glob("*/lesson.toml"))]


def find(lessons: Path, name: str) -> Lesson:
    """The lesson called 1, 01 or 01-vm-exit."""
    for lesson in load_all(lessons):
        number = lesson.name.split("-")[0]
        if name in (lesson.name, number, number.lstrip("0")):
            return lesson
    raise UsageError(f"there is no lesson {name}: make list shows those there are")
