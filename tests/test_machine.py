"""The life of a run: how the machine looks at entry, the exit status, signals, and a host that refuses."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from images import assemble, pvh
from support import Call, Guest, one_line, only_plain, started, wait_until_asleep

from kvmlab import events

# ---- entry ----

# Registers and boot data, one 32-bit write to port 0x80 each ("x86/HVM direct boot ABI").
SAY_ENTRY_STATE = """
%macro say 1
        mov eax, %1
        out 0x80, eax
%endmacro
        mov esp, 0x90000
        pushf
        say [esp]
        say cr0
        say cr4
        say [ebx]                       ; magic
        say [ebx + 4]                   ; version
        say [ebx + 8]                   ; flags
        say [ebx + 12]                  ; modules
        say [ebx + 32]                  ; ACPI
        mov esi, [ebx + 40]             ; memory map
        say [ebx + 48]                  ; its entries
        say [esi]                       ; base
        say [esi + 8]                   ; size
        say [esi + 16]                  ; type
        mov esi, [ebx + 24]             ; command line
        say [esi]
        mov ecx, 0xc0000080             ; EFER
        rdmsr
        out 0x80, eax
        mov dword [0x300000], 0x5aa5    ; data segments are flat and writable
        mov esi, 0x300000
        mov edi, 0x300010
        movsd
        say [ss:0x300010]
        mov al, 0
        out 0xf4, al
        hlt
"""


def test_the_machine_is_entered_as_pvh_demands(call: Call, tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "events"
    image.write_bytes(pvh(code=assemble(SAY_ENTRY_STATE)))
    assert call("--unknown-io=ignore", "--memory=9", f"--events={path}", image).returncode == 0
    said = [event for event in events.read(path) if event.get("port") == 0x80]
    assert [int.from_bytes(bytes.fromhex(event.data), "little") for event in said] == [
        0x00000002,  # RFLAGS: interrupts off, nothing but the bit that is always 1
        0x00000011,  # CR0: PE and ET; paging off
        0,  # CR4
        0x336EC578,
        1,
        0,
        0,
        0,
        1,
        0,
        9 << 20,
        1,  # RAM
        int.from_bytes(b"seed", "little"),
        0,  # EFER: not in long mode
        0x5AA5,
    ]


def test_memory_is_zero_at_first_but_for_image_and_boot_data(call: Call, tmp_path: Path) -> None:
    code = """
        mov edi, 0x8000
        mov ecx, (0x100000 - 0x8000) / 4
        xor eax, eax
        repe scasd
        setne al
        out 0xf4, al
        hlt
    """
    image = tmp_path / "image"
    image.write_bytes(pvh(code=assemble(code)))
    assert call(image).returncode == 0


@pytest.mark.parametrize(("irqchip", "has_apic"), [("none", 0), ("split", 1), ("kernel", 1)])
def test_cpuid_says_whether_there_is_a_local_apic(irqchip: str, has_apic: int, call: Call, tmp_path: Path) -> None:
    """SDM 3A "Presence of the Local APIC": CPUID.01H:EDX[9]."""
    code = """
        mov eax, 1
        cpuid
        shr edx, 9
        and edx, 1
        mov eax, edx
        out 0xf4, al
        hlt
    """
    image = tmp_path / "image"
    image.write_bytes(pvh(code=assemble(code)))
    assert call(f"--irqchip={irqchip}", image).returncode == has_apic


# ---- exit status ----

STATUS: dict[str, tuple[int, str, str, list[str]]] = {
    "success": (0, "crash", "halt_with_interrupts_off", []),
    "failure": (1, "crash", "exit_with_7", []),
    "a machine that lacks something": (77, "crash", "lack_something", []),
    "a part not written": (1, "crash", "not_written", []),
    "usage": (2, "crash", "halt_with_interrupts_off", ["--memory=0"]),
    "panic": (3, "crash", "give_up", []),
    "exception": (3, "crash", "undefined_instruction", []),
    "triple fault": (3, "crash", "empty_idt", []),
    "unknown access": (3, "crash", "read_unknown_port", []),
    "emulation failure": (3, "crash", "emulate_x87", []),
    "time limit": (4, "crash", "hang_with_interrupts_off", ["--time-limit=0.1"]),
    "endless halt": (4, "crash", "halt_with_interrupts_on", []),
    "no KVM": (5, "crash", "halt_with_interrupts_off", ["--kvm=/nonexistent"]),
}


@pytest.mark.parametrize("name", STATUS)
def test_the_exit_status_says_how_it_went(name: str, call: Call, guest: Guest) -> None:
    status, image, case, options = STATUS[name]
    done = call(*options, f"--append=case={case}", guest(image).image)
    assert done.returncode == status, done
    if status:
        assert done.stderr.startswith(b"vmm: "), "what happened stands in the first line"


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("case", "options"),
    [("hang_with_interrupts_off", []), ("halt_with_interrupts_on", ["--irqchip=kernel"])],
    ids=["in a loop", "in a halt inside KVM"],
)
def test_a_signal_ends_the_run(
    number: signal.Signals, case: str, options: list[str], vmm: Path, guest: Guest, tmp_path: Path
) -> None:
    record = tmp_path / "events"
    arguments = [*options, f"--events={record}", f"--append=case={case}"]
    with started(vmm, "--time-limit=30", *arguments, guest("crash").image) as process:
        assert process.stdout.readline().endswith(b"ing\n")
        if "halt" in case:
            wait_until_asleep(process.pid)
        sent = time.monotonic()
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait() == 128 + number
    assert time.monotonic() - sent < 10
    one_line(errors, f"ended by signal {number:d} at rip 0x")
    assert re.search(r" \(\w+\+0x\w+\)$", errors.decode()), "the place has a name"
    end = events.read(record)[-1]
    assert (end.kind, end.status, end.how) == ("end", 128 + number, "signal")


def test_a_console_that_nobody_reads_ends_at_the_time_limit(vmm: Path, guest: Guest) -> None:
    arguments = ["--time-limit=1", "--append=case=chatter"]
    with started(vmm, *arguments, guest("devices").image, limit=15, pipesize=4096) as process:
        errors = process.stderr.read()
        assert process.wait() == 4
    one_line(errors, "nobody reads the console")


# ---- a host that refuses ----

# How many files may be open, from just those that are at the start, and who is the first to want more.
FILES = {4: "KVM_CREATE_VM failed", 5: "KVM_CREATE_VCPU failed", 6: "cannot write the events"}


@only_plain  # the sanitizers open files of their own
@pytest.mark.parametrize("files", FILES)
def test_a_host_without_files_gets_one_line_and_status_5(files: int, vmm: Path, guest: Guest, tmp_path: Path) -> None:
    script = f'ulimit -n {files}; exec "$0" "$@"'
    arguments = [f"--events={tmp_path}/events", str(guest("hello").image)]
    done = subprocess.run(["sh", "-c", script, vmm, *arguments], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (5, b"")
    one_line(done.stderr, FILES[files])
    assert re.search(rb"Too many open files|No file descriptors available", done.stderr)  # glibc, musl


@only_plain  # the sanitizers reserve address space beyond any limit
def test_a_host_without_memory_gets_one_line_and_status_5(vmm: Path, guest: Guest) -> None:
    script = 'ulimit -v 1000000; exec "$0" "$@"'
    arguments = ["--memory=3072", str(guest("hello").image)]
    done = subprocess.run(["sh", "-c", script, vmm, *arguments], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (5, b"")
    one_line(done.stderr, "cannot get 3072 MiB for the guest", "try a smaller --memory")
