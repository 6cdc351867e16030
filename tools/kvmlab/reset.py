"""`make reset`: the stubs of a lesson again."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from kvmlab import markers, repository
from kvmlab.lesson import Lesson, UsageError
from kvmlab.repository import GitError

KEPT = "kept"  # not in the build folder, which `make clean` removes


def reset(lesson: Lesson) -> Iterator[str]:
    """The lines to show. What was there is kept before anything is written."""
    stubs = {path: text for path, text in _stubs(lesson).items() if _text(path) != text}
    if not stubs:
        yield f"lesson {lesson.number}: nothing to do, its files are as they were at first"
        return
    kept = _keep(lesson, [path for path in stubs if path.exists()])
    for path, text in stubs.items():
        path.write_text(text)
        yield f"{path}: the stubs again"
    yield f"what was there is kept in {kept}"


def _stubs(lesson: Lesson) -> dict[Path, str]:
    """By file, what students of this lesson start from: in our tree the stubs stand beside the solutions, in a
    student's tree they are what git has got first."""
    halves = [lesson.folder / name for name in ("guest.c", "host.c")]  # one of them may be gone
    texts = {path: _text(path) for path in dict.fromkeys([*lesson.sources, *halves])}
    if any(map(markers.has_stub, texts.values())):
        return {path: markers.student_version(text) for path, text in texts.items() if markers.has_stub(text)}
    stubs = {path: text for path in texts if markers.parts(text := _first(lesson, path))}
    if not stubs:
        raise UsageError(f"cannot find the stubs of lesson {lesson.number}: git does not have its files")
    return stubs


def _first(lesson: Lesson, path: Path) -> str:
    try:
        text = repository.first_version(lesson.root, path.relative_to(lesson.root))
    except GitError as error:
        raise UsageError(f"cannot find the stubs of lesson {lesson.number}: {error}") from None
    if markers.has_stub(text):
        raise UsageError(f"{path}: git has its solution, so this is no student's tree; git restore brings it back")
    if any(part.is_written for part in markers.parts(text)):
        raise UsageError(f"{path}: what git had first is no stub: is this the whole history? git fetch --unshallow")
    return text


def _keep(lesson: Lesson, paths: list[Path]) -> Path:
    """Copies, in a new folder."""
    name = lesson.root / KEPT / f"{lesson.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(2):
        try:
            name.mkdir(parents=True)
            break
        except FileExistsError:
            name = name.with_name(f"{name.name}-{number}")
    for path in paths:
        copy = name / path.relative_to(lesson.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return name


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
