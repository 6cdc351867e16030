"""`make watch`: a check at each save."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Callable, Iterator

from support import TOO_LONG
from variants import ENVIRONMENT, Variant, write_first

from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]

StartVariant = Callable[[str], Variant]

FIRST = "01-vm-exit"
CLEAR = "\x1b[H\x1b[2J\x1b[3J"
WAITING = "lesson 1: checked again when you save (Ctrl-C ends this)\n"


class Watching:
    """A `make watch` whose output a test reads as it comes."""

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self.process = process
        self._output = output

    def sees(self, text: str) -> str:
        """All that it shows up to this text."""
        seen = b""
        while not seen.endswith(text.encode()):
            assert select.select([self._output], [], [], TOO_LONG)[0], f"expected {text!r} at the end of {seen!r}"
            more = os.read(self._output, 1)
            assert more, f"expected {text!r} at the end of {seen!r}"
            seen += more
        return seen.decode()


@contextlib.contextmanager
def watching(student: Variant, terminal: int | None = None) -> Iterator[Watching]:
    call = student.call("watch", "1")
    stream: int = subprocess.PIPE if terminal is None else terminal
    environment = ENVIRONMENT | {"PYTHONPATH": "tools", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(call, cwd=ROOT, env=environment, stdout=stream, stderr=stream) as process:
        try:
            yield Watching(process, process.stdout.fileno() if process.stdout else -1)
        finally:
            process.kill()


def test_make_watch_checks_again_at_each_save_and_shows_what_the_compiler_says(variant: StartVariant) -> None:
    student = variant(FIRST)
    guest = student.folder / "guest.c"
    solution = guest.read_text()
    write_first(student, 0)
    with watching(student) as watch:
        assert "lesson 1: 0 of 12 points\n" in watch.sees(WAITING)
        guest.write_text(solution.replace("mmio_read32(", "mmio_read33("))
        watch.sees(WAITING)
        new = student.folder / "new"  # as many editors save, and a moment at which nothing is there
        checks = student.folder / "test_lesson.py"
        checks.rename(new)
        guest.unlink()
        watch.sees(WAITING)
        new.rename(checks)
        new.write_text(solution)
        new.rename(guest)
        assert "lesson 1: 3 of 12 points\n" in watch.sees(WAITING)
        watch.process.send_signal(signal.SIGINT)
        output, errors = watch.process.communicate(timeout=TOO_LONG)
    assert (watch.process.returncode, output) == (130, b"")
    assert re.search(r"guest\.c:\d+:\d+: error: implicit declaration of function .mmio_read33", errors.decode()), errors
    assert errors.decode().endswith("kvmlab: interrupted\n")


def test_each_check_begins_a_new_screen_on_a_terminal_only(variant: StartVariant) -> None:
    student = variant(FIRST)
    master, slave = pty.openpty()
    with watching(student, slave) as on_terminal:
        on_terminal = Watching(on_terminal.process, master)
        for _ in range(2):
            shown = on_terminal.sees(WAITING.replace("\n", "\r\n"))
            assert shown.startswith(CLEAR)
            assert "12 of 12 points" in shown
            (student.folder / "lab.h").touch()
    os.close(master)
    os.close(slave)
    with watching(student) as piped:
        assert piped.sees(WAITING).startswith("lesson 1: ")


def test_ctrl_c_ends_a_check_that_is_under_way_and_leaves_nothing(variant: StartVariant) -> None:
    student = variant(FIRST)
    student.change("guest.c", "    halt();\n", "    for (;;)\n        pause();\n")
    with watching(student) as watch:
        watch.sees("engine: kvm (this machine's /dev/kvm)\n")
        watch.process.send_signal(signal.SIGINT)
        # Who still has these pipes is still there.
        output, errors = watch.process.communicate(timeout=TOO_LONG)
    assert watch.process.returncode == 130
    assert b"points" not in output, "the check went on to its end"
    assert errors.decode().endswith("kvmlab: interrupted\n")
