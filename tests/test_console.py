"""COM1, a 16550 UART, is standard input and output; the ports beside it are the guest's way to the VMM."""

import hashlib
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from support import Call, Guest, one_line, only_plain, started

from kvmlab import events, runner
from kvmlab.random import stream
from kvmlab.runner import Run

COM1, LINE_STATUS, FIFO_SIZE = 0x3F8, 0x3FD, 16
END_OF_INPUT = b"\x04"


def device(guest: Guest, case: str, *options: str, stdin: bytes = b"") -> Run:
    return runner.run(guest("devices"), [f"--append=case={case}", *options], stdin=stdin, time_limit=20)


# ---- text in and out ----


@pytest.mark.parametrize(
    "text",
    [b"", b"hello\n", bytes(byte for byte in range(256) if byte != 4), b"x" * 5000],
    ids=["nothing", "a line", "every byte but the last one", "more than a pipe's page"],
)
def test_what_comes_in_goes_out_again(text: bytes, call: Call, guest: Guest) -> None:
    done = call("--append=case=echo", guest("devices").image, input=text + END_OF_INPUT + b"never read")
    assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")


def test_an_answer_arrives_before_the_next_question(vmm: Path, guest: Guest) -> None:
    """A person at the terminal sees each line when it is complete."""
    with started(vmm, "--time-limit=20", "--append=case=echo", guest("devices").image) as process:
        for question in (b"one\n", b"two\n"):
            process.stdin.write(question)
            answer = b""
            while not answer.endswith(b"\n"):
                byte = process.stdout.read(1)
                assert byte, f"the VMM ended after {answer!r}"
                answer += byte
            assert answer == question
        process.stdin.write(END_OF_INPUT)
        assert process.wait() == 0


def test_a_string_read_gets_a_byte_for_each_element(guest: Guest) -> None:
    run = device(guest, "echo_string", stdin=b"abcdefghijklmnopqrst")
    assert (run.status, run.output) == (0, "received abcdefghijklmno\n")
    reads = run.all("exit", reason="IO", port=COM1, is_write=0, device="com1")
    assert b"".join(bytes.fromhex(event.data) for event in reads) == b"abcdefghijklmno"
    assert sum(event.count for event in reads) == 15


def test_without_input_there_is_no_data(guest: Guest) -> None:
    assert device(guest, "read_without_input").output == "line status 60, data 00\n"


def test_with_input_the_line_status_says_so(guest: Guest) -> None:
    assert device(guest, "read_without_input", stdin=b"z").output == "line status 61, data 7a\n"


def test_a_closed_standard_input_is_no_input(vmm: Path, guest: Guest) -> None:
    script = 'exec "$0" --append=case=read_without_input "$1" <&-'
    image = guest("devices").image
    done = subprocess.run(["sh", "-c", script, vmm, image], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"line status 60, data 00\n", b"")


# ---- the UART's registers ----


def test_registers_hold_what_was_written_and_the_divisor_stands_behind_its_latch(guest: Guest) -> None:
    run = device(guest, "use_uart_registers")
    assert run.output == "divisor 1244 scratch 5a ier 01 mcr 03 lcr 03 lsr 60 iir 01\n"


def test_text_of_every_length_passes_through_the_fifo(guest: Guest) -> None:
    letters = "".join(chr(ord("a") + i % 26) for i in range(300))
    lengths = [0, 1, 15, 16, 17, 31, 32, 33, 126, 127, 128, 129, 300]
    assert device(guest, "print_lengths").output == "".join(letters[:length] + "\n" for length in lengths)


def test_the_driver_looks_at_the_transmitter_before_each_fifo_of_bytes(guest: Guest) -> None:
    run = device(guest, "print_lengths")
    exits = run.all("exit", reason="IO", device="com1")
    looks = [number for number, event in enumerate(exits) if event.port == LINE_STATUS]
    assert looks[0] == 0, "no byte is sent before the first look"
    assert {event.port for event in exits} == {COM1, LINE_STATUS}
    for look, next_look in pairwise([*looks, len(exits)]):
        assert sum(event.count for event in exits[look + 1 : next_look]) <= FIFO_SIZE


# ---- accesses that no driver would make ----


def test_a_wide_write_reaches_the_registers_that_follow(guest: Guest) -> None:
    run = device(guest, "write_com1_wide")
    # IER is 1 and LCR 3 after the 32-bit write, the scratch register 0x77 after the 16-bit one.
    assert (run.status, run.output) == (0, "AB\nwide 03000100 7700\n")


def test_a_string_of_words_is_as_many_wide_writes(guest: Guest) -> None:
    run = device(guest, "write_com1_words")
    assert (run.status, run.output) == (0, "ABCD")


STRADDLES = {
    "straddle_com1": "4-byte read of port 0x3fd",
    "straddle_exit_start": "2-byte write to port 0xf3",
    "straddle_exit_end": "4-byte write to port 0xf6",
    "straddle_port_space": "2-byte read of port 0xffff",
}


@pytest.mark.parametrize("case", STRADDLES)
def test_an_access_across_the_end_of_a_device_is_nobodys(case: str, guest: Guest) -> None:
    run = device(guest, case)
    assert (run.status, run.end.how) == (3, "unknown access")
    assert f"{STRADDLES[case]}, where there is no device" in run.errors


EXIT_CODES = {"exit_16_bits": (1, 0x100), "exit_32_bits": (1, 0x1000000), "exit_zero_32_bits": (0, 0)}


@pytest.mark.parametrize("case", EXIT_CODES)
def test_the_exit_port_takes_every_width(case: str, guest: Guest) -> None:
    status, code = EXIT_CODES[case]
    run = device(guest, case)
    assert (run.status, run.end.how) == (status, "exit")
    assert run.errors == (f"vmm: the guest reports failure {code}\n" if code else "")


def test_the_first_byte_of_a_string_decides_the_exit(guest: Guest) -> None:
    run = device(guest, "exit_string")
    assert (run.status, run.errors) == (0, "")


def test_reading_the_exit_port_does_not_exit(guest: Guest) -> None:
    assert device(guest, "read_exit_port").output == "exit port ffffffff\n"


def test_where_nothing_answers_every_width_reads_as_ones(guest: Guest) -> None:
    run = device(guest, "read_nothing_in_every_way", "--unknown-io=ignore")
    assert (run.status, run.output) == (0, "string 5000 mmio ff ffff ffffffffffffffff\n")
    assert {1, 2, 8} <= {event.size for event in run.all("unknown", space="gpa")}
    reads = run.all("exit", reason="IO", port=0x1234)
    assert sum(event.count for event in reads) == 5000


def test_an_access_across_the_end_of_memory_is_split_there(guest: Guest) -> None:
    run = device(guest, "straddle_end_of_memory", "--unknown-io=ignore")
    assert (run.status, run.output) == (0, "end of memory ffffccdd\n")
    seen = [(event.address, event.is_write, event.size) for event in run.all("unknown")]
    assert seen == [(16 << 20, 1, 2), (16 << 20, 0, 2)]


# ---- output that cannot be written ----


def test_a_full_disk_gets_one_line_and_status_5(call: Call, guest: Guest) -> None:
    with Path("/dev/full").open("wb") as full:
        done = call(guest("hello").image, stdout=full)
    assert done.returncode == 5
    one_line(done.stderr, "cannot write the console to standard output: No space left on device")


def test_a_full_disk_is_found_even_without_a_line_end(call: Call, guest: Guest) -> None:
    with Path("/dev/full").open("wb") as full:
        done = call("--append=case=echo", guest("devices").image, input=b"x" + END_OF_INPUT, stdout=full)
    assert done.returncode == 5
    one_line(done.stderr, "cannot write the console to standard output: No space left on device")


def test_a_closed_pipe_gets_one_line_and_status_5(vmm: Path, guest: Guest) -> None:
    """The reader goes away while the guest still writes."""
    with started(vmm, "--time-limit=20", "--append=case=chatter", guest("devices").image) as process:
        assert len(process.stdout.read(1)) == 1
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 5
    one_line(errors, "cannot write the console to standard output: Broken pipe")


def test_output_that_cannot_be_written_ends_the_record(call: Call, guest: Guest, tmp_path: Path) -> None:
    record = tmp_path / "events"
    with Path("/dev/full").open("wb") as full:
        done = call(f"--events={record}", guest("hello").image, stdout=full)
    end = events.read(record)[-1]
    assert (done.returncode, end.kind, end.status, end.how) == (5, "end", 5, "host failure")


# ---- a lot of output ----

FLOOD_CHUNK, FLOOD_CHUNKS = 64 << 10, 32
FLOOD_SEED = 11


@only_plain
def test_two_mebibytes_arrive_to_the_last_byte(vmm: Path, guest: Guest) -> None:
    """More than a pipe or any buffer on the way holds. Each byte is an exit. With the sanitizers it would only take
    longer."""
    random = stream(FLOOD_SEED, 1)
    chunk = b"".join(random.next().to_bytes(8, "little") for _ in range(FLOOD_CHUNK // 8))
    expected = hashlib.sha256(chunk * FLOOD_CHUNKS).hexdigest()
    seen, size = hashlib.sha256(), 0
    arguments = [f"--seed={FLOOD_SEED}", "--time-limit=900", "--append=case=flood"]
    with started(vmm, *arguments, guest("devices").image, limit=900) as process:
        while part := process.stdout.read(1 << 16):
            seen.update(part)
            size += len(part)
        assert process.wait() == 0
    assert size == FLOOD_CHUNK * FLOOD_CHUNKS
    assert seen.hexdigest() == expected
