"""The virtio console on a terminal: raw as long as the VMM runs, as it was when it has ended, however that was."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import TOO_LONG, Guest, one_line, only_plain

COMMAND_LINE_MAX = 2048
END_OF_INPUT = b"\x04"
CTRL_C, CTRL_Z = b"\x03", b"\x1a"
LOCAL_FLAGS = 3  # in what tcgetattr() gives


@dataclass
class Terminal:
    """A VMM on a terminal of its own: what a person there types and sees."""

    process: subprocess.Popen[bytes]
    master: int
    slave: int
    before: list[object]  # its settings when the VMM began

    def types(self, text: bytes) -> None:
        os.write(self.master, text)

    def sees(self, text: bytes) -> None:
        """Just this, and after it nothing yet."""
        seen = b""
        while len(seen) < len(text):
            ready = select.select([self.master], [], [], TOO_LONG)[0]
            assert ready, f"expected {text!r}, seen {seen!r}"
            seen += os.read(self.master, len(text) - len(seen))
        assert seen == text

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self.slave)

    def has(self, flag: int) -> bool:
        return bool(termios.tcgetattr(self.slave)[LOCAL_FLAGS] & flag)

    def ends(self) -> tuple[int, str]:
        """Its status, and what it says."""
        errors = self.process.communicate(timeout=TOO_LONG)[1].decode()
        return self.process.returncode, errors


Start = Callable[..., contextlib.AbstractContextManager[Terminal]]


@pytest.fixture
def start(vmm: Path, guest: Guest) -> Start:
    @contextlib.contextmanager
    def function(case: str, *options: str) -> Iterator[Terminal]:
        master, slave = pty.openpty()
        command: list[str | Path] = ["setsid", "--ctty"]
        command += [vmm, "--time-limit=20", f"--append=case={case}", *options, guest("virtio").image]
        before = termios.tcgetattr(slave)
        # With the terminal as its controlling one: Ctrl-C is a signal for it.
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE) as process:
            try:
                yield Terminal(process, master, slave, before)
            finally:
                process.kill()
                os.close(master)
                os.close(slave)

    return function


def test_each_key_goes_to_the_guest_at_once_and_without_echo(start: Start) -> None:
    with start("echo_by_interrupts") as terminal:
        terminal.sees(b"ready\r\n")
        assert not terminal.has(termios.ECHO | termios.ICANON)
        for key in (b"k", b"\xc3", CTRL_Z):
            terminal.types(key)
            terminal.sees(key)


def by_signal(number: signal.Signals) -> Callable[[Terminal], None]:
    return lambda terminal: terminal.process.send_signal(number)


def by_key(key: bytes) -> Callable[[Terminal], None]:
    return lambda terminal: terminal.types(key)


ENDINGS = {
    "the guest ends the run": (by_key(END_OF_INPUT), 0),
    "Ctrl-C": (by_key(CTRL_C), 128 + signal.SIGINT),
    "SIGTERM": (by_signal(signal.SIGTERM), 128 + signal.SIGTERM),
    "the time limit": (by_signal(signal.SIGALRM), 4),
    "the VMM crashes": (by_signal(signal.SIGSEGV), 5),
    "the VMM aborts": (by_signal(signal.SIGABRT), 5),
}


@only_plain  # the sanitizers take a crash for themselves
@pytest.mark.parametrize("irqchip", ["none", "kernel"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_terminal_is_put_back_whatever_ends_the_vmm(ending: str, irqchip: str, start: Start) -> None:
    """While the guest sleeps: in the VMM, or, with a local APIC, in KVM."""
    end, status = ENDINGS[ending]
    with start("echo_by_interrupts", f"--irqchip={irqchip}") as terminal:
        terminal.sees(b"ready\r\n")
        terminal.types(b"x")
        terminal.sees(b"x")
        assert terminal.settings != terminal.before
        end(terminal)
        seen, errors = terminal.ends()
        assert seen == status, errors
        assert terminal.settings == terminal.before, f"the shell gets the terminal back raw: {errors}"


def test_the_terminal_is_put_back_by_a_vmm_that_does_not_even_begin(start: Start) -> None:
    """What is wrong with the guest's command line shows when the devices have added theirs."""
    with start("x" * COMMAND_LINE_MAX) as terminal:
        status, errors = terminal.ends()
        assert (status, terminal.settings) == (2, terminal.before)
        one_line(errors, "--append: the guest's command line")
