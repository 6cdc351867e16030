"""What README.md quotes of a run with SEED=7."""

from kvmlab.events import Event
from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
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


QUOTES = {"kvm": quotes}
