"""gdb in front of a guest: real gdb in batch mode, and packets that no gdb would send."""

import random
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Guest, Process, one_line, started, wait_until_asleep

from kvmlab.engine import ENGINES, Engine
from kvmlab.machine import Job
from kvmlab.plugin import ROOT
from kvmlab.runner import Built

Gdb = Callable[..., "Session"]
RIP = re.compile(r"^rip +(0x[0-9a-f]+)", re.MULTILINE)


class Session:
    """What gdb has shown, and what the VMM has left."""

    def __init__(self, shown: str, status: int, output: str, errors: str) -> None:
        self.shown, self.status, self.output, self.errors = shown, status, output, errors

    def __str__(self) -> str:
        return f"{self.shown}{self.output}{self.errors}(status {self.status})"


def waiting(process: Process) -> None:
    said = process.stderr.readline()
    assert b"vmm: waiting for gdb" in said, said


@pytest.fixture
def gdb(guest: Guest, tmp_path: Path) -> Gdb:
    """Run these commands in gdb, with a guest of tests/guests that stands before its first instruction."""

    def function(name: str, *commands: str, case: str = "", options: tuple[str, ...] = ()) -> Session:
        built = guest(name)
        at = tmp_path / "socket"
        first = ["set confirm off", "set width 0", f"target remote {at}"]
        given = [word for command in (*first, *commands) for word in ("-ex", command)]
        append = [f"--append=case={case}"] if case else []
        with started(built.vmm, f"--gdb={at}", *append, *options, built.image) as vmm:
            waiting(vmm)
            done = subprocess.run(
                ["gdb", "-nx", "-batch", *given, built.image],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                check=False,
            )
            output, errors = vmm.communicate(timeout=20)
        return Session(done.stdout, vmm.returncode, output.decode(), errors.decode())

    return function


# ---- what a student does ----


def test_a_breakpoint_shows_callers_and_arguments(gdb: Gdb) -> None:
    seen = gdb("crash", "break panic_at", "continue", "backtrace", "up", "kill", case="give_up")
    assert re.search(r"^Breakpoint 1, panic_at \(kind=.*message=.*\"out of ideas\"", seen.shown, re.MULTILINE), seen
    assert re.search(r"^#1 .* in give_up \(\)", seen.shown, re.MULTILINE), seen
    assert re.search(r"^#3 .*guest_main \(\)", seen.shown, re.MULTILINE), seen


def test_registers_are_the_vcpus(gdb: Gdb) -> None:
    registers = ("info registers cs", "info registers cr0", "info registers efer", "print/x $cr3", "print &boot_pml4")
    seen = gdb("hello", "break guest_main", "continue", *registers, "kill")
    assert re.search(r"^cs +0x8 ", seen.shown, re.MULTILINE), seen
    assert re.search(r"^cr0 .*\[ PE .*PG \]", seen.shown, re.MULTILINE), seen
    assert re.search(r"^efer .*\[ LME LMA NXE \]", seen.shown, re.MULTILINE), seen
    root = re.search(r"^\$1 = (0x[0-9a-f]+)$", seen.shown, re.MULTILINE)
    assert root, seen
    assert seen.shown.count(root[1]) == 2, seen


def test_a_register_can_be_written(gdb: Gdb) -> None:
    seen = gdb("crash", "break guest_exit", "continue", "set $rdi = 0", "continue", case="exit_with_7")
    assert "exited normally" in seen.shown, seen
    assert seen.status == 0, seen


def test_memory_is_read_and_written_by_gva(gdb: Gdb) -> None:
    code = ("x/1xb 0x100000", "set *(int *)0x700000 = 0x1234567", "x/1xw 0x700000", "kill")
    seen = gdb("hello", "break guest_main", "continue", *code)
    assert re.search(r"^0x100000.*:\t0x04$", seen.shown, re.MULTILINE), seen
    assert re.search(r"^0x700000:\t0x01234567$", seen.shown, re.MULTILINE), seen


def test_memory_is_found_by_the_page_tables_of_the_guest(gdb: Gdb) -> None:
    mapped = 6 << 39 | 0x5000  # by crash.c, and by no identity map
    seen = gdb("crash", "continue", f"x/1xb {mapped:#x}", "kill", case="write_read_only")
    assert re.search(rf"^{mapped:#x}:\t0x00$", seen.shown, re.MULTILINE), seen


def test_memory_that_is_not_mapped_is_said_to_be_none(gdb: Gdb) -> None:
    seen = gdb("hello", "break guest_main", "continue", "x/1xg 0x7fff00000000")
    assert "Cannot access memory at address 0x7fff00000000" in seen.shown, seen


def test_each_step_is_one_instruction(gdb: Gdb) -> None:
    """Not beyond what loads SS: the CPU takes no trap right after it."""
    steps = ["stepi", "info registers rip"] * 3
    seen = gdb("hello", "break *&'pvh_entry.long_mode'", "continue", "x/4i $pc", *steps, "kill")
    listed = re.findall(r"^(?:=> |   )(0x[0-9a-f]+) <pvh_entry", seen.shown, re.MULTILINE)
    assert len(listed) == 4, seen
    assert RIP.findall(seen.shown) == listed[1:], seen


def test_more_breakpoints_than_the_cpu_has_are_hit_or_refused_in_one_line(gdb: Gdb) -> None:
    breaks = ["break guest_main", "break guest_start", "break printf", "break guest_exit", "break panic_at"]
    seen = gdb("hello", *breaks, "continue", "kill")
    refused = "vmm: this machine's KVM stops at no more than 4 breakpoints\n" in seen.errors
    assert refused or "Breakpoint 2, guest_start" in seen.shown, seen


def test_the_guest_goes_on_to_its_end_and_gdb_hears_of_it(gdb: Gdb) -> None:
    seen = gdb("hello", "continue")
    assert "exited normally" in seen.shown, seen
    assert (seen.status, seen.output.startswith("hello from seed 0")) == (0, True), seen


def test_a_guest_without_its_gdb_goes_on(gdb: Gdb) -> None:
    seen = gdb("hello", "break guest_main", "continue", "detach")
    assert (seen.status, seen.output.startswith("hello from seed 0")) == (0, True), seen


def test_a_guest_can_be_killed(gdb: Gdb) -> None:
    seen = gdb("hello", "kill")
    assert (seen.status, seen.output) == (128 + signal.SIGKILL, ""), seen
    one_line(seen.errors, "vmm: ended: killed by gdb")


def test_a_debugging_session_has_no_time_limit(gdb: Gdb) -> None:
    seen = gdb("hello", "shell sleep 0.3", "continue", options=("--time-limit=0.1",))
    assert (seen.status, "exited normally" in seen.shown) == (0, True), seen


# ---- a guest that fails stops where it is ----

FAILS = {
    "write_unmapped": ("SIGSEGV", "write_unmapped ()", "unhandled exception #PF", 3),
    "empty_idt": ("SIGSEGV", "empty_idt ()", "triple fault", 3),
    "give_up": ("SIGABRT", "give_up ()", "message: out of ideas", 3),
    "not_written": ("SIGABRT", "not_written ()", "todo: write", 1),
    "read_unknown_port": ("SIGSEGV", "read_unknown_port ()", "where there is no device", 3),
    "halt_with_interrupts_on": ("SIGINT", "halt_with_interrupts_on ()", "the guest hangs", 4),
    "exit_with_7": ("SIGABRT", "exit_with_7 ()", "the guest reports failure 7", 1),
}


@pytest.mark.parametrize(("case", "name", "where", "why", "status"), [(case, *how) for case, how in FAILS.items()])
def test_a_guest_that_fails_stops_where_it_is(
    gdb: Gdb, case: str, name: str, where: str, why: str, status: int
) -> None:
    seen = gdb("crash", "continue", "backtrace", "echo before the report\\n", "continue", case=case)
    stop, _, end = seen.shown.partition("before the report")
    assert [text for text in (why, f"received signal {name}", where) if text not in stop] == [], seen
    assert f"exited with code {status:02}" in end, seen
    assert seen.status == status, seen


# ---- Ctrl-C ----


def test_ctrl_c_stops_a_guest_that_hangs(guest: Guest, tmp_path: Path) -> None:
    built = guest("crash")
    case = "hang_with_interrupts_off"
    at = tmp_path / "socket"
    with started(built.vmm, f"--gdb={at}", f"--append=case={case}", built.image) as vmm:
        waiting(vmm)
        with started("gdb", "-nx", "-q", "-ex", "set confirm off", built.image) as gdb:
            gdb.stdin.write(f"target remote {at}\ncontinue\nbacktrace\nkill\nquit\n".encode())
            assert vmm.stdout.readline() == b"hanging\n"
            gdb.send_signal(signal.SIGINT)
            shown, _ = gdb.communicate(timeout=20)
        assert b"received signal SIGINT" in shown, shown.decode()
        assert f"{case} ()".encode() in shown, shown.decode()
        assert vmm.wait(20) == 128 + signal.SIGKILL


# ---- packets that no gdb would send ----


class Stub:
    """The other end of the line."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.unread = b""

    def send(self, text: bytes) -> None:
        self.line.sendall(b"$%s#%02x" % (text, sum(text) & 0xFF))

    def answer(self) -> bytes:
        """The next packet; what stands between is acknowledgements."""
        while not (found := re.search(rb"\$([^#]*)#[0-9a-f]{2}", self.unread)):
            more = self.line.recv(65536)
            assert more, "the stub is gone"
            self.unread += more
        self.unread = self.unread[found.end() :]
        return found[1]

    def ask(self, text: bytes) -> bytes:
        self.send(text)
        return self.answer()


@pytest.fixture
def stopped(guest: Guest, tmp_path: Path) -> Iterator[tuple[Process, Stub]]:
    """A guest before its first instruction, and the line to the stub."""
    built: Built = guest("hello")
    at = tmp_path / "socket"
    with started(built.vmm, f"--gdb={at}", built.image) as vmm, socket.socket(socket.AF_UNIX) as line:
        waiting(vmm)
        line.connect(str(at))
        line.settimeout(20)
        yield vmm, Stub(line)


def fine(vmm: Process, stub: Stub) -> None:
    """The stub still answers, and the guest runs to its end."""
    assert stub.ask(b"?") == b"T05thread:1;"
    assert stub.ask(b"c") == b"W00"
    assert vmm.wait(20) == 0


BAD = [
    *(b"m", b"m,", b"m0", b"m0,", b"mg,1", b"m0,1x", b"m10000000000000000,1", b"mffffffffffffffff,ffffffff"),
    *(b"M", b"M0,1:", b"M0,1:0", b"M0,2:00", b"M0,1:zz", b"M0,ffffffffffffffff:00", b"Mfffffffffffff000,1:00"),
    *(b"p", b"pffffffff", b"p-1", b"P", b"P0", b"P0=", b"P0=00", b"P99=00", b"P0=zz", b"G", b"G00", b"G" + b"f" * 4000),
    *(b"Z0", b"Z0,", b"Z0,x,1", b"z0,1", b"Z1,1"),
    *(b"qXfer:features:read:target.xml:", b"qXfer:features:read:target.xml:x,1", b"qXfer:features:read:target.xml:0"),
]
UNKNOWN = [b"", b"!", b"qUnknown", b"QUnknown", b"vMustReplyEmpty", b"vCont;", b"vCont;x", b"Z9,0,1", b"X0,0:"]


def test_what_makes_no_sense_is_an_error(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    for packet in BAD:
        assert re.fullmatch(rb"E[0-9a-f]{2}", stub.ask(packet)), packet
    fine(vmm, stub)


def test_what_is_not_there_gets_the_empty_answer(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    for packet in UNKNOWN:
        assert stub.ask(packet) == b"", packet
    fine(vmm, stub)


def test_registers_that_the_cpu_would_refuse_are_refused_and_nothing_changes(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    cr0 = stub.ask(b"p28")
    assert stub.ask(b"P28=0000008000000000") == b"E16", "paging without protected mode"
    assert stub.ask(b"p28") == cr0
    fine(vmm, stub)


def test_a_step_leaves_the_breakpoint_that_it_begins_at(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    rip = stub.ask(b"p10")
    assert stub.ask(b"Z0,%x,1" % int.from_bytes(bytes.fromhex(rip.decode()), "little")) == b"OK"
    assert stub.ask(b"s") == b"T05thread:1;"
    assert stub.ask(b"p10") != rip
    fine(vmm, stub)


def test_huge_sizes_and_offsets_are_cut(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    assert len(stub.ask(b"m0,ffffffffffffffff")) == 4096
    assert stub.ask(b"qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff") == b"l"
    assert len(stub.ask(b"qXfer:features:read:target.xml:0,ffffffffffffffff")) == 4096
    fine(vmm, stub)


def test_a_packet_that_is_too_long_is_an_error(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    assert stub.ask(b"m" * 100000) == b"E07"
    fine(vmm, stub)


def test_a_wrong_checksum_is_asked_for_again(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    stub.line.sendall(b"$g#00$g#zz")
    assert stub.line.recv(1) == b"-"
    fine(vmm, stub)


def test_more_breakpoints_than_there_is_room_for_are_refused(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    answers = [stub.ask(b"Z0,%x,1" % (0x700000 + i)) for i in range(100)]
    assert answers[:4] == [b"OK"] * 4
    assert answers[-1] == b"E16"
    fine(vmm, stub)


def test_garbage_never_ends_the_vmm(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    chance = random.Random(1)
    kinds = b"?gGpPmMZzHTqQ!"  # but for what lets the guest go on
    for _ in range(300):
        # But for the beginning of a packet, and for what asks for the last answer again.
        stub.line.sendall(bytes(chance.randrange(256) for _ in range(20)).replace(b"$", b"").replace(b"-", b""))
        body = bytes(chance.choice(b"0123456789abcdef,:;=xZ") for _ in range(chance.randrange(40)))
        stub.ask(bytes([chance.choice(kinds)]) + body)
    assert vmm.poll() is None
    assert stub.ask(b"qC") == b"QC1"


def test_a_gdb_that_is_gone_ends_the_guest(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    stub.line.close()
    assert vmm.wait(20) == 128 + signal.SIGHUP
    one_line(vmm.stderr.read(), "vmm: ended: gdb is gone")


def test_a_signal_ends_a_vmm_that_waits_for_gdb(guest: Guest, tmp_path: Path) -> None:
    built = guest("hello")
    with started(built.vmm, f"--gdb={tmp_path / 'socket'}", built.image) as vmm:
        waiting(vmm)
        wait_until_asleep(vmm.pid)
        vmm.terminate()
        assert vmm.wait(20) == 128 + signal.SIGTERM
    assert not (tmp_path / "socket").exists()


# ---- where there is no gdb: in the emulated machines ----


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gdb would say, said by a program that needs no libraries."""
    path = tmp_path_factory.mktemp("client") / "gdb_client"
    flags = ["-static", "-std=gnu11", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, ROOT / "tests" / "probes" / "gdb_client.c", "-o", path], check=True)
    return path


@pytest.mark.parametrize("name", ENGINES)
def test_breakpoints_and_steps_work_on_each_engine(
    name: str, engines: dict[str, Engine], client: Path, build: Path
) -> None:
    if name not in engines:
        pytest.skip(f"this session has no {name}: --engines={','.join(ENGINES)}")
    image = build / "tests" / "hello.elf"
    symbols = subprocess.run(["nm", image], capture_output=True, text=True, check=True).stdout
    (address,) = (int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" pvh_entry.long_mode"))
    # mov eax, KERNEL_DATA; mov ds, eax
    packets = [f"Z0,{address:x},1", "c", "p10", f"z0,{address:x},1", "s", "p10", "s", "p10", "m7fff00000000,1", "c"]
    rips = [(address + size).to_bytes(8, "little").hex() for size in (0, 5, 7)]
    answers = ["OK", "T05thread:1;", rips[0], "OK", "T05thread:1;", rips[1], "T05thread:1;", rips[2], "E01", "W00"]
    files = {"client": client, "vmm": build / "vmm" / "vmm", "image.elf": image}
    command = ["./client", *packets, "--", "./vmm", "--gdb=gdb.socket", "image.elf"]
    outcome = engines[name].run(Job(command, files))
    expected = "".join(f"{packet} {answer}\n" for packet, answer in zip(packets, answers, strict=True))
    assert expected in outcome.output.decode().replace("hello from seed 0 with 16 MiB\n", ""), outcome
    assert outcome.status == 0, outcome
