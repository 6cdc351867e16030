"""What Bochs writes about its CPU when it is asked to: each VM entry, each VM exit, and each page walk, which is
what an access takes whose translation is in no TLB."""

from collections import Counter
from collections.abc import Iterable

# Added to the command line of Bochs: its own file, and in it all that the CPU has to say.
NAME = "emulator.trace"
OPTIONS = [f"log: {NAME}", "debug: action=ignore, cpu0=report"]


def count(lines: Iterable[bytes]) -> dict[str, int]:
    """How often each thing happened between the first VM entry and the last VM exit: entries; exits; and the
    page walks that the guest and the host needed (guest_walks, host_walks). A walk in the guest is counted once,
    whatever second translations (EPT) its steps need (ept_walks)."""
    counts = Counter(entries=0, exits=0, guest_walks=0, host_walks=0, ept_walks=0)
    since_exit = 0
    in_guest = False
    for line in lines:
        if b"] page walk for" in line:
            counts["guest_walks"] += in_guest
            since_exit += not in_guest
        elif b"] EPT walk for" in line:
            counts["ept_walks"] += 1
        elif b"] VMLAUNCH " in line or b"] VMRESUME " in line:
            counts["host_walks"] += since_exit if counts["entries"] else 0
            counts["entries"] += 1
            since_exit, in_guest = 0, True
        elif b"] VMEXIT reason" in line:
            counts["exits"] += 1
            since_exit, in_guest = 0, False
    return dict(counts)
