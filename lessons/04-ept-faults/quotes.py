"""What README.md quotes of a run with SEED=7."""

from collections.abc import Callable

from kvmlab.events import Event
from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
    accesses = run.all("access")
    written, read = (
        next(event for event in accesses if event.stage == "absent" and event.is_write == is_write)
        for is_write in (1, 0)
    )
    exit_ = run.all("exit", reason="MMIO", gpa=read.gpa)[0]
    slot = next(event for event in run.all("slot") if event.gpa <= read.gpa < event.gpa + event.size)
    console = dict.fromkeys(run.output.splitlines()[1:])
    lines = [line for line in console if line.split(":")[0] not in ("touch", "settle", "removed")]
    copies = run.all("copy")[len(run.all("fault")) - 4 :]
    refused = [event for event in copies if event.result == "EEXIST"]
    pages = run.all("region", region=13)[0].pages
    dirty = run.all("dirty")[1].pages
    assert dirty.endswith(" 63"), "so that the first page that stays is next to it"
    return [
        f"`{run.output.splitlines()[-1]}`. Among",
        f"eight bytes at gpa {read.gpa:#x}. It has 16 MiB of memory, so there is nothing at {read.gpa:#x}",
        f'"slot":{slot.slot},"gpa":"{slot.gpa:#x}","size":"{slot.size:#x}"',
        f'"exit":{exit_.exit},"reason":"MMIO","gpa":"{exit_.gpa:#x}","is_write":0,"data":"{exit_.data}"',
        f'"stage":"absent","gpa":"{read.gpa:#x}","is_write":0,"value":"{read.value:#x}"',
        f"{('four', 'eight', 'twelve', 'sixteen')[slot.size // 4096 - 1]} KiB of memory there",
        f"the same two instructions {len(accesses)} times",
        *(f"| `{line}` |" for line in lines if line.split(":")[0] in LAST),
        f"has four `fault` and {len(copies)} `copy` events, {_count(refused)} of them with the result EEXIST",
        f"{len(copies) - len(refused)} pages came with four faults",
        f"`the word that the guest reads at gpa {written.gpa:#x}, where it has written before`",
        f"`expected {exit_.data}`",
        f"`seen a page at gpa {run.all('region', region=5)[0].gpa:#x}`",
        f"`seen 0 to {pages - 1}`. If you reset the first 64 pages only, 64 to {pages - 1} stay: "
        f"`seen {dirty} to {pages - 1}`",
        f"for this fault: gpa {refused[0].gpa:#x}, size 0x1000: EEXIST`",
        f"at rip {run.all('exit', reason='MEMORY_FAULT', rip=0x1000000001C)[0].rip:#x}: the host has no memory",
    ]


# The stages whose line is the console's last one when a part is missing.
LAST = ("device", "absent", "page", "block", "copy on write", "placed", "moved", "given", "taken")


def _count(events: list[Event]) -> str:
    return ("none", "one", "two", "three", "four", "five")[len(events)]


def _during(run: Run, stage: str) -> list[Event]:
    begin, over = run.all("begin", stage=stage)[0], run.all("over", stage=stage)[0]
    return [event for event in run.events if begin.seq < event.seq < over.seq]


def _traced(run: Run, stage: str, point: str) -> list[Event]:
    return [event for event in _during(run, stage) if event.kind == "trace" and event.point == point]


def _info(event: Event) -> str:
    words = str(event.text).split()
    return f"{int(words[words.index('info1') + 1], 16):#x}"


def vmx_quotes(run: Run) -> list[str]:
    """Exit qualifications, and an MMIO access as a violation first and as a misconfiguration then."""
    exits = [event for event in _traced(run, "device", "kvm_exit") if str(event.reason).startswith("EPT_")]
    reasons = [event.reason for event in exits]
    assert reasons == ["EPT_VIOLATION", *["EPT_MISCONFIG"] * (len(reasons) - 1)]
    gpa = f"{run.all('access', stage='device')[0].gpa:#x}"
    missing, cow = _traced(run, "page", "kvm_exit"), _traced(run, "copy on write", "kvm_exit")
    qualifications = {_info(event) for event in [*missing, *cow]}
    assert {"0x181", "0x182", "0x1aa", "0x82"} <= qualifications, qualifications
    third = [event for event in _during(run, "absent") if event.kind == "exit"][2]
    behind = [event.reason for event in _traced(run, "absent", "kvm_exit") if event.seq > third.seq]
    assert behind[:2] == ["EPT_MISCONFIG", "EPT_VIOLATION"]
    return [
        f"The {('five', 'six', 'seven')[len(exits) - 5]} accesses of the stage",
        f"kvm_exit reason EPT_VIOLATION info1 {_info(exits[0])} <-",
        f"kvm_page_fault address {gpa} error_code {_info(exits[0])} kvm_mmio write len 8 gpa {gpa}",
        f"kvm_exit reason EPT_MISCONFIG info1 {_info(exits[1])} <-",
    ]


def svm_quotes(run: Run) -> list[str]:
    device = [event for event in _traced(run, "device", "kvm_exit") if event.reason == "npf"]
    assert int(_info(device[1]), 16) & 8, "a reserved bit is set"
    return [f"The first write to the device of this lesson gives {_info(device[0])} with ENGINE=svm"]


QUOTES: dict[str, Callable[[Run], list[str]]] = {"kvm": quotes, "svm": svm_quotes, "vmx": vmx_quotes}
