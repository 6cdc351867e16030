"""Each engine deviates where deviations.toml says so, and nowhere else."""

import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmlab.engine import ENGINES, Engine
from kvmlab.machine import Job
from kvmlab.plugin import ROOT

HARDWARE = [Path("/sys/module/kvm_intel"), Path("/sys/module/kvm_amd")]


@dataclass(frozen=True)
class Deviation:
    """A row of the table, which explains the columns."""

    engines: list[str]
    name: str
    hardware: str
    seen: str
    so: str


ROWS = [Deviation(**row) for row in tomllib.loads((ROOT / "tests" / "deviations.toml").read_text())["deviation"]]


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of all probes; static, because an emulated machine has no libraries."""
    path = tmp_path_factory.mktemp("probes") / "deviations"
    flags = ["-static", "-std=gnu11", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/include"]
    subprocess.run(["gcc", *flags, ROOT / "tests" / "probes" / "deviations.c", "-o", path], check=True)
    return path


def test_every_row_has_a_probe_and_every_probe_a_row(probes: Path) -> None:
    listed = subprocess.run([probes], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == sorted(row.name for row in ROWS)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_an_engine_deviates_where_the_table_says_so(
    row: Deviation, name: str, engines: dict[str, Engine], probes: Path
) -> None:
    if name not in engines:
        pytest.skip(f"this session has no {name}: --engines={','.join(ENGINES)}")
    if name == "kvm" and name in row.engines and any(module.exists() for module in HARDWARE):
        pytest.skip("this KVM uses the CPU's own virtualization; the row is about backends in software")
    outcome = engines[name].run(Job(["./deviations", row.name], {"deviations": probes}))
    seen = outcome.output.decode().strip() or f"status {outcome.status}"
    expected = "deviates" if name in row.engines else "conforms"
    assert seen == expected, f"{row.name} on {name}: {outcome.errors.decode().strip()}"
