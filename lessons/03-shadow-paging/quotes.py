"""What README.md quotes of a run with SEED=7, and of one on a KVM that shadows the guest itself."""

from kvmlab.events import Event
from kvmlab.runner import Run


def counts(line: str) -> list[int]:
    """The numbers of a line such as "drop: 68 misses, 14 table writes, ..."."""
    return [int(word) for word in line.split() if word.isdigit()]


def picture(run: Run, gva: int, probe: Event) -> list[str]:
    """The walk of the inner tables to this address, as the host half has laid them out."""
    entries = {event.at: event.fields["value"] for event in run.all("word")}
    root = run.all("plan")[0].page_00
    indexes = [gva >> shift & 511 for shift in (39, 30, 21, 12)]
    path, table = [], root
    for index in indexes:
        path.append(entries[table + 8 * index])
        table = path[-1] & ~0xFFF
    return [
        f"inner gva {gva:#x}",
        "{:#x} [{}] [{}] [{}] [{}]".format(root, *indexes),
        "{:#x} --> {:#x} -> {:#x} -> {:#x}".format(*path),
        f"inner gpa {table + gva % 4096:#x}",
        f"gpa {probe.inner_gpa:#x}",
    ]


def quotes(run: Run) -> list[str]:
    title, *lines = run.output.splitlines()
    drop, cache, resync = (counts(line) for line in lines)
    faults = [sum(cost[:3]) for cost in (drop, cache, resync)]
    first = run.all("op")[0].gva
    (miss,), (seen,) = (run.all(kind, policy=0, op=7)[:1] for kind in ("trap", "result"))
    early = run.all("trap", policy=0, op=0)
    return [
        *lines,
        f"| `{title}` |",
        *picture(run, first, run.all("probe", gva=first)[0]),
        f"the same {len(run.all('result', policy=0))} operations",
        f"has taken the same {drop[2]} page faults",
        "it cost {}, {} and {} page faults".format(*faults),
        f'"policy":0,"op":7,"vector":14,"error_code":"{miss.error_code:#x}","cr2":"{miss.cr2:#x}"',
        f'"policy":0,"op":7, ... "error":"{seen.error:#x}","cr2":"{seen.cr2:#x}"',
        f'{["four", "five", "six"][len(early) - 4]} page faults are served (`"policy":0,"op":0`)',
        f"Why is it {drop[1]} table writes under *drop*, and {cache[1]} under *cache*",
        f"Under *resync* {resync[1]} table writes are left",
        f"three lines add up to {sum(faults)} faults",
    ]


def exits(run: Run, *reasons: str) -> int:
    return sum(event.reason in reasons for event in run.all("trace", point="kvm_exit"))


def shadowed_quotes(run: Run) -> list[str]:
    """KVM without EPT or NPT: the second column of a vendor in the table of `make compare`."""
    (counters,) = run.all("statistics", when="end")
    page_faults, invlpgs = exits(run, "PF", "EXCEPTION_NMI"), exits(run, "INVLPG", "invlpg")
    cr3 = exits(run, "read_cr3", "write_cr3", "CR_ACCESS")
    return [
        f"page fault 0 {page_faults:,} 0 {page_faults:,}",
        f"MOV to or from CR3 0 {cr3}" if run.engine == "svm" else f"{cr3} INVLPG",
        f"INVLPG 0 {invlpgs} 0 {invlpgs}",
        f"Your guest has {invlpgs} INVLPG and gets {invlpgs} exits",
        f"{counters.pf_taken:,} KVM's counter pf_guest",
        f"{counters.pf_fixed:,} KVM's counter pf_emulate",
        f"{counters.pf_guest} faults were reflected to your guest",
        *(
            f"KVM's counter {name} 0 {counters.fields[name]:,} 0 {counters.fields[name]:,}"
            for name in ("pf_guest", "pf_emulate", "mmu_pte_write", "invlpg")
        ),
    ]


def nested_quotes(run: Run) -> list[str]:
    """KVM with EPT or NPT: the first column of a vendor."""
    (counters,) = run.all("statistics", when="end")
    return [
        f"second-level fault {counters.pf_taken} 0 {counters.pf_taken} 0",
        f"KVM's counter pf_taken {counters.pf_taken} ",
        f"KVM's counter pf_fixed {counters.pf_fixed} ",
        f"What is left are {counters.pf_taken} faults of the second translation",
    ]


QUOTES = {
    "kvm": quotes,
    "svm": nested_quotes,
    "vmx": nested_quotes,
    "svm npt=0": shadowed_quotes,
    "vmx ept=0": shadowed_quotes,
}
