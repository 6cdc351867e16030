"""Every option of `vmm --help`: what it does, and what becomes of a value that makes no sense."""

import re
import struct
from pathlib import Path

import pytest
from images import MACHINE_FIELDS, machine_note, pvh
from support import Call, Guest, one_line

from kvmlab import events, runner
from kvmlab.plugin import ROOT

COMMAND_LINE_MAX = 2048  # with "seed=0 " and the final NUL: vmm.c


def long_options() -> dict[str, tuple[str, bool]]:
    """The getopt table of vmm.c: the name of each option, its letter, and whether it takes a value."""
    source = (ROOT / "vmm" / "vmm.c").read_text()
    table = source.split("long_options[] = {")[1].split("};")[0]
    rows = re.findall(r'\{"([a-z-]+)", (required|no)_argument, NULL, \'(.)\'\}', table)
    return {name: (letter, argument == "required") for name, argument, letter in rows}


# ---- help and usage ----


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_printed_and_status_0(option: str, call: Call) -> None:
    done = call(option)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"usage: vmm [OPTION]... IMAGE\n")


def test_help_names_every_option_of_the_table_and_no_other(call: Call) -> None:
    text = call("--help").stdout.decode()
    named = dict(re.findall(r"^  (-\w), --([a-z-]+)", text, re.MULTILINE))
    assert named == {f"-{letter}": name for name, (letter, _) in long_options().items()}
    for name, (letter, takes_value) in long_options().items():
        assert (f"-{letter}, --{name}=" in text) == takes_value, name


def test_help_fits_a_page_of_a_terminal(call: Call) -> None:
    lines = call("--help").stdout.decode().splitlines()
    assert len(lines) <= 40
    assert [line for line in lines if len(line) > 100] == []


def test_help_that_cannot_be_written_is_status_5(call: Call) -> None:
    with Path("/dev/full").open("wb") as full:
        assert call("--help", stdout=full).returncode == 5


USAGE_ERRORS: dict[str, tuple[list[str], str]] = {
    "no image": ([], "which image?"),
    "two images": (["one", "two"], "two is one too many"),
    "unknown option": (["--frobnicate", "image"], "frobnicate"),
    "unknown letter": (["-Z", "image"], "Z"),
    "option without its value": (["--memory"], "memory"),
    "value for an option that takes none": (["--summary=yes", "image"], "summary"),
    "abbreviation of several": (["--s=1", "image"], "ambiguous"),
    "memory of 0 MiB": (["--memory=0", "image"], "from 1 to 3072"),
    "memory of 3073 MiB": (["--memory=3073", "image"], "from 1 to 3072"),
    "memory below 0": (["--memory=-1", "image"], "from 1 to 3072"),
    "memory that is no number": (["--memory=much", "image"], "--memory=much"),
    "memory with a unit": (["--memory=1G", "image"], "--memory=1G"),
    "memory of nothing": (["--memory=", "image"], "--memory="),
    "memory behind a blank": (["--memory= 5", "image"], "--memory= 5"),
    "memory above 2^64": (["--memory=18446744073709551617", "image"], "from 1 to 3072"),
    "seed of 2^64": (["--seed=18446744073709551616", "image"], "--seed=18446744073709551616"),
    "seed below 0": (["--seed=-1", "image"], "--seed=-1"),
    "seed that is no number": (["--seed=x", "image"], "--seed=x"),
    "irqchip that is none": (["--irqchip=apic", "image"], "--irqchip=apic"),
    "irqchip cut short": (["--irqchip=non", "image"], "--irqchip=non"),
    "irqchip of nothing": (["--irqchip=", "image"], "--irqchip="),
    "unknown I/O that is neither": (["--unknown-io=loud", "image"], "--unknown-io=loud"),
    "steps after no exit": (["--step-after=never", "image"], "--step-after=never"),
    "time limit below 0": (["--time-limit=-1", "image"], "from 0 to 86400"),
    "time limit above a day": (["--time-limit=86401", "image"], "from 0 to 86400"),
    "time limit without end": (["--time-limit=inf", "image"], "--time-limit=inf"),
    "time limit that is no number": (["--time-limit=nan", "image"], "--time-limit=nan"),
    "time limit with a unit": (["--time-limit=5s", "image"], "--time-limit=5s"),
    "time limit of nothing": (["--time-limit=", "image"], "--time-limit="),
}


@pytest.mark.parametrize("name", USAGE_ERRORS)
def test_a_usage_error_gets_one_line_and_status_2(name: str, call: Call) -> None:
    arguments, phrase = USAGE_ERRORS[name]
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (2, b""), done.stderr
    one_line(done.stderr, phrase)


def test_every_letter_is_short_for_its_long_option(call: Call, tmp_path: Path) -> None:
    """Each option that takes a value is given one that makes no sense, both ways: the same complaint."""
    bad = {"memory": "0", "irqchip": "x", "unknown-io": "x", "seed": "x", "time-limit": "x", "step-after": "x"}
    bad |= {"append": "x" * COMMAND_LINE_MAX, "virtio-notify": "x"}
    bad |= dict.fromkeys(["events", "debugcon", "kvm", "gdb"], str(tmp_path / "no" / "file"))
    image = tmp_path / "image"
    image.write_bytes(pvh())
    assert bad.keys() == {name for name, (_, takes_value) in long_options().items() if takes_value}
    for name, value in bad.items():
        letter = long_options()[name][0]
        long, short = call(f"--{name}={value}", image), call(f"-{letter}", value, image)
        assert (short.returncode, short.stderr) == (long.returncode, long.stderr), name
        assert short.returncode in (2, 5), name


# ---- what the guest and the record see of an option ----


@pytest.mark.parametrize("option", ["--memory=5", "--memory=0x5", "--memory=05"])
def test_memory_is_what_the_guest_finds(option: str, guest: Guest) -> None:
    run = runner.run(guest("hello"), [option])
    assert run.output == "hello from seed 0 with 5 MiB\n"
    assert run.events[0].memory_mib == 5


def test_memory_may_be_as_large_as_the_address_space_permits(guest: Guest) -> None:
    run = runner.run(guest("hello"), ["--memory=3072"])
    assert run.output == "hello from seed 0 with 3072 MiB\n"


def test_without_an_irqchip_the_local_apic_is_not_there(guest: Guest) -> None:
    run = runner.run(guest("devices"), ["--irqchip=none", "--append=case=read_apic"])
    assert run.status == 3
    assert run.one("exit", reason="MMIO", gpa=0xFEE00030, is_write=0, size=4)
    assert "read of gpa 0xfee00030, where there is no device, at rip 0x" in run.errors
    assert "(read_apic+0x" in run.errors


@pytest.mark.parametrize("irqchip", ["split", "kernel"])
def test_with_an_irqchip_the_local_apic_answers_inside_kvm(irqchip: str, guest: Guest) -> None:
    run = runner.run(guest("devices"), [f"--irqchip={irqchip}", "--append=case=read_apic"])
    assert (run.status, run.events[0].irqchip) == (0, irqchip)
    version = int(run.output.removeprefix("apic version "), 16)
    assert 0x10 <= version & 0xFF <= 0x15, f'SDM 3A "Local APIC Version Register": {version:#x}'
    assert run.all("exit", reason="MMIO") == []


@pytest.mark.parametrize(("irqchip", "exits"), [("none", 1), ("split", 1), ("kernel", 0)])
def test_only_a_kernel_irqchip_has_a_pic(irqchip: str, exits: int, guest: Guest) -> None:
    run = runner.run(guest("devices"), [f"--irqchip={irqchip}", "--unknown-io=ignore", "--append=case=read_pic"])
    assert len(run.all("exit", reason="IO", port=0x21)) == exits
    assert run.output == ("pic mask 00\n" if irqchip == "kernel" else "pic mask ff\n")


def test_unknown_io_is_fatal_if_so_told(guest: Guest) -> None:
    run = runner.run(guest("devices"), ["--unknown-io=fatal", "--append=case=touch_nothing"])
    assert (run.status, run.output, run.end.how) == (3, "", "unknown access")


def test_unknown_io_that_is_ignored_reads_as_ones_and_is_recorded(guest: Guest) -> None:
    run = runner.run(guest("devices"), ["--unknown-io=ignore", "--append=case=touch_nothing"])
    assert (run.status, run.output) == (0, "in ff ffff ffffffff mmio ffffffff\n")
    seen = [(event.space, event.address, event.is_write, event.size) for event in run.all("unknown")]
    places = [("port", 0x1234, 1), ("port", 0x1234, 2), ("port", 0x1234, 4), ("gpa", 0xD0001000, 4)]
    assert seen == [(space, address, is_write, size) for is_write in (1, 0) for space, address, size in places]


@pytest.mark.parametrize(
    ("option", "seed"), [("7", 7), ("0x10", 16), ("0", 0), ("18446744073709551615", (1 << 64) - 1)]
)
def test_the_seed_reaches_the_guest_and_the_record(option: str, seed: int, guest: Guest) -> None:
    run = runner.run(guest("hello"), [f"--seed={option}"])
    assert run.output == f"hello from seed {seed} with 16 MiB\n"
    assert run.events[0].seed == seed


def test_without_a_seed_it_is_0(call: Call, guest: Guest) -> None:
    assert call(guest("hello").image).stdout == b"hello from seed 0 with 16 MiB\n"


def test_appended_text_is_on_the_command_line(guest: Guest) -> None:
    run = runner.run(guest("devices"), ["--append=quiet word=a,b:c=d other case=print_word"], seed=3)
    assert (run.status, run.output) == (0, "word found: a,b:c=d\n")


def test_appended_text_may_be_as_long_as_the_command_line(call: Call, guest: Guest) -> None:
    rest = "case=print_word word="
    longest = COMMAND_LINE_MAX - len("seed=0 ") - 1 - len(rest)
    done = call(f"--append={rest}{'x' * longest}", guest("devices").image)
    assert (done.returncode, done.stdout) == (0, f"word found: {'x' * longest}\n".encode())


def test_appended_text_that_is_too_long_gets_one_line_and_status_2(call: Call, guest: Guest) -> None:
    done = call("--append=" + "x" * (COMMAND_LINE_MAX - len("seed=0 ")), guest("devices").image)
    assert (done.returncode, done.stdout) == (2, b"")
    one_line(done.stderr, "--append", "2048 bytes", "2047 fit")


@pytest.mark.parametrize("seconds", [0.05, 0.25])
def test_a_run_ends_at_its_time_limit(seconds: float, guest: Guest) -> None:
    run = runner.run(guest("crash"), ["--append=case=hang_with_interrupts_off"], time_limit=seconds)
    assert (run.status, run.end.how) == (4, "time limit")
    assert f"still running after {seconds} s" in run.errors
    assert seconds <= run.end.ns / 1e9 < seconds + 0.8


def test_a_time_limit_of_0_is_none(guest: Guest) -> None:
    run = runner.run(guest("hello"), time_limit=0)
    assert run.status == 0


def test_debugcon_has_the_bytes_sent_to_port_0xe9(call: Call, guest: Guest, tmp_path: Path) -> None:
    done = call(f"--debugcon={tmp_path}/out", "--append=case=use_debugcon", guest("devices").image)
    assert (done.returncode, done.stdout) == (0, b"debugcon e9\n")
    assert (tmp_path / "out").read_bytes() == b"to the debug console\n\xff"


def test_without_debugcon_its_port_swallows_the_bytes(call: Call, guest: Guest) -> None:
    done = call("--append=case=use_debugcon", guest("devices").image)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"debugcon e9\n", b"")


@pytest.mark.parametrize("path", ["/nonexistent/file", "/dev/full", "/"])
def test_debugcon_that_cannot_be_written_gets_one_line_and_status_5(path: str, call: Call, guest: Guest) -> None:
    done = call(f"--debugcon={path}", "--append=case=use_debugcon", guest("devices").image)
    assert done.returncode == 5
    one_line(done.stderr, f"cannot write to {path}: ")


@pytest.mark.parametrize("option", ["--summary", "-S"])
def test_the_summary_counts_the_exits_of_the_record(option: str, guest: Guest) -> None:
    run = runner.run(guest("devices"), [option, "--unknown-io=ignore", "--append=case=touch_nothing"])
    assert f"exits: {run.end.exits}, " in run.errors
    for reason in ("IO", "MMIO"):
        assert re.search(rf"^ +{len(run.all('exit', reason=reason))} {reason}$", run.errors, re.MULTILINE)
    assert re.search(r"^slowest: exit \d+ \(M?M?IO at 0x\w+ \(\w+\+0x\w+\)\)", run.errors, re.MULTILINE)


def test_without_summary_nothing_is_said(guest: Guest) -> None:
    assert runner.run(guest("hello")).errors == ""


@pytest.mark.parametrize(
    ("path", "phrase"), [("/nonexistent", "No such file or directory"), ("/dev/null", "/dev/null is not KVM")]
)
def test_another_kvm_device_is_opened_and_refused(path: str, phrase: str, call: Call, guest: Guest) -> None:
    done = call(f"--kvm={path}", guest("hello").image)
    assert (done.returncode, done.stdout) == (5, b"")
    one_line(done.stderr, phrase)


def test_kvm_may_have_another_name(call: Call, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "kvm").symlink_to("/dev/kvm")
    assert call(f"--kvm={tmp_path}/kvm", guest("hello").image).returncode == 0


@pytest.mark.parametrize("path", ["/nonexistent/file", "/dev/full", "/"])
def test_events_that_cannot_be_written_get_one_line_and_status_5(path: str, call: Call, guest: Guest) -> None:
    done = call(f"--events={path}", guest("hello").image)
    assert done.returncode == 5
    one_line(done.stderr, f"cannot write the events to {path}: ")


# ---- the machine note ----


def image_of(guest: Guest, tmp_path: Path, **members: int) -> Path:
    """The devices guest with another machine note."""
    image = guest("devices").image.read_bytes()
    old = machine_note()
    assert image.count(old) == 1, "the note that MACHINE() writes"
    path = tmp_path / "image.elf"
    path.write_bytes(image.replace(old, machine_note(**members)))
    return path


def test_the_machine_note_is_obeyed(guest: Guest, tmp_path: Path) -> None:
    image = image_of(guest, tmp_path, memory_mib=7, irqchip=2, unknown_io=1)
    run = runner.run(runner.Built(guest("devices").vmm, image), ["--append=case=read_apic"])
    assert (run.status, run.events[0].memory_mib, run.events[0].irqchip) == (0, 7, "kernel")
    run = runner.run(runner.Built(guest("devices").vmm, image), ["--append=case=touch_nothing"])
    assert (run.status, len(run.all("unknown"))) == (0, 8)


def test_options_override_the_machine_note(guest: Guest, tmp_path: Path) -> None:
    image = image_of(guest, tmp_path, memory_mib=7, irqchip=2, unknown_io=1)
    options = ["--memory=6", "--irqchip=none", "--unknown-io=fatal", "--append=case=read_apic"]
    run = runner.run(runner.Built(guest("devices").vmm, image), options)
    assert (run.status, run.events[0].memory_mib, run.events[0].irqchip) == (3, 6, "none")


def test_an_image_without_a_machine_note_gets_what_help_says(call: Call, tmp_path: Path) -> None:
    image, record = tmp_path / "image", tmp_path / "events"
    image.write_bytes(pvh())
    assert call(f"--events={record}", image).returncode == 0
    (event, *_) = events.read(record)
    assert (event.memory_mib, event.irqchip) == (64, "none")


def test_a_machine_without_com1_has_none(guest: Guest, tmp_path: Path) -> None:
    image = image_of(guest, tmp_path, devices=0)
    run = runner.run(runner.Built(guest("devices").vmm, image), ["--append=case=print_word"])
    assert (run.status, run.output) == (3, "")
    assert "read of port 0x3fd, where there is no device" in run.errors


def test_the_machine_note_is_as_the_header_says() -> None:
    """images.py writes the note by itself: its fields are those of include/machine.h."""
    header = (ROOT / "include" / "machine.h").read_text()
    body = header.split("struct machine_note {")[1].split("};")[0]
    assert re.findall(r"uint32_t (\w+);", body) == MACHINE_FIELDS
    assert len(machine_note()) == struct.calcsize("<III8s5I")
