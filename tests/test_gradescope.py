"""`make gradescope`: the zip of the autograder, laid out and run as Gradescope does."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from kvmlab import gradescope
from kvmlab.plugin import ROOT

# Stands for the grader; it writes what the trusted tree and the submission say.
STAND_IN = """
import sys
options = dict(word.split("=", 1) for word in sys.argv[2:])
assert sys.argv[1] == "grade" and options["--format"] == "gradescope" and options["--lesson"] == "01-vm-exit"
print("for the instructor")
told = open(options["--submission"] + "/told").read()
if told == "crash":
    raise SystemExit(1)
open(options["--output"], "w").write('{"score": %s}' % told)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip of this tree, with a kernel that is none."""
    folder = tmp_path_factory.mktemp("gradescope")
    (folder / "cache" / "packages").mkdir(parents=True)
    (folder / "cache" / "packages" / "linux-image-6.1_1_amd64.deb").write_text("a kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMLAB_CACHE", str(folder / "cache"))
        gradescope.write(ROOT, folder / "one.zip", "01-vm-exit")
        gradescope.write(ROOT, folder / "two.zip", "01-vm-exit")
    return folder / "one.zip"


@pytest.fixture
def autograder(archive: Path, tmp_path: Path) -> Path:
    """What Gradescope makes of it: "File hierarchy"."""
    place = tmp_path / "auto grader"
    for folder in ("source", "submission", "results"):
        (place / folder).mkdir(parents=True)
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            Path(opened.extract(entry, place / "source")).chmod(entry.external_attr >> 16)
    shutil.copy(place / "source" / "run_autograder", place / "run_autograder")
    (place / "source/kvmlab/tools/kvmlab/__main__.py").write_text(STAND_IN)
    return place


def run(autograder: Path) -> str:
    done = subprocess.run(
        [autograder / "run_autograder"], cwd=autograder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_zip_has_its_scripts_at_its_root_and_the_whole_tree(archive: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        modes = {name: opened.getinfo(name).external_attr >> 16 & 0o777 for name in names}
        kernel = opened.read("kvmlab/build/engines/packages/linux-image-6.1_1_amd64.deb")
    assert {"setup.sh", "run_autograder", "kvmlab/Makefile", "kvmlab/lessons/01-vm-exit/guest.c"} <= set(names)
    assert kernel == b"a kernel"
    assert (modes["run_autograder"], modes["setup.sh"], modes["kvmlab/tools/setup"]) == (0o755, 0o755, 0o755)
    assert modes["kvmlab/Makefile"] == 0o644
    assert not [name for name in names if name.startswith("kvmlab/.git/") or "__pycache__" in name]


def test_the_same_tree_gives_the_same_zip(archive: Path) -> None:
    assert archive.read_bytes() == archive.with_name("two.zip").read_bytes()
    with zipfile.ZipFile(archive) as opened:
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_submission_is_graded_by_the_trusted_tree(autograder: Path) -> None:
    (autograder / "submission" / "told").write_text("7")
    assert "for the instructor\n" in run(autograder)
    assert json.loads((autograder / "results" / "results.json").read_text()) == {"score": 7}


def test_there_are_results_also_if_the_grader_crashes(autograder: Path) -> None:
    (autograder / "submission" / "told").write_text("crash")
    (autograder / "results" / "results.json").write_text('{"score": 99}')
    assert "the grader ended with status 1 and left no results" in run(autograder)
    results = json.loads((autograder / "results" / "results.json").read_text())
    assert (results["score"], results["output"]) == (0, "The grader failed. Please tell your instructor.")


def test_without_kvm_it_says_that_svm_grades(autograder: Path) -> None:
    (autograder / "submission" / "told").write_text("7")
    script = autograder / "run_autograder"
    ours = script.read_text()
    for kvm, says in (("/dev/null", False), ("/dev/nowhere", True)):
        script.write_text(ours.replace("/dev/kvm ]", f"{kvm} ]"))
        assert ("no /dev/kvm here: grading on svm" in run(autograder)) == says
