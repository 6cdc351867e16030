"""What README.md quotes of a run with SEED=7."""

from kvmlab.events import Event
from kvmlab.runner import Run


def shortened(event: Event, *names: str) -> str:
    """As the record has it, with these fields and no others."""
    recorded = {name: event.recorded[name] for name in ("kind", *names)}
    shown = {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in recorded.items()}
    return ",".join(f'"{name}":{value}' for name, value in shown.items())


def executed(run: Run, *operations: str) -> int:
    return len([event for event in run.all("operation") if event.operation in operations])


def frame_of(run: Run, gva: int, root: int, before: Event) -> int:
    """What the entry of this page says at this moment: of this space, or of all."""
    entries = run.all("entry", gva=gva, root=root) if root else run.all("entry", gva=gva)
    return int([entry.value for entry in entries if entry.seq < before.seq][-1]) & ~0xFFF


def lost(run: Run, pcid: int) -> str:
    """Which space loses this PCID first, in the words of the check."""
    spaces = {space.root: space.space for space in run.all("space")}
    loads = run.all("operation", operation="MOV to CR3", pcid=pcid)
    other = next(load for load in loads if load.root != loads[0].root)
    step = [step.step for step in run.all("step") if step.seq < other.seq][-1]
    return f"space {spaces[loads[0].root]} has lost PCID {pcid} to space {spaces[other.root]} at step {step}"


def quotes(run: Run) -> list[str]:
    plan, console = run.all("plan")[0], run.output.splitlines()
    trials = console[console.index("trials: a page gets another frame, and then") :]
    roots = [space.root for space in run.all("space")]
    steps = {step.step: step for step in run.all("step")}
    remap, entry, operation = run.events[run.events.index(steps[34]) :][:3]
    switch = run.events[run.events.index(steps[36]) + 1]
    looks = [event for event in run.all("look") if event.seq > steps[37].seq][:3]
    frames = [frame_of(run, plan.page_gva_0, roots[space], steps[77]) for space in (2, 3)]
    kernel_frame = frame_of(run, plan.kernel_gva_0, 0, steps[77])
    invlpg, invpcid = executed(run, "INVLPG"), executed(run, "INVPCID")
    single = len(run.all("operation", operation="INVPCID", type=0))
    loads = executed(run, "MOV to CR3", "MOV to CR4")
    return [
        f"{trials[0]} {trials[1]} {trials[3]} {trials[-2]} {trials[-1]}",
        *(f"| `{line}` |" for line in (*console[1:6], console[7])),
        f"| `{trials[-1].strip()}` | 20 |",
        shortened(remap, "step", "what"),
        shortened(entry, "root", "gva", "value"),
        shortened(operation, "operation", "type", "pcid", "gva"),
        shortened(switch, "operation", "root", "pcid", "keep"),
        *(shortened(look, "gva", "frame_gpa") for look in looks),
        f"Where has PCID {operation.pcid} gone since",
        f"1 {plan.pcid_0} 0 {plan.page_gva_0:#x} space 2 frame {frames[0]:#x}",
        f"1 {plan.pcid_1} 0 {plan.page_gva_0:#x} space 3 frame {frames[1]:#x}",
        f"any 1 {plan.kernel_gva_0:#x} all spaces frame {kernel_frame:#x}",
        f"An access with PCID {plan.pcid_0} in CR3",
        f"It executes INVLPG {invlpg} times and INVPCID {invpcid} times, and loads CR3 or CR4 {loads} times",
        f"{invlpg} for INVLPG, {invpcid} for INVPCID.",
        f"{invlpg} times INVLPG and {single} times INVPCID type 0",
        f"`{lost(run, plan.pcid_0)}`",
        f"`tlb_flush` is {run.all('statistics', when='end')[0].tlb_flush} with EPT",
        f"seen frame {plan.first_gpa_2:#x} is permitted, too",
    ]


QUOTES = {"vmx": quotes}
