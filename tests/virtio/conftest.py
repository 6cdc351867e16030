"""The device that the tests here drive, and how a test says which clause of the specification it is about."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from virtio.driver import Driver


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(clause): of VIRTIO 1.2, from clauses.toml, which the test proves")


@pytest.fixture(scope="session")
def device(build: Path) -> Path:
    """The VMM's virtio console without a VMM, under AddressSanitizer and UBSan."""
    path = build / "asan" / "tests" / "virtio" / "device"
    assert path.exists(), f"{path} is not built: make build-asan"
    return path


@pytest.fixture
def drivers(device: Path) -> Iterator[Callable[..., Driver]]:
    """Make a driver, with a device of its own. At the end no device may have anything to complain about."""
    made = []

    def make(**keywords: int) -> Driver:
        made.append(Driver(device, **keywords))
        return made[-1]

    try:
        yield make
        for driver in made:
            driver.close()
    finally:
        for driver in made:
            driver.kill()


@pytest.fixture
def driver(drivers: Callable[..., Driver]) -> Driver:
    """A driver of a device that nobody has touched yet."""
    return drivers()
