"""Lesson 4 on a host that refuses what the lesson needs: userfaultfd for faults of the kernel."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import one_line
from variants import command

from kvmlab.engine import Engine
from kvmlab.plugin import ROOT
from kvmlab.runner import lesson_built

REFUSED = "its userfaultfd serves no faults of KVM for this user: be root, or sudo sysctl vm.unprivileged_userfaultfd=1"


@pytest.fixture(scope="session")
def no_userfaultfd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that becomes the command behind it, on a host that refuses userfaultfd."""
    path = tmp_path_factory.mktemp("shims") / "no_userfaultfd"
    source = ROOT / "tests" / "shims" / "no_userfaultfd.c"
    subprocess.run(["gcc", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", source, "-o", path], check=True)
    return path


def test_a_host_that_refuses_userfaultfd_cannot_run_lesson_4_and_says_why(no_userfaultfd: Path, build: Path) -> None:
    built = lesson_built(build, "04-ept-faults")
    done = subprocess.run([no_userfaultfd, built.vmm, built.image], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (77, b"")
    one_line(done.stderr, f"vmm: this machine cannot run the lesson: {REFUSED}")


def test_auto_runs_lesson_4_on_svm_where_the_host_refuses_userfaultfd(
    no_userfaultfd: Path, build: Path, engines: dict[str, Engine]
) -> None:
    if not {"kvm", "svm"} <= engines.keys():
        pytest.skip("this session is without kvm or svm: --engines=kvm,svm,vmx")
    kvmlab = [sys.executable, "-m", "kvmlab", f"--build={build}", "run", "4", "--seed=1"]
    shown = command(no_userfaultfd, *kvmlab, PYTHONPATH="tools", PYTHONDONTWRITEBYTECODE="1")
    assert shown.status == 0, str(shown)
    assert f"engine: svm (emulated AMD; kvm: {REFUSED})\n" in shown.output
