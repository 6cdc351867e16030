"""The event record of a run, as include/events.h describes it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1


class Event:
    """One event: its fields are attributes; "0x..." strings are numbers."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {name: _value(value) for name, value in fields.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"event {self} has no field {name}") from None

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    def __str__(self) -> str:
        shown = {k: v for k, v in self.fields.items() if k not in _NOT_SHOWN and v != ""}
        text = " ".join(f"{k}={_text(k, v)}" for k, v in shown.items())
        return f"#{self.fields['seq']} {self.fields['kind']} {text}"


# Times differ from run to run, and the first two are shown in front.
_NOT_SHOWN = {"seq", "kind", "ns", "guest_ns", "vmm_ns", "exit", "if_flag"}
_DECIMAL = {"size", "count", "page_size", "status", "vector", "checkpoint", "what", "exits", "version", "memory_mib"}
_BYTES = {"data", "registers", "pushed", "bytes"}


def _value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("0x"):
        try:
            return int(value, 16)
        except ValueError:
            return value
    return value


def _text(name: str, value: Any) -> str:
    if isinstance(value, int) and value > 1 and name not in _DECIMAL:
        return hex(value)
    return str(value)


# More than any lesson makes: the record of a guest that loops over a port is cut, but for its end.
_MOST = 200_000


def read(path: Path) -> list[Event]:
    """The events of a record; a last line that a killed VMM left incomplete is not one."""
    events: list[Event] = []
    last = ""
    with path.open(errors="replace") as lines:
        for last in lines:
            if len(events) < _MOST and (event := _parse(last)):
                events.append(event)
    if len(events) == _MOST and (event := _parse(last)):
        events.append(event)
    if events and events[0].version != VERSION:
        raise ValueError(f"{path}: events of version {events[0].version}; this reader knows {VERSION}")
    return events


def _parse(line: str) -> Event | None:
    try:
        return Event(json.loads(line))
    except json.JSONDecodeError:
        return None


def around(events: list[Event], near: Event, before: int = 3, after: int = 2) -> Iterator[str]:
    """The lines to show for an event: itself, marked, between its neighbours."""
    at = events.index(near)
    for event in events[max(0, at - before) : at + after + 1]:
        yield f"{'>' if event is near else ' '} {event}"
