"""The student tree: everything a student needs, solutions replaced by stubs."""

import shutil
import subprocess
from pathlib import Path

from kvmlab import markers
from kvmlab.lesson import UsageError

# What reveals a solution, or is of no use to a student.
_LEFT_OUT = {"tests/mutants"}


def write(source: Path, destination: Path) -> None:
    """Write the student tree of the project at source to destination, which must not exist yet."""
    if destination.exists() and any(destination.iterdir()):
        raise UsageError(f"{destination} is not empty: name a folder that does not exist yet")
    for path in _files(source):
        if any(path == left_out or path.startswith(left_out + "/") for left_out in _LEFT_OUT):
            continue
        copy = destination / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, copy)
        if copy.suffix == ".c" and path.startswith("lessons/"):
            strip(copy)


def strip(path: Path) -> None:
    """Replace the solutions in this file by their stubs."""
    text = path.read_text()
    if markers.is_marked(text):
        path.write_text(markers.student_version(text, str(path)))


def _files(source: Path) -> list[str]:
    """What git tracks, so that no product of a build slips in."""
    listed = subprocess.run(["git", "-C", str(source), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split("\0") if path and (source / path).exists()]
