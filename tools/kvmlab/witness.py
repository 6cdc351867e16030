"""Does the record of a run agree with what was seen from outside of the VMM?

A host half is native code in the process that writes the record: it can call KVM_RUN or inject behind the
recorder's back, and it can write events itself. strace(1) stands outside of the sandbox and cannot be
reached from there: it has seen each ioctl of KVM, in order, and how each KVM_RUN came back.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from kvmlab.events import Event

_LINE = re.compile(r"(\d+) +(?:ioctl\(\d+, (KVM_\w+)|<\.\.\. ioctl resumed>)")
_ANSWER = re.compile(r"\) += (-?\d+)(?: (E\w+))?(?: \((\w+)\)$)?")
# What the record calls a KVM_RUN that came back with an errno.
_FAILED = {"EINTR": "INTR", "EFAULT": "MEMORY_FAULT"}


def objection(events: Sequence[Event], seed: int, log: str | None) -> str:
    """Why the record cannot be of this run, in a line; "" if it can. log: of strace, where there is one."""
    try:
        return _shape(events, seed) or ("" if log is None else _against(events, log))
    except (AttributeError, KeyError, TypeError) as error:
        return f"an event of it is damaged: {error}"


def _shape(events: Sequence[Event], seed: int) -> str:
    first, last = events[0], events[-1]
    if first.kind != "start" or first.seed != seed:
        return f"it does not begin with the start of a run with seed {seed}"
    exits = [event.exit for event in events if event.kind == "exit"]
    if [event.seq for event in events] != list(range(len(events))) or exits != list(range(1, len(exits) + 1)):
        return "events of it are missing, or there are some that the VMM has not written"
    if len([event for event in events if event.kind in ("start", "end")]) > 1 + (last.kind == "end"):
        return "it has more than one start, or an end that is not the last event"
    return ""


def _against(events: Sequence[Event], log: str) -> str:
    seen, calls = _seen(log)
    told = [event.reason for event in events if event.kind == "exit"]
    for number, (ours, its) in enumerate(zip(told, seen, strict=False), start=1):
        if ours not in (its, "?"):
            return f"exit {number} is {_short(ours)} there, and KVM's was {its}"
    if not len(told) <= len(seen) <= len(told) + _unrecorded(events[-1]):
        return f"it has {len(told)} exits, and KVM_RUN came back {len(seen)} times"
    injected = [event.type for event in events if event.kind == "inject"]
    if (asked := calls["KVM_INTERRUPT"] + calls["KVM_NMI"]) > len(injected):
        return f"it has {len(injected)} injections, and KVM was asked for {asked}"
    return ""


def _unrecorded(last: Event) -> float:
    """How many exits may be missing from the end of the record: all that a VMM that was killed had still to write,
    and the one in the midst of which another was ended."""
    if last.kind != "end":
        return math.inf
    return 0 if last.how in ("exit", "halt", "panic", "triple fault") else 1


def _short(value: object) -> str:
    return ascii(value)[1:30].rstrip("'")


def _seen(log: str) -> tuple[list[str], Counter[str]]:
    """Why each KVM_RUN of the VMM came back, in order, and how often KVM did what."""
    makers: list[str] = []  # of a VM: after a triple fault, the VMM repeats the run in a second process
    pending: dict[str, str] = {}
    done: list[tuple[str, str, str]] = []
    for line in log.splitlines():
        if not (found := _LINE.match(line)):
            continue
        process, request = found[1], found[2] or pending.pop(found[1], "")
        if line.endswith("<unfinished ...>"):
            pending[process] = request
        elif request and (answer := _ANSWER.search(line)):
            if request == "KVM_CREATE_VM" and answer[1] != "-1":
                makers.append(process)
            done.append((process, request, _FAILED.get(answer[2], answer[2]) or answer[3] or ""))
    ours = [(request, answer) for process, request, answer in done if process not in makers[1:]]
    returns = [answer.removeprefix("KVM_EXIT_") for request, answer in ours if request == "KVM_RUN"]
    return returns, Counter(request for request, _ in ours)
