"""What README.md quotes of a run with SEED=7."""

from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
    faults = len(run.all("report", what=4))
    small = run.all("probe", checkpoint=1)[0]
    shared = [run.one("probe", checkpoint=checkpoint) for checkpoint in (9, 10)]
    console = run.output.splitlines()
    exits = run.end.exits - run.count("exit", device="debugcon")  # which `make cover` has the counters leave by
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
        f"`{exits} IO` and no other kind: {run.count('exit', device='com1')} for the console, "
        f"{run.count('exit', device='lab report')} for reports, "
        f"{run.count('exit', device='lab checkpoint')} checkpoints",
    ]


QUOTES = {"kvm": quotes}
