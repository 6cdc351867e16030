"""What README.md quotes of a run with SEED=7."""

from kvmlab.runner import Run


def quotes(run: Run) -> list[str]:
    first = run.output.splitlines(keepends=True)[0]
    nonce, answer = (run.all("exit", reason="MMIO", is_write=is_write)[0] for is_write in (0, 1))
    batch = run.all("batch")[0]
    sent = bytes.fromhex(batch.sent).hex(" ")
    return [
        f"one line of {len(first)} characters",
        f"{len(first)} exits. Twice the guest asked the serial port",
        f"exits: {nonce.exit}, ",  # the student's run ends where the nonce would be read: at the panic port
        f'"exit":{nonce.exit}, "reason":"MMIO","gpa":"0xd0000000","is_write":0,"data":"{nonce.data}"',
        f'"exit":{answer.exit}, "reason":"MMIO","gpa":"0xd0000004","is_write":1,"data":"{answer.data}"',
        f'"exit":{run.end.exits},"reason":"HLT","if_flag":0',
        f"There are still {run.end.exits} exits",
        f"The nonce is the number {int.from_bytes(bytes.fromhex(nonce.data), 'little'):#x}",
        f"has {run.count('exit', reason='IO')} exits of kind IO",
        f"counts {run.count('exit', device='lab fifo')} of them",
        f"expected {sent}",
        f"seen {sent[: len('00 00')]} ```",
    ]


QUOTES = {"kvm": quotes}
