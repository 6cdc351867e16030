"""`make watch`: `make check` again at each save."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from kvmlab.lesson import Lesson

# It asks for the files' times, as long as nothing is to be done: this sees every way in which an editor saves, also
# where the files lie on another machine or outside of a container. inotify sees neither.
INTERVAL = 0.3

_NEW_SCREEN = "\033[H\033[2J\033[3J"

Saved = dict[Path, tuple[int, int]]


def watch(lesson: Lesson, build: Path) -> NoReturn:
    """Until Ctrl-C, which is a KeyboardInterrupt."""
    make = [os.environ.get("MAKE", "make"), "--no-print-directory", "check"]
    make += [f"LESSONS={lesson.folder.parent}", f"BUILD={build}", f"LESSON={lesson.name}"]
    while True:
        checked = _saved(lesson)
        print(_NEW_SCREEN if sys.stdout.isatty() else "", end="", flush=True)
        _run(make)
        print(f"lesson {lesson.number}: checked again when you save (Ctrl-C ends this)", flush=True)
        while _saved(lesson) == checked:
            time.sleep(INTERVAL)
        _await_quiet(lesson)


def _run(command: list[str]) -> None:
    """What it starts is a group of its own: Ctrl-C reaches all of it, by us, however it was sent."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0) as process:
        try:
            process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise


def _saved(lesson: Lesson) -> Saved:
    """When each file of the lesson was written last, and how long it is."""
    paths = [*lesson.sources, *lesson.folder.glob("*.h"), lesson.tests, lesson.folder / "lesson.toml"]
    return {path: found for path in paths if (found := _state(path))}


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:  # as some editors have it for a moment
        return None
    return found.st_mtime_ns, found.st_size


def _await_quiet(lesson: Lesson) -> None:
    """An editor may write a file in steps, and save several files one after the other."""
    before: Saved = {}
    while before != (now := _saved(lesson)):
        before = now
        time.sleep(INTERVAL)
