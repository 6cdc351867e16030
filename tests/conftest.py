"""What the tests of the VMM share: its two builds, and a way to call it with any command line."""

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The modules here that are not tests: images.py and support.py.
sys.path.insert(0, str(Path(__file__).parent))

import support

from kvmlab.runner import Built

# A status of its own for what the sanitizers find, which no test expects.
SANITIZER_STATUS = 99
os.environ["ASAN_OPTIONS"] = f"exitcode={SANITIZER_STATUS}"


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts us in the background ignores it, and so would all that the tests start and interrupt. The
    # workers of xdist have it from us; they may be in another thread than the main one, which may not set it.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes more than a minute; starts first, beside all others")
    config.addinivalue_line("markers", "spread: many of them take long; they stand between all others")


@pytest.hookimpl(trylast=True)  # after pytest has put side by side what shares a fixture
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """xdist hands out rows of tests, hundreds at first: a row in which all take long would keep one worker busy
    while the others have nothing left to do."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    spread = [item for item in items if item.get_closest_marker("spread") and item not in slow]
    others = [item for item in items if item not in slow and item not in spread]
    share = len(spread) / max(1, len(others))
    left = iter(spread)
    items[:] = slow
    for _, row in itertools.groupby(others, key=lambda item: item.path):
        items += (tests := list(row))
        items += itertools.islice(left, math.ceil(len(tests) * share))
    items += left


@pytest.fixture(scope="session", params=["plain", "asan"])
def vmm(request: pytest.FixtureRequest, build: Path) -> Path:
    """The VMM without a host half: as users have it, and under AddressSanitizer and UBSan."""
    path = build / "vmm" / "vmm" if request.param == "plain" else build / "asan" / "vmm" / "vmm"
    assert path.exists(), f"{path} is not built: make build-all build-asan"
    return path


@pytest.fixture
def call(vmm: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Call the VMM with these arguments: no events, bytes in and out, a short time limit."""

    def function(*arguments: str | bytes | Path, **keywords: Any) -> subprocess.CompletedProcess[bytes]:
        given: dict[str, Any] = {"input": b"", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60}
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            [vmm, "--time-limit=20", *arguments], check=False, **(given | keywords)
        )
        return done

    return function


@pytest.fixture(scope="session")
def host(vmm: Path) -> support.Host:
    """The VMM with the host half of this name."""
    return lambda name: support.make_half(vmm.parent.parent, f"{name}/vmm")


@pytest.fixture(scope="session")
def halves(host: support.Host, build: Path) -> support.Halves:
    """Both halves of this name."""
    return lambda name: Built(host(name), support.make_half(build, f"{name}/image.elf"))
