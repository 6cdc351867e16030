"""Lesson 11 with devices that do what they must not (`--append=device=NAME`, include/edu_behaviour.h), and with guests
that do (tests/hosts/passthrough). Whatever they do, the VMM says what happened, goes on, and has lost nothing but what
it had given away."""

import os
import re
import signal
from pathlib import Path

import pytest
from support import child_of, lesson_like, make_half, only_plain, started, wait_until_gone

from kvmlab import runner
from kvmlab.engine import Engine
from kvmlab.events import Event
from kvmlab.runner import Built, Run
from kvmlab.shared_memory import SharedMemory

NAME = "11-passthrough"
PAGE = 4096
SHARED_SIZE = 16 * PAGE
BUFFER, BUFFER_SIZE = 0x40000, 4096
SCRIBBLE = 0x5A  # of vmm/edu/process.c
EOPNOTSUPP = 95


@pytest.fixture(scope="session")
def lesson11(vmm: Path, build: Path) -> Built:
    return lesson_like(vmm, build, NAME)


@pytest.fixture(scope="session")
def bad_guest(lesson11: Built, build: Path) -> Built:
    """Its host half with tests/hosts/passthrough."""
    return Built(lesson11.vmm, make_half(build, "passthrough/image.elf"))


def run(built: Built, *words: str, seed: int = 1, engine: Engine | None = None) -> Run:
    return runner.run(built, [f"--append={' '.join(words)}"], seed=seed, time_limit=20, engine=engine)


def stages(recorded: Run, form: str) -> list[str]:
    return [event.stage for event in recorded.all("stage", form=form)]


# ---- bad devices ----

GONE = "its id reads as 0xffffffff now"
NO_DEVICE = "passed through: there is no such device"
NOT_ALIVE = "passed through: it is no edu device, or it does not live"
NO_FACTORIAL = "passed through: it does not say that the factorial is there"

# What the guest says, what the VMM says, and the last stage that the guest has come to.
BAD_DEVICES: dict[str, tuple[str, str, str | None]] = {
    "dies": (NO_FACTORIAL, "its process has ended", "raised"),
    "hangs": (NO_FACTORIAL, "the guest can do nothing with it", "raised"),
    "mumbles": (NO_DEVICE, "its answer is not one", None),
    "babbles": (NO_DEVICE, "what it sends is no message", None),
    "silent": (NO_DEVICE, "it does not answer", None),
    "boasts": (NO_DEVICE, "claim_is_sound() says no", None),
    "shrinks": (NO_DEVICE, "claim_is_sound() says no", None),
    "strays": (
        "passed through: it is no edu device, or it does not live",
        "it wants a doorbell where none can be",
        "impostor",
    ),
}


def expect_lost(recorded: Run, said: str, why: str) -> None:
    """The guest has noticed, the VMM has noticed, and from then on nobody is there."""
    assert (recorded.status, recorded.end.how) == (1, "exit"), recorded.errors
    assert recorded.output.splitlines()[-2:] == [said, GONE]
    assert [event.why for event in recorded.all("lost")] == [why]
    assert all(event.ram_is_unchanged for event in recorded.all("stage"))


@pytest.mark.parametrize("device", BAD_DEVICES)
def test_a_bad_device_is_lost_and_the_guest_goes_on(device: str, lesson11: Built) -> None:
    said, why, last = BAD_DEVICES[device]
    recorded = run(lesson11, f"device={device}")
    expect_lost(recorded, said, why)
    came_to = stages(recorded, "passed through")
    assert came_to[-1:] == ([last] if last else [])


@only_plain
@pytest.mark.parametrize("device", ["dies", "storms"])
def test_a_bad_device_is_lost_on_all_engines(device: str, lesson11: Built, engines: dict[str, Engine]) -> None:
    for engine in engines.values():
        recorded = run(lesson11, f"device={device}", engine=engine)
        assert (recorded.status, recorded.output.splitlines()[-1]) == (1, GONE), recorded.errors
        assert recorded.count("lost") == 1


def test_a_device_that_interrupts_without_end_is_taken_away(lesson11: Built) -> None:
    recorded = run(lesson11, "device=storms")
    said = "passed through: it does not interrupt, or takes no note of the acknowledgement"
    expect_lost(recorded, said, "the guest can do nothing with it")


def test_a_device_that_asks_for_memory_behind_its_window_is_refused_and_goes_on(lesson11: Built) -> None:
    recorded = run(lesson11, "device=asks")
    assert recorded.status == 0, recorded.errors
    refused = [(event.command, event.error) for event in recorded.all("refused")]
    assert refused == [("DMA_WRITE", EOPNOTSUPP)] * 3
    assert without_windows(memory(recorded), recorded) == without_windows(content(recorded), recorded)


def test_a_device_can_spoil_the_file_that_it_has_and_nothing_else(lesson11: Built) -> None:
    recorded = run(lesson11, "device=scribbles")
    assert recorded.status == 0, recorded.errors
    assert memory(recorded, "factorial") == memory(recorded, "unmapped", "emulated")
    assert memory(recorded, "dma") == bytes([SCRIBBLE]) * SHARED_SIZE, "who has a file has all of it"
    assert all(event.ram_is_unchanged for event in recorded.all("stage"))


# ---- bad guests ----


def content(recorded: Run) -> bytes:
    """What is in the shared file at the beginning."""
    return bytes(SharedMemory(recorded, SHARED_SIZE, []).bytes)


def memory(recorded: Run, stage: str = "", form: str = "passed through") -> bytes:
    """What is in it at the end of this stage, or of the run."""
    end = recorded.one("stage", form=form, stage=stage) if stage else recorded.end
    assert end, f"there is no stage {stage}"
    return bytes(SharedMemory(recorded, SHARED_SIZE, []).advance(end).bytes)


def without_windows(shared: bytes, recorded: Run) -> bytes:
    """What no window has."""
    found = bytearray(shared)
    for window in recorded.all("window"):
        found[window.offset : window.offset + window.size] = bytes(window.size)
    return bytes(found)


class Model:
    """What a device with these mappings does."""

    def __init__(self, recorded: Run) -> None:
        self.shared = bytearray(content(recorded))
        self.buffer = bytearray(BUFFER_SIZE)
        self.windows = recorded.all("window")

    def transfer(self, event: Event) -> str:
        if event.size > BUFFER_SIZE or event.offset > BUFFER_SIZE - event.size:
            return "outside its buffer"
        if event.size == 0:
            return "done"
        for window in self.windows:
            if window.gpa <= event.address and event.address + event.size <= window.gpa + window.size:
                at = window.offset + event.address - window.gpa
                inside, outside = slice(event.offset, event.offset + event.size), slice(at, at + event.size)
                if event.is_to_ram:
                    self.shared[outside] = self.buffer[inside]
                else:
                    self.buffer[inside] = self.shared[outside]
                return "done"
        return "not mapped"


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_guest_that_asks_for_anything_gets_what_is_its_own(seed: int, bad_guest: Built) -> None:
    """In both forms: also the device in the VMM itself touches the windows only; guard pages lie around them."""
    recorded = run(bad_guest, "guest=hostile", seed=seed)
    assert recorded.status == 0, recorded.errors
    results = set()
    model = Model(recorded)
    for form in ("emulated", "passed through"):
        model.buffer = bytearray(BUFFER_SIZE)
        for event in recorded.all("device", form=form, what="dma"):
            assert event.result == model.transfer(event), str(event)
            results.add(event.result)
        (end,) = recorded.all("stage", form=form, stage="hostile")
        assert memory(recorded, "hostile", form) == bytes(model.shared)
        assert end.ram_is_unchanged
    assert results == {"done", "not mapped", "outside its buffer"}


def test_a_window_that_is_taken_away_in_mid_transfer_is_left_alone(bad_guest: Built) -> None:
    recorded = run(bad_guest, "guest=unmaps")
    assert recorded.status == 0, recorded.errors
    what = [(event.what, event.get("result")) for event in recorded.all("device") if event.what in ("dma", "unmap")]
    assert what == [("dma", "cancelled"), ("unmap", "done")]
    assert memory(recorded) == content(recorded)


# ---- what the device's process has, and how long it lives ----


@only_plain
def test_the_device_ends_with_a_vmm_that_is_killed(lesson11: Built) -> None:
    """Even if it does not look at its socket."""
    with started(lesson11.vmm, lesson11.image) as process:
        child = child_of(process.pid)
        while b"passed through: 2 interrupts" not in process.stdout.readline():
            pass
        os.kill(child, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_gone(child)


@only_plain
def test_the_devices_process_has_nothing_of_the_vmm_but_a_socket(lesson11: Built) -> None:
    with started(lesson11.vmm, "--append=device=hangs", lesson11.image) as process:
        child = child_of(process.pid)
        while b"passed through: 2 interrupts" not in process.stdout.readline():
            pass
        links = [os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()]
        kinds = {link.partition(":[")[0] for link in links}
        assert kinds <= {"socket", "anon_inode", "pipe", "/memfd:edu (deleted)"}, links
        its_own = re.compile(r"/dev/kvm|kvm-v|windows")  # the VM, the vCPU, memory that the device is to ask for
        assert [link for link in links if its_own.search(link)] == []
        maps = Path(f"/proc/{child}/maps").read_text().splitlines()
        assert [line for line in maps if its_own.search(line)] == []
        sizes = [int(end, 16) - int(start, 16) for line in maps for start, end in [line.split()[0].split("-")]]
        assert max(sizes) < 16 << 20, "as large as the guest's RAM"
