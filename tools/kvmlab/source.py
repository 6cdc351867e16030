"""From an address to a line of C, as far as the debug information of a program knows it."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvmlab import markers
from kvmlab.events import Event
from kvmlab.lesson import Lesson


class Line(NamedTuple):
    """Where code comes from; file is as the compiler has named it, "??" where nothing is known."""

    function: str
    file: str
    number: str


UNKNOWN = Line("??", "??", "?")


def lines_at(program: Path, address: str) -> Iterator[Line]:
    """The line at this address, and what it was inlined into, from the inside out."""
    command = ["addr2line", "--inlines", "--functions", "--exe", str(program), address]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    for function, place in zip(shown[::2], shown[1::2], strict=False):
        file, _, number = place.partition(" (")[0].rpartition(":")
        yield Line(function, file, number)


def of_student(lesson: Lesson, image: Path, event: Event) -> str:
    """The line that this event comes from and what stands there, if students of the lesson write in its file."""
    for line in lines_at(image, hex(_instruction(image, event))):
        for path in lesson.sources:
            # By the end of the name: it may have been compiled in another place.
            if f"/{line.file}".endswith(f"/{path.relative_to(lesson.root)}") and markers.parts_of(path):
                return f"{path}:{line.number}, in {line.function}: {_text(path, line.number)}"
    return ""


# What the VMM says behind the line that tells how it crashed or that it is stuck.
CALLS = re.compile(r" \[at pc (0x[0-9a-f]+) called from((?: 0x[0-9a-f]+)*)\]$", re.MULTILINE)


def of_host(vmm: Path, errors: str) -> str:
    """Where the host half was when the VMM crashed or was stuck, and what stands there: the innermost of the calls
    that the VMM has listed. Where none is in a host half: where the VMM itself was."""
    if not (found := CALLS.search(errors)):
        return ""
    # They are where the calls return to: the next line, perhaps, or another function.
    addresses = [found[1], *(hex(int(call, 16) - 1) for call in found[2].split())]
    lines = (line for address in addresses for line in lines_at(vmm, address))
    innermost = next(lines, UNKNOWN)
    host = next((line for line in itertools.chain([innermost], lines) if Path(line.file).name == "host.c"), None)
    line = host or innermost
    if not line.number.isdigit():
        return ""
    path = Path(line.file)
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    who = "host half" if host else "VMM"
    return f"the {who} was at {path}:{line.number}, in {line.function}: {_text(path, line.number)}"


def _instruction(image: Path, event: Event) -> int:
    """An address in the instruction that made this event. KVM has stepped over a HLT and over a store to a device;
    over an OUT on some machines only (include/events.h)."""
    rip: int = event.rip
    is_port_write = event.get("reason") == "IO" and event.get("is_write")
    is_store = event.get("reason") == "MMIO" and event.get("is_write")
    is_behind = event.get("reason") == "HLT" or is_store or (is_port_write and not _is_out(image, rip))
    return rip - 1 if is_behind else rip


def _is_out(image: Path, address: int) -> bool:
    command = ["objdump", "--disassemble", "--no-show-raw-insn", f"--start-address={address:#x}"]
    command += [f"--stop-address={address + 1:#x}", str(image)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return re.search(rf"^ *{address:x}:\s+(?:rep )?out", shown, re.MULTILINE) is not None


def _text(path: Path, number: str) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return lines[int(number) - 1].strip() if number.isdigit() and 0 < int(number) <= len(lines) else "?"
