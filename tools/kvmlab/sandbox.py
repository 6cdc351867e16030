"""What a submission is built and run in: bubblewrap's sandbox (bwrap(1)), with strace(1) outside as a witness.

In the sandbox there are /usr, the files named, and a /tmp in memory; of devices the harmless ones, and KVM's where it
is asked for; no network, and no other process. What bounds memory, processes and files are resource limits
(prlimit(1)): of root, Linux limits no processes, so that root's sandboxes run as a user that nobody else is.
"""

import contextlib
import functools
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmlab import landlock
from kvmlab.engine import DEVICE
from kvmlab.machine import MachineError

OUTPUT_MOST = 1 << 20
SPACE = 64 << 20  # of the file systems in memory
MEMORY = 1 << 30  # of each process
PROCESSES = 48
FILE_SIZE = 64 << 20
WITNESS_SIZE = 256 << 20

_LIMITS = [f"--as={MEMORY}", f"--fsize={FILE_SIZE}", "--core=0", "--nofile=512"]
_NAMESPACES = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try".split()
_ALONE = [*_NAMESPACES, "--die-with-parent", "--new-session", "--clearenv", "--setenv", "PATH", "/usr/bin"]
_SYSTEM = "--ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64".split()
# All that KVM is asked for, by whatever process, and how each KVM_RUN came back; and what could hide that.
_WITNESS = "strace -f --seccomp-bpf -qq -e trace=ioctl,seccomp,prctl -e signal=none -e kvm=vcpu".split()


@dataclass(frozen=True)
class Ended:
    """How a command in the sandbox ended."""

    status: int
    output: bytes = b""
    errors: bytes = b""
    is_late: bool = False
    witness: str = ""  # what strace has seen


@dataclass(frozen=True)
class Place:
    """What a command finds there."""

    folder: str  # where it starts
    given: Mapping[str, Path] = field(default_factory=dict)  # cannot be written
    results: Mapping[str, Path] = field(default_factory=dict)  # a file or a folder that can
    kvm: bool = False


def run(command: Sequence[str], place: Place, limit: float, stdin: bytes = b"", is_witnessed: bool = False) -> Ended:
    """Run a command to its end, or to the limit, in seconds. Nothing of it is left then."""
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch_name:
        scratch = Path(scratch_name)
        (scratch / "stdin").write_bytes(stdin)
        # bwrap dies with its parent; strace does not by itself.
        alone = ["setpriv", "--pdeathsig", "KILL", "prlimit", f"--fsize={WITNESS_SIZE}", "--"]
        witness = [*alone, *_WITNESS, "-o", str(scratch / "witness")]
        whole = [*(witness if is_witnessed else []), "bwrap", *_arguments(place, scratch), "--", *_limits(), *command]
        status = _run(whole, scratch, limit)
        return _ended(status, scratch, (scratch / "witness").read_text(errors="replace") if is_witnessed else "")


def build(command: Sequence[str], tree: Path, made: Path, limit: float) -> Ended:
    """Run a compiler in a tree, which writes only to the folder made. It runs nothing of what it compiles: where
    there is no sandbox, it is enough to keep other files from it."""
    given = {f"/tree/{path.name}": path for path in tree.iterdir() if path != made}
    if not problem(kvm=False):
        return run(command, Place("/tree", given, {f"/tree/{made.name}": made}), limit)
    with tempfile.TemporaryDirectory(prefix="kvmlab-") as scratch_name:
        scratch = Path(scratch_name)
        (scratch / "stdin").touch()
        words = ["env", "-i", "PATH=/usr/bin", f"TMPDIR={scratch}", "prlimit", *_LIMITS, "--", *command]
        readable = [tree, *map(Path, ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"))]
        writable = [made, scratch, Path("/dev/null")]
        try:
            status = _run(words, scratch, limit, tree, lambda: landlock.keep_only(readable, writable))
        except subprocess.SubprocessError:
            raise MachineError(f"there is no Landlock to build under, and {problem(kvm=False)}") from None
        return _ended(status, scratch)


def _ended(status: int | None, scratch: Path, witness: str = "") -> Ended:
    output, errors = ((scratch / name).read_bytes()[:OUTPUT_MOST] for name in ("output", "errors"))
    return Ended(-signal.SIGKILL if status is None else status, output, errors, status is None, witness)


def _run(
    command: list[str],
    scratch: Path,
    limit: float,
    folder: Path | None = None,
    first: Callable[[], None] | None = None,
) -> int | None:
    """The status; None if it had to be killed. To files: what they can hold is limited."""
    with (
        (scratch / "stdin").open("rb") as stdin,
        (scratch / "output").open("wb") as output,
        (scratch / "errors").open("wb") as errors,
        subprocess.Popen(
            command,
            cwd=folder,
            stdin=stdin,
            stdout=output,
            stderr=errors,
            start_new_session=True,
            preexec_fn=first,
        ) as process,
    ):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()  # and what is in the sandbox dies with it,
            with contextlib.suppress(ProcessLookupError):  # or what a compiler has started
                os.killpg(process.pid, signal.SIGKILL)


def _arguments(place: Place, scratch: Path) -> list[str]:
    arguments = [*_ALONE, *_SYSTEM, "--proc", "/proc", "--dev", "/dev"]
    if place.kvm:
        arguments += ["--dev-bind", str(_kvm_for_all(scratch)), str(DEVICE)]
    for folder in {"/tmp", "/dev/shm", place.folder}:
        arguments += ["--perms", "0777", "--size", str(SPACE), "--tmpfs", folder]
    for option, files in (("--ro-bind", place.given), ("--bind", place.results)):
        for inside, outside in files.items():
            arguments += [option, str(outside.absolute()), inside]
    if os.getuid() == 0:
        for path in place.results.values():
            _give(path)
        arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", place.folder]


def _limits() -> list[str]:
    user = str(_user())
    become = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all"]
    # Where memory runs out, the kernel ends these first.
    return [
        "choom",
        "--adjust",
        "1000",
        "--",
        *(become if os.getuid() == 0 else []),
        "prlimit",
        f"--nproc={PROCESSES}",
        *_LIMITS,
        "--",
    ]


def _user() -> int:
    """One for each grader, so that what one submission uses up is not missing for another."""
    return 20_000 + os.getpid() % 40_000


def _give(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, _user(), _user(), follow_symlinks=False)


def _kvm_for_all(scratch: Path) -> Path:
    """KVM's device, for whoever root becomes in the sandbox."""
    if os.getuid() or DEVICE.stat().st_mode & 0o006 == 0o006:
        return DEVICE
    device = scratch / "kvm"
    os.mknod(device, stat.S_IFCHR, DEVICE.stat().st_rdev)
    device.chmod(0o666)
    return device


@functools.cache
def problem(kvm: bool) -> str:
    """Why there can be no sandbox here; "" if there can. Trying it is the only proof."""
    place = Place("/job", kvm=kvm)
    # KVM_CREATE_VM is no business of a shell's; that the device opens is enough.
    command = ["sh", "-c", f": <>{DEVICE}" if kvm else ":"]
    try:
        ended = run(command, place, 20.0, is_witnessed=kvm)
    except (OSError, MachineError) as error:
        return f"no sandbox here: {error}"
    said = ended.errors.decode(errors="replace").strip().splitlines()
    return f"no sandbox here: {said[-1] if said else f'status {ended.status}'}" if ended.status else ""
