"""`make handout`: a student tree that works, and that holds no solution."""

import filecmp
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from support import assume_different_owner, one_line
from variants import NAMES, Region, Shown, command, git, regions

from kvmlab import handout, markers
from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]

PRODUCTS = {".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "kept"}
PROOF_OF = (
    *("bench", "commands", "compare", "engines", "grading", "gradescope", "handout", "iommu", "lesson_texts"),
    *("lessons", "passthrough", "reset", "source", "student", "terminal", "tlb_notes", "userfaultfd", "vfio"),
    *("virtio_guest", "watch", "workflows"),
)
PROOF = {f"tests/test_{name}.py" for name in PROOF_OF}
PROOF |= {"tests/bench/bench.mk", "tests/kvmlab_server.py", "tests/variants.py"}
PROOF |= {f"lessons/{name}/quotes.py" for name in NAMES}
# What the VMM and the guests' runtime do in the way that a lesson has students write.
ALIKE = {"guest/virtio_console.c", "vmm/virtqueue.c"}
PROOF_FOLDERS = (
    ".github",
    "tests/bench/halves",
    "tests/hosts/iommu",
    "tests/hosts/passthrough",
    "tests/hosts/vfio",
    "tests/mutants",
    "tests/virtio",
)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is on disk now, without a git repository."""
    copy = tmp_path_factory.mktemp("project") / "kvmlab"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*PRODUCTS))
    return copy


@pytest.fixture(scope="session")
def student(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student tree."""
    tree = tmp_path_factory.mktemp("student") / "kvmlab"
    shown = hand_out(project, tree)
    assert (shown.status, shown.output) == (0, f"the student tree is in {tree}\n"), str(shown)
    return tree


def hand_out(source: Path, destination: Path) -> Shown:
    return command("make", "handout", f"DEST={destination}", folder=source)


def hand_out_status(source: Path, destination: Path, **environment: str) -> Shown:
    """The same without make, which would turn every failure into its own status 2."""
    environment["PYTHONPATH"] = "tools"
    return command(sys.executable, "-m", "kvmlab", "handout", destination, folder=source, **environment)


def files(tree: Path) -> set[str]:
    paths = (path.relative_to(tree) for path in tree.rglob("*") if path.is_file())
    return {str(path) for path in paths if PRODUCTS.isdisjoint(path.parts)}


def changed(a: Path, b: Path) -> set[str]:
    return {name for name in files(a) & files(b) if not filecmp.cmp(a / name, b / name, shallow=False)}


# ---- what is in it ----


def test_the_student_tree_is_the_project_but_for_solutions_and_their_proof(project: Path, student: Path) -> None:
    assert files(student) <= files(project)
    missing = files(project) - files(student)
    folders = [{name for name in missing if name.startswith(f"{folder}/")} for folder in PROOF_FOLDERS]
    assert all(folders)
    assert missing.difference(*folders) == PROOF
    of_lessons = {at.file for name in NAMES for at in regions(name)}
    assert changed(project, student) == of_lessons | ALIKE
    modes = {name for name in files(student) if (student / name).stat().st_mode != (project / name).stat().st_mode}
    assert modes == set(), "these are no longer as executable as they were"


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("region", [region for name in NAMES for region in regions(name)], ids=str)
def test_no_line_of_a_solution_is_in_the_student_tree(student: Path, region: Region) -> None:
    telling = {line for line in map(flat, map(str.strip, region.solution.splitlines())) if len(line) > 20}
    assert telling, f"by which line could this solution be recognised?\n{region.solution}"
    for name in sorted(files(student)):
        text = flat((student / name).read_text(errors="replace"))
        assert {line for line in telling if line in text} == set(), f"{name} gives away {region}"


def test_a_student_tree_hands_out_itself(student: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert hand_out(student, again).status == 0
    assert files(again) == files(student)
    assert changed(student, again) == set()


def test_only_what_git_tracks_is_handed_out(project: Path, student: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(project, ours)
    for arguments in (["init", "-q"], ["add", "-A"]):
        assert command("git", *arguments, folder=ours).status == 0
    (ours / "exam.txt").write_text("not for students")
    (ours / "build").mkdir()
    (ours / "build" / "image.elf").write_text("a product")
    (ours / "LICENSE").unlink()
    theirs = tmp_path / "theirs"
    assert hand_out(ours, theirs).status == 0
    assert files(theirs) == files(student) - {"LICENSE"}
    assert not (theirs / "build").exists()


# ---- the repository that it is ----


def expect_one_commit(tree: Path) -> None:
    """Of all that is there; git knows nothing else, so no solution either."""
    assert git(tree, "rev-list", "--all", "--count") == "1\n"
    assert git(tree, "status", "--porcelain", "--ignored") == ""
    tracked = set(git(tree, "ls-files", "-z").split("\0")) - {""}
    assert tracked == files(tree)
    known = {line.split()[0] for line in git(tree, "cat-file", "--batch-all-objects", "--batch-check").splitlines()}
    named = {line.split()[0] for line in git(tree, "rev-list", "--all", "--objects").splitlines()}
    assert known == named


def test_the_student_tree_is_a_repository_with_one_commit(student: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shown = hand_out(student, again)
    assert (shown.status, shown.errors) == (0, "")
    expect_one_commit(again)
    assert git(again, "log", "--format=%an %s") == "kvmlab The lessons as they are handed out\n"


HOSTILE = """[commit]
gpgSign = true
[core]
excludesFile = {home}/ignore
hooksPath = {home}/hooks
autocrlf = true
"""


def test_it_is_so_whatever_the_users_git_is_set_up_to_do(student: Path, tmp_path: Path) -> None:
    """With a name or without, in a hook of another repository, and with hooks of the user's own."""
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    (home / "hooks" / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    (home / "hooks" / "pre-commit").chmod(0o755)
    (home / "ignore").write_text("*.c\n")
    (home / ".gitconfig").write_text(HOSTILE.format(home=home))
    theirs = tmp_path / "theirs"
    within = {"GIT_DIR": str(tmp_path / "other.git"), "GIT_INDEX_FILE": str(tmp_path / "index")}
    shown = hand_out_status(student, theirs, HOME=str(home), **within)
    assert (shown.status, shown.errors) == (0, ""), str(shown)
    expect_one_commit(theirs)


def test_without_git_the_tree_is_written_all_the_same_and_one_line_says_what_is_missing(
    project: Path, student: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shown = hand_out_status(project, theirs, PATH=str(tmp_path))
    assert (shown.status, shown.output) == (0, f"the student tree is in {theirs}\n")
    one_line(shown.errors, "kvmlab: it is no git repository", "`make reset` cannot work", "there is no git")
    assert files(theirs) == files(student)
    assert changed(theirs, student) == set()


def test_git_is_asked_also_in_a_tree_that_belongs_to_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for words in (["init", "-q"], ["add", "-A"]):
        (tree / "file").touch()
        git(tree, *words)
    assume_different_owner(tmp_path, monkeypatch)
    path, real = os.environ["PATH"], os.environ["REAL"]
    assert command("git", "ls-files", folder=tree, PATH=path, REAL=real).status == 128
    assert handout.files(tree) == ["file"]


# ---- where it may go ----


def test_an_empty_folder_may_be_filled(student: Path, tmp_path: Path) -> None:
    assert hand_out_status(student, tmp_path).status == 0
    assert files(tmp_path) == files(student)


def test_the_destination_may_contain_spaces(student: Path, tmp_path: Path) -> None:
    shown = hand_out(student, tmp_path / "my own  work")
    assert (shown.status, shown.errors) == (0, "")
    assert files(tmp_path / "my own  work") == files(student)


def test_a_folder_that_is_not_empty_is_refused_in_one_line(student: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    shown = hand_out_status(student, tmp_path)
    assert shown.status == 2
    assert shown.errors == f"kvmlab: {tmp_path} is not an empty folder: name one that does not exist yet\n"
    assert files(tmp_path) == {"thesis.txt"}


def test_a_file_is_refused_in_one_line(student: Path, tmp_path: Path) -> None:
    taken = tmp_path / "thesis.txt"
    taken.write_text("do not lose me")
    shown = hand_out_status(student, taken)
    assert (shown.status, len(shown.errors.splitlines())) == (2, 1), str(shown)
    assert taken.read_text() == "do not lose me"


def test_no_destination_is_refused_in_one_line(student: Path) -> None:
    shown = command("make", "handout", folder=student)
    assert [line for line in shown.errors.splitlines() if not line.startswith("make: ")] == [
        "kvmlab: where to? say DEST=dir, as in: make handout DEST=../mine"
    ]


# ---- the commands work there ----


@pytest.fixture(scope="session")
def worked_in(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student tree that may be built and changed, at a place whose name has a space."""
    tree = tmp_path_factory.mktemp("student") / "my work"
    shutil.copytree(student, tree)
    return tree


def test_make_run_there_says_what_to_write_until_it_is_written(project: Path, worked_in: Path) -> None:
    shown = command("make", "run", "LESSON=1", "SEED=1", folder=worked_in)
    assert shown.points == 0
    where = re.search(r"^vmm: (lessons/01-vm-exit/guest\.c):(\d+): not written yet: (.*)$", shown.errors, re.MULTILINE)
    assert where, str(shown)
    assert where[3] in (worked_in / where[1]).read_text().splitlines()[int(where[2]) - 1]

    for file in ("guest.c", "host.c"):
        shutil.copy(project / "lessons" / "01-vm-exit" / file, worked_in / "lessons" / "01-vm-exit")
    shown = command("make", "check", "LESSON=1", folder=worked_in)
    assert (shown.status, shown.failed, shown.points) == (0, [], 12), str(shown)


def test_all_tests_that_are_there_can_be_collected(worked_in: Path) -> None:
    shown = command(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", folder=worked_in)
    assert (shown.status, shown.errors) == (0, ""), str(shown)


def test_make_list_hint_and_reset_work_there(project: Path, student: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    assert hand_out(student, tree).status == 0
    listed = command("make", "list", folder=tree).output.splitlines()
    assert len(listed) == len(NAMES)
    assert all(re.search(r" -/\d+ points +0/\d+ parts ", line) for line in listed), listed
    assert "entry_at, map_page, map_large_page, hint 1 of 3" in command("make", "hint", "LESSON=2", folder=tree).output

    guest = Path("lessons") / "02-paging" / "guest.c"
    shutil.copy(project / guest, tree / guest)
    (tree / guest).write_text((tree / guest).read_text().replace("/* STUB", "/*"))
    git(tree, "commit", "-q", "-a", "-m", "mine")
    shown = command("make", "reset", "LESSON=2", folder=tree)
    assert (shown.status, shown.errors) == (0, ""), str(shown)
    assert (tree / guest).read_text() == (student / guest).read_text()
    assert git(tree, "status", "--porcelain") == f" M {guest}\n", "what is kept is not to be committed by accident"


# ---- markers that do not pair up ----

BROKEN = {
    "a solution in a solution": (2, ["/* BEGIN SOLUTION */", "/* BEGIN SOLUTION */", "/* STUB", "END SOLUTION */"]),
    "a stub outside": (1, ["/* STUB", "END SOLUTION */"]),
    "two stubs": (3, ["/* BEGIN SOLUTION */", "/* STUB", "/* STUB", "END SOLUTION */"]),
    "an end outside": (2, ["int x;", "END SOLUTION */"]),
    "no stub": (3, ["/* BEGIN SOLUTION */", "x = 1;", "END SOLUTION */"]),
    "no stub, closed comments": (3, ["/* BEGIN SOLUTION */", "x = 1;", "/* END SOLUTION */"]),
    "no end": (1, ["/* BEGIN SOLUTION */", "x = 1;", "/* STUB", "TODO();"]),
    "neither stub nor end": (2, ["int x;", "/* BEGIN SOLUTION */", "x = 1;"]),
    "misspelled begin": (1, ["/*BEGIN SOLUTION*/", "x = 1;", "/* STUB", "END SOLUTION */"]),
    "misspelled end": (3, ["/* BEGIN SOLUTION */", "/* STUB", "END SOLUTION*/"]),
}


@pytest.mark.parametrize(("line", "text"), BROKEN.values(), ids=BROKEN)
def test_a_marker_that_does_not_pair_up_is_named_with_file_and_line(line: int, text: list[str]) -> None:
    with pytest.raises(markers.MarkerError, match=rf"^guest\.c:{line}: "):
        markers.student_version("\n".join(text), "guest.c")


def test_a_wrong_marker_lets_nothing_out(project: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(project, ours)
    path = ours / "lessons" / "02-paging" / "guest.c"
    lines = path.read_text().splitlines()
    number = next(number for number, line in enumerate(lines, start=1) if "BEGIN SOLUTION" in line)
    lines[number - 1] = "    /* BEGIN SOLUTIONS */"
    path.write_text("\n".join(lines))
    shown = hand_out_status(ours, tmp_path / "theirs")
    assert shown.status == 2
    assert shown.errors.startswith(f"kvmlab: lessons/02-paging/guest.c:{number}: /* BEGIN SOLUTIONS */ "), str(shown)
    assert len(shown.errors.splitlines()) == 1
    assert not (tmp_path / "theirs").exists()
