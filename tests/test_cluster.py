"""tools/cluster: the same work items on more than one machine."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import]
from support import one_line

from kvmlab.plugin import ROOT

SLURM = ROOT / "tools" / "cluster" / "slurm.sh"
JOB = ROOT / "tools" / "cluster" / "job.yaml"


# ---- Slurm ----


def task(*arguments: object, cwd: Path = ROOT, number: str = "") -> subprocess.CompletedProcess[str]:
    """As Slurm runs a task: a copy of the script, in the folder where sbatch was called."""
    command = ["bash", "-s", "--", *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": number}
    with SLURM.open() as script:
        return subprocess.run(
            command, stdin=script, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
        )


def test_a_task_of_slurm_grades_the_submission_of_its_number(tmp_path: Path) -> None:
    (tmp_path / "submissions" / "alice").mkdir(parents=True)
    done = task(tmp_path / "submissions", tmp_path / "results", number="1")
    assert done.returncode == 2
    one_line(done.stderr, "there is no submission 1: they are numbered from 0 to 0")


@pytest.mark.parametrize("arguments", [(), ("a",)])
def test_a_task_without_folders_says_how_to_start_it(arguments: tuple[str, ...]) -> None:
    done = task(*arguments, number="0")
    assert done.returncode == 2
    one_line(done.stderr, "kvmlab: say: sbatch --array=0-N")


def test_a_task_of_slurm_grades_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "submissions" / "alice").mkdir(parents=True)
    options = ["--engine=svm", "--lesson=99"]
    done = task(tmp_path / "submissions", tmp_path / "results", *options, number="0")
    one_line(done.stderr, "there is no lesson 99")


def test_a_task_outside_of_the_course_says_so(tmp_path: Path) -> None:
    done = task("a", "b", cwd=tmp_path, number="0")
    assert done.returncode == 2
    one_line(done.stderr, f"kvmlab: {tmp_path} is not the course's tree: call sbatch from there")


def test_a_task_outside_of_an_array_says_how_to_start_it() -> None:
    one_line(task("a", "b").stderr, "kvmlab: say: sbatch --array=0-N")


def test_slurm_reads_every_option() -> None:
    """sbatch(1): it stops at the first line that is neither a comment nor blank; these are options that it has."""
    head = re.split(r"^(?!#|\s*$)", SLURM.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", head, flags=re.MULTILINE))
    assert len(options) == SLURM.read_text().count("#SBATCH")
    assert options.keys() == {"job-name", "cpus-per-task", "mem", "time", "output"}
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    assert re.fullmatch(r"\d+[KMGT]", options["mem"])
    assert "%a" in options["output"], "all tasks would write to one file"


# ---- Kubernetes ----

# "Kubernetes API", batch/v1 Job and core/v1 PodSpec and Container: the fields used here, with what they hold. A server
# refuses a field that it does not know only if it is asked to (`kubectl apply --validate=strict`).
QUANTITY = re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?")
VARIABLE = {"name": str, "value": str}
CONTAINER: dict[str, Any] = {"name": str, "image": str, "workingDir": str, "command": [str], "args": [str]}
CONTAINER |= {"env": [VARIABLE], "volumeMounts": [{"name": str, "mountPath": str}]}
CONTAINER |= {"resources": {kind: {"cpu": QUANTITY, "memory": QUANTITY} for kind in ("requests", "limits")}}
POD: dict[str, Any] = {"restartPolicy": str, "automountServiceAccountToken": bool, "containers": [CONTAINER]}
POD |= {"securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int}}
POD |= {"volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}]}
SPEC: dict[str, Any] = {"completionMode": str, "completions": int, "parallelism": int, "backoffLimitPerIndex": int}
SPEC |= {"template": {"spec": POD}}
SCHEMA: dict[str, Any] = {"apiVersion": str, "kind": str, "metadata": {"name": str}, "spec": SPEC}


def holds(data: Any, schema: Any, where: str = "job") -> None:
    """What is there is as the schema says."""
    if isinstance(schema, dict):
        assert isinstance(data, dict), where
        assert data.keys() <= schema.keys(), where
        for name, value in data.items():
            holds(value, schema[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(data, list), where
        for value in data:
            holds(value, schema[0], where)
    elif isinstance(schema, re.Pattern):
        assert schema.fullmatch(data), where
    else:
        assert type(data) is schema, where


@pytest.fixture(scope="module")
def job() -> Any:
    return yaml.safe_load(JOB.read_text())


def test_the_job_holds_to_the_schema(job: Any) -> None:
    holds(job, SCHEMA)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])


def test_the_job_is_indexed_and_one_failure_ends_no_other(job: Any) -> None:
    """batch/v1 JobSpec: backoffLimitPerIndex wants completionMode Indexed and restartPolicy Never."""
    assert (job["spec"]["completionMode"], job["spec"]["template"]["spec"]["restartPolicy"]) == ("Indexed", "Never")
    assert job["spec"]["backoffLimitPerIndex"] >= 1
    assert job["spec"]["parallelism"] <= job["spec"]["completions"] <= 100_000


def test_the_volume_that_is_mounted_is_there(job: Any) -> None:
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["workingDir"].startswith(container["volumeMounts"][0]["mountPath"])


def test_a_pod_grades_the_submission_of_its_index(job: Any, tmp_path: Path) -> None:
    (tmp_path / "course").symlink_to(ROOT)
    (tmp_path / "submissions" / "alice").mkdir(parents=True)
    [container] = job["spec"]["template"]["spec"]["containers"]
    [script] = container["args"]
    for folder in ("submissions", "results"):
        script = script.replace(f"../{folder}", str(tmp_path / folder))
    given = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    command = [*container["command"], script]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    one_line(done.stderr, "there is no submission 1: they are numbered from 0 to 0")
