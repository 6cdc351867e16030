"""What README.md quotes of a run with SEED=7."""

from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
    console = run.output.splitlines()
    base, interrupts = run.all("plan")[0].base, len(run.all("inject"))
    halts, windows = (run.count("exit", reason=reason) for reason in ("HLT", "IRQ_WINDOW_OPEN"))
    exits = run.end.exits - run.count("exit", device="debugcon")  # which `make cover` has the counters leave by
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


QUOTES = {"kvm": quotes}
