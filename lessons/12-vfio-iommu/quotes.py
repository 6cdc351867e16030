"""What README.md quotes of a run with SEED=7."""

from collections.abc import Callable

from kvmlab.events import Event
from kvmlab.runner import Run


def walk(event: Event) -> str:
    return (
        f'"what":"walk","iova":"{event.iova:#x}","permissions":{event.permissions},"hpa":"{event.hpa:#x}",'
        f'"reads":{event.reads}'
    )


def request(event: Event) -> str:
    kind = f'"type":{event.type},' if event.get("type") else ""
    return f'"of":"device","file":"{event.file}","request":"{event.request}",{kind}"error":{event.error}'


def quotes(run: Run) -> list[str]:
    source, destination, _ = run.all("window")
    plan = run.all("plan")[0]
    console = run.output.splitlines()
    walks = [event for event in run.all("io", what="walk") if event.part == "walk"]
    first = run.all("io", what="map")[0]
    again = run.all("io", what="map")[-1]
    stale = run.all("io", what="map", part="invalidate")[0]
    (beyond,) = (event for event in walks if event.iova == first.iova | 1 << 39)
    assert plan.iommu == "software"
    assert source.gpa > 0xFFFFFFF
    return [
        f"gva {destination.gpa:#x} gpa {destination.gpa:#x} hva 0x7f... iova {destination.iova:#x}",
        f"Window 1 lies at gpa {destination.gpa:#x}",
        "`vmm: the device and the IOMMU before it are software`",
        walk(walks[1]),
        walk(beyond),
        *(request(event) for event in run.all("vfio", of="device")[:4]),
        *(f'`"when":"{event.when}","count":{event.count}`' for event in run.all("signals")),
        f"`{plan.line_rounds} interrupts by the line`",
        f"moves {plan.get('count')} bytes",
        *(f"| `{line}` |" for line in (*console[1:6], *console[7:])),
        f"io_map() for {first.iova:#x}: accesses",
        f"io_walk() for {beyond.iova:#x}: what is permitted",
        f"`io_map() for {again.iova:#x}: the entry of level2 permits`",
        f"`iotlb_translate() for {stale.iova:#x}, to write: entries read`",
    ]


def hardware(run: Run) -> list[str]:
    """What the kernel says."""
    assert run.all("plan")[0].iommu == "hardware"
    assert not run.all("exit", reason="MMIO")
    blocked = run.all("fault")[1]
    return [f'"kind":"fault","address":"{blocked.address:#x}","is_write":{blocked.is_write},"text":"{blocked.text}"']


QUOTES: dict[str, Callable[[Run], list[str]]] = {"kvm": quotes, "svm": hardware}
