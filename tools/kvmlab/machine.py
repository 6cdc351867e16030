"""An emulated machine that runs jobs: this side of what tools/engines/init.c does on the other.

A machine lives in a folder: its disk, through which jobs go in and results come out, and `answers`, a
named pipe that the emulator writes what the machine says to. Whoever knows the folder can give the
machine a job; a lock keeps two from doing so at once. Between jobs the emulator is stopped by a
signal, for neither of them ever sleeps.
"""

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The contract with init.c, by the names that things have there.
READY = b"\nkvmlab machine: ready\n"
BROKEN = b"\nkvmlab machine: "
SECTOR = 512
BLOCK = 16 * SECTOR
JOB_MOST = 63 << 20
RESULTS_AT = 64 << 20
RESULT_MOST = 16 << 20
RESULT_TAIL = 256 << 10
RESULTS = 8
HEADER = struct.Struct("=8sQQ")
JOB_MAGIC = b"kvmlab 1"
RECORD = FRAME = struct.Struct("=II")
ARGUMENT, FILE, CONTENT, RESULT, KVM_PARAMS, VENDOR_PARAMS, TRACE = range(1, 8)
OUTPUT, ERRORS, REFUSED, DONE = range(1, 5)
DONE_FRAME = struct.Struct(f"={1 + RESULTS}q")

# A disk needs a geometry on Bochs: 256 cylinders of 16 heads of 63 sectors, 126 MiB.
DISK_SIZE = 256 * 16 * 63 * SECTOR

TIME_LIMIT = 10.0
# Beyond the job's own limit, which the machine's clock measures: an emulator may be as slow as this.
PATIENCE = 20.0
START_MOST = 300.0


class MachineError(Exception):
    """The machine is of no use, and says in one line why: exit status 5."""


class MachineHangsError(MachineError):
    """It does not answer."""


@dataclass(frozen=True)
class Job:
    """Some files, and a command that starts in the folder they are put into."""

    command: Sequence[str]
    files: Mapping[str, Path]
    results: Sequence[str] = ()
    stdin: bytes = b""
    # The user watches: what the command prints to its output is shown at once, and not kept.
    watched: bool = False
    time_limit: float = TIME_LIMIT
    # Record KVM's tracepoints, where the engine can.
    trace: bool = False
    # On svm, run on a machine that no other job has used. The device for VFIO cannot be reset, and of blocked DMA
    # Linux reports only what comes first within some seconds.
    vfio: bool = False


@dataclass
class Outcome:
    """What a job left."""

    status: int = 0  # negative: the signal that ended the command
    output: bytes = b""
    errors: bytes = b""
    results: dict[str, bytes] = field(default_factory=dict)
    kernel_log: str = ""
    trace: str = ""
    emulator: dict[str, int] = field(default_factory=dict)  # emulator_log.count(), where there is a log


@dataclass(frozen=True)
class Settings:
    """How KVM is to be loaded."""

    kvm_params: str = ""
    vendor_params: str = ""


def read_result(path: Path) -> bytes:
    """What a job left in a file; of a long one only the beginning and the end. As init.c does it."""
    with path.open("rb") as file:
        content = file.read(RESULT_MOST)
        if file.seek(0, os.SEEK_END) <= RESULT_MOST:
            return content
        file.seek(-RESULT_TAIL, os.SEEK_END)
        return content[:-RESULT_TAIL] + file.read()


def _first_line(text: bytes) -> str:
    return text.partition(b"\n")[0].decode(errors="replace")


def _record(kind: int, content: bytes) -> bytes:
    return RECORD.pack(kind, len(content)) + content + bytes(-len(content) % 4)


def _text(kind: int, text: str) -> bytes:
    return _record(kind, text.encode() + b"\0")


def _records(job: Job, settings: Settings) -> bytes:
    records = [_text(ARGUMENT, word) for word in job.command]
    contents = {name: path.read_bytes() for name, path in job.files.items()} | {"stdin": job.stdin}
    for name, content in contents.items():
        records += [_text(FILE, name), _record(CONTENT, content)]
    records += [_text(RESULT, name) for name in job.results]
    records += [_text(KVM_PARAMS, settings.kvm_params), _text(VENDOR_PARAMS, settings.vendor_params)]
    if job.trace:
        records.append(_record(TRACE, b""))
    packed = b"".join(records)
    if len(packed) > JOB_MOST:
        raise MachineError(f"the files of the run have {len(packed) >> 20} MiB; {JOB_MOST >> 20} fit")
    return packed


class Machine:
    """A machine that somebody has started in this folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        # Not waiting for a writer: that there is none any more is what we must be able to see.
        self._answers = os.open(folder / "answers", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._unread = b""

    def close(self) -> None:
        os.close(self._answers)

    def run(self, job: Job, settings: Settings, shown: Callable[[bytes], None]) -> Outcome:
        """Run a job to its end. shown: where the output of one that is watched goes."""
        records = _records(job, settings)
        with self._taken():
            self._send(records)
            outcome, refused = self._follow(job, shown, time.monotonic() + 2 * job.time_limit + PATIENCE)
        if refused:
            raise MachineError(f"the emulated machine cannot run this: {refused}")
        return outcome

    # ---- the conversation ----

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        """The machine is ours, and runs; whoever left it in the middle of a job left it useless."""
        busy = self.folder / "busy"
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if busy.exists():
                raise MachineError("the emulated machine was left in the middle of a job")
            busy.touch()
            self._signal(signal.SIGCONT)
            self.wait_until_ready()
            yield
            self._signal(signal.SIGSTOP)
            busy.unlink()

    def wait_until_ready(self) -> None:
        """Until init has loaded KVM, or says why it cannot."""
        if (self.folder / "ready").exists():
            return
        deadline = time.monotonic() + START_MOST
        while READY not in self._unread:
            _, broken, reason = self._unread.partition(BROKEN)
            if broken and b"\n" in reason:
                raise MachineError(f"the emulated machine: {_first_line(reason)}")
            self._unread += self._read(deadline)
        self._unread = self._unread.partition(READY)[2]
        (self.folder / "ready").touch()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((self.folder / "pid").read_text()), number)

    def _send(self, records: bytes) -> None:
        """The header last: it is what the machine looks at."""
        with self.disk.open("r+b") as disk:
            disk.seek(SECTOR)
            disk.write(records)
            disk.flush()
            disk.seek(0)
            disk.write(HEADER.pack(JOB_MAGIC, time.monotonic_ns(), len(records)))

    def _follow(self, job: Job, shown: Callable[[bytes], None], deadline: float) -> tuple[Outcome, str]:
        """What the job left, and why it was not run if it was not."""
        output, errors = bytearray(), bytearray()
        while True:
            kind, size = FRAME.unpack(self._take(FRAME.size, deadline))
            content = self._take(size, deadline)
            if kind == OUTPUT and job.watched:
                shown(content)
            elif kind == OUTPUT:
                output += content
            elif kind == ERRORS:
                errors += content
            elif kind == DONE:
                outcome = self._outcome(job, DONE_FRAME.unpack(content))
                outcome.output, outcome.errors = bytes(output), bytes(errors)
                return outcome, ""
            elif kind == REFUSED:
                return Outcome(), content.decode(errors="replace").strip()
            else:
                raise MachineError(f"the emulated machine is broken: it sends a frame of kind {kind}")

    def _outcome(self, job: Job, done: tuple[int, ...]) -> Outcome:
        status, *sizes = done
        contents: list[bytes | None] = []
        with self.disk.open("rb") as disk:
            at = RESULTS_AT
            for size in sizes[: 2 + len(job.results)]:
                disk.seek(at)
                contents.append(disk.read(size) if size >= 0 else None)
                at += (max(size, 0) + BLOCK - 1) // BLOCK * BLOCK
        kernel_log, trace, *results = contents
        found = {name: content for name, content in zip(job.results, results, strict=True) if content is not None}
        texts = [(text or b"").decode(errors="replace") for text in (kernel_log, trace)]
        return Outcome(status, results=found, kernel_log=texts[0], trace=texts[1])

    def _take(self, size: int, deadline: float) -> bytes:
        while len(self._unread) < size:
            self._unread += self._read(deadline)
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def _read(self, deadline: float) -> bytes:
        """What the machine says next."""
        readable, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise MachineHangsError("the emulated machine does not answer: its emulator hangs")
        if read := os.read(self._answers, 1 << 20):
            return read
        raise MachineError(f"the emulator died{self._last_words()}")

    def _last_words(self) -> str:
        """What it or the machine's kernel last printed; but what QEMU says before it shows all registers."""
        for name in ("emulator.log", "kernel.log"):
            path = self.folder / name
            lines = path.read_text(errors="replace").split("\n") if path.exists() else []
            if said := [line.strip() for line in lines if line.strip()]:
                return f", saying: {next((line for line in said if 'hardware error' in line), said[-1])}"
        return ""


class OwnMachine(Machine):
    """A machine that we have started, and that ends with us."""

    def __init__(
        self, folder: Path, command: Sequence[str], *, pass_fds: Sequence[int] = (), restored: bool = False
    ) -> None:
        """Start it in this folder, which is ours: the command names what is there by relative paths.
        restored: it is ready from the beginning."""
        with (folder / "disk").open("wb") as disk:
            disk.truncate(DISK_SIZE)
        os.mkfifo(folder / "answers")
        super().__init__(folder)
        # Its to keep open: that nobody has the pipe open for writing says that the emulator is dead.
        answers = os.open(folder / "answers", os.O_WRONLY | os.O_CLOEXEC)
        with (folder / "emulator.log").open("wb") as log:
            # Killed when this process is gone, however it went; and not by a Ctrl-C that is ours.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[*pass_fds, answers],
                start_new_session=True,
            )
        os.close(answers)
        if restored:
            (folder / "ready").touch()
        (folder / "pid").write_text(str(self._process.pid))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        super().close()
