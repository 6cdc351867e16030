"""What README.md quotes of a run with SEED=7."""

from collections.abc import Callable
from pathlib import Path

from kvmlab import lesson
from kvmlab.compare import aligned
from kvmlab.runner import Run


def comparison(run: Run) -> list[str]:
    """The table of compare.py without its last two columns."""
    module = lesson.load(Path(__file__).parent).module("compare")
    assert module
    return list(aligned([list(row)[:5] for row in module.table([run])]))


def quotes(run: Run) -> list[str]:
    emulated, passed = run.all("edu")
    windows = run.all("window")
    claim = run.all("claim", whose="this device")[0]
    tasks = {event.form: event for event in reversed(run.all("task", what="liveness"))}
    first = run.all("task", what="transfer")[0]
    transfer = f"{first.get('count'):#x} bytes from {first.get('from'):#x} to {first.buffer:#x}, command 0x5"
    liveness = [event for event in run.all("exit") if event.get("gpa") == emulated.bar + 4]
    written = liveness[0].data
    console = run.output.splitlines()
    return [
        *comparison(run),
        *(f"{window.gpa:#x} +------------+ slot" for window in windows),
        *(f"| at {window.offset:#x} |" for window in [*windows, claim.__class__({"offset": hex(claim.file_offset)})]),
        f"{passed.bar:#x} +------------+ slot",
        f"vector {passed.vector:#x}",
        f"emulated device has its BAR at gpa {emulated.bar:#x}",
        f'"gpa":"{emulated.bar + 4:#x}","is_write":1,"data":"{written}"',
        f'"gpa":"{emulated.bar + 0x1000:#x}","is_write":1,"data":"04000000"',
        *(f'"gpa":"{emulated.bar + 4:#x}","is_write":0,"data":"{look.data}"' for look in liveness[1:4]),
        *(f"| `{line}` |" for line in (console[0], *console[1:4], *console[5:6], console[6])),
        *(f"| `{console[number]}` |" for number in (8, 9, 10)),
        f"`expected {transfer}`",
        f"`expected [{tasks['passed through'].value:#x}]`",
        f"`expected {windows[0].offset:#x}`, `seen 0`",
        f"`seen {windows[0].offset:#x}`",
        *deceits(run),
        *part(run),
        f"unhandled exception vector {passed.gsi}`",
        *(f"an offset such as {event.area_offset:#x}" for event in run.all("claim") if event.area_offset >> 63),
        *(f"in the file)` with {event.file_offset:#x}" for event in run.all("claim") if event.file_offset >> 63),
    ]


def asked(run: Run, form: str, what: str) -> list[int]:
    return [int(event.value) for event in run.all("task", form=form, what=what)]


def deceits(run: Run) -> list[str]:
    """What a driver reads that looks once, and what one acknowledges that does so until the status is 0."""
    (number,) = asked(run, "emulated", "liveness")
    (impostor,) = asked(run, "emulated", "impostor")
    looks = [*asked(run, "emulated", "early"), ~number & 0xFFFFFFFF]
    reads = [f"read {look:#x}" for look in looks]
    first, second = asked(run, "passed through", "raise")
    return [
        f"id reads as {impostor:#010x}, which is no edu device",
        f"`expected [write {number:#x}, {', '.join(reads)}]`",
        f"`seen     [write {number:#x}, {reads[0]}]`",
        f"`expected [{first:#x}, {second:#x}]`, `seen     [{first:#x}, {first:#x}, {second:#x}, {second:#x}]`",
    ]


def part(run: Run) -> list[str]:
    """Where it is in its file, and where a guest ends up that leaves out one of the offsets."""
    (of_file,) = run.all("part")
    ends = [0, of_file.area_size - 4]
    right, without_file_offset, without_area_offset = (
        f"[{', '.join(hex(begin + end) for end in ends)}]"
        for begin in (of_file.file_offset + of_file.area_offset, of_file.area_offset, of_file.file_offset)
    )
    return [
        f"`expected {right}`. Without `file_offset`: `seen     {without_file_offset}`",
        f"without `area_offset`: `seen     {without_area_offset}`",
    ]


def traced(run: Run) -> list[str]:
    """A doorbell, what comes of it, and the acknowledgement."""
    passed = run.all("edu")[1]
    first, last = (run.all("stage", form="passed through", stage=name)[0].seq for name in ("probed", "raised"))
    trace = [event for event in run.all("trace") if first < event.seq < last]
    said = " ".join(f"{event.point} {' '.join(event.text.split())}" for event in trace)
    bell, vector = passed.bar + 0x1000, passed.vector
    lines = [
        f"kvm_mmio mmio write len 4 gpa {bell:#x} val 0x60",
        f"kvm_msi_set_irq dst 0 vec {vector} (Fixed|physical|edge)",
        f"kvm_apic_accept_irq apicid 0 vec {vector} (Fixed|edge)",
        f"kvm_inj_virq IRQ {vector:#x}",
        f"kvm_mmio mmio write len 4 gpa {bell:#x} val 0x64",
        f"kvm_eoi apicid 0 vector {vector}",
    ]
    begin = at = said.find(lines[0])
    for line in lines:
        at = said.find(line, at)
        assert at >= 0, f"{line}, in this order, in the trace of {run.engine}"
    assert "kvm_userspace_exit" not in said[begin:at]
    return lines


QUOTES: dict[str, Callable[[Run], list[str]]] = {"kvm": quotes, "svm": traced}
