"""The lessons' texts quote a run with SEED=7: what they say is what such a run gives."""

import re
from pathlib import Path

import pytest
from variants import is_done

from kvmlab import runner
from kvmlab.events import Event
from kvmlab.plugin import ROOT
from kvmlab.runner import Run

SEED = 7


def text(name: str) -> str:
    """A lesson's text with its line breaks folded, so that a quote may stand across two lines."""
    return " ".join((ROOT / "lessons" / name / "README.md").read_text().split())


def finished(build: Path, name: str) -> Run:
    run = runner.run(runner.lesson_built(build, name), seed=SEED)
    assert is_done(run, name), run.errors
    return run


def count(run: Run, **fields: object) -> int:
    return len(run.all("exit", **fields))


def vm_exit_quotes(run: Run) -> list[str]:
    first = run.output.splitlines(keepends=True)[0]
    nonce, answer = (run.all("exit", reason="MMIO", is_write=is_write)[0] for is_write in (0, 1))
    batch = run.all("batch")[0]
    sent = bytes.fromhex(batch.sent).hex(" ")
    return [
        f"one line of {len(first)} characters",
        f"{len(first)} exits. Twice the guest asked the serial port",
        f"exits: {nonce.exit}, ",  # the student's run ends where the nonce would be read: at the panic port
        f'"exit":{nonce.exit}, "reason":"MMIO","gpa":"0xd0000000","is_write":0,"data":"{nonce.data}"',
        f'"exit":{answer.exit}, "reason":"MMIO","gpa":"0xd0000004","is_write":1,"data":"{answer.data}"',
        f'"exit":{run.end.exits},"reason":"HLT","if_flag":0',
        f"There are still {run.end.exits} exits",
        f"The nonce is the number {int.from_bytes(bytes.fromhex(nonce.data), 'little'):#x}",
        f"has {count(run, reason='IO')} exits of kind IO",
        f"counts {count(run, device='lab fifo')} of them",
        f"expected {sent}",
        f"seen {sent[: len('00 00')]} ```",
    ]


def paging_quotes(run: Run) -> list[str]:
    faults = len(run.all("report", what=4))
    small = run.all("probe", checkpoint=1)[0]
    shared = [run.one("probe", checkpoint=checkpoint) for checkpoint in (9, 10)]
    console = run.output.splitlines()
    exits = run.end.exits - count(run, device="debugcon")  # which `make cover` has the counters leave by
    return [
        f"`{console[-1]}`",
        f"`{console[2]}`",
        f"`{console[3]}`",
        f"`{console[4]}`",
        *(f'"gva":"{probe.gva:#x}", ... "gpa":"{probe.gpa:#x}"' for probe in shared if probe),
        f"gva {small.gva:#x} ",
        f"gpa {small.gpa:#x} ",
        f'"gva":"{small.gva:#x}","kvm_gpa":"{small.gpa:#x}","accessed":1,"dirty":0',
        f"counts {faults} page faults",
        f"has taken {faults} page faults",
        f"`{exits} IO` and no other kind: {count(run, device='com1')} for the console, "
        f"{count(run, device='lab report')} for reports, {count(run, device='lab checkpoint')} checkpoints",
    ]


def exceptions_quotes(run: Run) -> list[str]:
    (order, frame), (last, *_) = (run.all(kind, round=1)[0] for kind in ("order", "frame")), run.all("order", round=22)
    page_fault = next(plan for plan in run.all("plan") if plan.vector == 14)
    vector_and_code = f'"vector":{order.vector},"error_code":"{order.error_code:#x}"'
    return [
        f'"kind":"order", "round":1,{vector_and_code}, ... "information":"{order.information:#x}"',
        f'"kind":"inject", "symbol":"fault_point+0x0","type":"exception",{vector_and_code}',
        f'"kind":"frame", "round":1, ... {vector_and_code}, ... "rsp":"{frame.rsp:#x}"',
        f"vector {order.vector}, error code {order.error_code:#x}",
        f"{order.information:#x}, error code in a field of its own",
        f"{order.eventinj >> 32:#010x}_{order.eventinj & 0xFFFFFFFF:08x}",
        f"address {frame.rsp - 8:#018x} ",
        f"intr_info {order.information:#x} error_code {order.error_code:#010x}",
        f"error code {last.error_code:#x} at rip",
        f"`round {page_fault.round}, #PF: CR2 in the handler`",
        f"`{run.output.splitlines()[1]}`",
    ]


def irq_window_quotes(run: Run) -> list[str]:
    console = run.output.splitlines()
    base, interrupts = run.all("plan")[0].base, len(run.all("inject"))
    halts, windows = (count(run, reason=reason) for reason in ("HLT", "IRQ_WINDOW_OPEN"))
    exits = run.end.exits - count(run, device="debugcon")  # which `make cover` has the counters leave by
    off, masked = (run.all("round", of=kind)[0].seq for kind in ("off", "masked"))
    risen = [event for event in run.all("rise") if event.seq > off]
    injected = [event for event in run.all("inject") if event.seq > off]
    first, taken = risen[0].seq, injected[0].seq
    others = sorted(event.line for event in risen[:5])
    shadow = run.all("entry", if_flag=1, ready=0)
    unmasked = next(event.seq for event in run.all("rise") if event.seq > masked)
    return [
        f"{console[-1]} exits: {exits}, ... {exits - halts - windows} IO {halts} HLT {windows} IRQ_WINDOW_OPEN",
        f"has served {interrupts} interrupts",
        f"{windows} times in this run",
        f"line i has the vector {base:#x} + i",
        f"`{console[1]}`",
        f"vector {base + risen[0].line:#x} was injected while RFLAGS.IF was 0 (event {first + 1})",
        f"line {risen[0].line} waited (it rose at event {first}), and the guest was not ready, but no interrupt "
        f"window was requested (event {first + 2})",
        f"line {injected[0].vector - base}, which rose last",
        f"injects {injected[0].vector:#x}",
        f"injects {injected[1].vector:#x}",
        f"and so on: lines {others[1]}, {others[2]}, {others[3]} and {others[4]}",
        f"line {others[0]} was injected (event 456) while line {injected[0].vector - base}",
        f"`event {taken + 2}` is the entry with vector {injected[0].vector:#x}",
        f"There are {('none', 'one', 'two', 'three', 'four', 'five')[len(shadow)]}",
        f"counts {windows}, and there are {interrupts} interrupts. How did the other {interrupts - windows}",
        f"vector {injected[1].vector:#x} was injected (event {taken + 1}) before vector {injected[0].vector:#x}",
        f"line {risen[0].line} rose (event {first}), has not been injected since",
        f"was injected (event {unmasked + 2}) while IMR had it masked",
    ]


def nmi_quotes(run: Run) -> list[str]:
    def raised(scene: str, **fields: object) -> list[Event]:
        return run.all("raise", scene=scene, **fields)

    first, second = (event.vector for event in raised("an interrupt, a kick, both", type="interrupt"))
    burst = raised("a burst of NMIs")[0].count
    held = [event.count for event in raised("NMIs in an NMI handler")]
    console = run.output.splitlines()
    return [
        f"type=interrupt vector={first} decision decision=an interrupt inject type=interrupt vector={first}",
        f"decision decision=the interrupt again <- {first} goes first",
        f"inject type=interrupt vector={second} <- and {second} when",
        f"in the order {first}, NMI, {second}. Had",
        f"would have been NMI, {second}, {first}.",
        f"interrupt {first} is {1 << 31 | first:#x}",
        f"it begins to serve, {held[1]} NMIs are raised",
        f"it has served, {held[2]} NMIs are raised",
        f"{['Five', 'Six', 'Seven', 'Eight'][sum(held) - 5]} NMIs, two calls of the handler",
        f"`{console[5].partition(': ')[2]}`",
        f"`{console[6]}`",
        f"after {burst} NMIs were raised at once",
        f"`interrupt {raised('two interrupts')[1].vector} was injected while RFLAGS.IF was 0`",
        f"`interrupt {raised('both, IF on', type='interrupt')[0].vector} was injected before the NMI was served`",
        f"all {len(run.all('situation'))} situations",
        f"plays {len(run.all('scene'))} scenes",
    ]


def irqchip_quotes(run: Run) -> list[str]:
    plan, message = run.all("plan")[0], run.all("message")[0]
    stages = {event.stage: event for event in run.all("stage")}
    lines, end = stages[7], stages[14]
    held = [event for event in run.all("taken") if event.requested]
    console = run.output.splitlines()
    self_vector = bytes.fromhex(plan.vectors)[0]
    return [
        f'"address":"{message.address:#x}","data":"{message.get("data"):#x}","accepted":{message.accepted}',
        f"its CPU the logical destination {plan.logical_id}",
        f"has the entry {lines.level_entry:#x}",
        f'"stage":7,"edge_entry":"{lines.edge_entry:#x}","level_entry":"{lines.level_entry:#x}"',
        *(
            f'"device":{event.device},"vector":"{event.vector:#x}","requested":"{event.requested}",'
            f'"task_priority":"{event.task_priority:#x}"'
            for event in held
        ),
        f'"kind":"stage","stage":14,"requested":"{end.requested}"',
        *(f"| `{line}` |" for line in (console[0], console[1], console[2], console[3], console[5], console[6])),
        f"| `{console[-1]}` |",
        f"about vector {self_vector:#x}, of device self",
        f"after {plan.edges} pulses",
        f"which has {plan.requests} requests",
        f"serves {('no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven')[plan.requests]} requests",
        f"`expected {message.address:#x}`",
    ]


QUOTES = {
    "01-vm-exit": vm_exit_quotes,
    "02-paging": paging_quotes,
    "06-exceptions": exceptions_quotes,
    "07-irq-window": irq_window_quotes,
    "08-nmi": nmi_quotes,
    "09-irqchip": irqchip_quotes,
}


@pytest.mark.parametrize("name", QUOTES)
def test_a_text_quotes_what_a_run_gives(name: str, build: Path) -> None:
    said = text(name)
    wrong = [quote for quote in QUOTES[name](finished(build, name)) if " ".join(quote.split()) not in said]
    assert wrong == [], f"lessons/{name}/README.md does not say this of SEED={SEED}"


@pytest.mark.parametrize("name", QUOTES)
def test_a_text_names_files_and_functions_that_exist(name: str) -> None:
    """Names in backquotes that look like a file of the project or a call of its code."""
    folders = [ROOT / folder for folder in ("vmm", "guest", "include", f"lessons/{name}")]
    sources = "".join(path.read_text() for folder in folders for path in folder.glob("*.[ch]"))
    prose = re.sub(r"```.*?```", "", (ROOT / "lessons" / name / "README.md").read_text(), flags=re.DOTALL)
    quoted = set(re.findall(r"`([^`]+)`", prose))
    files = {word for word in quoted if re.fullmatch(r"(vmm|guest|include)/[\w.]+", word)}
    assert [word for word in sorted(files) if not (ROOT / word).exists()] == []
    ours = {word for word in quoted if re.fullmatch(r"(?!handle_|kvm_|io_|pio_|em_|vmx_|init_)[a-z]+_\w+(\(\))?", word)}
    assert [word for word in sorted(ours) if word.removesuffix("()") not in sources] == []
