"""Does the record of a run agree with what was seen from outside of the VMM?

A host half is native code in the process that writes the record: it can call KVM_RUN or inject behind the
recorder's back, and it can write events itself. But it cannot reach who looks on: strace(1) outside of the
sandbox, or the kernel of an emulated machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvmlab.events import Event

_CALL = re.compile(r"(\d+) +(?:ioctl\(\d+, (KVM_\w+)|<\.\.\. ioctl resumed>)")
_ANSWER = re.compile(r"\) += (-?\d+)(?: (E\w+))?(?: \((\w+)\)$)?")
# Not from the beginning of the line: there stands the thread's name, which is the submission's to choose.
_TRACED = re.compile(r"-(\d+) +\[\d+\] \S+ +[\d.]+: kvm_userspace_exit: reason (KVM_EXIT_\w+|restart|error)\b")
# A filter of one's own can have a system call done that ptrace(2) does not see: seccomp_unotify(2).
_HIDES = re.compile(r"^\d+ +(?:seccomp\(|prctl\(PR_SET_SECCOMP\b)", re.MULTILINE)
# What the record calls a KVM_RUN that came back with an errno.
_FAILED = {"EINTR": "INTR", "EFAULT": "MEMORY_FAULT", "restart": "INTR", "error": "MEMORY_FAULT"}


@dataclass(frozen=True)
class Seen:
    """What KVM did, as somebody else saw it."""

    returns: list[tuple[str, str]]  # each time that KVM_RUN came back: the thread, and the reason
    injections: int = 0  # that KVM_INTERRUPT and KVM_NMI asked for, where that was seen
    hides: bool = False  # somebody has tried to do what is not seen


def seen_by_strace(log: str) -> Seen:
    pending: dict[str, str] = {}
    returns, injections = [], 0
    for line in log.splitlines():
        if not (found := _CALL.match(line)):
            continue
        thread, request = found[1], found[2] or pending.pop(found[1], "")
        if line.endswith("<unfinished ...>"):
            pending[thread] = request
        elif request == "KVM_RUN" and (answer := _ANSWER.search(line)):
            returns.append((thread, _reason(answer[2] or answer[3] or "")))
        injections += request in ("KVM_INTERRUPT", "KVM_NMI") and thread not in pending
    return Seen(returns, injections, _HIDES.search(log) is not None)


def seen_by_kernel(trace: str) -> Seen:
    return Seen([(found[1], _reason(found[2])) for found in _TRACED.finditer(trace)])


def _reason(word: str) -> str:
    return _FAILED.get(word, word.removeprefix("KVM_EXIT_"))


def objection(events: Sequence[Event], seed: int, seen: Seen) -> str:
    """Why the record cannot be of this run, in a line; "" if it can."""
    try:
        return _shape(events, seed) or _against(events, seen)
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


def _against(events: Sequence[Event], seen: Seen) -> str:
    if seen.hides:
        return "system calls were filtered, so that not all of them were seen"
    its = _of_first_run(seen.returns, events[-1])
    told = [event.reason for event in events if event.kind == "exit"]
    for number, (ours, other) in enumerate(zip(told, its, strict=False), start=1):
        if ours not in (other, "?"):
            return f"exit {number} is {_short(ours)} there, and KVM's was {other}"
    if not len(told) <= len(its) <= len(told) + _unrecorded(events[-1]):
        return f"it has {len(told)} exits, and KVM_RUN came back {len(its)} times"
    injected = [event.type for event in events if event.kind == "inject"]
    if seen.injections > len(injected):
        return f"it has {len(injected)} injections, and KVM was asked for {seen.injections}"
    return ""


def _of_first_run(returns: list[tuple[str, str]], last: Event) -> list[str]:
    """After a triple fault the VMM repeats the run in a second process, to look at it step by step."""
    is_repeated = last.kind == "end" and last.how == "triple fault"
    return [reason for thread, reason in returns if not is_repeated or thread == returns[0][0]]


def _unrecorded(last: Event) -> int:
    """How many exits may be missing from the end of the record: the one in the midst of which the run was ended, also
    by a crash of the VMM, which writes what it has. Of one that was killed nobody knows what it had still to write."""
    return 0 if last.get("how") in ("exit", "halt", "panic", "triple fault") else 1


def _short(value: object) -> str:
    return ascii(value)[1:30].rstrip("'")
