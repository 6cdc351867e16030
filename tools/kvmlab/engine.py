"""The engines: what executes a guest. The VMM, the guest and the checks are the same on all of them."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmlab import cache, emulator_log
from kvmlab.lesson import Lesson, UsageError
from kvmlab.machine import Job, Machine, MachineError, MachineHangsError, Outcome, OwnMachine, Settings, read_result

# These name the folder of a machine that is there already.
SHARED_SVM = "KVMLAB_SVM"
SHARED_VMX = "KVMLAB_VMX"

DEVICE = Path("/dev/kvm")
GET_API_VERSION = 0xAE00
CREATE_VM = 0xAE01
API_VERSION = 12
LATE = 60.0  # seconds that a VMM may take beyond its time limit
HANGS = 4  # its exit status


class Engine:
    """Runs jobs. What an engine has started ends when it is closed."""

    name: str
    what: str

    def __init__(self, params: str = "", trace: bool = False) -> None:
        self.params = params
        self.trace = trace

    def run(self, job: Job) -> Outcome:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing, where a run leaves nothing behind."""


class Kvm(Engine):
    """This machine's own KVM."""

    name = "kvm"
    what = "this machine's /dev/kvm"

    def run(self, job: Job) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch:
            folder = Path(scratch)
            for name, path in job.files.items():
                (folder / name).symlink_to(path.absolute())
            # A file, not a pipe: all of the input is there before the guest looks for it.
            (folder / "stdin").write_bytes(job.stdin)
            status, output, errors = self._run_in(folder, job)
            results = {name: read_result(folder / name) for name in job.results if (folder / name).exists()}
        return Outcome(status, output, errors, results)

    @staticmethod
    def _run_in(folder: Path, job: Job) -> tuple[int, bytes, bytes]:
        with (
            (folder / "stdin").open("rb") as stdin,
            subprocess.Popen(
                job.command,
                cwd=folder,
                stdin=None if job.watched else stdin,
                stdout=None if job.watched else subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as command,
        ):
            try:
                output, errors = command.communicate(timeout=job.time_limit + LATE)
            except KeyboardInterrupt:
                # A VMM that is watched has been asked to stop too, and says where the guest was.
                if not job.watched:
                    raise
                command.send_signal(signal.SIGINT)
                output, errors = command.communicate(timeout=LATE)
            finally:
                command.kill()
            return command.returncode, output or b"", errors


class Emulated(Engine):
    """A machine that a program emulates, with Debian's kernel and its KVM."""

    def settings(self, place: Path) -> Settings:
        """Whose parameters are they, and do they exist? Linux itself would ignore those it does not know."""
        known = cache.module_parameters(place)
        words: dict[str, list[str]] = {"kvm": [], "vendor": []}
        for word in self.params.split():
            name, equals, _ = word.partition("=")
            if not equals or name not in known:
                names = " ".join(sorted(name for name, owner in known.items() if owner == "vendor"))
                raise UsageError(f"KVM_PARAMS={self.params}: the KVM of {self.name} has no {name}=; it has {names}")
            words[known[name]].append(word)
        return Settings(" ".join(words["kvm"]), " ".join(words["vendor"]))


class Svm(Emulated):
    """For each job, a machine restored from a snapshot in which it waits for one."""

    name = "svm"
    what = "emulated AMD"

    def run(self, job: Job) -> Outcome:
        place = cache.ready(self.name)
        if (shared := os.environ.get(SHARED_SVM)) and not job.vfio:
            with contextlib.closing(Machine(Path(shared))) as machine:
                return machine.run(job, self.settings(place), _show)
        try:
            return self._run_restored(place, job)
        except MachineError:
            if not cache.discard_if_corrupt(self.name, place):
                raise
        return self._run_restored(cache.ready(self.name), job)

    def _run_restored(self, place: Path, job: Job) -> Outcome:
        settings = self.settings(place)
        with (
            tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch,
            contextlib.closing(start_svm(place, Path(scratch))) as machine,
        ):
            return machine.run(job, settings, _show)


def start_svm(place: Path, folder: Path, *options: str) -> OwnMachine:
    """Restore the emulated AMD machine in this folder; with more options for QEMU, if there are any."""
    with (place / "state").open("rb") as state:
        restore = [*cache.QEMU, *options, "-incoming", f"fd:{state.fileno()}"]
        return OwnMachine(folder, restore, pass_fds=[state.fileno()], restored=True)


_UNSTOPPABLE = "nothing stops it on this engine, so that there is no record; ENGINE=svm says more"


class Vmx(Emulated):
    """One machine for all jobs: it takes a while to start."""

    name = "vmx"
    what = "emulated Intel"

    def __init__(self, params: str = "", trace: bool = False) -> None:
        super().__init__(params, trace)
        self._machine: Machine | None = None
        self._settings = Settings()
        self._closing = contextlib.ExitStack()

    def run(self, job: Job) -> Outcome:
        if not self._machine:
            place = cache.ready(self.name)
            self._settings = self.settings(place)
            self._machine = self._closing.enter_context(contextlib.closing(self._attach(place)))
        try:
            return self._run_logged(self._machine, job)
        except MachineHangsError:
            # On Bochs no interrupt gets through to a guest that loops with interrupts off and never
            # exits (tests/deviations.toml): neither does the VMM's time limit.
            self.close()
            self._machine = None
            return Outcome(HANGS, errors=f"vmm: the guest hangs: with interrupts off, and {_UNSTOPPABLE}\n".encode())

    def _run_logged(self, machine: Machine, job: Job) -> Outcome:
        """Run the job; if the emulator keeps a log, count what it has written meanwhile, and keep no more of it
        than this job's: each takes some 60 MiB."""
        log = machine.folder / emulator_log.NAME
        if not log.exists():
            return machine.run(job, self._settings, _show)
        begin = log.stat().st_size
        os.truncate(log, 0)
        outcome = machine.run(job, self._settings, _show)
        with log.open("rb") as lines:
            lines.seek(begin)
            outcome.emulator = emulator_log.count(lines)
        return outcome

    def _attach(self, place: Path) -> Machine:
        """The machine that the tests share, or else one of our own."""
        if shared := os.environ.get(SHARED_VMX):
            return Machine(Path(shared))
        folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="kvmlab-")))
        return start_vmx(place, folder)

    def close(self) -> None:
        self._closing.close()


def start_vmx(place: Path, folder: Path, keeps_log: bool = False) -> OwnMachine:
    """Start the emulated Intel machine in this folder, without waiting until it is ready. keeps_log: the emulator
    writes down what its CPU does."""
    (folder / "boot.iso").symlink_to(place / "boot.iso")
    if not keeps_log:
        return OwnMachine(folder, cache.BOCHS)
    (folder / emulator_log.NAME).touch()
    return OwnMachine(folder, [*cache.BOCHS, *emulator_log.OPTIONS])


@contextlib.contextmanager
def _shared(variable: str, start: Callable[[Path], OwnMachine]) -> Iterator[None]:
    """As long as this lasts, all engines of this kind, in this process and in those that it starts, use one
    emulated machine: it takes its time to start."""
    with contextlib.ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="kvmlab-")))
        closing.enter_context(contextlib.closing(start(folder)))
        os.environ[variable] = str(folder)
        closing.callback(os.environ.pop, variable)
        yield


def one_svm() -> contextlib.AbstractContextManager[None]:
    return _shared(SHARED_SVM, lambda folder: start_svm(cache.ready("svm"), folder))


def one_vmx(keeps_log: bool = False) -> contextlib.AbstractContextManager[None]:
    return _shared(SHARED_VMX, lambda folder: start_vmx(cache.ready("vmx"), folder, keeps_log))


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Kvm, Svm, Vmx)}


def kvm_problem() -> str:
    """Why this machine's KVM cannot be used; "" if it can. Having a VM made is the only proof."""
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    try:
        if (version := fcntl.ioctl(device, GET_API_VERSION)) != API_VERSION:
            return f"{DEVICE} is not KVM: API version {version}"
        os.close(fcntl.ioctl(device, CREATE_VM))
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return f"{DEVICE} is not KVM"
        return f"{DEVICE} makes no VM: {error.strerror}"
    finally:
        os.close(device)
    return ""


class CannotRun(Exception):
    """No engine that was asked for can run the lesson: one line, exit status 77."""


class Unable(Exception):
    """An engine cannot run the lesson, as the run itself has found out."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(reason)
        self.engine = engine
        self.reason = reason


def choose(lesson: Lesson, wanted: str, params: str, trace: bool) -> tuple[Engine, str]:
    """The engine to run a lesson on, and the line that says which it is and why."""
    if wanted != "auto" and wanted not in ENGINES:
        raise UsageError(f"ENGINE={wanted}: there are auto, {', '.join(ENGINES)}")
    objections = []
    for name in ENGINES if wanted == "auto" else [wanted]:
        if objection := _objection(lesson, name, params, trace):
            objections.append(f"{name}: {objection}" if wanted == "auto" else objection)
            continue
        # Asked for by name, this machine's KVM may say itself why it refuses.
        if name == "kvm" and wanted == "auto" and (problem := kvm_problem()):
            objections.append(problem)
            continue
        chosen = ENGINES[name](params, trace)
        return chosen, f"engine: {name} ({'; '.join([chosen.what, *objections])})"
    raise CannotRun(f"lesson {lesson.number} cannot run on ENGINE={wanted}: {'; '.join(objections)}")


def _objection(lesson: Lesson, name: str, params: str, trace: bool) -> str:
    """Why this engine cannot run the lesson like this; "" if it can."""
    if name in lesson.not_on:
        return lesson.not_on[name]
    if name == "kvm" and (params or trace):
        return f"{'KVM_PARAMS' if params else 'KTRACE'} needs a kernel of its own: svm or vmx"
    return ""
