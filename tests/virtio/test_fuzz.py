"""The fuzzer: for a while on the device as it is, and on devices that lack one check each, which it must find."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from virtio.fuzz import CORPUS, fuzz

from kvmlab.plugin import ROOT

SECONDS = int(os.environ.get("VIRTIO_FUZZ_SECONDS", "60"))
FILES_MAX, SIZE_MAX = 200, 1024


def built(folder: Path, *variables: str) -> Path:
    """The fuzzer, in this folder."""
    program = folder / "virtio"
    command = ["make", "-s", "build-fuzz", f"FUZZER={program}", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.slow
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    fuzzed = fuzz(built(tmp_path), SECONDS, tmp_path)
    assert not fuzzed.crashed, fuzzed.shown
    assert fuzzed.runs > 1000, fuzzed.shown


# File, what stands there, what then stands there, and what the fuzzer says to it.
PLANTED = {
    "a buffer outside of memory": (
        "virtqueue.c",
        '    if (!hva)\n        return "a buffer is not in memory";\n',
        "",
        r"null pointer|AddressSanitizer: SEGV",
    ),
    "a chain without end": (
        "virtqueue.c",
        "            if (chain->count == queue->ring.num)\n"
        '                return "a chain is longer than the queue, or a loop";\n',
        "",
        r"AddressSanitizer: global-buffer-overflow|out of bounds",
    ),
    "a broken device that looks on": (
        "virtqueue.c",
        "    if (!queue_is_live(device, number))\n        return false;\n    if (virtio_has_feature",
        "    if (!queue->ready)\n        return false;\n    if (virtio_has_feature",
        r"libFuzzer: timeout",
    ),
    "a line that stays high": (
        "virtio_mmio.c",
        "    device->interrupt_status &= ~value;\n    line_update(device);\n",
        "    device->interrupt_status &= ~value;\n",
        r"Assertion `line_is_high\(\) == ",
    ),
    "a configuration space without end": (
        "virtio_mmio.c",
        "    bool is_inside = offset + access->size <= device->config_size;\n",
        "    bool is_inside = offset <= device->config_size;\n",
        r"AddressSanitizer: global-buffer-overflow",
    ),
    "a queue that is not in memory": (
        "virtio_mmio.c",
        "    if (!queue->ring.desc || !queue->ring.avail || !queue->ring.used)\n",
        "    if (!queue->ring.desc || !queue->ring.avail)\n",
        r"null pointer|AddressSanitizer: SEGV",
    ),
}


@pytest.mark.parametrize(("file", "old", "new", "says"), PLANTED.values(), ids=PLANTED)
def test_the_fuzzer_finds_a_bug_that_is_planted(file: str, old: str, new: str, says: str, tmp_path: Path) -> None:
    source = (ROOT / "vmm" / file).read_text()
    assert source.count(old) == 1, f"vmm/{file} has changed: plant the bug anew"
    planted = tmp_path / file
    planted.write_text(source.replace(old, new))
    fuzzed = fuzz(built(tmp_path, f"PLANTED={planted}"), 60, tmp_path)
    assert fuzzed.crashed
    assert re.search(says, fuzzed.shown), fuzzed.shown
    assert "operation" in fuzzed.shown, "its operations are shown"


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.iterdir()]
    assert 0 < len(sizes) <= FILES_MAX
    assert max(sizes) <= SIZE_MAX
