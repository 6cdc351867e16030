"""Lesson 12 with guests that do what they must not (tests/hosts/iommu/guest.c), with a device that goes away, and
with anything that VFIO can be asked for (tests/hosts/iommu/host.c); and its driver, which does not know whose device it
drives."""

import math
import os
import re
import signal
import struct
import subprocess
from pathlib import Path

import pytest
from support import Host, child_of, lesson_like, make_half, of_session, only_plain, started, wait_until_gone

from kvmlab import events, runner
from kvmlab.engine import Engine
from kvmlab.events import Event
from kvmlab.runner import Built, Run
from kvmlab.shared_memory import SharedMemory, expect_memory

Engines = dict[str, Engine]

NAME = "12-vfio-iommu"
PAGE = 4096
SHARED_SIZE = 16 * PAGE
BUFFER, BUFFER_SIZE = 0x40000, 4096
DMA_MASK = 0xFFFFFFF
WRITE = 2  # VFIO_DMA_MAP_FLAG_WRITE
SOFTWARE = "vmm: the device and the IOMMU before it are software\n"
HARDWARE = "vmm: the device and the IOMMU before it are this machine's, by VFIO\n"


@pytest.fixture(scope="session")
def lesson12(vmm: Path, build: Path) -> Built:
    return lesson_like(vmm, build, NAME)


@pytest.fixture(scope="session")
def bad_guest(lesson12: Built, build: Path) -> Built:
    """Its host half with tests/hosts/iommu."""
    return Built(lesson12.vmm, make_half(build, "iommu/image.elf"))


def run(built: Built, guest: str, *, seed: int = 1, engine: Engine | None = None) -> Run:
    return runner.run(built, [f"--append=guest={guest}"], seed=seed, time_limit=20, vfio=True, engine=engine)


# ---- a guest that lets the device move data from and to anywhere ----


class Model:
    """What the transfers of a device behind an IOMMU leave. Where it may not go, ours gives up; QEMU's goes on with the
    next page, and has read zeros."""

    def __init__(self, recorded: Run, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self.memory = SharedMemory(recorded, SHARED_SIZE, [])
        self.buffer = bytearray(BUFFER_SIZE)
        self.pages: dict[int, tuple[int, bool]] = {}  # by iova: the offset in the file, and is it writable
        self.faults: list[tuple[int, bool]] = []

    def mapping(self, event: Event) -> None:
        for at in range(0, event.size, PAGE):
            if event.request == "VFIO_IOMMU_UNMAP_DMA":
                del self.pages[event.iova + at]
            else:
                self.pages[event.iova + at] = (event.offset + at, bool(event.fields["flags"] & WRITE))

    def transfer(self, memory: int, buffer: int, count: int, *, is_to_ram: bool) -> str:
        """Page by page: each is moved, or is not."""
        offset, iova, result = buffer - BUFFER, memory & DMA_MASK, "done"
        if not 0 <= offset <= offset + count <= BUFFER_SIZE:
            return "outside its buffer"
        while count:
            in_page = iova % PAGE
            size = min(count, PAGE - in_page)
            at, is_writable = self.pages.get(iova - in_page, (0, None))
            inside, outside = slice(offset, offset + size), slice(at + in_page, at + in_page + size)
            if is_writable is None or (is_to_ram and not is_writable):
                self.faults.append((iova - in_page, is_to_ram))
                result = "not mapped"
                if not self.goes_on:
                    break
                if not is_to_ram:
                    self.buffer[inside] = bytes(size)
            elif is_to_ram:
                self.memory.bytes[outside] = self.buffer[inside]
            else:
                self.buffer[inside] = self.memory.bytes[outside]
            iova, offset, count = iova + size, offset + size, count - size
        return result


def transfers(recorded: Run) -> list[tuple[int, int, int, bool]]:
    """What the guest has asked for: it says so before it asks."""
    asked = re.findall(r"^transfer (\w+) (\w+) (\w+) ([01])$", recorded.output, flags=re.MULTILINE)
    return [(int(memory, 16), int(buffer, 16), int(count, 16), bool(int(way))) for memory, buffer, count, way in asked]


@pytest.mark.parametrize("seed", range(2, 6))
def test_dma_to_anywhere_goes_where_the_tables_say_and_no_further(seed: int, bad_guest: Built) -> None:
    """Also where a transfer begins in a page that the device may reach, and ends in one that it may not."""
    recorded = run(bad_guest, "hostile", seed=seed)
    assert (recorded.status, recorded.errors) == (0, SOFTWARE)
    asked = iter(transfers(recorded))
    model, results, partly = Model(recorded), [], 0
    faults: list[tuple[int, bool]] = []
    for event in recorded.events:
        if event.kind == "vfio" and event.request in ("VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"):
            assert event.error == 0, str(event)
            model.mapping(event)
        elif event.kind == "fault":
            faults.append((event.address, bool(event.is_write)))
        elif event.kind == "device" and event.what == "dma":
            memory, buffer, count, is_to_ram = next(asked)
            before = bytes(model.memory.bytes), bytes(model.buffer)
            results.append(model.transfer(memory, buffer, count, is_to_ram=is_to_ram))
            partly += results[-1] == "not mapped" and before != (model.memory.bytes, model.buffer)
            assert event.result == results[-1], str(event)
        elif event.kind == "stage" and event.stage == "moved":
            seen = SharedMemory(recorded, SHARED_SIZE, []).advance(event)
            expect_memory(recorded, f"transfer {len(results)}", model.memory, seen, event)
            assert faults == model.faults, str(event)
            assert event.ram_is_unchanged, str(event)
    assert next(asked, None) is None
    assert set(results) == {"done", "not mapped", "outside its buffer"}
    assert partly, "no transfer has been stopped in its middle: choose another seed"


@only_plain
@pytest.mark.parametrize("seed", [2, 3])
def test_dma_through_a_real_iommu_goes_where_the_tables_say_too(seed: int, bad_guest: Built, engines: Engines) -> None:
    """What is reported is not compared: Linux describes three of all."""
    recorded = run(bad_guest, "hostile-in-buffer", seed=seed, engine=of_session(engines, "svm"))
    assert (recorded.status, recorded.errors) == (0, HARDWARE)
    asked = iter(transfers(recorded))
    model, results = Model(recorded, goes_on=True), []
    for event in recorded.events:
        if event.kind == "vfio" and event.request in ("VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"):
            model.mapping(event)
        elif event.kind == "stage" and event.stage == "moved":
            memory, buffer, count, is_to_ram = next(asked)
            results.append(model.transfer(memory, buffer, count, is_to_ram=is_to_ram))
            seen = SharedMemory(recorded, SHARED_SIZE, []).advance(event)
            expect_memory(recorded, f"transfer {len(results)}", model.memory, seen, event)
            assert event.ram_is_unchanged, str(event)
    assert next(asked, None) is None
    assert set(results) == {"done", "not mapped"}
    reported = {(event.address, bool(event.is_write)) for event in recorded.all("fault")}
    assert reported <= set(model.faults)


# ---- a guest that writes anything to the lab ----


@pytest.mark.parametrize("seed", range(1, 13))
def test_a_guest_may_write_anything_to_the_lab_in_any_order(seed: int, bad_guest: Built) -> None:
    recorded = run(bad_guest, "ports", seed=seed)
    assert (recorded.status, recorded.output, recorded.errors) == (0, "300 writes\n", SOFTWARE)
    assert recorded.end.ns < 1.5e9, "the guest has made the VMM wait"
    assert not recorded.all("lost"), "what has become of the device?"
    assert all(event.ram_is_unchanged for event in recorded.all("stage"))


# ---- a device that goes away ----


@only_plain
@pytest.mark.parametrize(
    ("guest", "number", "why"),
    [("waits", signal.SIGKILL, "its process has ended"), ("unmaps", signal.SIGSTOP, "it does not answer")],
)
def test_a_device_that_is_gone_is_lost_and_the_guest_goes_on(
    guest: str, number: signal.Signals, why: str, bad_guest: Built, tmp_path: Path
) -> None:
    record = tmp_path / "events.jsonl"
    with started(bad_guest.vmm, f"--append=guest={guest}", f"--events={record}", bad_guest.image) as process:
        child = child_of(process.pid)
        assert process.stdout.readline() == b"it is there\n"
        os.kill(child, number)
        assert process.stdout.read() == b"it does not live any more\n"
        assert process.stderr.read().startswith(SOFTWARE.encode() + b"vmm: the guest ")
        assert process.wait() == 1
    assert [event.why for event in events.parse(record.read_bytes()) if event.kind == "lost"] == [why]
    wait_until_gone(child)


@only_plain
def test_the_device_ends_with_a_vmm_that_is_killed(bad_guest: Built) -> None:
    """Even if it does not look at its socket."""
    with started(bad_guest.vmm, "--append=guest=waits", bad_guest.image) as process:
        child = child_of(process.pid)
        assert process.stdout.readline() == b"it is there\n"
        os.kill(child, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_gone(child)


# ---- one driver ----

DRIVER = {
    *("edu_command", "edu_probe", "edu_factorial", "edu_transfer", "edu_await_interrupt"),
    "edu_interrupted",
}
FACTORIALS = 6


def code_at(image: bytes, address: int, size: int) -> bytes:
    """What the loader puts there: ELF, "Program Header"."""
    (table,), (entry_size, entries) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<HH", image, 54)
    for at in range(table, table + entries * entry_size, entry_size):
        kind, _, offset, first, _, length = struct.unpack_from("<IIQQQQ", image, at)
        if kind == 1 and first <= address and address + size <= first + length:
            return image[offset + address - first :][:size]
    raise AssertionError(f"nothing is loaded at {address:#x}")


def driver_code(image: Path) -> dict[str, bytes]:
    """All functions of guest/edu.c, but for the one that calls others of the runtime."""
    symbols = subprocess.run(["nm", "-S", image], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) (\w+) [Tt] (edu_\w+)$", symbols, flags=re.MULTILINE)
    content = image.read_bytes()
    return {
        name: code_at(content, int(address, 16), int(size, 16))
        for address, size, name in found
        if name != "edu_driver_begin"
    }


def test_the_driver_of_both_lessons_is_the_same_machine_code(build: Path) -> None:
    """So what is seen of it in lesson 11 (a device in the VMM, and one in a process) and in lesson 12 (one in a
    process, and QEMU's own) is seen of one and the same."""
    lessons = [runner.lesson_built(build, name).image for name in ("11-passthrough", NAME)]
    of11, of12, of_test = (driver_code(image) for image in (*lessons, make_half(build, "iommu/image.elf")))
    assert of11.keys() >= DRIVER
    assert of11 == of12 == of_test


@only_plain
@pytest.mark.parametrize("name", ["kvm", "svm"])
def test_the_driver_has_factorials_computed_by_either_device(bad_guest: Built, engines: Engines, name: str) -> None:
    """Of these, lesson 12 has none."""
    recorded = run(bad_guest, "factorials", engine=of_session(engines, name))
    assert (recorded.status, recorded.errors) == (0, HARDWARE if name == "svm" else SOFTWARE)
    computed = re.findall(r"^(\d+)! = (\d+)$", recorded.output, flags=re.MULTILINE)
    assert len(computed) == FACTORIALS
    for number, result in computed:
        assert int(result) == math.factorial(int(number)) % (1 << 32), f"{number}!"


# ---- VFIO in software answers as the kernel does ----

# By request: with which errnos the kernel has refused it, or 0, at least.
EBADF, EFAULT, EBUSY, EEXIST, ENODEV, EINVAL, ENOTTY = 9, 14, 16, 17, 19, 22, 25
ANSWERS = {
    "NO_REQUEST": {EBADF, EINVAL, ENOTTY},
    "VFIO_GROUP_GET_STATUS": {0, EINVAL},
    "VFIO_GROUP_SET_CONTAINER": {0, EBADF, EINVAL},
    "VFIO_SET_IOMMU": {0, EINVAL, ENODEV},
    "VFIO_GROUP_GET_DEVICE_FD": {0, EINVAL, ENODEV},
    "VFIO_IOMMU_MAP_DMA": {0, EINVAL, EEXIST, EFAULT, ENOTTY},
    "VFIO_IOMMU_UNMAP_DMA": {0, EINVAL, ENOTTY},
    "VFIO_DEVICE_GET_REGION_INFO": {0, EINVAL, ENOTTY},
    "VFIO_DEVICE_SET_IRQS": {0, EBADF, EBUSY, EINVAL, ENOTTY},
}
ANSWERED = ("error", "result", "messages", "lines", "unmasks")
SEEDS = [2, 10]


class Answers:
    """What one of them has answered to the list of requests: to each, what it was, and the answer."""

    def __init__(self, recorded: Run, of: str) -> None:
        self.pairs: list[tuple[Event, tuple[object, ...]]] = []
        request = None
        for event in recorded.events:
            if event.kind == "vfio":
                request = event
            elif event.kind == "answer" and event.of == of:
                assert request
                self.pairs.append((request, tuple(event.fields[name] for name in ANSWERED)))

    def errors(self, request: str) -> set[object]:
        return {answer[0] for event, answer in self.pairs if event.request == request}

    def expect(self, others: "Answers") -> None:
        """The same, one by one."""
        for (event, expected), (_, seen) in zip(self.pairs, others.pairs, strict=True):
            assert seen == expected, f"{ANSWERED} of {event}"


def ask(vmm: Path, build: Path, seed: int, engine: Engine) -> Run:
    """Let tests/hosts/iommu ask, before a guest that has nothing to do with it."""
    recorded = runner.run(Built(vmm, build / "tests" / "hello.elf"), seed=seed, vfio=True, engine=engine)
    assert (recorded.status, recorded.errors) == (0, "")
    assert not recorded.all("lost")
    return recorded


@pytest.fixture(scope="module", params=SEEDS)
def on_svm(request: pytest.FixtureRequest, engines: Engines, build: Path) -> Run:
    """The kernel has been asked, and then the software."""
    return ask(make_half(build, "iommu/vmm"), build, request.param, of_session(engines, "svm"))


def test_the_list_of_requests_has_all_kinds_of_answers(on_svm: Run) -> None:
    kernel = Answers(on_svm, "kernel")
    for request, errors in ANSWERS.items():
        assert kernel.errors(request) >= errors, request
    for name in ("messages", "lines"):
        assert {answer[ANSWERED.index(name)] for _, answer in kernel.pairs} == {0, 1}, name


def test_vfio_in_software_answers_as_the_kernel_does(on_svm: Run) -> None:
    Answers(on_svm, "kernel").expect(Answers(on_svm, "software"))


def test_vfio_in_software_answers_on_this_machine_as_the_kernel_does_on_svm(
    on_svm: Run, host: Host, build: Path, engines: Engines
) -> None:
    recorded = ask(host("iommu"), build, on_svm.seed, of_session(engines, "kvm"))
    Answers(on_svm, "kernel").expect(Answers(recorded, "software"))
    maps = Answers(recorded, "software").pairs
    mapped = sum(event.size for event, _ in maps if event.request == "VFIO_IOMMU_MAP_DMA" and not event.error)
    unmapped = sum(
        int(str(answer[1])) for event, answer in maps if event.request == "VFIO_IOMMU_UNMAP_DMA" and not event.error
    )
    (pages,) = recorded.all("pages")
    assert pages.pages * PAGE == mapped - unmapped
