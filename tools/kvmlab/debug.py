"""`make debug`: the lesson in the VMM, stopped before its first instruction, and gdb in front of it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kvmlab.engine import ENGINES, CannotRun, Kvm, kvm_problem
from kvmlab.lesson import Lesson, UsageError
from kvmlab.runner import Built

WAITS = b"waiting for gdb"
# Before gdb reads the image. Of watchpoints the VMM knows nothing: gdb must step, and compare. And debuginfod has
# nothing of a guest.
SETTINGS = ("set confirm off", "set can-use-hw-watchpoints 0", "set debuginfod enabled off")
ENDS = 10.0  # seconds that the VMM may take when gdb is gone


def admit(lesson: Lesson, wanted: str) -> None:
    """Only this machine's KVM will do: while an emulated machine runs a job, no line leads into it."""
    if wanted not in ("auto", *ENGINES):
        raise UsageError(f"ENGINE={wanted}: there are auto, {', '.join(ENGINES)}")
    if wanted not in ("auto", Kvm.name):
        raise CannotRun(f"make debug is for ENGINE={Kvm.name}: no line leads into the emulated machine of {wanted}")
    if problem := lesson.not_on.get(Kvm.name) or kvm_problem():
        raise CannotRun(f"make debug LESSON={lesson.number} needs ENGINE={Kvm.name}: {problem}")


def debug(built: Built, seed: int) -> int:
    """Until gdb ends. The VMM is in a session of its own: a Ctrl-C in the terminal is for gdb, which passes it on."""
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as folder:
        socket = Path(folder) / "gdb"
        command: list[str | Path] = [built.vmm, f"--gdb={socket}", f"--seed={seed}", built.image]
        with subprocess.Popen(
            command, bufsize=0, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as vmm:
            try:
                return _in_front_of(vmm, socket, built.image)
            finally:
                _end(vmm)


def _in_front_of(vmm: subprocess.Popen[bytes], socket: Path, image: Path) -> int:
    assert vmm.stderr
    for said in iter(vmm.stderr.readline, b""):
        if WAITS in said:
            break
        sys.stderr.buffer.write(said)
        sys.stderr.buffer.flush()
    else:
        return vmm.wait()
    with _shown(vmm.stderr):
        return _gdb(["target remote " + str(socket), "tbreak guest_main", "continue"], image)


def _gdb(commands: list[str], image: Path) -> int:
    before = [word for setting in SETTINGS for word in ("-iex", setting)]
    given = [word for command in commands for word in ("-ex", command)]
    with _foreground(), subprocess.Popen(["gdb", "-q", *before, *given, image]) as gdb:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return gdb.wait()
        finally:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _foreground() -> Iterator[None]:
    """What is typed in the terminal is for us and gdb alone: make would take a Ctrl-C for its end.

    Ctrl-Z would stop us and not make, and no shell would come. It is off for so long.
    """
    terminal = sys.stdin.fileno()
    group = os.getpgrp()
    if not os.isatty(terminal) or os.tcgetpgrp(terminal) != group:
        yield
        return
    typed = termios.tcgetattr(terminal)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # that we take the terminal from the background
    os.tcsetpgrp(terminal, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    characters = [*typed[6][: termios.VSUSP], b"\0", *typed[6][termios.VSUSP + 1 :]]
    termios.tcsetattr(terminal, termios.TCSADRAIN, [*typed[:6], characters])
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, typed)
        os.tcsetpgrp(terminal, group)


@contextlib.contextmanager
def _shown(errors: IO[bytes]) -> Iterator[None]:
    """What the VMM says is shown as it comes, to its end."""
    thread = threading.Thread(target=_show, args=(errors,), daemon=True)
    thread.start()
    yield
    thread.join(ENDS)


def _show(errors: IO[bytes]) -> None:
    for line in iter(errors.readline, b""):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def _end(vmm: subprocess.Popen[bytes]) -> None:
    """gdb has ended the guest, or the VMM has seen that gdb is gone."""
    try:
        vmm.wait(ENDS)
    except subprocess.TimeoutExpired:
        vmm.kill()
