"""`make hint`: more help each time, with the task that the student is at."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from kvmlab import markers, whole_file
from kvmlab.lesson import Hint, Lesson
from kvmlab.markers import Part


def next_hints(lesson: Lesson, build: Path) -> Iterator[str]:
    """The lines to show. How many hints of which task were given is kept beside what was built."""
    place = build / "lessons" / lesson.name / "hints-given"
    given = _given(place)
    missing = _first_missing(lesson)
    hint = _about(lesson, *missing) if missing else None
    if missing and hint:
        path, part = missing
        yield f"lesson {lesson.number}: the next part to write is {part.function}, {path}:{part.line}"
    else:
        yield f"lesson {lesson.number}: every part is written; the next hint of each task"
    for each in [hint] if hint else lesson.hints:
        yield from _shown(each, given.get(each.task, 0))
        given[each.task] = min(given.get(each.task, 0) + 1, len(each.tiers))
    whole_file.write(place, json.dumps(given))


def _given(place: Path) -> dict[str, int]:
    """By task. A file that is not there, or that holds anything else, says that none was given."""
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    counts = found.items() if isinstance(found, dict) else []
    return {task: count for task, count in counts if isinstance(count, int) and count >= 0}


def _first_missing(lesson: Lesson) -> tuple[Path, Part] | None:
    """The first part that is not written yet, in the order of the work, which is that of the hints."""
    parts = [(path, part) for path in lesson.sources for part in markers.parts_of(path) if not part.is_written]
    return min(parts, key=lambda found: _order(lesson, found[0], found[1])) if parts else None


def _order(lesson: Lesson, path: Path, part: Part) -> tuple[int, int]:
    """Which hint, and where in its task."""
    if not (hint := _about(lesson, path, part)):
        return len(lesson.hints), 0
    return lesson.hints.index(hint), hint.task.index(part.function)


def _about(lesson: Lesson, path: Path, part: Part) -> Hint | None:
    """The hint whose task names this function; both halves may have one of that name."""
    named = [hint for hint in lesson.hints if re.search(rf"\b{part.function}\b", hint.task)]
    return next((hint for hint in named if path.name in hint.task), named[0] if named else None)


def _shown(hint: Hint, given: int) -> Iterator[str]:
    tier = min(given, len(hint.tiers) - 1)
    left = len(hint.tiers) - 1 - tier
    yield f"  {hint.task}, hint {tier + 1} of {len(hint.tiers)}:"
    yield f"    {hint.tiers[tier]}"
    yield f"    ({left} more: ask again)" if left else "    (there are no more)"
