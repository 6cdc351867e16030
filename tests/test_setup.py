"""tools/setup: what it finds missing, by the names of Debian's packages, and how it installs that."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmlab.plugin import ROOT

# Command, file or Python module, and the package that brings it.
COMMANDS = {
    "make": "make",
    "gcc": "gcc",
    "musl-gcc": "musl-tools",
    "ld": "binutils",
    "nasm": "nasm",
    "gdb": "gdb",
    "git": "git",
    "bwrap": "bubblewrap",
    "strace": "strace",
    "gnuplot": "gnuplot-nox",
    "qemu-system-x86_64": "qemu-system-x86",
    "clang": "clang",
    "lcov": "lcov",
    "clang-format": "clang-format",
    "clang-tidy": "clang-tidy",
    "cppcheck": "cppcheck",
    "shellcheck": "shellcheck",
    "mypy": "mypy",
    "node": "nodejs",
    "npm": "npm",
}
FILES = {
    "usr/include/stdio.h": "libc6-dev",
    "usr/include/linux/kvm.h": "linux-libc-dev",
    "usr/bin/python3": "python3",
    "usr/lib/python3/dist-packages/pytest": "python3-pytest",
    "usr/lib/python3/dist-packages/xdist": "python3-pytest-xdist",
    "usr/lib/python3/dist-packages/yaml": "python3-yaml",
    "usr/lib/llvm-14/lib/clang/14.0.6/lib/linux/libclang_rt.fuzzer-x86_64.a": "libclang-rt-dev",
}
TOMLLIB = "usr/lib/python3.11/tomllib"
GROUPS = ["run", "test", "grade", "bench", "cover", "lint"]
INSTALL = "apt-get install --no-install-recommends -y"


class Machine:
    """A machine made of stubs that note how they are called; at first it has all that setup looks for."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.root = folder / "root"
        self.notes = folder / "calls"
        self.bin.mkdir()
        for command in ("env", "mktemp", "paste", "rm", "sort", "tail"):
            (self.bin / command).symlink_to(str(shutil.which(command)))
        for command in COMMANDS:
            self.add(command)
        for file in (*FILES, TOMLLIB):
            self._write(self.root / file, "exit 1")
        self.add("apt-get")
        self.add("sudo", '"$@"')
        self.add("id", "echo 0", noted=False)

    def add(self, command: str, script: str = "", *, noted: bool = True) -> None:
        self._write(self.bin / command, script, noted=noted)

    def remove(self, name: str) -> None:
        ((self.root if "/" in name else self.bin) / name).unlink()

    def setup(self, *groups: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": str(self.bin), "SETUP_ROOT": str(self.root)} | environment
        command = [str(ROOT / "tools/setup"), *groups]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)

    def calls(self) -> list[str]:
        """Each call of a stub, as a command line."""
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def installed(self) -> list[list[str]]:
        """The packages of each `apt-get install`."""
        installs = [call.removeprefix(INSTALL).split(" -o ")[0] for call in self.calls() if call.startswith(INSTALL)]
        return [packages.split() for packages in installs]

    def _write(self, path: Path, script: str, *, noted: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        note = f'echo "{path.name} $*" >>{self.notes}\n' if noted else ""
        path.write_text(f"#!/bin/sh\n{note}{script}\n")
        path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_where_nothing_is_missing_setup_is_silent_and_starts_nothing(machine: Machine) -> None:
    done = machine.setup(*GROUPS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.calls() == []


@pytest.mark.parametrize(("name", "package"), [*COMMANDS.items(), *FILES.items()])
def test_what_is_missing_is_installed_by_its_package(machine: Machine, name: str, package: str) -> None:
    machine.remove(name)
    done = machine.setup(*GROUPS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"setup: installing what is missing: {package}\n"
    assert machine.installed() == [[package]]


def test_all_that_is_missing_is_installed_at_once_and_named_once(machine: Machine) -> None:
    for name in ("nasm", "gcc", "usr/include/stdio.h"):
        machine.remove(name)
    assert machine.setup("run", "test").returncode == 0
    assert machine.installed() == [["gcc", "libc6-dev", "nasm"]]


def test_run_asks_for_nothing_that_only_other_commands_need(machine: Machine) -> None:
    for command in set(COMMANDS) - {"make", "gcc", "musl-gcc", "ld", "nasm"}:
        machine.remove(command)
    machine.remove("usr/lib/python3/dist-packages/xdist")
    assert machine.setup("run").returncode == 0
    assert machine.calls() == []


def test_with_a_ruff_on_path_lint_needs_no_node(machine: Machine) -> None:
    machine.remove("node")
    machine.remove("npm")
    machine.add("ruff")
    assert machine.setup("lint").returncode == 0
    assert machine.calls() == []


def test_module_that_python_finds_elsewhere_is_not_missing(machine: Machine) -> None:
    machine.remove("usr/lib/python3/dist-packages/pytest")
    machine.add("apt-get", "exit 1")
    python = machine.root / "usr/bin/python3"
    python.write_text('#!/bin/sh\n[ "$*" = "-c import pytest" ]\n')
    assert machine.setup("run").returncode == 0


def test_root_installs_without_sudo(machine: Machine) -> None:
    machine.remove("nasm")
    assert machine.setup("run").returncode == 0
    assert machine.calls() == ["apt-get update", f"{INSTALL} nasm -o DPkg::Lock::Timeout=120"]


def test_user_installs_through_sudo(machine: Machine) -> None:
    machine.remove("nasm")
    machine.add("id", "echo 1000", noted=False)
    assert machine.setup("run").returncode == 0
    through_sudo = [call.removeprefix("sudo ") for call in machine.calls() if call.startswith("sudo ")]
    assert through_sudo == [
        "apt-get update",
        f"env DEBIAN_FRONTEND=noninteractive {INSTALL} nasm -o DPkg::Lock::Timeout=120",
    ]
    assert machine.installed() == [["nasm"]]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What setup says where it refuses: one line, with status 5."""
    assert done.returncode == 5, done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1), done.stderr
    return done.stderr


def test_user_without_sudo_is_told_what_root_must_install(machine: Machine) -> None:
    machine.remove("nasm")
    machine.remove("sudo")
    machine.add("id", "echo 1000", noted=False)
    line = one_line(machine.setup("run"))
    assert "no sudo" in line
    assert f"as root: {INSTALL} nasm" in line
    assert machine.calls() == []


def test_setup_never_says_what_to_install_and_installs_nothing(machine: Machine) -> None:
    machine.remove("nasm")
    machine.remove("ld")
    assert f"as root: {INSTALL} binutils nasm" in one_line(machine.setup("run", SETUP="never"))
    assert machine.calls() == []


def test_setup_never_is_silent_where_nothing_is_missing(machine: Machine) -> None:
    done = machine.setup(*GROUPS, SETUP="never")
    assert (done.returncode, done.stderr) == (0, "")


def test_system_without_apt_get_is_told_what_is_missing(machine: Machine) -> None:
    machine.remove("nasm")
    machine.remove("apt-get")
    assert "by the names of Debian's packages: nasm\n" in one_line(machine.setup("run"))
    assert machine.calls() == []


def test_failing_apt_get_shows_the_end_of_its_log_and_what_to_do(machine: Machine) -> None:
    machine.remove("nasm")
    machine.add("apt-get", "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done; exit 100")
    done = machine.setup("run")
    assert done.returncode == 5
    first, *log, last = done.stderr.splitlines()
    assert first == "setup: installing what is missing: nasm"
    assert (len(log), log[-2:]) == (15, ["out 9", "err 9"])
    assert last.endswith(f"by hand, as root: {INSTALL} nasm")


def test_failing_update_matters_only_if_the_installation_fails(machine: Machine) -> None:
    machine.remove("nasm")
    machine.add("apt-get", '[ "$1" != update ]')
    done = machine.setup("run")
    assert (done.returncode, done.stderr) == (0, "setup: installing what is missing: nasm\n")


def test_python_that_is_too_old_is_named(machine: Machine) -> None:
    machine.remove(TOMLLIB)
    assert "older than 3.11" in one_line(machine.setup("run"))
