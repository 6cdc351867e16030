"""The images are no private format: QEMU's microvm boots them, too, by the same entry note."""

import subprocess
from pathlib import Path

import pytest
from support import TOO_LONG, started

EXIT_PORT = "isa-debug-exit,iobase=0xf4"  # ends QEMU with status value * 2 + 1


def command(image: Path, seed: int, more: str = "") -> list[str | Path]:
    return [
        *("qemu-system-x86_64", "-M", "microvm", "-accel", "tcg", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-serial", "stdio", "-device", EXIT_PORT, "-append", f"seed={seed} {more}", "-kernel", image),
    ]


def qemu(image: Path, seed: int = 0, more: str = "") -> tuple[int, list[str]]:
    """The status and the lines of a guest that ends by itself."""
    done = subprocess.run(
        command(image, seed, more), input="", capture_output=True, text=True, timeout=TOO_LONG, check=False
    )
    return done.returncode, done.stdout.splitlines()


def test_a_guest_finds_its_seed_and_its_memory(build: Path) -> None:
    assert qemu(build / "tests" / "hello.elf", seed=7) == (1, ["hello from seed 7 with 128 MiB"])


def test_a_failure_is_passed_on(build: Path) -> None:
    assert qemu(build / "tests" / "crash.elf", more="case=exit_with_7") == (7 * 2 + 1, [])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("give_up", "panic: tests/guests/crash.c:"),
        ("undefined_instruction", "panic: exception 6, error code 0x0, rip 0x1"),
        ("write_unmapped", "panic: exception 14, error code 0x2, rip 0x1"),
    ],
)
def test_a_panic_is_a_line_on_the_console_where_no_vmm_explains_it(case: str, text: str, build: Path) -> None:
    status, lines = qemu(build / "tests" / "crash.elf", more=f"case={case}")
    assert status == 3 * 2 + 1
    assert len(lines) == 1
    assert lines[0].startswith(text)


def test_ring_3_runs_there_as_well(build: Path) -> None:
    status, lines = qemu(build / "tests" / "runtime.elf", more="case=try_in_ring_3")
    assert (status, lines[0], lines[-1]) == (1, "double 2468acf12", "double 2a")


def test_lesson_1_begins(build: Path) -> None:
    """It needs the lab device, which QEMU does not have, and in the end it halts for good."""
    image = build / "lessons" / "01-vm-exit" / "image.elf"
    with started(*command(image, 7)) as process:
        assert process.stdout.readline() == b"lesson 1: what a VM exit is\n"


def test_lesson_2_runs_to_its_end(build: Path) -> None:
    status, lines = qemu(build / "lessons" / "02-paging" / "image.elf", seed=7)
    assert status == 1
    assert [line.partition(":")[0] for line in lines] == [
        *("lesson 2", "map", "large", "permissions", "lazy", "harvest", "remap", "spaces")
    ]
