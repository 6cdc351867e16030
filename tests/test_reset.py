"""`make reset`: the stubs again, and nothing lost."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from variants import Shown, Variant, command, git, write_parts

from kvmlab import markers
from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]

FIRST = "01-vm-exit"


@pytest.fixture
def repository(student_home: Path) -> Path:
    """With the stubs in the first commit, and the first lesson written in the second."""
    git(student_home, "init", "-q")
    git(student_home, "add", "-A")
    git(student_home, "commit", "-q", "-m", "as handed out")
    write_parts(student_home, FIRST, 2)
    git(student_home, "commit", "-q", "-a", "-m", "lesson 1 is done")
    return student_home


def reset(home: Path, name: str = FIRST) -> Shown:
    """Without make, which would turn every failure into its own status 2."""
    return command(
        sys.executable, "-m", "kvmlab", f"--lessons={home}/lessons", "reset", name, PYTHONPATH=str(ROOT / "tools")
    )


def kept_in(shown: Shown) -> Path:
    (place,) = re.findall(r"^what was there is kept in (.*)$", shown.output, re.MULTILINE)
    return Path(place)


def contents(home: Path, name: str) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in Variant(home, name).sources}


@pytest.mark.parametrize("name", [FIRST, "11-passthrough"])
def test_make_reset_brings_all_stubs_back_and_keeps_what_was_there(repository: Path, name: str) -> None:
    stubs = {path: git(repository, "show", f"HEAD~1:{path}").encode() for path in contents(repository, name)}
    write_parts(repository, name, 100)
    (repository / "lessons" / name / "host.c").write_bytes(b"\xff\0 no text")
    helper = repository / "lessons" / name / "mine.c"
    helper.write_text("/* a file of my own */\n")
    written = contents(repository, name)
    shown = reset(repository, name)
    assert (shown.status, shown.errors) == (0, ""), str(shown)
    kept = kept_in(shown)
    assert contents(repository, name) == stubs | {f"lessons/{name}/mine.c": helper.read_bytes()}
    copies = {str(path.relative_to(kept)): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert copies == {path: text for path, text in written.items() if stubs.get(path, text) != text}
    assert copies
    again = reset(repository, name)
    number = int(name[:2])
    assert again.output == f"lesson {number}: nothing to do, its files are as they were at first\n", str(again)


def test_each_reset_keeps_its_own_copy_and_a_file_that_is_gone_comes_back(repository: Path) -> None:
    guest = repository / "lessons" / FIRST / "guest.c"
    places = set()
    for text in ("first\n", "second\n", "third\n"):
        guest.write_text(text)
        kept = kept_in(reset(repository))
        assert (kept / "lessons" / FIRST / "guest.c").read_text() == text
        places.add(kept)
    assert len(places) == 3
    guest.unlink()
    assert reset(repository).status == 0
    assert guest.exists()


def test_where_stubs_stand_beside_solutions_make_reset_needs_no_git(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lessons", tmp_path / "lessons")
    solutions = contents(tmp_path, FIRST)
    shown = reset(tmp_path)
    assert shown.status == 0, str(shown)
    for path, text in solutions.items():
        assert (tmp_path / path).read_text() == markers.student_version(text.decode())
        assert (kept_in(shown) / path).read_bytes() == text


def expect_refused(home: Path, *phrases: str) -> None:
    before = contents(home, FIRST)
    shown = reset(home)
    assert (shown.status, shown.output, len(shown.errors.splitlines())) == (2, "", 1), str(shown)
    for phrase in phrases:
        assert phrase in shown.errors, str(shown)
    assert contents(home, FIRST) == before
    assert not (home / "kept").exists()


def test_without_the_first_commit_nothing_is_touched_and_one_line_says_why(repository: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{repository}", str(clone))
    expect_refused(clone, "guest.c: what git had first is no stub", "git fetch --unshallow")
    shutil.rmtree(clone / ".git")
    git(clone, "init", "-q")
    expect_refused(clone, "cannot find the stubs of lesson 1: git")
    git(clone, "commit", "-q", "--allow-empty", "-m", "nothing")
    expect_refused(clone, "cannot find the stubs of lesson 1: git does not have its files")


def test_without_git_one_line_says_so(student_home: Path) -> None:
    expect_refused(student_home, "cannot find the stubs of lesson 1: git")


def test_a_tree_whose_solutions_git_has_is_no_students(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lessons", tmp_path / "lessons")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "with solutions")
    assert reset(tmp_path).status == 0
    shutil.rmtree(tmp_path / "kept")
    expect_refused(tmp_path, "git has its solution", "git restore")
