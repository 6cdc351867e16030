"""On svm a host half can give its guest a real device: QEMU's edu, behind an IOMMU, by VFIO: tests/hosts/vfio."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import make_half, of_session
from variants import Variant, command

from kvmlab import cache, engine, runner
from kvmlab.engine import Engine, Svm
from kvmlab.machine import MachineError
from kvmlab.runner import Built, Run

pytest_plugins = ["variants"]

Engines = dict[str, Engine]

SEED = 0x1234567
UNTOUCHED = "c5" * 64
READS = 1000
# Where the device was to write, and must not: only read, not mapped any more, never mapped.
FORBIDDEN = [0x8000000, 0x9000000, 0xC00000]
DMAR = r"DMAR: \[DMA Write NO_PASID\] Request device \[00:02\.0\] fault addr (0x\w+) \[.*\] PTE Write access is not set"


@pytest.fixture(scope="module")
def vfio(build: Path) -> Built:
    """Both halves of tests/hosts/vfio."""
    return Built(make_half(build, "vfio/vmm"), make_half(build, "vfio/image.elf"))


@pytest.fixture(scope="module", params=["", "npt=0"], ids=["nested paging", "shadow paging"])
def recorded(request: pytest.FixtureRequest, engines: Engines, vfio: Built) -> Run:
    """One run of them."""
    of_session(engines, "svm")
    run = runner.run(vfio, seed=SEED, vfio=True, engine=Svm(request.param))
    assert (run.status, run.errors) == (0, "")
    return run


def reports(run: Run, device: str) -> list[int]:
    """What the guest has said through this port."""
    return [int.from_bytes(bytes.fromhex(event.data), "little") for event in run.all("exit", device=device)]


# ---- the group and the registers ----


def test_the_device_is_alone_in_a_group_that_vfio_may_have(recorded: Run) -> None:
    (group,) = recorded.all("group")
    assert (group.devices, group.is_viable, group.type1) == (1, 1, 1)


def test_the_guest_reads_the_devices_registers_without_an_exit(recorded: Run) -> None:
    (before,), (after,) = (recorded.all("statistics", when=when) for when in ("before", "after"))
    assert after.mmio_exits == before.mmio_exits
    assert after.exits - before.exits < READS, "KVM's own, for interrupts of the host"
    assert reports(recorded, "wrong") == [0]
    assert reports(recorded, "liveness") == [SEED ^ 0xFFFFFFFF]
    assert not recorded.all("exit", reason="MMIO")


# ---- interrupts ----


def test_a_message_interrupts_once_and_a_line_until_it_is_acknowledged(recorded: Run) -> None:
    """Both without the host half: from VFIO to KVM by irqfd; for the line, back by its resamplefd."""
    assert reports(recorded, "cause") == [0x11, 0x22, 0x33, 0x33, 0x33]


def test_vfio_masks_a_line_that_has_interrupted_until_it_is_told_to_unmask_it(recorded: Run) -> None:
    counts = {event.when: event.count for event in recorded.all("interrupts")}
    assert counts == {"raised": 1, "masked by VFIO": 0, "unmasked": 1, "acknowledged": 0}


# ---- DMA ----


def test_dma_moves_data_both_ways(recorded: Run) -> None:
    (moved,) = recorded.all("memory", when="moved")
    assert moved.destination == moved.source
    assert moved.source != UNTOUCHED
    assert moved.victim == UNTOUCHED


def test_dma_where_the_device_must_not_write_leaves_memory_untouched(recorded: Run) -> None:
    (before,) = recorded.all("memory", when="read only")
    (moved,) = recorded.all("memory", when="moved")
    assert (before.source, before.destination, before.victim) == (moved.source, UNTOUCHED, UNTOUCHED)
    for when in ("cached", "unmapped", "never mapped"):
        (memory,) = recorded.all("memory", when=when)
        assert (memory.source, memory.destination, memory.victim) == (UNTOUCHED,) * 3, when


def test_the_kernel_log_says_which_dma_was_blocked(recorded: Run) -> None:
    """But for the stage "cached": QEMU says nothing where its IOTLB has the page, as one that may only be read."""
    said = re.findall(r"DMAR: .* fault addr .*", recorded.kernel_log)
    assert [event.text for event in recorded.all("iommu_fault")] == said
    assert re.findall(DMAR, recorded.kernel_log) == [f"{address:#x}" for address in FORBIDDEN]


def test_dma_beyond_the_devices_buffer_is_the_end_of_qemu(engines: Engines, vfio: Built) -> None:
    of_session(engines, "svm")
    with pytest.raises(MachineError, match=r"^the emulator died, saying: qemu: hardware error: EDU: DMA range "):
        runner.run(vfio, ["--append=beyond=1"], vfio=True, engine=Svm())


# ---- on which machine ----


def test_each_run_has_a_machine_that_no_other_has_used(engines: Engines, vfio: Built) -> None:
    """Of a second run within five seconds Linux would not report all that was blocked."""
    of_session(engines, "svm")
    with engine.one_svm():
        runs = [runner.run(vfio, vfio=True, engine=Svm()) for _ in range(2)]
    assert [run.kernel_log.count("fault addr") for run in runs] == [len(FORBIDDEN)] * 2


@pytest.mark.parametrize("name", ["run", "check"])
@pytest.mark.parametrize(("toml", "status"), [("vfio = true\n", 0), ("", 5)])
def test_a_lesson_says_in_its_toml_that_it_uses_vfio(
    engines: Engines, variant: Callable[[str], Variant], name: str, toml: str, status: int
) -> None:
    """Else it would run on the machine that others share, which is not there in this test."""
    of_session(engines, "svm")
    ours = variant("09-irqchip")  # one that runs several times
    path = ours.folder / "lesson.toml"
    path.write_text(toml + path.read_text())
    shown = command(*ours.call(name, "9", "--seed=1", "--engine=svm"), PYTHONPATH="tools", KVMLAB_SVM="/nowhere")
    assert shown.status == status, str(shown)
    assert "/nowhere" in shown.errors or status == 0


@pytest.mark.parametrize("name", ["kvm", "vmx"])
def test_an_engine_without_the_device_is_known_by_sysfs(engines: Engines, vfio: Built, name: str) -> None:
    of_session(engines, name)
    run = runner.run(vfio, vfio=True, engine=engines[name])
    assert (run.status, run.lacking) == (77, "it has no device edu that is vfio-pci's")


def test_what_is_prepared_is_known_by_the_modules_in_it(tmp_path: Path) -> None:
    recipe, package = cache.RECIPES["svm"], tmp_path / "linux-image"
    other = dataclasses.replace(recipe, more_modules=recipe.more_modules[:-1])
    assert cache._key(recipe, package) != cache._key(other, package)
    assert cache._key(recipe, package) == cache._key(dataclasses.replace(recipe), package)
