"""Collect what guests sent of their coverage counters (guest/coverage.c): `python -m kvmlab.coverage STREAMS`.

Each file in the folder STREAMS is what one run wrote to its debug console. The counters of all runs
are added up and left where gcov looks for them: beside the .gcno files of the build."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _chunk(stream: bytes, at: int) -> bytes:
    size = int.from_bytes(stream[at : at + 4], "little")
    chunk = stream[at + 4 : at + 4 + size]
    if len(stream) < at + 4 or len(chunk) < size:
        raise EOFError
    return chunk


def counters(stream: bytes) -> Iterator[tuple[Path, bytes]]:
    """Each object file's .gcda path and content; a run that ended while sending has fewer."""
    at = 0
    while at < len(stream):
        chunks: list[bytes] = []
        while not chunks or chunks[-1]:
            try:
                chunks.append(_chunk(stream, at))
            except EOFError:
                return
            at += 4 + len(chunks[-1])
        yield Path(chunks[0].decode()), b"".join(chunks[1:])


def _unpack(stream: Path, folder: Path) -> dict[str, Path]:
    """Write a run's counters to the folder, one level deep; by name, where they belong."""
    places = {}
    for path, content in counters(stream.read_bytes()):
        (folder / path.name).write_bytes(content)
        places[path.name] = path
    return places


def collect(streams: list[Path]) -> int:
    """Add up these runs; how many had counters?"""
    places: dict[str, Path] = {}
    used = 0
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
        total = Path(scratch) / "total"
        for number, stream in enumerate(streams):
            one = Path(scratch) / f"run-{number}"
            one.mkdir()
            found = _unpack(stream, one)
            if not found:
                continue
            places |= found
            used += 1
            if total.exists():
                merged = Path(scratch) / "merged"
                subprocess.run(["gcov-tool", "merge", "-o", merged, total, one], check=True, capture_output=True)
                shutil.rmtree(total)
                merged.rename(total)
            else:
                one.rename(total)
        for name, path in places.items():
            shutil.copy(total / name, path)
    return used


if __name__ == "__main__":
    runs = collect(sorted(Path(sys.argv[1]).iterdir()))
    print(f"counters of {runs} guest runs")
