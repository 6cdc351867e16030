"""What README.md quotes of a run with SEED=7."""

from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
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


QUOTES = {"kvm": quotes}
