"""The table of deviations (tests/deviations.toml): what stands in it is so."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvmlab.engine import Engine
from kvmlab.machine import Job
from kvmlab.plugin import ROOT

ROWS = tomllib.loads((ROOT / "tests" / "deviations.toml").read_text())["deviation"]
PROBED = [row for row in ROWS if "probe" in row]
CASES = {row["probe"]: row["hardware"] for row in PROBED}
REAL_MODULES = [path for path in map(Path, ("/sys/module/kvm_intel", "/sys/module/kvm_amd")) if path.exists()]


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "probe"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
    subprocess.run(["gcc", *flags, ROOT / "tests" / "probes" / "probe.c", "-o", path], check=True)
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["kvm", "svm", "vmx"])
def test_an_engine_does_what_the_table_says(engines: dict[str, Engine], probe: Path, name: str, case: str) -> None:
    """As the hardware does, but for what stands in the table; a true KVM deviates in nothing."""
    if name not in engines:
        pytest.skip(f"this session is without {name}: --engines=kvm,svm,vmx")
    rows = [row for row in PROBED if (row["engine"], row["probe"]) == (name, case)]
    if name == "kvm" and REAL_MODULES:
        rows = []
    outcome = engines[name].run(Job(["./probe", case], {"probe": probe}))
    expected = rows[0]["seen"] if rows else CASES[case]
    assert (outcome.status, outcome.output.decode().strip(), outcome.errors) == (0, expected, b"")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['engine']}-{row.get('probe', 'test')}")
def test_a_row_says_all_that_a_reader_needs(row: dict[str, Any]) -> None:
    assert all(row[field] for field in ("engine", "what", "source", "so"))
    if "test" in row:
        file, _, test = row["test"].partition("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text()
    else:
        assert row["seen"] != row["hardware"] == CASES[row["probe"]]
