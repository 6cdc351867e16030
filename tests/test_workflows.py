"""The workflows for GitHub: keys that GitHub knows, and commands that there are."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import]

from kvmlab.lesson import load_all
from kvmlab.plugin import ROOT

COURSE = ROOT / ".github" / "workflows" / "course.yml"
CLASSROOM = ROOT / "tools" / "classroom" / "classroom.yml"

# GitHub's "Workflow syntax for GitHub Actions".
WORKFLOW = {"name", "run-name", "on", "permissions", "env", "defaults", "concurrency", "jobs"}
JOB = {"name", "permissions", "needs", "if", "runs-on", "environment", "concurrency", "outputs", "env", "defaults"}
JOB |= {"steps", "timeout-minutes", "strategy", "continue-on-error", "container", "services", "uses", "with", "secrets"}
STEP = {"id", "if", "name", "uses", "run", "working-directory", "shell", "with", "env", "continue-on-error"}
STEP |= {"timeout-minutes"}
CONTAINER = {"image", "credentials", "env", "ports", "volumes", "options"}

both = pytest.mark.parametrize("file", [COURSE, CLASSROOM], ids=["course", "classroom"])


def read(file: Path) -> Any:
    # YAML 1.1 takes the key `on` for a truth.
    return {"on" if key is True else key: value for key, value in yaml.safe_load(file.read_text()).items()}


def steps(file: Path) -> list[dict[str, Any]]:
    [job] = read(file)["jobs"].values()
    return list(job["steps"])


@both
def test_github_knows_every_key(file: Path) -> None:
    workflow = read(file)
    assert {"on", "jobs"} <= workflow.keys() <= WORKFLOW
    assert set(workflow["on"]) <= {"push", "pull_request", "workflow_dispatch"}
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps"} <= job.keys() <= JOB
        assert job["container"].keys() <= CONTAINER
        for step in job["steps"]:
            assert step.keys() <= STEP
            assert len(step.keys() & {"run", "uses"}) == 1, step


@both
def test_a_workflow_may_only_read(file: Path) -> None:
    assert read(file)["permissions"] == {"contents": "read"}


@both
def test_every_command_is_one_for_the_shell_of_the_container(file: Path) -> None:
    """In a container GitHub uses `sh -e`."""
    for step in steps(file):
        if "run" in step:
            done = subprocess.run(["sh", "-n"], input=step["run"], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), step


WORDS = {"if", "else", "fi", "then", "[", "echo", "exit", "cat"}


@both
def test_every_command_exists(file: Path) -> None:
    for step in steps(file):
        for line in re.split(r"\n|&&", step.get("run", "")):
            words = [word for word in shlex.split(line) if not re.match(r"\w+=", word)]
            if not words or words[0] in WORDS:
                continue
            assert shutil.which(words[0], path=f"{ROOT}:/usr/bin:/bin") or (ROOT / words[0]).exists(), line
            if words[0] == "make":
                makefiles = "".join(path.read_text() for path in (ROOT / "Makefile", *ROOT.glob("tests/*/*.mk")))
                assert re.search(rf"^{words[1]}:.* ## ", makefiles, re.MULTILINE), line
            if "kvmlab" in words:
                called = words[words.index("kvmlab") + 1]
                python = ["/usr/bin/python3", "-m", "kvmlab", called, "--help"]
                done = subprocess.run(
                    python, env={"PYTHONPATH": str(ROOT / "tools")}, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stderr


def engine_step(file: Path, kvm: str, folder: Path) -> tuple[str, str]:
    """What the step that looks for KVM says where this is its device, and what it hands on to other steps."""
    [script] = [step["run"] for step in steps(file) if "/dev/kvm" in step.get("run", "")]
    environment = {"PATH": "/usr/bin:/bin", "GITHUB_ENV": str(folder / "env")}
    (folder / "env").touch()
    script = script.replace("/dev/kvm ]", f"{kvm} ]")
    done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout, (folder / "env").read_text()


@both
def test_without_kvm_it_says_which_engine_stands_in(file: Path, tmp_path: Path) -> None:
    said, handed_on = engine_step(file, f"{tmp_path}/nowhere", tmp_path)
    assert re.fullmatch(r"::notice title=[^:]+::.*svm.*\n", said)
    assert handed_on == ("ENGINES=svm,vmx\n" if file == COURSE else "")


@both
def test_with_kvm_it_is_used(file: Path, tmp_path: Path) -> None:
    said, handed_on = engine_step(file, "/dev/null", tmp_path)
    assert "svm" not in said
    assert handed_on == ("ENGINES=kvm,svm,vmx\n" if file == COURSE else "")


# Stands for the grader: it ends as the submission says.
GRADER = """
import pathlib, sys
options = dict(word.split("=", 1) for word in sys.argv[2:])
assert sys.argv[1] == "grade" and options["--format"] == "classroom"
status = int(pathlib.Path(options["--submission"], "status").read_text())
if status < 2:
    pathlib.Path(options["--output"]).write_text("lesson-1=e30=\\n")
sys.exit(status)
"""


@pytest.mark.parametrize(("status", "handed_on"), [(0, "lesson-1=e30=\n"), (1, "lesson-1=e30=\n"), (5, ""), (77, "")])
def test_the_classroom_hears_of_every_grade_and_of_every_failure(tmp_path: Path, status: int, handed_on: str) -> None:
    [step] = [step for step in steps(CLASSROOM) if step.get("id") == "grade"]
    checkouts = [step["with"] for step in steps(CLASSROOM) if "checkout" in step.get("uses", "")]
    submission, course = (tmp_path / each["path"] for each in checkouts)
    (course / "tools" / "kvmlab").mkdir(parents=True)
    (course / "tools" / "kvmlab" / "__main__.py").write_text(GRADER)
    (course / "tools" / "setup").write_text("#!/bin/sh\n")
    (course / "tools" / "setup").chmod(0o755)
    submission.mkdir()
    (submission / "status").write_text(str(status))
    (tmp_path / "output").touch()
    done = subprocess.run(
        ["sh", "-ec", step["run"]],
        cwd=tmp_path / step["working-directory"],
        env={"PATH": "/usr/bin:/bin", "GITHUB_OUTPUT": str(tmp_path / "output")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (status if status > 1 else 0), done.stderr
    assert (tmp_path / "output").read_text() == handed_on


def test_the_classroom_does_not_grade_the_stubs_that_its_own_robot_pushes() -> None:
    [job] = read(CLASSROOM)["jobs"].values()
    assert job["if"] == "github.actor != 'github-classroom[bot]'"


def test_git_reads_a_folder_that_is_not_its_users() -> None:
    """In a container the user is root, and the folder of the checkout the runner's: git-config(1), safe.directory."""
    commands = [step.get("run", step.get("uses")) for step in steps(COURSE)]
    checkout = next(place for place, command in enumerate(commands) if command.startswith("actions/checkout@"))
    assert commands[checkout + 1] == 'git config --global --add safe.directory "$GITHUB_WORKSPACE"'


def test_the_classroom_hears_of_every_lesson() -> None:
    [reporter] = [step for step in steps(CLASSROOM) if "reporter" in step.get("uses", "")]
    names = [f"lesson-{lesson.number}" for lesson in load_all(ROOT / "lessons")]
    assert reporter["with"]["runners"].split(",") == names
    # autograding-grading-reporter, src/main.js: the variable of a runner's result.
    outputs = {f"{name.upper()}_RESULTS": f"${{{{ steps.grade.outputs.{name} }}}}" for name in names}
    assert reporter["env"] == outputs
    assert [step["id"] for step in steps(CLASSROOM) if "id" in step] == ["grade"]
