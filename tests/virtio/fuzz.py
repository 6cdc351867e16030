"""Run the fuzzer of tests/virtio/fuzz.c: `make fuzz`.

    python3 fuzz.py PROGRAM SECONDS

It begins with the corpus, finds more in build/fuzz/found, and shows a crash with the operations that led there. New
input comes into the corpus by `make fuzz-corpus`, which keeps a small set of files that reaches as much. Files that
have names were made by hand: with them the fuzzer begins at each check of the device.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
ONE_INPUT = 5  # seconds; most take less than a millisecond
LENGTH = 1024  # bytes of an input
LAST_OPERATIONS = 60  # lines shown


@dataclass(frozen=True)
class Fuzzed:
    """How it went."""

    runs: int
    crashed: bool
    shown: str


def fuzz(program: Path, seconds: int, folder: Path, corpus: Path = CORPUS) -> Fuzzed:
    """Look for so long for a crash; what is found goes into this folder."""
    found = folder / "found"
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-timeout={ONE_INPUT}", f"-max_len={LENGTH}", "-print_final_stats=1"]
    command: list[str | Path] = [program, *options, f"-artifact_prefix={folder}/", found, corpus]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    runs = re.search(r"^stat::number_of_executed_units:\s*(\d+)$", done.stderr, re.MULTILINE)
    shown = done.stderr if done.returncode else done.stderr[-500:]
    artifact = re.search(r"Test unit written to (\S+)", done.stderr)
    if artifact:
        shown += f"\n{explain(program, Path(artifact[1]))}"
    return Fuzzed(int(runs[1]) if runs else 0, done.returncode != 0, shown)


def explain(program: Path, reproducer: Path) -> str:
    """The end of the operations in this input."""
    command: list[str | Path] = [program, f"-timeout={ONE_INPUT}", "-artifact_prefix=/dev/null", reproducer]
    environment = os.environ | {"VIRTIO_FUZZ_SHOW": "1"}
    shown = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    ).stderr
    lines = [line for line in shown.splitlines() if line.startswith("  ") and not line.startswith("    #")]
    again = f"VIRTIO_FUZZ_SHOW=1 {program} {reproducer}"
    return "\n".join([f"The last of what {reproducer.name} does; all of it: {again}", *lines[-LAST_OPERATIONS:]])


def main() -> int:
    program, seconds = Path(sys.argv[1]), int(sys.argv[2])
    fuzzed = fuzz(program, seconds, program.parent)
    print(fuzzed.shown)
    verdict = "a crash, see above" if fuzzed.crashed else "nothing found"
    print(f"{fuzzed.runs} runs in {seconds} seconds: {verdict}")
    return int(fuzzed.crashed)


if __name__ == "__main__":
    sys.exit(main())
