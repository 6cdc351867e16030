"""Images made byte by byte: ELF files of both classes, notes, and Multiboot headers, right or wrong."""

import functools
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# ELF, "Program Header" and "ELF Header".
PT_LOAD, PT_NOTE = 1, 4
EM_386, EM_X86_64 = 3, 62
EHDR = {32: struct.Struct("<16sHHIIIIIHHHHHH"), 64: struct.Struct("<16sHHIQQQIHHHHHH")}
EHDR_FIELDS = (
    "e_ident e_type e_machine e_version e_entry e_phoff e_shoff e_flags "
    "e_ehsize e_phentsize e_phnum e_shentsize e_shnum e_shstrndx"
).split()
PHDR = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}
PHDR_FIELDS = {
    32: "p_type p_offset p_vaddr p_paddr p_filesz p_memsz p_flags p_align".split(),
    64: "p_type p_flags p_offset p_vaddr p_paddr p_filesz p_memsz p_align".split(),
}

# Where the VMM of include/machine.h and include/pvh.h looks.
ENTRY_GPA = 0x100000
ENTRY_NOTE_TYPE, MACHINE_NOTE_TYPE = 18, 1
MACHINE_FIELDS = "version memory_mib irqchip devices unknown_io".split()


@dataclass
class Segment:
    """A program header and the bytes it describes. fields: members that shall say something else."""

    data: bytes
    gpa: int = ENTRY_GPA
    kind: int = PT_LOAD
    fields: dict[str, int] = field(default_factory=dict)


def elf(*segments: Segment, bits: int = 64, **fields: int | bytes) -> bytes:
    """An ELF file. fields: members of the ELF header that shall say something else."""
    ehdr, phdr = EHDR[bits], PHDR[bits]
    headers = b""
    data = b""
    data_at = ehdr.size + phdr.size * len(segments)
    for segment in segments:
        members = {
            "p_type": segment.kind,
            "p_offset": data_at + len(data),
            "p_vaddr": segment.gpa,
            "p_paddr": segment.gpa,
            "p_filesz": len(segment.data),
            "p_memsz": len(segment.data),
            "p_flags": 7,
            "p_align": 4,
        }
        members |= segment.fields
        headers += phdr.pack(*(members[name] for name in PHDR_FIELDS[bits]))
        data += segment.data + bytes(-len(segment.data) % 8)
    ident: dict[str, int | bytes] = {
        "e_ident": bytes([0x7F, *b"ELF", bits // 32, 1, 1]),
        "e_type": 2,
        "e_machine": EM_X86_64 if bits == 64 else EM_386,
        "e_version": 1,
        "e_entry": ENTRY_GPA,
        "e_phoff": ehdr.size,
        "e_shoff": 0,
        "e_flags": 0,
        "e_ehsize": ehdr.size,
        "e_phentsize": phdr.size,
        "e_phnum": len(segments),
        "e_shentsize": 0,
        "e_shnum": 0,
        "e_shstrndx": 0,
    }
    ident |= fields
    return ehdr.pack(*(ident[name] for name in EHDR_FIELDS)) + headers + data


def note(name: bytes, kind: int, descriptor: bytes, align: int = 4, **sizes: int) -> bytes:
    """An ELF note. sizes: namesz and descsz that shall say something else."""
    namesz = sizes.get("namesz", len(name) + 1)
    head = struct.pack("<III", namesz, sizes.get("descsz", len(descriptor)), kind) + name + b"\0"
    head += bytes(-len(head) % align)
    return head + descriptor + bytes(-len(descriptor) % align)


def entry_note(gpa: int = ENTRY_GPA) -> bytes:
    return note(b"Xen", ENTRY_NOTE_TYPE, struct.pack("<I", gpa))


def machine_note(**members: int) -> bytes:
    """The machine note, as MACHINE() writes it: 16 MiB and COM1, but for these members."""
    machine = dict.fromkeys(MACHINE_FIELDS, 0) | {"version": 1, "memory_mib": 16, "devices": 1} | members
    return note(b"kvmlab", MACHINE_NOTE_TYPE, struct.pack("<5I", *(machine[name] for name in MACHINE_FIELDS)))


def notes(data: bytes, **fields: int) -> Segment:
    return Segment(data, gpa=0, kind=PT_NOTE, fields=fields)


def pvh(*more: Segment, code: bytes = b"", note_data: bytes = b"", bits: int = 64, **fields: int | bytes) -> bytes:
    """A good image that prints "pvh" and ends with success, or runs this code; with more segments."""
    return elf(Segment(code or assemble(HELLO)), notes(note_data or entry_note()), *more, bits=bits, **fields)


@functools.cache
def assemble(source: str) -> bytes:
    """Machine code, by nasm. It is entered in 32-bit protected mode, at ENTRY_GPA unless `org` differs."""
    with tempfile.TemporaryDirectory() as scratch:
        code, out = Path(scratch) / "code.asm", Path(scratch) / "code.bin"
        org = "" if "org " in source else f"org {ENTRY_GPA}\n"
        code.write_text(f"bits 32\n{org}{source}")
        subprocess.run(["nasm", "-f", "bin", "-o", out, code], check=True)
        return out.read_bytes()


# Print the text at esi; end the run with al.
PRINT = """
        mov dx, 0x3f8
%%next: lodsb
        test al, al
        jz %%done
        out dx, al
        jmp %%next
%%done:
"""
MACROS = f"%macro print 0\n{PRINT}%endmacro\n%macro leave_with 1\n mov al, %1\n out 0xf4, al\n hlt\n%endmacro\n"

HELLO = f"""{MACROS}
        mov esi, text
        print
        leave_with 0
text:   db "pvh", 10, 0
"""

# Multiboot Specification 0.6.96, "The layout of Multiboot header".
MULTIBOOT_MAGIC = 0x1BADB002
VIDEO_MODE, LATER_FEATURE, ADDRESSES = 1 << 2, 1 << 5, 1 << 16


def multiboot(flags: int = 0, *addresses: int, checksum: int | None = None) -> bytes:
    """A Multiboot header. addresses: header, load, load end, bss end, entry."""
    right = -(MULTIBOOT_MAGIC + flags) & 0xFFFFFFFF
    words = [MULTIBOOT_MAGIC, flags, right if checksum is None else checksum, *addresses]
    return struct.pack(f"<{len(words)}I", *words)


# "Machine state" and "Boot information format": prints the command line if all is as specified. The
# bytes after the code count as bss, which the loader must have cleared.
MULTIBOOT_KERNEL = f"""{MACROS}
        cmp eax, 0x2badb002
        jne wrong
        test dword [ebx], 1 << 2        ; flags: there is a command line
        jz wrong
        test dword [ebx], 1 << 6        ; flags: there is a memory map
        jz wrong
        mov edi, [ebx + 48]             ; mmap_addr: size, base, length, type
        cmp dword [edi], 20
        jne wrong
        cmp dword [edi + 20], 1
        jne wrong
        mov eax, [ebx + 8]              ; mem_upper: KiB above 1 MiB
        add eax, 1024
        shl eax, 10
        cmp eax, [edi + 12]
        jne wrong
        mov esi, hello
        print
        mov esi, [ebx + 16]             ; cmdline
        print
        leave_with 0
wrong:  leave_with 1
hello:  db "multiboot ", 0
"""


def multiboot_elf(header: bytes | None = None, bits: int = 32) -> bytes:
    """A 32-bit ELF kernel with a Multiboot header before its code."""
    header = multiboot() if header is None else header
    code = assemble(f"org {ENTRY_GPA + len(header)}\n{MULTIBOOT_KERNEL}")
    return elf(Segment(header + code), bits=bits, e_entry=ENTRY_GPA + len(header))


def multiboot_flat(before: bytes = b"", **addresses: int) -> bytes:
    """A flat Multiboot kernel behind these bytes; addresses: members of its header that shall differ."""
    at = ENTRY_GPA + len(before)
    code = assemble(f"org {at + 32}\n{MULTIBOOT_KERNEL}")
    members = {"header": at, "load": ENTRY_GPA, "load_end": 0, "bss_end": 0, "entry": at + 32} | addresses
    return before + multiboot(ADDRESSES, *members.values()) + code
