"""What the emulated machines start from: made once, under build/engines, from Debian's packages.

A folder for each engine, named by the versions and options that went into it. It appears complete or
not at all, and says in its manifest what it must contain."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from kvmlab.machine import MachineError, OwnMachine

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tools" / "engines"
NEEDED = 600 << 20  # bytes of free space to make a cache: the kernel's package, and a snapshot

# Quiet, with nothing that takes time and nobody misses; gone at once if it panics.
KERNEL_OPTIONS = "mitigations=off cryptomgr.notests tsc=reliable panic=-1"

QEMU = [
    *["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "qemu64,+svm,+npt", "-m", "512"],
    *["-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:kernel.log"],
    *["-chardev", "file,id=answers,path=answers", "-device", "isa-parallel,chardev=answers"],
    *["-chardev", "null,id=none", "-device", "isa-debugcon,iobase=0xe9,chardev=none"],
    *["-drive", "file=disk,format=raw,if=none,id=disk,werror=report"],
    *["-device", "isa-ide,id=jobs", "-device", "ide-hd,bus=jobs.0,drive=disk"],
    # A device for VFIO, behind an IOMMU; without interrupt remapping VFIO would not take it.
    *["-device", "intel-iommu,intremap=on", "-device", "edu,addr=2"],
]
QEMU_KERNEL = f"console=ttyS0 quiet intel_iommu=on {KERNEL_OPTIONS}"
VFIO = ["vfio", "vfio_iommu_type1", "vfio_virqfd", "vfio-pci-core", "vfio-pci"]

BOCHS = ["bochs", "-q", "-f", str(SOURCES / "bochsrc"), "-rc", str(SOURCES / "bochs.rc")]
BOCHS_KERNEL = f"console=ttyS0,115200 loglevel=4 nosmp nokaslr audit=0 lsm=capability reboot=t {KERNEL_OPTIONS}"


def folder() -> Path:
    return Path(os.environ.get("KVMLAB_CACHE") or ROOT / "build" / "engines").absolute()


@dataclass(frozen=True)
class Recipe:
    """How an engine's folder is made."""

    engine: str
    module: str  # of the kernel, beside kvm.ko
    packages: Sequence[str]
    options: Sequence[str]
    make: Callable[[Path, Path, Path], None]  # from kernel and initial RAM file system, in this folder
    more_modules: Sequence[str] = ()


def ready(engine: str) -> Path:
    """The engine's folder, made if it is not there or not sound."""
    recipe = RECIPES[engine]
    _set_up(engine)
    package = _kernel_package()
    place = folder() / f"{engine}-{_key(recipe, package)}"
    if damage := _damage(place):
        with _one_at_a_time(engine):
            if damage := _damage(place):
                _make(recipe, package, place, damage)
    return place


def discard_if_corrupt(engine: str, place: Path) -> bool:
    """Read all of the folder: if anything is not as it was made, it is of no use."""
    manifest = json.loads((place / "manifest").read_text())
    corrupt = [name for name, (_, checksum) in manifest.items() if _checksum(place / name) != checksum]
    if corrupt:
        _say(engine, f"{corrupt[0]} is not as it was made")
        shutil.rmtree(place, ignore_errors=True)
    return bool(corrupt)


def module_parameters(place: Path) -> dict[str, str]:
    """The names of the module parameters, and whose they are: "kvm" or "vendor"."""
    found = {}
    for owner in ("kvm", "vendor"):
        for line in (place / f"{owner}.parameters").read_text().split():
            found[line] = owner
    return found


# ---- is it there, and sound? ----


def _set_up(engine: str) -> None:
    done = subprocess.run([ROOT / "tools" / "setup", engine], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MachineError(done.stderr.strip().splitlines()[-1])
    sys.stderr.write(done.stderr)


def _kernel_package() -> Path:
    """What tools/setup has fetched; the last of several."""
    return max((folder() / "packages").glob("linux-image-*.deb"), key=lambda path: path.stat().st_mtime)


def _key(recipe: Recipe, package: Path) -> str:
    query = ["dpkg-query", "--show", "--showformat=${Package} ${Version}\n", *recipe.packages]
    versions = subprocess.run(query, capture_output=True, check=False).stdout
    ingredients = [versions, package.name.encode(), " ".join([*recipe.options, *recipe.more_modules]).encode()]
    ingredients += [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    return hashlib.sha256(b"\0".join(ingredients)).hexdigest()[:16]


def _damage(place: Path) -> str:
    """What is wrong, as far as a quick look can tell; "" if nothing is."""
    try:
        manifest = json.loads((place / "manifest").read_text())
        for name, (size, _) in manifest.items():
            if (place / name).stat().st_size != size:
                return f"{name} has {(place / name).stat().st_size} bytes, not {size}"
    except FileNotFoundError as error:
        return f"there is no {Path(error.filename).name}" if place.exists() else "first use"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _one_at_a_time(engine: str) -> Iterator[None]:
    with (folder() / f"{engine}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(engine, "another run is preparing it; waiting for that")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- make it ----


def _say(engine: str, what: str) -> None:
    print(f"engine {engine}: {what}", file=sys.stderr, flush=True)


def _make(recipe: Recipe, package: Path, place: Path, why: str) -> None:
    start = time.monotonic()
    _say(recipe.engine, f"preparing what it starts from: {why}")
    for old in folder().glob(f"{recipe.engine}-*"):  # what older versions have left, 100 MiB each
        shutil.rmtree(old, ignore_errors=True)
    try:
        if (free := shutil.disk_usage(folder()).free) < NEEDED:
            raise MachineError(f"{folder()} has {free >> 20} MiB of free space; {NEEDED >> 20} are needed")
        with tempfile.TemporaryDirectory(dir=folder(), prefix="making-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            _make_files(recipe, package, Path(scratch), new)
            new.rename(place)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MachineError(f"no space left in {folder()}, which needs {NEEDED >> 20} MiB") from None
        raise MachineError(f"cannot prepare the engine {recipe.engine}: {error}") from None
    size = sum(path.stat().st_size for path in place.iterdir()) >> 20
    _say(recipe.engine, f"ready after {time.monotonic() - start:.0f} s; {size} MiB in {place}")


def _make_files(recipe: Recipe, package: Path, scratch: Path, new: Path) -> None:
    _say(recipe.engine, f"unpacking {package.name}")
    modules = scratch / "root" / "modules"
    modules.mkdir(parents=True)
    kernel = scratch / "vmlinuz"
    members = {f"{name}.ko": f"{name}.ko" for name in ("irqbypass", "kvm", *recipe.more_modules)}
    members |= {f"{recipe.module}.ko": "vendor.ko"}
    _unpack(package, {name: modules / own for name, own in members.items()} | {"vmlinuz": kernel})
    for name in ("kvm", "vendor"):
        (new / f"{name}.parameters").write_text("\n".join(_parameters(modules / f"{name}.ko")))
    (modules / "vendor.ko").rename(modules / f"{recipe.module.replace('-', '_')}.ko")
    # Without debugging information, and without the signatures, which would only be verified.
    _command("strip", "--strip-debug", *modules.iterdir())
    flags = ["-std=gnu11", "-O2", "-D_GNU_SOURCE", "-static", "-s"]
    _command("gcc", *flags, SOURCES / "init.c", "-o", scratch / "root" / "init")
    initrd = scratch / "initrd"
    names = "\n".join(str(path.relative_to(scratch / "root")) for path in sorted((scratch / "root").rglob("*")))
    with initrd.open("wb") as archive:
        _command("cpio", "--create", "--format=newc", "--quiet", cwd=scratch / "root", given=names, to=archive)
    recipe.make(kernel, initrd, new)
    manifest = {path.name: [path.stat().st_size, _checksum(path)] for path in new.iterdir()}
    (new / "manifest").write_text(json.dumps(manifest, indent=1))


def _unpack(package: Path, wanted: dict[str, Path]) -> None:
    """Single files of a package, by the beginning of their names."""
    missing = dict(wanted)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                key = "vmlinuz" if name.startswith("vmlinuz-") else name
                if key in missing and (content := archive.extractfile(member)):
                    with missing.pop(key).open("wb") as copy:
                        shutil.copyfileobj(content, copy)
    if missing:
        raise MachineError(f"{package} has no {', '.join(missing)}: remove it, and it is fetched again")


def _parameters(module: Path) -> list[str]:
    """What the module says of itself in its section .modinfo: parm=NAME:description."""
    words = module.read_bytes().split(b"\0")
    return [word[9:].partition(b":")[0].decode() for word in words if word.startswith(b"parmtype=")]


def _command(*words: str | Path, cwd: Path | None = None, given: str = "", to: IO[bytes] | None = None) -> None:
    output = to or subprocess.DEVNULL
    done = subprocess.run(words, cwd=cwd, input=given.encode(), stdout=output, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise MachineError(f"{words[0]} failed: {said[-1] if said else f'status {done.returncode}'}")


# ---- svm: a snapshot of a machine that waits for a job ----


def _make_snapshot(kernel: Path, initrd: Path, new: Path) -> None:
    _say("svm", "starting the emulated machine once, for a snapshot")
    scratch = new.parent / "machine"
    scratch.mkdir()
    boot = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", QEMU_KERNEL]
    wait = ["-global", "isa-debugcon.readback=0"]
    ours, its = socket.socketpair()
    control = ["-chardev", f"socket,id=control,fd={its.fileno()}", "-mon", "chardev=control,mode=control"]
    with contextlib.closing(OwnMachine(scratch, [*QEMU, *boot, *wait, *control], pass_fds=[its.fileno()])) as machine:
        its.close()
        machine.wait_until_ready()
        # The path is relative to the machine's folder: no name of the user's reaches this shell.
        _migrate(ours, f"exec:cat > ../{new.name}/state")


def _migrate(control: socket.socket, to: str) -> None:
    """Ask QEMU for all of the machine's state (QEMU Machine Protocol)."""
    orders: list[tuple[str, dict[str, object]]] = [
        ("qmp_capabilities", {}),
        ("migrate-set-parameters", {"max-bandwidth": 1 << 40}),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
        ("migrate", {"uri": to}),
    ]
    with control, control.makefile("rw") as conversation:
        for order, arguments in orders:
            conversation.write(json.dumps({"execute": order, "arguments": arguments}))
        conversation.flush()
        for line in conversation:
            said = json.loads(line)
            status = said.get("data", {}).get("status") if said.get("event") == "MIGRATION" else None
            if status == "completed":
                return
            if status == "failed" or "error" in said:
                break
    raise MachineError("QEMU cannot write the snapshot: is there enough space?")


# ---- vmx: a CD to boot from ----


def _make_cd(kernel: Path, initrd: Path, new: Path) -> None:
    files = new.parent / "cd"
    (files / "isolinux").mkdir(parents=True)
    kernel.rename(files / "vmlinuz")
    initrd.rename(files / "initrd")
    append = f"append initrd=/initrd {BOCHS_KERNEL}"
    (files / "isolinux" / "isolinux.cfg").write_text(f"default go\nlabel go\nkernel /vmlinuz\n{append}\n")
    for loader in ("/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"):
        shutil.copy(loader, files / "isolinux")
    boot = ["-b", "isolinux/isolinux.bin", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    _command("xorriso", "-as", "mkisofs", "-quiet", *boot, "-o", new / "boot.iso", files)


RECIPES = {
    "svm": Recipe("svm", "kvm-amd", ["qemu-system-x86"], [*QEMU, QEMU_KERNEL], _make_snapshot, VFIO),
    "vmx": Recipe("vmx", "kvm-intel", ["bochs", "bochsbios"], [BOCHS_KERNEL], _make_cd),
}
