"""The event record is what include/events.h says: valid, complete, without gaps, and as the guest saw it."""

import json
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from images import assemble, pvh
from support import Call, Guest, Halves, half_command, started

from kvmlab import events
from kvmlab.plugin import ROOT

Record = list[dict[str, Any]]


def hexadecimal(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"0x(0|[1-9a-f][0-9a-f]{0,15})", value) is not None


def number(value: object) -> bool:
    return type(value) is int and value >= 0


def flag(value: object) -> bool:
    return value in (0, 1)


def text(value: object) -> bool:
    return isinstance(value, str)


def data(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"([0-9a-f]{2})*", value) is not None


def is_one_of(*values: str) -> Any:
    return lambda value: value in values


# The fields of each kind as include/events.h documents them; for exits also of each reason.
PLACE = {"rip": hexadecimal, "symbol": text}
FAULT = {"vector": number, "error_code": hexadecimal, "cr2": hexadecimal}
FIELDS: dict[str, dict[str, Any]] = {
    "start": {
        "version": number,
        "image": text,
        "seed": hexadecimal,
        "memory_mib": number,
        "irqchip": is_one_of("none", "split", "kernel"),
    },
    "exit": PLACE
    | {"exit": number, "reason": text, "reason_number": number}
    | {"if_flag": flag, "guest_ns": number, "vmm_ns": number},
    "unknown": {"space": is_one_of("port", "gpa"), "address": hexadecimal, "is_write": flag, "size": number},
    "panic": {"reason": is_one_of("exception", "message", "todo", "cannot", "?"), "message": text, "location": text},
    "cannot": {"message": text},
    "inject": PLACE
    | {"type": is_one_of("interrupt", "nmi", "exception"), "vector": number}
    | {"if_flag": flag, "ready": flag},
    "entry": {"entry": number, "if_flag": flag, "ready": flag, "window": flag}
    | dict.fromkeys(["nmi_injected", "nmi_pending", "nmi_masked"], flag),
    "triple_fault": PLACE,
    "emulation_failure": PLACE | {"bytes": data},
    "hang": PLACE,
    "statistics": {"when": text},
    "end": {"status": number, "how": text, "exits": number, "guest_ns": number, "vmm_ns": number},
}
ACCESS = {"is_write": flag, "size": number, "data": data}
OF_REASON = {"IO": ACCESS | {"port": hexadecimal, "count": number}, "MMIO": ACCESS | {"gpa": hexadecimal}}
MAY_HAVE = {
    "exit": {"device": text},
    "inject": {"error_code": hexadecimal},
    "entry": {"exception": number, "interrupt": number},
    "triple_fault": FAULT | {"injected": flag},
    "panic": FAULT | PLACE,
}

ALWAYS = {"start", "exit", "statistics", "end"}

RUNS: dict[str, tuple[str, str, list[str], set[str]]] = {
    # name: (guest, case, further options, kinds that it must record beside ALWAYS)
    "hello": ("hello", "", [], set()),
    "unknown accesses": ("devices", "touch_nothing", ["--unknown-io=ignore"], {"unknown"}),
    "every width": ("devices", "read_nothing_in_every_way", ["--unknown-io=ignore"], {"unknown"}),
    "a local APIC": ("devices", "read_apic", ["--irqchip=split"], set()),
    "strings": ("devices", "print_lengths", [], set()),
    "an exception": ("crash", "write_unmapped", [], {"panic"}),
    "a panic": ("crash", "panic_unprintable", [], {"panic"}),
    "a panic that is none": ("crash", "panic_nowhere", [], {"panic"}),
    "a machine that lacks something": ("crash", "lack_something", [], {"panic"}),
    "a task": ("crash", "not_written", [], {"panic"}),
    "a triple fault": ("crash", "enter_empty_space", [], {"triple_fault"}),
    "a triple fault without a cause": ("crash", "enter_root_outside_memory", [], {"triple_fault"}),
    "an emulation failure": ("crash", "emulate_x87", [], {"emulation_failure"}),
    "a hang": ("crash", "hang_with_interrupts_off", ["--time-limit=0.1"], {"hang"}),
    "a halt": ("crash", "halt_with_interrupts_on", [], {"hang"}),
}


def record_of(call: Call, guest: Guest, name: str, tmp_path: Path) -> Record:
    """The record of one of RUNS, each line as JSON makes it."""
    image, case, options, _ = RUNS[name]
    path = tmp_path / "events.jsonl"
    call(f"--events={path}", f"--append=case={case}", *options, guest(image).image, input=b"input")
    content = path.read_text(encoding="ascii")
    assert content.endswith("}\n")
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_kinds_and_fields_are_those_that_are_documented(name: str, call: Call, guest: Guest, tmp_path: Path) -> None:
    record = record_of(call, guest, name, tmp_path)
    assert {event["kind"] for event in record} == ALWAYS | RUNS[name][3]
    expect_documented(record)


OF_HALVES = {
    # halves of tests/hosts, command: the kind that they must record beside start, entry, exit and end
    ("interrupts", "INTERRUPT"): "inject",
    ("interrupts", "HALT_NMI"): "inject",
    ("interrupts", "EXCEPTION"): "inject",
    ("api", "CANNOT"): "cannot",
}


@pytest.mark.parametrize(("name", "command_name"), OF_HALVES)
def test_what_host_halves_do_is_recorded_as_documented(
    name: str, command_name: str, halves: Halves, tmp_path: Path
) -> None:
    built = halves(name)
    command = half_command(name, command_name)
    path = tmp_path / "events.jsonl"
    subprocess.run([built.vmm, f"--events={path}", f"--append=command={command}", built.image], check=False)
    record = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    kinds = {event["kind"] for event in record} - {"statistics"}  # which a run that host_cannot() ends has not
    assert kinds == {"start", "entry", "exit", "end", OF_HALVES[name, command_name]}
    expect_documented(record)


def expect_documented(record: Record) -> None:
    """The counters of an event `statistics` are KVM's own."""
    for event in record:
        kind = event["kind"]
        must = {"seq": number, "ns": number, "kind": text} | FIELDS[kind] | OF_REASON.get(event.get("reason", ""), {})
        may = dict.fromkeys(event, number) if kind == "statistics" else MAY_HAVE.get(kind, {})
        assert must.keys() <= event.keys() <= must.keys() | may.keys(), event
        wrong = {field: value for field, value in event.items() if not (may | must)[field](value)}
        assert wrong == {}, event


@pytest.mark.parametrize("name", RUNS)
def test_a_record_is_whole_and_in_order(name: str, call: Call, guest: Guest, tmp_path: Path) -> None:
    record = record_of(call, guest, name, tmp_path)
    assert [event["seq"] for event in record] == list(range(len(record)))
    assert all(before["ns"] <= after["ns"] for before, after in pairwise(record))
    kinds = [event["kind"] for event in record]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert (kinds.count("start"), kinds.count("end")) == (1, 1)


@pytest.mark.parametrize("name", RUNS)
def test_exits_are_numbered_counted_and_timed(name: str, call: Call, guest: Guest, tmp_path: Path) -> None:
    record = record_of(call, guest, name, tmp_path)
    end = record[-1]
    exits = [event for event in record if event["kind"] == "exit"]
    assert [event["exit"] for event in exits] == list(range(1, end["exits"] + 1))
    assert sum(event["guest_ns"] for event in exits) == end["guest_ns"] > 0
    assert sum(event["vmm_ns"] for event in exits) == end["vmm_ns"]
    assert end["guest_ns"] + end["vmm_ns"] <= end["ns"]


def test_every_kind_and_field_is_documented() -> None:
    words = set(re.findall(r"\w+", (ROOT / "include" / "events.h").read_text()))
    names = set(FIELDS) | set(FAULT) | {"device"}
    for fields in (*FIELDS.values(), *OF_REASON.values()):
        names |= set(fields)
    assert names - words == set()


def test_the_version_is_the_one_that_the_reader_knows(call: Call, guest: Guest, tmp_path: Path) -> None:
    header = (ROOT / "include" / "events.h").read_text()
    assert f"#define EVENTS_VERSION {events.VERSION}\n" in header
    assert record_of(call, guest, "hello", tmp_path)[0]["version"] == events.VERSION


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_text('{"seq":0,"ns":1,"kind":"start","version":999}\n')
    with pytest.raises(ValueError, match="version 999"):
        events.read(path)


# One access of each kind, by machine code: what is written, and what the guest must then see.
ACCESSES = """
        mov eax, 0x44332211
        out 0x80, al
        out 0x80, ax
        out 0x80, eax
        mov [0xd0000000], al
        mov [0xd0000003], ax
        mov [0xd0000010], eax
        in al, 0x3f ; nobody there
        mov eax, [0xd0000020]
        mov dx, 0x3ff
        mov al, 0x5a
        out dx, al
        in al, dx
        xor al, 0x5a
        out 0xf4, al
        hlt
"""


def test_data_is_what_the_guest_wrote_and_read(call: Call, tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "events"
    image.write_bytes(pvh(code=assemble(ACCESSES)))
    assert call("--unknown-io=ignore", f"--events={path}", image).returncode == 0
    seen = [
        (event.get("port", event.get("gpa")), event.is_write, event.size, event.data, event.get("device"))
        for event in events.read(path)
        if event.kind == "exit"
    ]
    assert seen == [
        (0x80, 1, 1, "11", None),
        (0x80, 1, 2, "1122", None),
        (0x80, 1, 4, "11223344", None),
        (0xD0000000, 1, 1, "11", None),
        (0xD0000003, 1, 2, "1122", None),
        (0xD0000010, 1, 4, "11223344", None),
        (0x3F, 0, 1, "ff", None),
        (0xD0000020, 0, 4, "ffffffff", None),
        (0x3FF, 1, 1, "5a", "com1"),
        (0x3FF, 0, 1, "5a", "com1"),
        (0xF4, 1, 1, "00", "exit"),
    ]


def test_an_image_of_any_name_keeps_the_record_valid(call: Call, guest: Guest, tmp_path: Path) -> None:
    image = os.fsencode(tmp_path) + b'/we"ird\\\n\x01\xc3\xa9\xff'
    Path(os.fsdecode(image)).write_bytes(guest("hello").image.read_bytes())
    path = tmp_path / "events"
    assert call(f"--events={path}", image).returncode == 0
    start = json.loads(path.read_text(encoding="ascii").splitlines()[0])
    assert start["image"].encode("latin-1") == image


def test_without_symbols_there_is_none(call: Call, tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "events"
    image.write_bytes(pvh())
    assert call(f"--events={path}", image).returncode == 0
    assert {event.symbol for event in events.read(path) if event.kind == "exit"} == {""}


def test_the_record_of_a_killed_vmm_has_no_end(vmm: Path, guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "events"
    with started(vmm, f"--events={path}", "--append=case=chatter", guest("devices").image) as process:
        size = 0
        while size < 2000:
            part = process.stdout.read(2000 - size)
            assert part, "the VMM has ended by itself"
            size += len(part)
        process.kill()
        process.stdout.read()
    record = events.read(path)
    assert record[0].kind == "start"
    assert "end" not in {event.kind for event in record}
    assert [event.seq for event in record] == list(range(len(record)))
    assert len(record) > 1000
