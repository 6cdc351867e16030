"""What the benchmark has measured: a table, a JSON file, and a plot by gnuplot."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """One figure on one engine; its number is that of a target, or there is none."""

    what: str
    engine: str
    limit: float | None
    value: float

    @property
    def is_met(self) -> bool:
        return self.limit is None or self.value <= self.limit


def machine() -> str:
    """What it was measured on."""
    with open("/proc/cpuinfo") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
    return f"{os.cpu_count()} x {model}, {platform.system()} {platform.release()}"


def table(lines: Sequence[Line]) -> Iterator[str]:
    """A row for each figure, with the engines side by side."""
    names = sorted({line.what for line in lines}, key=lambda what: (what.startswith("-"), what))
    yield "| | kvm | at most | svm | at most |"
    yield "|---|---|---|---|---|"
    for what in names:
        cells = [what]
        for engine in ("kvm", "svm"):
            found = next((line for line in lines if (line.what, line.engine) == (what, engine)), None)
            cells += [_value(found), "" if not found or found.limit is None else f"{found.limit:g}"]
        yield f"| {' | '.join(cells)} |"


def _value(line: Line | None) -> str:
    if not line:
        return ""
    text = f"{line.value:.0f}" if float(line.value).is_integer() or line.value >= 100 else f"{line.value:.2f}"
    return text if line.is_met else f"**{text}**"


def plot(others: Mapping[str, float], where: Path) -> None:
    """How long a start takes, as bars on a logarithmic scale."""
    rows = "\n".join(f'"{name}" {ratio:.3f}' for name, ratio in others.items())
    script = f"""
set terminal svg size 640,{90 + 40 * len(others)} font "sans-serif,13" background "white"
set output "{where}"
set title "Start, print a line, exit: time as a ratio to the floor"
$data << end
{rows}
end
set logscale x
set xrange [0.8:*]
set yrange [{len(others) - 0.4}:-0.6]
set style fill solid 0.7
unset key
plot $data using (0.8):0:(0.8):2:($0-0.3):($0+0.3):ytic(1) with boxxyerror linecolor "#336699", \
     $data using 2:0:(sprintf(" %.1f", $2)) with labels left
"""
    subprocess.run(["gnuplot"], input=script, text=True, check=True)


def show(folder: Path, lines: Sequence[Line], others: Mapping[str, float]) -> None:
    """On the terminal, and as bench.json and start.svg in this folder."""
    data = {"machine": machine(), "figures": [asdict(line) for line in lines], "start": others}
    (folder / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"{machine()}; svm: instructions on an emulated AMD CPU\n")
    print("\n".join(table(lines)))
    print()
    for name, ratio in others.items():
        print(f"start of {name}: {ratio:.2f} of the floor's")
    if others:
        plot(others, folder / "start.svg")
    print(f"{folder}/bench.json, {folder}/start.svg")
