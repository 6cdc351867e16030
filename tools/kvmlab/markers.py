"""Solutions and stubs: how the student's version of a file follows from ours.

A place where a student writes code looks like this, here and, without the solution, in the student's
tree:

    /* BEGIN SOLUTION */
    the solution
    /* STUB
    what the student finds instead
    END SOLUTION */

A stub has the word TODO in it, which no solution has: that is how the two are told apart in a student's tree.
"""

import re
from dataclasses import dataclass
from pathlib import Path

BEGIN = "/* BEGIN SOLUTION */"
STUB = "/* STUB"
END = "END SOLUTION */"
STUDENT_END = "/* END SOLUTION */"


class MarkerError(Exception):
    """The markers of a file do not pair up."""


def has_stub(text: str) -> bool:
    """Is there a stub that waits to take a solution's place? The student's own tree has none."""
    return any(line.strip() == STUB for line in text.splitlines())


PART = re.compile(
    r"^[ \t]*/\* BEGIN SOLUTION \*/\n(?P<text>.*?)"
    r"(?:^[ \t]*/\* STUB\n(?P<stub>.*?)^[ \t]*END SOLUTION \*/\n|^[ \t]*/\* END SOLUTION \*/\n)",
    re.MULTILINE | re.DOTALL,
)
_FUNCTION = re.compile(r"^(?:static|void|bool) [^;=]*?(\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A place where a student writes."""

    function: str
    line: int  # the one with BEGIN SOLUTION
    text: str  # what stands there; in our tree the solution
    stub: str  # "" in a student's tree

    @property
    def is_written(self) -> bool:
        return "TODO" not in self.text


def parts(text: str) -> list[Part]:
    """The places of a file, from top to bottom. Where a student has taken the markers away, there is none."""
    found = []
    for match in PART.finditer(text):
        before = text[: match.start()]
        function = _FUNCTION.findall(before)[-1:]
        found.append(Part("".join(function), before.count("\n") + 1, match["text"], match["stub"] or ""))
    return found


def parts_of(path: Path) -> list[Part]:
    """Of a file that may be gone, or be no text."""
    return parts(path.read_text(errors="replace")) if path.is_file() else []


def student_version(text: str, name: str = "file") -> str:
    """The text with each solution replaced by its stub."""
    lines: list[str] = []
    part, since = "given", 0
    for number, line in enumerate(text.splitlines(), start=1):
        marker = line.strip()
        if marker == BEGIN and part == "given":
            part, since = "solution", number
            lines.append(line)
        elif marker == STUB and part == "solution":
            part = "stub"
        elif marker == END and part == "stub":
            part = "given"
            lines.append(line.replace(END, STUDENT_END))
        elif marker == STUB or "BEGIN SOLUTION" in line or "END SOLUTION" in line:
            raise MarkerError(f"{name}:{number}: {marker} does not belong here, in the {part} part")
        elif part != "solution":
            lines.append(line)
    if part != "given":
        raise MarkerError(f"{name}:{since}: this solution has no end: expected {STUB}, then {END}")
    return "\n".join(lines) + "\n"
