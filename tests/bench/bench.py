"""What a start, an exit, an injection, a page cost: `make bench`, `make bench-check`, `make bench-baseline`.

Each figure is a ratio of two things that ran in the same rounds, in random order: the machine's mood is in both. On
kvm it is one of times, for information. On svm it is one of instructions: the emulated machine counts them (QEMU's
-icount shift=0), and they repeat to 1%. `check` compares these with tests/bench/baseline.json, and nothing else.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import report
from report import Line

from kvmlab import cache, whole_file
from kvmlab.engine import kvm_problem, start_svm
from kvmlab.machine import Job, Settings

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"
WORSE = 0.03
EXITS = 1000  # of the guests in bench.mk
ICOUNT = ("-icount", "shift=0,sleep=off")
ROUNDS = {"kvm": 30, "svm": 5}

VMM = "./vmm"
RUNS: dict[str, list[str]] = {
    "floor": ["./floor"],
    "floor-exits": ["./floor-exits"],
    "floor-cpuid": ["./floor-cpuid"],
    "line": [VMM, "line.elf"],
    "com1": ["-", VMM, "com1.elf"],
    "unclaimed": ["-", VMM, "unclaimed.elf"],
    "line-events": ["-", VMM, "--events=events", "line.elf"],
    "com1-events": ["-", VMM, "--events=events", "com1.elf"],
    "unclaimed-events": ["-", VMM, "--events=events", "unclaimed.elf"],
}


@dataclass(frozen=True)
class Half:
    """Of tests/bench/halves: two cases of a guest, and how often each does what it is about."""

    cases: tuple[str, str]
    times: int
    vmm: str

    def run(self, name: str, case: str, times: int) -> list[str]:
        return ["-", f"./{self.vmm}", f"--append=case={case} count={times}", f"{name}.elf"]


HALVES = {
    "inject": Half(("ioctl", "synced"), 5000, "inject.vmm"),
    "kick": Half(("bare", "data"), 5000, "vmm"),
    "page-in": Half(("anonymous", "uffd16"), 8192, "page-in.vmm"),
}
RUNS |= {
    f"{name}-{case}-{times}": half.run(name, case, times)
    for name, half in HALVES.items()
    for case in half.cases
    for times in (0, half.times)
}


@dataclass(frozen=True)
class Cost:
    """Of one run, in nanoseconds or, on svm, in instructions."""

    first_byte: int
    end: int


@dataclass(frozen=True)
class Measured:
    """The costs of each run of RUNS, by round."""

    costs: Mapping[str, Sequence[Cost]]

    def ends(self, name: str) -> list[int]:
        return [cost.end for cost in self.costs[name]]

    def ratio(self, name: str, to: str) -> float:
        return median(a / b for a, b in zip(self.ends(name), self.ends(to), strict=True))

    def first_byte(self) -> float:
        pairs = zip(self.costs["line"], self.costs["floor"], strict=True)
        return median(ours.first_byte / floor.first_byte for ours, floor in pairs)

    def each(self, name: str, without: str, times: int = EXITS) -> float:
        """What one of so many costs."""
        return median((a - b) / times for a, b in zip(self.ends(name), self.ends(without), strict=True))

    def half(self, name: str) -> float:
        """What the second case of a half costs, as a ratio to the first."""
        times = HALVES[name].times
        first, second = (self.each(f"{name}-{case}-{times}", f"{name}-{case}-0", times) for case in HALVES[name].cases)
        return second / first


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    what: str
    limits: Mapping[str, float]
    figure: Callable[[Measured], float]


ROWS = [
    Row(
        "start",
        "1 start, print a line, exit: to the floor",
        {"kvm": 1.35, "svm": 1.15},
        lambda m: m.ratio("line", "floor"),
    ),
    Row("start-cpuid", "- a start: to a floor whose guest has a CPUID", {}, lambda m: m.ratio("line", "floor-cpuid")),
    Row("first byte", "2 first byte on the console: to the floor's", {"kvm": 1.5, "svm": 1.5}, Measured.first_byte),
    Row(
        "console",
        "4 a byte by COM1: to an access to an unclaimed port",
        {"kvm": 1.05, "svm": 1.05},
        lambda m: m.each("com1", "line") / m.each("unclaimed", "line"),
    ),
    Row(
        "events",
        "4 the same with --events",
        {"kvm": 1.25, "svm": 1.25},
        lambda m: m.each("com1-events", "line-events") / m.each("unclaimed-events", "line-events"),
    ),
    Row(
        "exit",
        "- an unclaimed port: to an exit of the floor",
        {},
        lambda m: m.each("unclaimed", "line") / m.each("floor-exits", "floor"),
    ),
    Row(
        "record",
        "- a byte by COM1 with --events: to one without",
        {},
        lambda m: m.each("com1-events", "line-events") / m.each("com1", "line"),
    ),
    Row(
        "injection",
        "5 an injection by synced events: to KVM_INTERRUPT",
        {"svm": 0.88},
        lambda m: m.half("inject"),
    ),
    Row(
        "virtio",
        "6 a kick with 4 KiB: to one without",
        {"svm": 1.1},
        lambda m: m.half("kick"),
    ),
    Row(
        "page-in",
        "7 a page by userfaultfd, 64 KiB a fault: to a first touch",
        {"kvm": 1.2, "svm": 1.2},
        lambda m: m.half("page-in"),
    ),
]


# ---- where it runs ----


def files(build: Path) -> dict[str, Path]:
    """What the runs find in their folder."""
    words = [
        word.removeprefix("./") for run in RUNS.values() for word in run if word.startswith("./") or ".elf" in word
    ]
    return {name: build / "bench" / name for name in dict.fromkeys(["measure", *words])}


Runner = Callable[[Sequence[str], bytes], str]


@contextlib.contextmanager
def on_kvm(build: Path) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
        for name, path in files(build).items():
            shutil.copy(path, Path(scratch) / name)

        def run(command: Sequence[str], given: bytes) -> str:
            done = subprocess.run(command, input=given, cwd=scratch, stdout=subprocess.PIPE, check=True)
            return done.stdout.decode()

        yield run


@contextlib.contextmanager
def on_svm(build: Path) -> Iterator[Runner]:
    with (
        tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch,
        contextlib.closing(start_svm(cache.ready("svm"), Path(scratch), *ICOUNT)) as machine,
    ):

        def run(command: Sequence[str], given: bytes) -> str:
            job = Job(command, files(build), stdin=given, time_limit=100)
            outcome = machine.run(job, Settings(), lambda _: None)
            if outcome.status:
                raise SystemExit(f"bench: {' '.join(command)} ended with status {outcome.status}: {outcome.errors!r}")
            return outcome.output.decode()

        yield run


PLACES = {"kvm": on_kvm, "svm": on_svm}


def measure(run: Runner, engine: str, runs: Mapping[str, Sequence[str]]) -> Measured:
    given = "".join("\t".join(words) + "\n" for words in runs.values()).encode()
    seed = random.randrange(1 << 16) if engine == "kvm" else 1  # where nothing else runs, the same order every time
    output = run(["./measure", "time", str(ROUNDS[engine]), str(seed)], given)
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    names = list(runs)
    for line in output.splitlines():
        which, *numbers, status = map(int, line.split())
        if status:
            raise SystemExit(f"bench: on {engine}, {names[which]} ended with status {status}")
        first, end = numbers[2:] if engine == "svm" else numbers[:2]
        costs[names[which]].append(Cost(first, end))
    if engine == "svm":  # the first round finds caches empty
        costs = {name: found[1:] for name, found in costs.items()}
    return Measured(costs)


# ---- what is not a ratio of two runs ----


def memory(run: Runner) -> Iterator[Line]:
    """At the first byte of the console, guest memory excepted."""
    _, rss, anonymous = run(["./measure", "memory"], "\t".join(RUNS["line"]).encode() + b"\n").split()
    yield Line("3 memory of the VMM itself, KiB", "svm", 128, float(anonymous))
    yield Line("- memory with the pages of its file, KiB", "svm", None, float(rss))


def binary(build: Path) -> Iterator[Line]:
    yield Line("3 stripped VMM, KiB", "kvm", 128, (build / "bench" / "vmm").stat().st_size / 1024)


@dataclass(frozen=True)
class SystemCalls:
    """Of one run."""

    runs: int  # KVM_RUN
    ioctls: int  # the others
    all: int  # but KVM_RUN


def system_calls(build: Path, image: str) -> SystemCalls:
    made = build / "bench"
    with tempfile.NamedTemporaryFile(prefix="kvmlab-") as log:
        command = ["strace", "-f", "-o", log.name, str(made / "vmm"), str(made / image)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        lines = Path(log.name).read_text().splitlines()
    names = [line.split(maxsplit=1)[1].partition("(")[0] for line in lines if "(" in line and "resumed" not in line]
    runs = sum(", KVM_RUN," in line for line in lines)
    return SystemCalls(runs, names.count("ioctl") - runs, len(names) - runs)


def counted(build: Path) -> Iterator[Line]:
    few, many = system_calls(build, "line.elf"), system_calls(build, "com1.elf")
    yield Line("3 system calls but KVM_RUN", "kvm", 30, few.all)
    yield Line(f"4 ioctls but KVM_RUN for {many.runs - few.runs} exits", "kvm", 0, many.ioctls - few.ioctls)


def checked(engine: str) -> Iterator[Line]:
    """`make check` of a lesson that is built."""
    command = ["make", "-s", "check", "LESSON=1", "SEED=7", f"ENGINE={engine}"]
    times = []
    for _ in range(4):
        began = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - began)
    yield Line("8 make check of one lesson, one seed, s", engine, {"kvm": 1, "svm": 2}[engine], median(times[1:]))


# ---- others that are installed ----


def peers(build: Path) -> dict[str, list[str]]:
    """The command lines with which they run line.elf."""
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        return {}
    options = "-nodefaults -no-user-config -display none -no-reboot -m 64 -serial stdio".split()
    options += ["-device", "isa-debug-exit,iobase=0xf4", "-kernel", str(build.absolute() / "bench" / "line.elf")]
    # Of what the guest writes to the port of isa-debug-exit, QEMU ends with twice as much and one.
    as_success = ["/bin/sh", "-c", '"$@" 2>/dev/null; [ $? = 1 ]', "sh", qemu, "-M", "microvm", *options]
    return {f"QEMU microvm, {how}": [*as_success, "-accel", how] for how in ("kvm", "tcg")}


def compared(run: Runner, build: Path) -> dict[str, float]:
    """How long a start takes, as a ratio to the floor's, and the floor first."""
    started = measure(run, "kvm", {"floor": RUNS["floor"], "kvmlab": RUNS["line"]} | peers(build))
    return {name: started.ratio(name, "floor") for name in started.costs}


# ---- the commands ----


def ratios(measured: Measured, engine: str) -> list[Line]:
    return [Line(row.what, engine, row.limits.get(engine), row.figure(measured)) for row in ROWS]


def show(build: Path) -> int:
    lines: list[Line] = []
    others: dict[str, float] = {}
    problem = kvm_problem()
    if problem:
        print(f"bench: kvm is left out: {problem}", file=sys.stderr)
    for engine in ["svm"] if problem else ["kvm", "svm"]:
        with PLACES[engine](build) as run:
            lines += ratios(measure(run, engine, RUNS), engine)
            if engine == "svm":
                lines += memory(run)
            else:
                lines += [*binary(build), *counted(build)]
                others = compared(run, build)
        lines += checked(engine)
    report.show(build / "bench", lines, others)
    return 0


def figures(build: Path) -> dict[str, float]:
    with on_svm(build) as run:
        measured = measure(run, "svm", RUNS)
    return {row.name: round(row.figure(measured), 3) for row in ROWS}


def baseline(build: Path) -> int:
    whole_file.write(BASELINE, json.dumps(figures(build), indent=1) + "\n")
    print(f"{BASELINE}: written")
    return 0


def check(build: Path) -> int:
    """Ratios of instructions on svm to those of the baseline."""
    known = json.loads(BASELINE.read_text())
    found = figures(build)
    if found.keys() != known.keys():
        raise SystemExit(f"bench: {BASELINE.name} has other figures: make bench-baseline")
    changes = {name: figure / known[name] - 1 for name, figure in found.items()}
    for name, change in changes.items():
        print(f"{'WORSE' if change > WORSE else 'ok':5}  {name:12} {found[name]:6.3f} ({change:+.1%})")
    if worse := [name for name, change in changes.items() if change > WORSE]:
        print(f"bench: dearer by more than {WORSE:.0%}: {', '.join(worse)}; if it is worth that: make bench-baseline")
    return 1 if worse else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["show", "check", "baseline"])
    parser.add_argument("--build", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    return {"show": show, "check": check, "baseline": baseline}[arguments.command](arguments.build)


if __name__ == "__main__":
    sys.exit(main())
