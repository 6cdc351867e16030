"""Run an image in the VMM and collect all that can be known about the run."""

import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmlab import events as record
from kvmlab.events import Event

TIME_LIMIT = 10.0


@dataclass
class Run:
    """What one run of the VMM left: its status, what it printed, and what it recorded."""

    status: int
    output: str
    errors: str
    seed: int = 0
    events: list[Event] = field(default_factory=list)

    def all(self, kind: str, /, **fields: object) -> list[Event]:
        """The events of this kind whose fields have these values."""
        return [
            event
            for event in self.events
            if event.kind == kind and all(event.get(name) == value for name, value in fields.items())
        ]

    def one(self, kind: str, /, **fields: object) -> Event | None:
        """The first of them, or None."""
        return next(iter(self.all(kind, **fields)), None)

    @property
    def end(self) -> Event:
        """How the run ended, which only a VMM that was killed does not say."""
        found = self.one("end")
        assert found, f"the record has no end: the VMM was killed (status {self.status})"
        return found


@dataclass(frozen=True)
class Built:
    """A lesson or a test guest, ready to run: the image, and the VMM that its host half is in."""

    vmm: Path
    image: Path


def lesson_built(build: Path, name: str) -> Built:
    folder = build / "lessons" / name
    own = folder / "vmm"
    return Built(own if own.exists() else build / "vmm" / "vmm", folder / "image.elf")


def run(
    built: Built,
    options: Sequence[str] = (),
    *,
    seed: int = 0,
    stdin: bytes = b"",
    events: Path | None = None,
    time_limit: float = TIME_LIMIT,
) -> Run:
    """Run the image to its end, with everything captured."""
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
        path = events or Path(scratch) / "events.jsonl"
        command = _command(built, [*options, f"--time-limit={time_limit}"], seed, path)
        # A file, not a pipe: all of the input is there before the guest looks for it.
        typed = Path(scratch) / "input"
        typed.write_bytes(stdin)
        with typed.open("rb") as console:
            done = subprocess.run(command, stdin=console, capture_output=True, timeout=time_limit + 60, check=False)
        recorded = record.read(path) if path.exists() else []
    errors = done.stderr.decode(errors="replace")
    return Run(done.returncode, done.stdout.decode(errors="replace"), errors, seed, recorded)


def run_on_terminal(built: Built, *, seed: int, events: Path) -> Run:
    """Run the image with the user's own terminal as its console."""
    events.unlink(missing_ok=True)
    command = _command(built, ["--summary", f"--time-limit={TIME_LIMIT}"], seed, events)
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    errors = done.stderr.decode(errors="replace")
    sys.stdout.flush()
    sys.stderr.write(errors + crash_location(built, errors))
    sys.stderr.flush()
    return Run(done.returncode, "", errors, seed, record.read(events) if events.exists() else [])


def crash_location(built: Built, errors: str) -> str:
    """If the VMM itself crashed: the line of C it crashed at, as far as addr2line knows."""
    found = re.search(r"VMM itself crashed: .* at pc (0x[0-9a-f]+)", errors)
    if not found:
        return ""
    done = subprocess.run(
        ["addr2line", "-f", "-s", "-e", str(built.vmm), found[1]], capture_output=True, text=True, check=False
    )
    function, _, line = done.stdout.strip().partition("\n")
    return f"vmm: that is in {function}, {line}\n"


def _command(built: Built, options: Sequence[str], seed: int, events: Path) -> list[str]:
    command = [str(built.vmm), f"--seed={seed}", f"--events={events}"]
    # `make cover` wants what the guest sends of its counters (guest/coverage.c).
    if streams := os.environ.get("KVMLAB_GUEST_COVERAGE"):
        command.append(f"--debugcon={streams}/{uuid.uuid4()}")
    return [*command, *options, str(built.image)]
