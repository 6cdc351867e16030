"""How far a student is: `make list`, and what it remembers of the last run or check of each lesson."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmlab import markers, whole_file
from kvmlab.lesson import Lesson


@dataclass(frozen=True)
class Progress:
    """What the last `make run` or `make check` gave, for sources with this hash."""

    points: int
    sources: str


def sources_hash(lesson: Lesson) -> str:
    """Of all files in which students of the lesson write."""
    contents = (hashlib.sha256(path.read_bytes()).digest() for path in lesson.sources if path.is_file())
    return hashlib.sha256(b"".join(contents)).hexdigest()


def keep(lesson: Lesson, build: Path, progress: Progress) -> None:
    """Replaced as a whole: an interrupt leaves the old one or the new one."""
    whole_file.write(_place(lesson, build), json.dumps(asdict(progress)))


def last(lesson: Lesson, build: Path) -> Progress | None:
    """A file that is not there, or not one of ours, is none."""
    try:
        found = Progress(**json.loads(_place(lesson, build).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.points, int) else None


def _place(lesson: Lesson, build: Path) -> Path:
    return build / "lessons" / lesson.name / "progress.json"


def table(lessons: Sequence[Lesson], build: Path) -> Iterator[str]:
    """A line for each lesson: points, parts written, title."""
    for lesson in lessons:
        found = last(lesson, build)
        points = f"{found.points if found else '-'}/{sum(lesson.points.values())}"
        parts = [part for path in lesson.sources for part in markers.parts_of(path)]
        written = f"{sum(part.is_written for part in parts)}/{len(parts)}"
        since = "; changed since" if found and found.sources != sources_hash(lesson) else ""
        yield f"{lesson.number:3} {points:>6} points {written:>6} parts  {lesson.title}  ({lesson.folder}{since})"
