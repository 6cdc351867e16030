"""What several tests of the VMM need."""

import contextlib
import fcntl
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from kvmlab import runner
from kvmlab.engine import Engine
from kvmlab.plugin import ROOT
from kvmlab.runner import Built

# What the fixtures of these names give.
Call = Callable[..., subprocess.CompletedProcess[bytes]]
Guest = Callable[[str], Built]
Host = Callable[[str], Path]
Halves = Callable[[str], Built]

HOSTS = ROOT / "tests" / "hosts"

# For a test that the sanitizers would change or make too slow: it says which.
only_plain = pytest.mark.parametrize("vmm", ["plain"], indirect=True)

TOO_LONG = 60.0


def one_line(errors: bytes | str, *phrases: str) -> None:
    """What went wrong stands in one line, which contains these phrases."""
    text = errors.decode() if isinstance(errors, bytes) else errors
    text = re.sub(r"^profiling:.*\n", "", text, flags=re.MULTILINE)  # the coverage build's own complaints
    assert re.fullmatch(r".*\n", text), f"expected one line, seen:\n{text}"
    for phrase in phrases:
        assert phrase in text, f"expected {phrase!r} in: {text}"


def make_half(build: Path, target: str, lessons: Path = HOSTS) -> Path:
    """Build a part of tests/hosts, which is laid out like lessons."""
    return make(build, f"lessons/{target}", lessons)


def make(build: Path, target: str, lessons: Path = HOSTS) -> Path:
    """Build this, with the flags of the rest of this build."""
    flags = ["SANITIZE=1"] if build.name == "asan" else []
    if (build / "vmm" / "vmm.gcno").exists():
        flags.append("COVERAGE=1")
    built = build / target
    with (build / "lock").open("w") as lock:  # workers of xdist share the build
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-s", *flags, f"BUILD={build}", f"LESSONS={lessons}", built], cwd=ROOT, check=True)
    return built


def lesson_like(vmm: Path, build: Path, name: str) -> Built:
    """A lesson, with its VMM under the sanitizers if this VMM is."""
    built = runner.lesson_built(build, name)
    if vmm == build / "vmm" / "vmm":
        return built
    return Built(make_half(vmm.parent.parent, f"{name}/vmm", Path("lessons")), built.image)


def half_command(name: str, command: str) -> int:
    """The number of a command in the lab.h of these halves."""
    names: list[str] = re.findall(r"COMMAND_(\w+),", (HOSTS / name / "lab.h").read_text())
    return names.index(command)


class Process(subprocess.Popen[bytes]):
    """A process that a test talks to, all three streams piped."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def __init__(self, *command: str | Path, pipesize: int = -1) -> None:
        pipe = subprocess.PIPE
        super().__init__(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, pipesize=pipesize)


@contextlib.contextmanager
def started(*command: str | Path, limit: float = TOO_LONG, pipesize: int = -1) -> Iterator[Process]:
    """Start a process; it is killed when the test is done with it, or when it takes too long."""
    with Process(*command, pipesize=pipesize) as process:
        watchdog = threading.Timer(limit, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def wait_until_asleep(pid: int) -> None:
    """Until the process waits in the kernel: the state that proc(5) calls S."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline, "the guest does not halt"
        os.sched_yield()


def child_of(pid: int) -> int:
    """The device's process, when it is there."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 20
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline, "the VMM starts no process"
        time.sleep(0.01)
    return int(found[0])


def wait_until_gone(pid: int) -> None:
    """Or a zombie, which has nothing left."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the device's process has not ended"
        time.sleep(0.01)


def assume_different_owner(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let git take every repository for one of somebody else's, as in a container, or on a volume of a cluster:
    git-config(1), safe.directory."""
    there = os.environ["PATH"]
    (home / "git").write_text('#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 PATH=$REAL exec git "$@"\n')
    (home / "git").chmod(0o755)
    monkeypatch.setenv("REAL", there)
    monkeypatch.setenv("PATH", f"{home}:{there}")


def of_session(engines: dict[str, Engine], name: str) -> Engine:
    """The engine of this name, if this session has it."""
    if name not in engines:
        pytest.skip(f"this session is without {name}: --engines=kvm,svm,vmx")
    return engines[name]
