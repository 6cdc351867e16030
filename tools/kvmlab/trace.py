"""KVM's tracepoints, merged into the events of a run: what the kernel did between two of its exits.

What the trace of Linux looks like: Documentation/trace/ftrace.rst, "Output format". The tracepoints are
those of arch/x86/kvm/trace.h and include/trace/events/kvm.h.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from kvmlab import events
from kvmlab.events import Event

# Task, processor, flags, seconds, tracepoint, and what it says.
_LINE = re.compile(r"^ *\S+-\d+ +\[\d+\] \S+ +(\d+\.\d+): (kvm_\w+): ?(.*?) *$", re.MULTILINE)
# KVM_RUN came back, with an exit or with an errno: "restart" (EINTR) and "error", which the record has as
# exits by the reasons INTR and MEMORY_FAULT.
_CAME_BACK = re.compile(r"reason (KVM_EXIT_\w+|restart|error)\b")
_REASON = re.compile(r"\breason (\w+)")


def merge(record: bytes, trace: str) -> bytes:
    """The record with an event of the kind "trace" for each line of the trace. KVM_RUN comes back once
    for each event of the kind "exit", in the same order: what the trace says up to there stands before."""
    points = _points(trace)
    merged: list[dict[str, Any]] = []
    for event in (event.recorded for event in events.parse(record)):
        if event["kind"] == "exit":
            merged += _up_to_return(points, event["ns"])
        if event["kind"] == "end":
            merged += [_event(event["ns"], *point) for _, *point in points]
        merged.append(event)
    return b"".join(json.dumps(event | {"seq": seq}).encode() + b"\n" for seq, event in enumerate(merged))


def summary(run: Iterable[Event]) -> str:
    """How often each tracepoint was passed, and why."""
    counts: dict[str, Counter[str]] = {}
    for event in run:
        if event.kind == "trace":
            counts.setdefault(event.point, Counter())[event.get("reason", "")] += 1
    lines = ["what KVM did, by its tracepoints:"]
    for point, reasons in sorted(counts.items()):
        lines.append(
            f"  {point:20} " + ", ".join(f"{count} {reason}".strip() for reason, count in reasons.most_common())
        )
    return "\n".join(lines)


def _points(trace: str) -> Iterator[tuple[float, str, str]]:
    return ((float(found[1]), found[2], found[3]) for found in _LINE.finditer(trace))


def _up_to_return(points: Iterator[tuple[float, str, str]], ns: int) -> list[dict[str, Any]]:
    """The events up to the next return of KVM_RUN, which was ns nanoseconds after the VMM's start."""
    passed: list[tuple[float, str, str]] = []
    for point in points:
        passed.append(point)
        if point[1] == "kvm_userspace_exit" and _CAME_BACK.match(point[2]):
            break
    return [_event(ns - round(1e9 * (passed[-1][0] - at)), point, text) for at, point, text in passed]


def _event(ns: int, point: str, text: str) -> dict[str, Any]:
    event: dict[str, Any] = {"seq": 0, "ns": ns, "kind": "trace", "point": point}
    if reason := _REASON.search(text):
        event["reason"] = reason[1]
    return event | {"text": text}
