"""The guest's driver of the virtio console, on the VMM's device and on one that nobody here wrote: QEMU's."""

import hashlib
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

import pytest
from support import TOO_LONG, Call, Guest, Process, only_plain, started, wait_until_asleep

from kvmlab import events, runner
from kvmlab.engine import ENGINES, Engine, Kvm
from kvmlab.events import Event
from kvmlab.random import stream
from kvmlab.runner import Run

NOTIFY = ["exit", "ioeventfd"]
IRQCHIPS = ["none", "split", "kernel"]
MACHINES = [(irqchip, notify) for irqchip in IRQCHIPS for notify in NOTIFY]
on_every_machine = pytest.mark.parametrize(("irqchip", "notify"), MACHINES)
by_both_notifications = pytest.mark.parametrize("notify", NOTIFY)
# VIRTIO_CONSOLE_F_SIZE and VIRTIO_RING_F_EVENT_IDX are accepted, or not.
with_and_without_features = pytest.mark.parametrize("plain", [0, 1], ids=["features", "plain"])

LINE = b"a line through the virtio console\n"
END_OF_INPUT = b"\x04"
TEXT = bytes(byte for byte in range(256) if byte != 4) * 3

MIB = 1 << 20
CHUNK = 64 << 10
BUFFER = 4096
DRIVER_FEATURES, INTERRUPT_VECTOR, EDGE_LEVEL = 0x20, 32 + 5, 0x4D0
DEVICE = "virtio console"
TRANSMIT = 1


def numbered(size: int, seed: int) -> bytes:
    """What the guest sends as its `send`."""
    random = stream(seed, 1)
    rest = b"".join(random.next().to_bytes(8, "little") for _ in range(CHUNK // 8 - 1))
    count = -(-size // CHUNK)
    return b"".join(number.to_bytes(8, "little") + rest for number in range(count))[:size]


def digest(data: bytes) -> tuple[int, str]:
    """Two long texts that differ are not worth printing."""
    return len(data), hashlib.sha256(data).hexdigest()


def without_end(data: bytes) -> bytes:
    return data.replace(END_OF_INPUT, b"\x05")


@dataclass(frozen=True)
class Console:
    """The guest on the VMM, in both of its builds."""

    call: Call
    image: Path

    def __call__(self, case: str, *options: str, stdin: bytes = b"") -> bytes:
        """What a case has sent, by COM1 and by the virtio console."""
        done = self.call(f"--append=case={case}", *options, self.image, input=stdin)
        assert (done.returncode, done.stderr) == (0, b"")
        output: bytes = done.stdout
        return output


@pytest.fixture
def console(call: Call, guest: Guest) -> Console:
    return Console(call, guest("virtio").image)


def recorded(guest: Guest, case: str, *options: str, stdin: bytes = b"", engine: Engine | None = None) -> Run:
    arguments = [f"--append=case={case}", *options]
    run = runner.run(guest("virtio"), arguments, stdin=stdin, time_limit=50, engine=engine or Kvm())
    assert (run.status, run.errors) == (0, "")
    assert run.all("virtio_misuse") == []
    return run


def machine(irqchip: str, notify: str) -> list[str]:
    return [f"--irqchip={irqchip}", f"--virtio-notify={notify}"]


# ---- out ----


@on_every_machine
@with_and_without_features
def test_a_line_arrives(plain: int, irqchip: str, notify: str, console: Console) -> None:
    assert console(f"say_line plain={plain}", *machine(irqchip, notify)) == LINE


@by_both_notifications
@with_and_without_features
@pytest.mark.parametrize("size", [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 16 * BUFFER, 16 * BUFFER + 1, MIB])
def test_every_size_arrives_unchanged(size: int, plain: int, notify: str, console: Console) -> None:
    output = console(f"send size={size} plain={plain}", "--seed=3", f"--virtio-notify={notify}")
    assert digest(output) == digest(numbered(size, seed=3))


@only_plain
def test_the_indices_of_the_rings_begin_again_after_65535(console: Console, tmp_path: Path) -> None:
    """And the index at which the device would interrupt stays ahead of them all the way."""
    size, record = (1 << 16) + 40, tmp_path / "events"
    options = ["--virtio-notify=ioeventfd", f"--events={record}", "--time-limit=100"]
    output = console(f"send_bytewise size={size}", *options)
    assert digest(output) == digest(bytes(i % 251 for i in range(size)))
    assert b'"kind":"virtio_interrupt"' not in record.read_bytes()


@by_both_notifications
def test_an_emergency_needs_no_set_up(notify: str, guest: Guest) -> None:
    run = recorded(guest, "emergency", f"--virtio-notify={notify}")
    assert run.output == "without any set-up\n"
    assert run.all("virtio_status") == []


# ---- in and out again ----


@on_every_machine
@with_and_without_features
@pytest.mark.parametrize("how", ["polling", "interrupts"])
def test_what_comes_in_goes_out_again(how: str, plain: int, irqchip: str, notify: str, console: Console) -> None:
    options = machine(irqchip, notify)
    assert console(f"echo_by_{how} plain={plain}", *options, stdin=TEXT + END_OF_INPUT) == b"ready\n" + TEXT


def test_a_read_takes_as_little_as_it_asks_for(console: Console) -> None:
    assert console("echo_bytewise", stdin=TEXT + END_OF_INPUT) == b"ready\n" + TEXT


@on_every_machine
def test_a_mebibyte_comes_in_and_goes_out_again(irqchip: str, notify: str, console: Console) -> None:
    """More than all buffers of both queues hold."""
    text = without_end(numbered(MIB, seed=4))
    output = console("echo_by_interrupts", *machine(irqchip, notify), stdin=text + END_OF_INPUT)
    assert digest(output) == digest(b"ready\n" + text)


def ask(process: Process, question: bytes) -> bytes:
    process.stdin.write(question)
    return answer(process, len(question))


def answer(process: Process, size: int) -> bytes:
    """The next size bytes of its output, or what there is before it ends."""
    seen = b""
    while len(seen) < size and (part := process.stdout.read(size - len(seen))):
        seen += part
    return seen


@on_every_machine
@with_and_without_features
def test_an_interrupt_wakes_a_guest_that_sleeps(plain: int, irqchip: str, notify: str, vmm: Path, guest: Guest) -> None:
    """A guest that looked before it slept, and was not woken, would sleep on."""
    arguments = [*machine(irqchip, notify), f"--append=case=echo_by_interrupts plain={plain}", "--time-limit=20"]
    with started(vmm, *arguments, guest("virtio").image) as process:
        assert answer(process, 6) == b"ready\n"
        for number in range(20):
            if number % 2:
                wait_until_asleep(process.pid)
            question = b"question %d\n" % number
            assert ask(process, question) == question
        process.stdin.write(END_OF_INPUT)
        assert process.wait() == 0


@pytest.mark.parametrize("irqchip", ["none", "split"])
def test_a_guest_that_waits_halts_and_is_interrupted(irqchip: str, vmm: Path, guest: Guest, tmp_path: Path) -> None:
    """It does not poll: there are few exits, a halt and an injection among them."""
    record = tmp_path / "events"
    arguments = [f"--irqchip={irqchip}", f"--events={record}", "--append=case=echo_by_interrupts"]
    with started(vmm, *arguments, guest("virtio").image) as process:
        assert answer(process, 6) == b"ready\n"
        wait_until_asleep(process.pid)
        process.stdin.write(END_OF_INPUT)
        assert process.wait() == 0
    seen = events.read(record)
    injected = [event for event in seen if event.kind == "inject"]
    assert [(event.type, event.vector) for event in injected] == [("interrupt", INTERRUPT_VECTOR)]
    exits = [event.reason for event in seen if event.kind == "exit"]
    assert len(exits) < 150
    assert ("HLT" in exits) == (irqchip == "none"), "with a local APIC in the kernel, KVM itself halts the vCPU"


@on_every_machine
def test_a_console_can_be_reset_and_begun_again_at_any_time(irqchip: str, notify: str, vmm: Path, guest: Guest) -> None:
    """In so little memory that no page may be taken for the same purpose again."""
    arguments = [*machine(irqchip, notify), "--memory=4", "--append=case=reset_in_the_middle"]
    with started(vmm, *arguments, guest("virtio").image) as process:
        before = b""
        while not before.endswith(b"ready\n"):
            part = process.stdout.read(CHUNK)
            assert part, f"it ended after {before[-100:]!r}"
            before += part
        assert set(before[:-6]) <= {0}
        assert ask(process, b"after all resets\n") == b"after all resets\n"
        process.stdin.write(END_OF_INPUT)
        assert process.wait() == 0


# ---- the size of the terminal ----


def test_without_a_terminal_the_size_is_the_devices_own(console: Console) -> None:
    assert console("look_at_size") == b"80 columns, 25 rows\n"


def test_a_driver_that_did_not_accept_the_size_does_not_read_it(console: Console) -> None:
    assert console("look_at_size plain=1") == b"no size\n"


@contextmanager
def on_terminal(*command: str | Path, columns: int, rows: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process on a terminal of its own, and the other end of that."""
    ours, its = pty.openpty()
    resize(ours, columns, rows)
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def resize(terminal: int, columns: int, rows: int) -> None:
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def read_line(terminal: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(terminal, 1)
    return line


@on_every_machine
def test_another_size_of_the_terminal_wakes_a_guest_that_sleeps(
    irqchip: str, notify: str, vmm: Path, guest: Guest
) -> None:
    arguments = [*machine(irqchip, notify), "--append=case=follow_size"]
    with on_terminal(vmm, *arguments, guest("virtio").image, columns=100, rows=30) as (process, terminal):
        assert read_line(terminal) == b"100 columns, 30 rows\r\n"
        wait_until_asleep(process.pid)
        resize(terminal, 132, 50)
        process.send_signal(signal.SIGWINCH)
        assert read_line(terminal) == b"132 columns, 50 rows\r\n"
        os.write(terminal, END_OF_INPUT)
        assert process.wait(TOO_LONG) == 0


# ---- how little it takes ----


def exits_per_byte(guest: Guest, case: str, size: int, *options: str) -> float:
    run = recorded(guest, f"{case} size={size}", *options)
    assert len(run.output) == size
    return run.count("exit") / size


@only_plain
@by_both_notifications
def test_it_needs_a_thousand_times_fewer_exits_per_byte_than_com1(notify: str, guest: Guest) -> None:
    """With one notification per 4 KiB, and all that it takes to begin: counted from the guest's first instruction."""
    by_com1 = exits_per_byte(guest, "send_letters_by_com1", 2 * BUFFER)
    by_virtio = exits_per_byte(guest, f"send_letters piece={BUFFER}", MIB, f"--virtio-notify={notify}")
    assert by_virtio * 1000 < by_com1


def sent(run: Run) -> list[Event]:
    return run.all("virtio_chain", device=DEVICE, queue=TRANSMIT)


@by_both_notifications
@with_and_without_features
def test_a_notification_is_of_a_full_ring(plain: int, notify: str, guest: Guest) -> None:
    """And nobody interrupts a guest that has asked not to be."""
    run = recorded(guest, f"send_letters size={MIB} plain={plain}", f"--virtio-notify={notify}")
    assert [event.readable for event in sent(run)] == [BUFFER] * (MIB // BUFFER)
    notified = run.count("virtio_notify", device=DEVICE, queue=TRANSMIT)
    assert 0 < notified <= MIB // BUFFER
    if notify == "exit":
        assert notified == MIB // (16 * BUFFER), "the device is done when the write to it is"
    assert run.all("virtio_interrupt") == []


def test_a_driver_accepts_no_more_than_it_wants(guest: Guest) -> None:
    """Beside VIRTIO_F_VERSION_1, which is bit 0 of the upper half."""
    for plain, wanted in ((0, 1 << 29 | 1 << 0), (1, 0)):
        run = recorded(guest, f"say_line plain={plain}")
        writes = run.all("exit", reason="MMIO", is_write=1, gpa=0xD0000000 + DRIVER_FEATURES)
        assert [int.from_bytes(bytes.fromhex(event.data), "little") for event in writes] == [1, wanted]


def test_the_line_is_level_triggered(guest: Guest) -> None:
    run = recorded(guest, "echo_by_interrupts", stdin=END_OF_INPUT)
    writes = run.all("exit", reason="IO", is_write=1, port=EDGE_LEVEL)
    assert writes[-1].data == f"{1 << 5:02x}"


@pytest.mark.parametrize("irqchip", ["split", "kernel"])
def test_a_spurious_interrupt_is_no_exception(irqchip: str, console: Console) -> None:
    assert console("take_spurious_interrupts", f"--irqchip={irqchip}") == b"line 7: taken\nline 15: taken\n"


# ---- on the emulated engines: their console has no input ----


@only_plain
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "kvm"])
def test_an_emulated_engine_gets_all_output(name: str, engines: dict[str, Engine], guest: Guest) -> None:
    if name not in engines:
        pytest.skip(f"this session has no {name}: --engines={','.join(ENGINES)}")
    for irqchip, notify in MACHINES:
        run = recorded(guest, "say_line", *machine(irqchip, notify), engine=engines[name])
        assert run.output.encode() == LINE
    for notify in NOTIFY:
        run = recorded(guest, f"send_letters size={CHUNK + 1}", f"--virtio-notify={notify}", engine=engines[name])
        assert run.output == "".join(chr(ord("a") + i % 26) for i in range(CHUNK + 1))


# ---- QEMU's device: hw/char/virtio-console.c behind hw/virtio/virtio-mmio.c ----

EXIT_PORT = "isa-debug-exit,iobase=0xf4"
SUCCESS = 1  # of QEMU: value * 2 + 1
PIPE = 1 << 20  # it drops what a pipe that is full does not take at once
# Without ACPI the devices' lines are 5 to 12 of a pair of 8259As, else pins of a second I/O APIC.
WITH_8259A, WITHOUT_8259A = "microvm,acpi=off", "microvm"


@dataclass(frozen=True)
class Qemu:
    """QEMU's microvm. The virtio console is its standard input and output; COM1 goes to a file."""

    image: Path
    com1: Path

    def command(self, case: str, model: str = WITH_8259A, legacy: bool = False, more: str = "") -> list[str | Path]:
        return [
            *("qemu-system-x86_64", "-M", model, "-accel", "tcg", "-nodefaults", "-no-reboot", "-display", "none"),
            *("-device", EXIT_PORT, "-serial", f"file:{self.com1}", *more.split()),
            *("-global", f"virtio-mmio.force-legacy={'on' if legacy else 'off'}", "-device", "virtio-serial-device"),
            *("-chardev", "stdio,id=c,signal=off", "-device", "virtconsole,chardev=c"),
            *("-kernel", self.image, "-append", f"seed=3 case={case}"),
        ]

    def __call__(self, case: str, stdin: bytes = b"", **how: str | bool) -> tuple[int, bytes]:
        """Its status, and what came through the console."""
        with started(*self.command(case, **how), pipesize=PIPE) as process:  # type: ignore[arg-type]
            output, errors = process.communicate(stdin)
        assert errors == b""
        return process.returncode, output

    def found(self, *words: str) -> str:
        """What the guest says of the console that it finds; QEMU's own word stands behind these."""
        given = " ".join(f"virtio_mmio.device={word}" for word in words)
        assert self(f"find id=3 {given}") == (SUCCESS, b"")
        return self.com1.read_text()


@pytest.fixture
def qemu(build: Path, tmp_path: Path) -> Qemu:
    return Qemu(build / "tests" / "virtio.elf", tmp_path / "com1")


@with_and_without_features
def test_a_line_arrives_through_qemus_device(plain: int, qemu: Qemu) -> None:
    assert qemu(f"say_line plain={plain}") == (SUCCESS, LINE)


@with_and_without_features
@pytest.mark.parametrize("how", ["polling", "interrupts"])
def test_qemus_device_brings_input_and_takes_it_back(how: str, plain: int, qemu: Qemu) -> None:
    with started(*qemu.command(f"echo_by_{how} plain={plain}")) as process:
        assert answer(process, 6) == b"ready\n"
        for question in (b"one\n", b"two, which is longer\n", TEXT):
            assert ask(process, question) == question
        process.stdin.write(END_OF_INPUT)
        assert process.wait() == SUCCESS


@with_and_without_features
@pytest.mark.parametrize("how", ["polling", "interrupts"])
def test_100_kilobytes_pass_qemus_device_both_ways(how: str, plain: int, qemu: Qemu) -> None:
    text = without_end(numbered(100_000, seed=5))
    status, output = qemu(f"echo_by_{how} plain={plain}", text + END_OF_INPUT)
    assert status == SUCCESS
    assert digest(output) == digest(b"ready\n" + text)


def test_the_indices_begin_again_on_qemus_device_as_well(qemu: Qemu) -> None:
    size = (1 << 16) + 40
    status, output = qemu(f"send_bytewise size={size}")
    assert status == SUCCESS
    assert digest(output) == digest(bytes(i % 251 for i in range(size)))


def test_qemus_device_can_be_reset_and_begun_again(qemu: Qemu) -> None:
    with started(*qemu.command("reset_in_the_middle"), pipesize=PIPE) as process:
        assert answer(process, 20 * 21 // 2 * 4000 + 6).endswith(b"ready\n")
        assert ask(process, b"after all resets\n") == b"after all resets\n"
        process.stdin.write(END_OF_INPUT)
        assert process.wait() == SUCCESS


def test_qemus_device_takes_an_emergency_write_without_any_set_up(qemu: Qemu) -> None:
    assert qemu("emergency") == (SUCCESS, b"without any set-up\n")


def test_a_device_whose_line_no_8259a_has_can_still_be_polled(qemu: Qemu) -> None:
    """With ACPI QEMU leaves it to that to name the devices."""
    word = "virtio_mmio.device=512@0xfeb02e00:47"
    assert qemu(f"echo_by_polling {word}", TEXT + END_OF_INPUT, model=WITHOUT_8259A) == (SUCCESS, b"ready\n" + TEXT)
    assert qemu(f"echo_by_interrupts {word}", END_OF_INPUT, model=WITHOUT_8259A)[0] != SUCCESS
    assert "the device has no line at the 8259As" in qemu.com1.read_text()


def test_another_device_in_front_is_passed_over(qemu: Qemu) -> None:
    more = "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r"
    assert qemu("say_line", more=more) == (SUCCESS, LINE)
    assert qemu("find id=4", more=more)[0] == SUCCESS
    assert qemu.com1.read_text().startswith("found 1 ")


def test_a_legacy_device_is_passed_over(qemu: Qemu) -> None:
    assert qemu("say_line", legacy=True) == (2 * 1 + 1, b"")
    assert qemu.com1.read_text() == "no console\n"


# The same device by other spellings, with the lines that they say.
SPELLINGS = {
    "512@0xfeb00e00:7": 7,
    "1K@4272950784:07": 7,
    "0x200@0XFEB00E00:0xb": 11,
    "1k@037654007000:6": 6,
    "1M@0xfeb00e00:9:3": 9,
    "512@0xfeb00e00:4294967295": 0xFFFFFFFF,
}


@pytest.mark.parametrize("word", SPELLINGS)
def test_a_device_is_found_by_any_spelling_of_its_word(word: str, qemu: Qemu) -> None:
    assert qemu.found(word) == f"found 1 at feb00e00 irq {SPELLINGS[word]}\n"


# Line 7 would tell that one of these was taken.
NONSENSE = [
    *("", "512", "512@", "512@0xfeb00e00", "512@0xfeb00e00:", "@0xfeb00e00:7", "512@:7", "512:0xfeb00e00:7"),
    *("512@0xfeb00e00:7:", "512@0xfeb00e00:7x", "512@0xfeb00e00:7,8", "512@0xfeb00e00:7:3:4", "x@0xfeb00e00:7"),
    *("512T@0xfeb00e00:7", "512@0xfeb00e00:0x", "512@0xfeb00e00:08", "512@feb00e00:7", "-512@0xfeb00e00:7"),
    # no room for a register, not aligned, beyond what is mapped, more than 64 bits, more than 32
    *("256@0xfeb00e00:7", "512@0xfeb00e02:7", "1G@0xfeb00e00:7", "512@0x1feb00e00:7", "4G@0xfeb00e00:7"),
    *("512@0x100000000feb00e00:7", "18446744073709551616@0xfeb00e00:7", "17179869185G@0xfeb00e00:7"),
    *("512@0xfeb00e00:4294967303", "512@0xffffffffffffff00:7"),
    # these make sense, but there is RAM, an empty place of the bus, and nothing
    *("512@0x200000:7", "512@0xfeb00c00:7", "512@0xfd000000:7"),
]


@pytest.mark.parametrize("some", [NONSENSE[i::4] for i in range(4)], ids=str)
def test_words_that_name_no_device_are_passed_over(some: list[str], qemu: Qemu) -> None:
    assert qemu.found(*some) == "found 1 at feb00e00 irq 12\n"
