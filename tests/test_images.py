"""Any file given as an image either runs or gets one line and status 5."""

import os
import random
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from images import (
    ENTRY_GPA,
    HELLO,
    LATER_FEATURE,
    VIDEO_MODE,
    Segment,
    assemble,
    elf,
    entry_note,
    machine_note,
    multiboot,
    multiboot_elf,
    multiboot_flat,
    note,
    notes,
    pvh,
)
from support import Call, Guest, one_line

MIB = 1 << 20
BOOT_DATA_GPA, BOOT_DATA_END = 0x6000, 0x8000
PVH_OUTPUT, MULTIBOOT_OUTPUT = b"pvh\n", b"multiboot seed=7 quiet"
LONG_NOTE = note(b"Linux", 257, bytes(100))


def data(gpa: int, size: int = 16, **fields: int) -> Segment:
    return Segment(bytes(size), gpa, fields=fields)


GOOD: dict[str, tuple[Callable[[], bytes], bytes]] = {
    "ELF64 with an entry note": (pvh, PVH_OUTPUT),
    "ELF32 with an entry note": (lambda: pvh(bits=32), PVH_OUTPUT),
    "8-byte entry note": (lambda: pvh(note_data=note(b"Xen", 18, struct.pack("<Q", ENTRY_GPA))), PVH_OUTPUT),
    "entry note behind others": (lambda: pvh(note_data=LONG_NOTE + machine_note() + entry_note()), PVH_OUTPUT),
    "notes aligned to 8": (
        lambda: elf(
            Segment(assemble(HELLO)),
            notes(note(b"Linux", 1, b"12345", align=8) + note(b"Xen", 18, struct.pack("<Q", ENTRY_GPA), 8), p_align=8),
        ),
        PVH_OUTPUT,
    ),
    "entry note in the second note segment": (
        lambda: elf(Segment(assemble(HELLO)), notes(LONG_NOTE), notes(entry_note())),
        PVH_OUTPUT,
    ),
    "segments that touch": (lambda: pvh(data(0x300000, 0x1000), data(0x301000), data(0x2FFFF0)), PVH_OUTPUT),
    "segments on both sides of the boot data": (
        lambda: pvh(data(BOOT_DATA_GPA - 16), data(BOOT_DATA_END)),
        PVH_OUTPUT,
    ),
    "a segment up to the last byte of memory": (
        lambda: pvh(data(16 * MIB - 16), note_data=machine_note() + entry_note()),
        PVH_OUTPUT,
    ),
    "an empty segment anywhere": (lambda: pvh(data(1 << 63, 0)), PVH_OUTPUT),
    "a machine note that is cut off, which is as good as none": (
        lambda: pvh(note_data=entry_note() + machine_note(memory_mib=3000)[:-8]),
        PVH_OUTPUT,
    ),
    "Multiboot in ELF32": (multiboot_elf, MULTIBOOT_OUTPUT),
    "Multiboot with what is understood": (lambda: multiboot_elf(multiboot(3)), MULTIBOOT_OUTPUT),
    "Multiboot in a flat file": (multiboot_flat, MULTIBOOT_OUTPUT),
    "Multiboot header behind other bytes": (lambda: multiboot_flat(bytes(512)), MULTIBOOT_OUTPUT),
    "Multiboot header at the last place": (lambda: multiboot_flat(bytes(8192 - 12)), MULTIBOOT_OUTPUT),
    "Multiboot header behind one of a wrong checksum": (
        lambda: multiboot_flat(multiboot(0, checksum=1)),
        MULTIBOOT_OUTPUT,
    ),
    "Multiboot load end before the end of the file": (
        lambda: multiboot_flat(load_end=ENTRY_GPA + len(multiboot_flat())) + bytes(64 * MIB),
        MULTIBOOT_OUTPUT,
    ),
    "Multiboot bss up to the end of memory": (lambda: multiboot_flat(bss_end=64 * MIB), MULTIBOOT_OUTPUT),
    "Multiboot with addresses in ELF64": (
        # The header is in the segment's bytes, so the file's first 120 bytes stand before it.
        lambda: elf(Segment(multiboot_flat(header=ENTRY_GPA))),
        MULTIBOOT_OUTPUT,
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_runs(name: str, call: Call, tmp_path: Path) -> None:
    make, output = GOOD[name]
    image = tmp_path / "image"
    image.write_bytes(make())
    done = call("--seed=7", "--append=quiet", image)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, b"")


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"#!/bin/sh\necho not an image\n" * 100, "not an image"),
    "one byte": (lambda: b"\x7f", "not an image"),
    "ELF magic alone": (lambda: pvh()[:8], "not an image"),
    "truncated ELF64 header": (lambda: pvh()[:63], "ELF header is truncated"),
    "truncated ELF32 header": (lambda: pvh(bits=32)[:51], "ELF header is truncated"),
    "ELF32 of a 64-bit machine": (lambda: pvh(bits=32, e_machine=62), "another machine"),
    "ELF64 of a 32-bit machine": (lambda: pvh(e_machine=3), "another machine"),
    "aarch64": (lambda: pvh(e_machine=183), "another machine"),
    "big-endian": (lambda: pvh(e_ident=b"\x7fELF\2\2\1"), "another machine"),
    "ELF of class 0": (lambda: pvh(bits=32, e_ident=b"\x7fELF\0\1\1"), "another machine"),
    "ELF of class 3": (lambda: pvh(bits=32, e_ident=b"\x7fELF\3\1\1"), "another machine"),
    "truncated program headers": (lambda: pvh()[:150], "program headers are truncated"),
    "truncated program headers of ELF32": (lambda: pvh(bits=32)[:100], "program headers are truncated"),
    "program headers behind the file": (lambda: pvh(e_phoff=10_000), "program headers are truncated"),
    "program headers near 2^64": (lambda: pvh(e_phoff=(1 << 64) - 8), "program headers are truncated"),
    "program headers that would wrap around": (lambda: pvh(e_phoff=(1 << 64) - 56), "program headers are truncated"),
    "program headers near 2^32": (lambda: pvh(bits=32, e_phoff=(1 << 32) - 8), "program headers are truncated"),
    "65 program headers": (lambda: pvh(e_phnum=65), "absurd"),
    "65535 program headers": (lambda: pvh(e_phnum=0xFFFF), "absurd"),
    "no program headers": (lambda: pvh(e_phnum=0), "no entry note"),
    "no segment to load": (lambda: elf(notes(entry_note())), "no loadable segment"),
    "truncated segment": (lambda: pvh(data(0x300000, 4096))[:-1], "segment 1 is truncated"),
    "segment behind the file": (lambda: pvh(data(0x300000, p_offset=1 << 40)), "segment 1 is truncated"),
    "segment near 2^64 of the file": (lambda: pvh(data(0x300000, p_offset=(1 << 64) - 8)), "segment 1 is truncated"),
    "segment of 2^64 - 1 bytes": (
        lambda: pvh(data(0x300000, p_filesz=(1 << 64) - 1, p_memsz=(1 << 64) - 1)),
        "segment 1 is truncated",
    ),
    "file size above memory size": (lambda: pvh(data(0x300000, p_memsz=8)), "larger in the file than in memory"),
    "memory size of 0": (lambda: pvh(data(0x300000, p_memsz=0)), "larger in the file than in memory"),
    "the same segment twice": (lambda: pvh(data(0x300000), data(0x300000)), "segments 1 and 2 overlap"),
    "segments that overlap in one byte": (
        lambda: pvh(data(0x300000, 4096), data(0x300FFF)),
        "segments 1 and 2 overlap",
    ),
    "bss that overlaps": (lambda: pvh(data(0x0FF000, 16, p_memsz=4097)), "segments 0 and 1 overlap"),
    "segment over the boot data": (lambda: pvh(data(BOOT_DATA_GPA + 0x800)), "boot data"),
    "segment into the boot data": (lambda: pvh(data(BOOT_DATA_GPA - 15)), "boot data"),
    "segment from the boot data": (lambda: pvh(data(BOOT_DATA_END - 1)), "boot data"),
    "segment around the boot data": (lambda: pvh(data(0, 16, p_memsz=0x10000)), "boot data"),
    "segment behind memory": (lambda: pvh(data(64 * MIB)), "outside the 64 MiB"),
    "segment over the end of memory": (lambda: pvh(data(64 * MIB - 15)), "outside the 64 MiB"),
    "bss over the end of memory": (lambda: pvh(data(0x300000, p_memsz=64 * MIB)), "outside the 64 MiB"),
    "segment that wraps around 2^64": (lambda: pvh(data((1 << 64) - 4096, p_memsz=8192)), "outside the 64 MiB"),
    "segment of all of 2^64": (lambda: pvh(data(0x300000, p_memsz=(1 << 64) - 1)), "outside the 64 MiB"),
    "segment behind the memory of its note": (
        lambda: pvh(data(16 * MIB), note_data=machine_note() + entry_note()),
        "outside the 16 MiB",
    ),
    "no entry note": (lambda: elf(Segment(assemble(HELLO)), notes(LONG_NOTE)), "no entry note"),
    "entry note of another name": (lambda: pvh(note_data=note(b"Xem", 18, bytes(4))), "no entry note"),
    "entry note of another type": (lambda: pvh(note_data=note(b"Xen", 17, bytes(4))), "no entry note"),
    "entry note of 0 bytes": (lambda: pvh(note_data=note(b"Xen", 18, b"")), "entry note is damaged"),
    "entry note of 2 bytes": (lambda: pvh(note_data=note(b"Xen", 18, bytes(2))), "entry note is damaged"),
    "entry note of 12 bytes": (lambda: pvh(note_data=note(b"Xen", 18, bytes(12))), "entry note is damaged"),
    "note name of 2^32 - 1 bytes": (
        lambda: pvh(note_data=note(b"Xen", 18, bytes(4), namesz=0xFFFFFFFF)),
        "no entry note",
    ),
    "note of 2^32 - 1 bytes": (lambda: pvh(note_data=note(b"Xen", 18, bytes(4), descsz=0xFFFFFFFF)), "no entry note"),
    "note that hides the next": (
        lambda: pvh(note_data=note(b"Linux", 1, bytes(4), descsz=200) + entry_note()),
        "no entry note",
    ),
    "note name without an end": (lambda: pvh(note_data=note(b"Xen", 18, b"", namesz=3)), "no entry note"),
    "notes behind the file": (
        lambda: elf(Segment(assemble(HELLO)), notes(entry_note(), p_offset=1 << 63)),
        "no entry note",
    ),
    "notes cut off by the end of the file": (lambda: pvh()[:-6], "no entry note"),
    "entry behind memory": (lambda: pvh(note_data=entry_note(64 * MIB)), "entry point 0x4000000 lies outside"),
    "entry at 4 GiB - 1": (lambda: pvh(note_data=entry_note(0xFFFFFFFF)), "entry point 0xffffffff lies outside"),
    "entry above 4 GiB": (
        lambda: pvh(note_data=note(b"Xen", 18, struct.pack("<Q", (1 << 32) + ENTRY_GPA))),
        "entry point 0x100100000 lies outside",
    ),
    "machine note of another version": (lambda: pvh(note_data=entry_note() + machine_note(version=2)), "version"),
    "shorter machine note": (
        lambda: pvh(note_data=entry_note() + note(b"kvmlab", 1, struct.pack("<4I", 1, 16, 0, 1))),
        "version",
    ),
    "longer machine note": (
        lambda: pvh(note_data=entry_note() + note(b"kvmlab", 1, struct.pack("<6I", 1, 16, 0, 1, 0, 0))),
        "version",
    ),
    "machine without memory": (lambda: pvh(note_data=entry_note() + machine_note(memory_mib=0)), "does not have"),
    "machine of 3 GiB and 1 MiB": (
        lambda: pvh(note_data=entry_note() + machine_note(memory_mib=3073)),
        "does not have",
    ),
    "machine with another irqchip": (lambda: pvh(note_data=entry_note() + machine_note(irqchip=3)), "does not have"),
    "machine with another device": (lambda: pvh(note_data=entry_note() + machine_note(devices=7)), "does not have"),
    "machine with another bus": (lambda: pvh(note_data=entry_note() + machine_note(unknown_io=2)), "does not have"),
    "truncated Multiboot magic": (lambda: multiboot()[:11], "not an image"),
    "truncated Multiboot addresses": (lambda: multiboot_flat()[:31], "Multiboot header is truncated"),
    "Multiboot without addresses in a flat file": (lambda: multiboot() + bytes(100), "needs a 32-bit ELF"),
    "Multiboot without addresses in ELF64": (lambda: multiboot_elf(bits=64), "needs a 32-bit ELF"),
    "Multiboot checksum wrong": (lambda: multiboot(0, checksum=1) + bytes(100), "not an image"),
    "Multiboot checksum wrong in ELF32": (lambda: multiboot_elf(multiboot(0, checksum=1)), "no entry note"),
    "Multiboot header not aligned": (lambda: b"x" + multiboot_flat(), "not an image"),
    "Multiboot header too far behind": (lambda: bytes(8192 - 8) + multiboot_flat(), "not an image"),
    "Multiboot video mode": (lambda: multiboot_elf(multiboot(VIDEO_MODE)), "video mode"),
    "Multiboot feature of the future": (lambda: multiboot_elf(multiboot(LATER_FEATURE)), "later specification"),
    "Multiboot load address before the file": (lambda: multiboot_flat(load=ENTRY_GPA - 4), "outside the file"),
    "Multiboot load address behind its header": (lambda: multiboot_flat(load=ENTRY_GPA + 4), "outside the file"),
    "Multiboot load end behind the file": (lambda: multiboot_flat(load_end=ENTRY_GPA + 4096), "is truncated"),
    "Multiboot load end before its load address": (lambda: multiboot_flat(load_end=ENTRY_GPA - 4), "segment 0 is"),
    "Multiboot bss end before its load end": (
        lambda: multiboot_flat(load_end=ENTRY_GPA + 100, bss_end=ENTRY_GPA + 50),
        "larger in the file than in memory",
    ),
    "Multiboot bss end before its load address": (lambda: multiboot_flat(bss_end=1), "segment 0"),
    "Multiboot load address behind memory": (
        lambda: multiboot_flat(header=0xFFF00000, load=0xFFF00000),
        "outside the 64 MiB",
    ),
    "Multiboot over the boot data": (
        lambda: multiboot_flat(header=BOOT_DATA_GPA, load=BOOT_DATA_GPA),
        "boot data",
    ),
    "Multiboot entry behind memory": (lambda: multiboot_flat(entry=64 * MIB), "entry point 0x4000000 lies outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_gets_one_line_and_status_5(name: str, call: Call, tmp_path: Path) -> None:
    make, phrase = BAD[name]
    image = tmp_path / "image"
    image.write_bytes(make())
    done = call(image)
    assert (done.returncode, done.stdout) == (5, b""), done.stderr
    one_line(done.stderr, str(image), phrase)


def test_an_image_that_is_not_there_gets_one_line_and_status_5(call: Call, tmp_path: Path) -> None:
    done = call(tmp_path / "nothing")
    assert done.returncode == 5
    one_line(done.stderr, "nothing", "No such file or directory")


def test_a_folder_gets_one_line_and_status_5(call: Call, tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.returncode == 5
    one_line(done.stderr, str(tmp_path), "not a file")


def test_a_pipe_gets_one_line_and_status_5(call: Call) -> None:
    done = call("/dev/stdin", input=pvh())
    assert done.returncode == 5
    one_line(done.stderr, "not a file")


def test_an_unreadable_image_gets_one_line_and_status_5(call: Call, vmm: Path) -> None:
    """Permissions do not bind root, so root runs the VMM as somebody else, who needs a copy of it."""
    as_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as folder:
        image = Path(folder) / "image"
        image.write_bytes(pvh())
        image.chmod(0)
        Path(folder).chmod(0o755)
        copy = shutil.copy(vmm, folder)
        done = call(image, executable=copy, **({"user": 65534} if as_root else {}))
    assert done.returncode == 5
    one_line(done.stderr, "image", "Permission denied")


# ---- symbols make messages better, and nothing else ----

SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
SYMTAB, STRTAB = 2, 3


class Sections:
    """The section headers of an ELF64 file, to be damaged."""

    def __init__(self, image: bytes) -> None:
        self.bytes = bytearray(image)
        (self.at,) = struct.unpack_from("<Q", image, 0x28)
        (self.count,) = struct.unpack_from("<H", image, 0x3C)
        kinds = [SECTION.unpack_from(image, self.at + SECTION.size * i)[1] for i in range(self.count)]
        self.symbols = self.at + SECTION.size * kinds.index(SYMTAB)
        self.strings = self.at + SECTION.size * SECTION.unpack_from(image, self.symbols)[6]

    def set(self, section: int, field: str, value: int) -> bytes:
        place, code = {"offset": (0x18, "<Q"), "size": (0x20, "<Q"), "link": (0x28, "<I")}[field]
        struct.pack_into(code, self.bytes, section + place, value)
        return bytes(self.bytes)

    def set_header(self, place: int, code: str, value: int) -> bytes:
        struct.pack_into(code, self.bytes, place, value)
        return bytes(self.bytes)

    def set_names(self, name: int) -> bytes:
        offset, size = SECTION.unpack_from(self.bytes, self.symbols)[4:6]
        for at in range(offset, offset + size, SYMBOL.size):
            struct.pack_into("<I", self.bytes, at, name)
        return bytes(self.bytes)

    def set_last_letter(self, letter: int) -> bytes:
        offset, size = SECTION.unpack_from(self.bytes, self.strings)[4:6]
        self.bytes[offset + size - 1] = letter
        return bytes(self.bytes)


DAMAGE: dict[str, Callable[[Sections], bytes]] = {
    "section headers behind the file": lambda s: s.set_header(0x28, "<Q", len(s.bytes)),
    "section headers near 2^64": lambda s: s.set_header(0x28, "<Q", (1 << 64) - 64),
    "no section headers": lambda s: s.set_header(0x3C, "<H", 0),
    "cut off": lambda s: bytes(s.bytes[: s.at + SECTION.size]),
    "symbols behind the file": lambda s: s.set(s.symbols, "offset", len(s.bytes)),
    "symbols near 2^64": lambda s: s.set(s.symbols, "offset", (1 << 64) - 24),
    "no symbols": lambda s: s.set(s.symbols, "size", 0),
    "2^64 - 1 bytes of symbols": lambda s: s.set(s.symbols, "size", (1 << 64) - 1),
    "strings of another section": lambda s: s.set(s.symbols, "link", 0xFFFFFFFF),
    "strings behind the file": lambda s: s.set(s.strings, "offset", len(s.bytes)),
    "2^64 - 1 bytes of strings": lambda s: s.set(s.strings, "size", (1 << 64) - 1),
    "no strings": lambda s: s.set(s.strings, "size", 0),
    "strings without an end": lambda s: s.set_last_letter(ord("x")),
    "names behind the strings": lambda s: s.set_names(0xFFFFFFFF),
    "names of nothing": lambda s: s.set_names(0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_symbol_table_is_as_good_as_none(name: str, call: Call, guest: Guest, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(DAMAGE[name](Sections(guest("crash").image.read_bytes())))
    done = call("--append=case=undefined_instruction", image)
    assert done.returncode == 3
    first = done.stderr.decode().partition("\n")[0]
    assert re.search(r"#UD \(invalid opcode\), error code 0x0 at rip 0x1\w+$", first), "no name behind the address"


# ---- whatever else a file may contain ----

MUTANTS = 300
FUZZ_SEED = 20260101
FUZZ_TIME_LIMIT = 0.2


def mutate(random_: random.Random, image: bytes) -> bytes:
    """A few changed bytes, mostly where the headers are; or the end cut off."""
    if random_.random() < 0.15:
        return image[: random_.randrange(len(image))]
    mutant = bytearray(image)
    for _ in range(random_.randint(1, 4)):
        in_headers = random_.random() < 0.9
        at = random_.randrange(min(240, len(image)) if in_headers else len(image))
        mutant[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, mutant[at] ^ 1 << random_.randrange(8)])
    return bytes(mutant)


def test_any_damage_ends_with_a_status_and_in_time(call: Call, guest: Guest, tmp_path: Path) -> None:
    random_ = random.Random(FUZZ_SEED)
    good = [
        pvh(data(0x300000, 64), note_data=machine_note() + LONG_NOTE + entry_note()),
        pvh(bits=32),
        multiboot_elf(),
        multiboot_flat(bytes(64)),
        guest("hello").image.read_bytes(),
    ]
    image = tmp_path / "image"
    seen = dict.fromkeys(range(6), 0)
    for number in range(MUTANTS):
        image.write_bytes(mutate(random_, random_.choice(good)))
        started = time.monotonic()
        done = call(f"--time-limit={FUZZ_TIME_LIMIT}", image)
        took = time.monotonic() - started
        what = f"mutant {number} of seed {FUZZ_SEED}: {done}"
        assert done.returncode in seen, what
        assert took < FUZZ_TIME_LIMIT + 10, f"{what}, after {took:.1f} s"
        if done.returncode == 5:
            one_line(done.stderr, "vmm: ")
        seen[done.returncode] += 1
    # Neither all too harmless nor all refused at the door.
    assert seen[0] > MUTANTS / 20, seen
    assert seen[5] > MUTANTS / 4, seen
