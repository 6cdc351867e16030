"""What README.md quotes of a run with SEED=7."""

from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
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


QUOTES = {"kvm": quotes}
