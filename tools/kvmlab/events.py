"""The event record of a run, as include/events.h describes it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1


class Event:
    """One event: its fields are attributes; "0x..." strings are numbers."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded
        self.fields = {name: _value(value) for name, value in recorded.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"event {self} has no field {name}") from None

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    def __str__(self) -> str:
        fields = {"when": self.recorded["when"]} if self.recorded["kind"] == "statistics" else self.recorded
        shown = " ".join(f"{k}={v}" for k, v in fields.items() if k not in _NOT_SHOWN and v != "")
        return f"#{self.recorded['seq']} {self.recorded['kind']} {shown}"


# The first two are shown in front; the others differ from run to run or tell a student nothing.
_NOT_SHOWN = {"seq", "kind", "ns", "guest_ns", "vmm_ns", "exit", "reason_number", "if_flag"}


def _value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("0x"):
        try:
            return int(value, 16)
        except ValueError:
            return value
    return value


def read(path: Path) -> list[Event]:
    """The events of a file."""
    return parse(path.read_bytes())


def parse(record: bytes) -> list[Event]:
    """The events of a record. A line that is cut is none: a killed VMM left the last one so, and the
    middle of a long record is not kept (machine.RESULT_MOST)."""
    events = [event for line in record.splitlines() if (event := _parse(line))]
    if events and events[0].version != VERSION:
        raise ValueError(f"events of version {events[0].version}; this reader knows {VERSION}")
    return events


def _parse(line: bytes) -> Event | None:
    try:
        return Event(json.loads(line))
    except ValueError:
        return None


def around(events: list[Event], near: Event, before: int = 3, after: int = 2) -> Iterator[str]:
    """The lines to show for an event: itself, marked, between its neighbours."""
    at = events.index(near)
    for event in events[max(0, at - before) : at + after + 1]:
        yield f"{'>' if event is near else ' '} {event}"
