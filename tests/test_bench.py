"""The benchmark: what it makes of its measurements, and when make bench-check fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvmlab.engine import kvm_problem
from kvmlab.plugin import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import bench
import report
from bench import Cost, Measured
from report import Line


def measured(**ends: int) -> Measured:
    """Two rounds in which each run costs this, and one in which all costs ten times as much."""
    names = {name: ends.get(name.replace("-", "_"), 1000) for name in bench.RUNS}
    return Measured(
        {name: [Cost(end // 2, end), Cost(end // 2, end), Cost(5 * end, 10 * end)] for name, end in names.items()}
    )


def row(name: str) -> bench.Row:
    return next(row for row in bench.ROWS if row.name == name)


def test_a_ratio_is_one_of_the_same_round_so_that_a_slow_round_does_not_count() -> None:
    found = measured(line=1300, floor=1000)
    assert row("start").figure(found) == pytest.approx(1.3)
    assert row("first byte").figure(found) == pytest.approx(1.3)


def test_what_an_exit_costs_is_without_the_start() -> None:
    found = measured(line=1000, com1=1000 + 2 * bench.EXITS, unclaimed=1000 + 4 * bench.EXITS)
    assert row("console").figure(found) == pytest.approx(0.5)


def test_each_half_is_divided_by_how_often_it_does_it() -> None:
    times = bench.HALVES["kick"].times
    found = measured(
        kick_bare_0=500,
        kick_data_0=500,
        **{f"kick_bare_{times}": 500 + 2 * times, f"kick_data_{times}": 500 + 3 * times},
    )
    assert row("virtio").figure(found) == pytest.approx(1.5)


@pytest.fixture
def baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All figures are 1 in it."""
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({row.name: 1.0 for row in bench.ROWS}))
    monkeypatch.setattr(bench, "BASELINE", path)
    return path


@pytest.mark.parametrize(("figure", "status"), [(0.5, 0), (1.02, 0), (1.04, 1)])
def test_what_has_become_dearer_by_more_than_3_percent_fails_the_check(
    figure: float, status: int, baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baseline.exists()
    figures = {row.name: 1.0 for row in bench.ROWS} | {"virtio": figure}
    monkeypatch.setattr(bench, "figures", lambda _: figures)
    assert bench.check(Path("build")) == status
    shown = capsys.readouterr().out
    assert ("bench: dearer by more than 3%: virtio; if it is worth that: make bench-baseline\n" in shown) == bool(
        status
    )


def test_a_baseline_of_other_figures_is_refused(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "figures", lambda _: {"another": 1.0})
    with pytest.raises(SystemExit, match=r"baseline.json has other figures: make bench-baseline"):
        bench.check(baseline)


def test_the_baseline_that_is_committed_has_all_figures() -> None:
    assert json.loads(bench.BASELINE.read_text()).keys() == {row.name for row in bench.ROWS}


def test_the_table_has_the_engines_side_by_side_and_marks_what_is_not_met() -> None:
    lines = [
        Line("1 a start", "kvm", 1.35, 1.2),
        Line("1 a start", "svm", 1.15, 1.19),
        Line("- more", "svm", None, 2.0),
    ]
    assert list(report.table(lines))[2:] == ["| 1 a start | 1.20 | 1.35 | **1.19** | 1.15 |", "| - more |  |  | 2 |  |"]


def test_the_floor_prints_one_byte(build: Path) -> None:
    if problem := kvm_problem():
        pytest.skip(problem)
    subprocess.run(["make", "-s", f"BUILD={build}", f"{build}/bench/floor"], cwd=ROOT, check=True)
    done = subprocess.run([build / "bench" / "floor"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"!")
