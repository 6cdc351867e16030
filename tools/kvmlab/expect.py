"""How a check says what is wrong: what was expected, what was seen, and the events around it."""

from typing import NoReturn

from kvmlab import events
from kvmlab.events import Event
from kvmlab.runner import Run


class CheckFailed(AssertionError):
    """A check that does not hold; its text is what the student reads. near: the event that shows it."""

    def __init__(self, text: str, near: Event | None = None) -> None:
        super().__init__(text)
        self.near = near


def expect(run: Run, what: str, *, expected: object, seen: object, near: Event | None = None) -> None:
    """Fail unless both are equal. near: the event that shows it."""
    __tracebackhide__ = True
    if expected != seen:
        lines = [f"expected {_shown(expected)}", f"seen     {_shown(seen)}"]
        if run.status and not near:
            lines.append(how_it_ended(run))
        fail(run, what, *lines, near=near)


def require(run: Run, what: str, kind: str, /, **fields: object) -> Event:
    """The first event of this kind with these fields; fail if the run has none, and show how it ended."""
    __tracebackhide__ = True
    found = run.one(kind, **fields)
    if found is None:
        wanted = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        last = run.events[-1] if run.events else None
        lines = f"expected an event: {f'{kind} {wanted}'.rstrip()}", "seen     none", how_it_ended(run)
        fail(run, what, *lines, near=last)
    return found


def fail(run: Run, what: str, *lines: str, near: Event | None = None) -> NoReturn:
    """Fail with these lines."""
    __tracebackhide__ = True
    context = list(events.around(run.events, near)) if near else []
    raise CheckFailed("\n".join([what, *lines, *context]), near)


def how_it_ended(run: Run) -> str:
    """In one line, also where the VMM did not live to record it."""
    if end := run.one("end"):
        return f"the run ended by: {end.how} (status {run.status})"
    how = {4: "was stuck", 5: "could not go on"}.get(run.status, "left: a host half does not call exit()")
    if run.status > 128:
        how = f"was killed by signal {run.status - 128}"
    return f"the run has no end: the VMM {how} (status {run.status})"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return hex(value) if value > 9 else str(value)
    if isinstance(value, bytes):
        return value.hex(" ") or "nothing"
    if isinstance(value, (list, tuple, set)):
        return "[" + ", ".join(_shown(item) for item in (sorted(value) if isinstance(value, set) else value)) + "]"
    return str(value)
