"""gdb in front of a guest: real gdb in batch mode, and packets that no gdb would send."""

import contextlib
import random
import re
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Guest, Process, of_session, one_line, started, wait_until_asleep

from kvmlab import debug
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


def addresses(image: Path, *names: str) -> list[int]:
    listed = subprocess.run(["nm", image], capture_output=True, text=True, check=True).stdout
    found = {name: int(address, 16) for address, _, name in (line.split() for line in listed.splitlines())}
    return [found[name] for name in names]


@pytest.fixture
def gdb(guest: Guest, tmp_path: Path) -> Gdb:
    """Run these commands in gdb, with a guest of tests/guests that stands before its first instruction."""

    def function(name: str, *commands: str, case: str = "", options: tuple[str, ...] = ()) -> Session:
        built = guest(name)
        at = tmp_path / "socket"
        first = [*debug.SETTINGS, "set width 0", f"target remote {at}"]
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


def frames(shown: str) -> list[str]:
    """The functions of a backtrace."""
    return re.findall(r"^#\d+ +(?:0x[0-9a-f]+ in )?(<.*>|\w+)", shown, re.MULTILINE)


def test_a_backtrace_ends_at_the_entry(gdb: Gdb) -> None:
    seen = gdb("hello", "break guest_main", "continue", "backtrace", "kill")
    assert frames(seen.shown) == ["guest_main", "guest_start", "pvh_entry"], seen


def test_a_backtrace_leads_from_a_trap_handler_to_what_it_has_interrupted(gdb: Gdb) -> None:
    called = ["panic_report", "trap_dispatch", "<signal handler called>", "write_at", "write_unmapped"]
    saved = [*(f"r{i}" for i in range(8, 16)), *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip")]
    compare = [f"print $frame->{name} == (uint64_t)${name}" for name in saved]
    pushed = ("frame function trap_dispatch", "set $frame = frame", "print $frame->vector", "up 2")
    seen = gdb("crash", "break panic_report", "continue", "backtrace", *pushed, *compare, case="write_unmapped")
    assert frames(seen.shown)[: len(called)] == called, seen
    assert re.findall(r"^\$\d+ = (\d+)$", seen.shown, re.MULTILINE) == ["14", *("1" for _ in saved)], seen


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


def test_a_watchpoint_stops_where_the_value_has_changed(gdb: Gdb) -> None:
    seen = gdb("hello", "tbreak trap_install", "continue", "watch tss.ist[0]", "continue", "kill")
    assert re.search(r"^Old value = 0\nNew value = [1-9]", seen.shown, re.MULTILINE), seen


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
    report, _, _ = end.partition(f"exited with code {status:02}")
    assert "\nvmm: " in report, seen
    assert (seen.status, seen.errors) == (status, ""), seen


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


# ---- packets, one by one ----


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


@contextlib.contextmanager
def standing(vmm: Path, *arguments: str | Path) -> Iterator[tuple[Process, Stub]]:
    """A guest before its first instruction, and the line to the stub."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(vmm, f"--gdb={folder}/socket", *arguments) as process,
        socket.socket(socket.AF_UNIX) as line,
    ):
        waiting(process)
        line.connect(f"{folder}/socket")
        line.settimeout(20)
        yield process, Stub(line)


@pytest.fixture
def stopped(guest: Guest) -> Iterator[tuple[Process, Stub]]:
    built: Built = guest("hello")
    with standing(built.vmm, built.image) as pair:
        yield pair


def fine(vmm: Process, stub: Stub) -> None:
    """The stub still answers, and the guest runs to its end."""
    assert stub.ask(b"?") == b"T05thread:1;"
    assert stub.ask(b"c") == b"W00"
    assert vmm.wait(20) == 0


BAD = [
    *(b"m", b"m,", b"m0", b"m0,", b"mg,1", b"m0,1x", b"m10000000000000000,1", b"mffffffffffffffff,ffffffff"),
    *(b"M", b"M0,1:", b"M0,1:0", b"M0,2:00", b"M0,1:zz", b"M0,ffffffffffffffff:00", b"Mfffffffffffff000,1:00"),
    *(b"p", b"pffffffff", b"p-1", b"P", b"P0", b"P0=", b"P0=00", b"P99=00", b"P0=zz", b"G", b"G00", b"G" + b"f" * 4000),
    *(b"M0,1:0000", b"Z0", b"Z0,", b"Z0,x,1", b"z0,1", b"Z1,1"),
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


def test_ctrl_c_between_two_steps_stops_the_next(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    assert stub.ask(b"s") == b"T05thread:1;"
    stub.line.sendall(b"\x03")
    assert stub.ask(b"c") == b"T02thread:1;"
    assert stub.ask(b"c") == b"W00"
    assert vmm.wait(20) == 0


def test_ctrl_c_right_behind_a_packet_is_not_lost(stopped: tuple[Process, Stub]) -> None:
    vmm, stub = stopped
    stub.line.sendall(b"$c#63\x03")
    assert stub.answer() == b"T02thread:1;"
    assert stub.ask(b"c") == b"W00"
    assert vmm.wait(20) == 0


def test_ring_3_is_stepped_or_refused_in_one_line(guest: Guest) -> None:
    """But never passed over in silence. What runs there jumps to itself."""
    built = guest("crash")
    (user_call,) = addresses(built.image, "user_call")
    with standing(built.vmm, "--append=case=read_from_ring_3", built.image) as (_, stub):
        assert stub.ask(b"Z0,%x,1" % user_call) == b"OK"
        assert stub.ask(b"c") == b"T05thread:1;"
        assert stub.ask(b"z0,%x,1" % user_call) == b"OK"
        entry = stub.ask(b"p5")
        assert stub.ask(b"M%x,2:ebfe" % int.from_bytes(bytes.fromhex(entry.decode()), "little")) == b"OK"
        while stub.ask(b"p10") != entry:
            stub.send(b"c")
            select.select([stub.line], [], [], 0.01)  # the guest goes on meanwhile, and has nothing to say
            stub.line.sendall(b"\3")
            assert stub.answer() == b"T02thread:1;"
        answer = stub.ask(b"s")
        if answer != b"T05thread:1;":
            assert b"this machine's KVM cannot step through ring 3" in bytes.fromhex(answer[1:].decode())
            assert stub.answer() == b"T02thread:1;"
        assert stub.ask(b"p10") == entry


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


def as_sent(value: int) -> str:
    return value.to_bytes(8, "little").hex()


@pytest.mark.parametrize("name", ENGINES)
def test_what_make_debug_needs_works_on_each_engine(
    name: str, engines: dict[str, Engine], client: Path, build: Path
) -> None:
    image = build / "tests" / "crash.elf"
    entry, leave = addresses(image, "pvh_entry.long_mode", "guest_exit")
    stopped, interrupted, rip, rdi = "T05thread:1;", "T02thread:1;", "10", "5"
    asked = [
        *[(f"Z0,{entry:x},1", "OK"), ("c", stopped), (f"p{rip}", as_sent(entry)), (f"z0,{entry:x},1", "OK")],
        # mov eax, KERNEL_DATA; mov ds, eax
        *[(f"m{entry:x},7", "b8100000008ed8"), ("s", stopped), (f"p{rip}", as_sent(entry + 5)), ("p0", as_sent(0x10))],
        *[("s", stopped), (f"p{rip}", as_sent(entry + 7))],
        *[("M700000,2:1234", "OK"), ("m700000,2", "1234"), ("m7fff00000000,1", "E01")],
        # The guest prints, and loops; from there on it is led to its end.
        *[("c!", interrupted), (f"P{rdi}={as_sent(0)}", "OK"), (f"P{rip}={as_sent(leave)}", "OK"), ("c", "W00")],
    ]
    files = {"client": client, "vmm": build / "vmm" / "vmm", "image.elf": image}
    vmm = ["./vmm", "--gdb=gdb.socket", "--append=case=hang_with_interrupts_on", "image.elf"]
    outcome = of_session(engines, name).run(Job(["./client", *(packet for packet, _ in asked), "--", *vmm], files))
    assert outcome.output.decode().splitlines() == [f"{packet} {answer}" for packet, answer in asked], outcome
    assert outcome.status == 0, outcome
