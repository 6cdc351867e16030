"""The student tree: the project as it is, with stubs where the solutions were."""

import shutil
from pathlib import Path

from kvmlab import markers, repository, reset
from kvmlab.lesson import UsageError
from kvmlab.repository import GitError

# The proof that the lessons hold what they promise: it consists of solutions, right and wrong ones. And what would
# run in a student's repository though it is for ours.
_LEFT_OUT = {
    ".github",
    "tests/bench/bench.mk",
    "tests/bench/halves",
    "tests/hosts/iommu",
    "tests/hosts/passthrough",
    "tests/hosts/vfio",
    "tests/kvmlab_server.py",
    "tests/mutants",
    "tests/test_bench.py",
    "tests/test_commands.py",
    "tests/test_compare.py",
    "tests/test_engines.py",
    "tests/test_grading.py",
    "tests/test_gradescope.py",
    "tests/test_handout.py",
    "tests/test_iommu.py",
    "tests/test_lesson_texts.py",
    "tests/test_lessons.py",
    "tests/test_passthrough.py",
    "tests/test_reset.py",
    "tests/test_source.py",
    "tests/test_student.py",
    "tests/test_terminal.py",
    "tests/test_tlb_notes.py",
    "tests/test_userfaultfd.py",
    "tests/test_vfio.py",
    "tests/test_virtio_guest.py",
    "tests/test_watch.py",
    "tests/test_workflows.py",
    "tests/variants.py",
    "tests/virtio",
}
_LEFT_OUT_OF_LESSONS = "quotes.py"  # of what a text quotes, for a test of ours
_MAY_HOLD_SOLUTIONS = ("guest/", "lessons/", "vmm/")
# Where there is no git to say what belongs to the project: what `make` and the tools leave behind.
_PRODUCTS = {".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", reset.KEPT}


def write(source: Path, destination: Path) -> str:
    """Write the student tree of the project at source to destination, which must not exist yet. Says why it is no git
    repository, with all of it in one commit, if it is none."""
    copy(source, destination)
    try:
        repository.commit_all(destination, "The lessons as they are handed out")
    except GitError as error:
        return str(error)
    return ""


def copy(source: Path, destination: Path) -> None:
    """The files of the student tree, no repository."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UsageError(f"{destination} is not an empty folder: name one that does not exist yet")
    copied = [path for path in files(source) if not _is_left_out(path)]
    # All of them before the first is written: a marker that is wrong must not let a solution out.
    stripped = _stripped(source, copied)
    for path in copied:
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, target)
        if path in stripped:
            target.write_text(stripped[path])


def _is_left_out(path: str) -> bool:
    is_proof = any(f"{path}/".startswith(f"{left}/") for left in _LEFT_OUT)
    return is_proof or Path(path).match(f"lessons/*/{_LEFT_OUT_OF_LESSONS}")


def _stripped(source: Path, files: list[str]) -> dict[str, str]:
    """The student's version of each file that may hold a solution, or part of one: a queue of the VMM's own is
    what a lesson is about. A student tree is one already."""
    sources = [path for path in files if path.startswith(_MAY_HOLD_SOLUTIONS) and path.endswith((".c", ".h"))]
    texts = {path: (source / path).read_text() for path in sources}
    if not any(markers.has_stub(text) for text in texts.values()):
        return {}
    return {path: markers.student_version(text, path) for path, text in texts.items()}


def files(source: Path) -> list[str]:
    """What git tracks, so that nothing of a build slips in; without git, all but known products."""
    if not (source / ".git").exists():
        paths = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
        return [str(path) for path in paths if _PRODUCTS.isdisjoint(path.parts)]
    try:
        listed = repository.git(source, "ls-files", "-z")
    except GitError as error:
        raise UsageError(f"git cannot list the project's files: {error}") from None
    return [path for path in listed.split("\0") if path and (source / path).is_file()]
