"""What the tests here are made of."""

import re
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest
from virtio import names
from virtio.driver import Died, Driver

HEADERS = Path("/usr/include/linux")


def defined(prefix: str) -> Iterator[tuple[str, int]]:
    """What the headers of virtio define with this prefix; "(1 << 0)" and "0x100" are values, other names are not."""
    for header in ("mmio", "ring", "console", "config"):
        text = (HEADERS / f"virtio_{header}.h").read_text()
        for name, value in re.findall(rf"^#define {prefix}(\w+)\s+(0x[0-9a-f]+|\d+|\(1 << \d\))", text, re.MULTILINE):
            yield name, 1 << int(value[6:-1]) if value.startswith("(") else int(value, 0)


PREFIXES: dict[type[IntEnum | IntFlag], list[str]] = {
    names.MMIO: ["VIRTIO_MMIO_"],
    names.INT: ["VIRTIO_MMIO_INT_"],
    names.S: ["VIRTIO_CONFIG_S_"],
    names.DESC: ["VRING_DESC_F_"],
    names.AVAIL: ["VRING_AVAIL_F_"],
    names.USED: ["VRING_USED_F_"],
}


@pytest.mark.parametrize("kind", PREFIXES, ids=[kind.__name__ for kind in PREFIXES])
def test_names_have_the_values_of_linuxs_headers(kind: type[IntEnum | IntFlag]) -> None:
    known = {name: value for prefix in PREFIXES[kind] for name, value in defined(prefix)}
    assert {member.name: known.get(str(member.name)) for member in kind} == {m.name: m.value for m in kind}


def test_features_have_the_bits_of_linuxs_headers() -> None:
    known = {
        name: 1 << bit
        for prefix in ("VIRTIO_F_", "VIRTIO_RING_F_", "VIRTIO_CONSOLE_F_")
        for name, bit in defined(prefix)
    }
    assert {feature.name: known.get(str(feature.name)) for feature in names.F} == {f.name: f.value for f in names.F}


def test_a_device_that_ends_is_noticed_with_what_it_says(driver: Driver) -> None:
    gpa = driver.room(4096, align=4096)
    driver.guard(gpa, 4096, 0)
    driver.go_live()
    with driver.dies_at(gpa):
        driver.queue(1).send(driver.readable(b"good")._replace(gpa=gpa))
    with pytest.raises(Died):
        driver.works()
