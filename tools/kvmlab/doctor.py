"""`make doctor`: what this machine has for each engine, and what to type where it lacks something."""

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from kvmlab import cache, engine
from kvmlab.lesson import Lesson

SETUP = cache.ROOT / "tools" / "setup"
GROUPS = ("run", "test", "svm", "vmx")  # of tools/setup
ANY_LESSON = Lesson(Path("0-any"), "one that all engines can run", {}, {}, [])

MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}  # by the CPU's flag
PARAMETERS = ("ept", "npt", "vpid", "nested")
WSL = {"Microsoft": "WSL 1", "microsoft": "WSL 2"}  # by a word in the kernel's release
CONTAINERS = {".dockerenv": "Docker", "run/.containerenv": "Podman", "run/systemd/container": "LXC or the like"}

FIRMWARE = "sudo systemctl reboot --firmware-setup, and there turn on VT-x (Intel) or SVM (AMD)"
NESTED_ON_WSL = r"in %UserProfile%\.wslconfig, under [wsl2]: nestedVirtualization=true; then wsl --shutdown"
# How a virtual machine gets virtualization of its own, by the vendor that its DMI tables name.
NESTED = {
    "QEMU": "on the host: sudo modprobe kvm_intel nested=1 (or kvm_amd); then start this machine with -cpu host",
    "VMware, Inc.": 'in the settings of this machine, Processors: "Virtualize Intel VT-x/EPT or AMD-V/RVI"',
    "innotek GmbH": "on the host, with this machine off: VBoxManage modifyvm NAME --nested-hw-virt on",
    "Microsoft Corporation": "on the host: Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true",
}
NESTED_ELSEWHERE = "turn on nested virtualization where this virtual machine is configured"
# Linux allocated devices (Documentation/admin-guide/devices.txt), 10 char: 232 is /dev/kvm.
MAKE_DEVICE = "sudo rm -f /dev/kvm && sudo mknod -m 660 /dev/kvm c 10 232 && sudo chgrp kvm /dev/kvm"

OK, NOTE, MEND = "ok", "--", "!!"


class Fact(NamedTuple):
    """One line of the table, and below it what to type."""

    mark: str
    what: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        below = f"\n{'':17}{self.mend}" if self.mend else ""
        return f"{self.mark:4}{self.what:13}{self.text}{below}"


# ---- the machine ----


class Host:
    """The machine whose root directory this is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cpu = self.table("proc/cpuinfo", ":")
        flags = self.cpu.get("flags", "").split()
        self.flag = next((flag for flag in MODULES if flag in flags), "")
        self.virtual = "hypervisor" in flags
        self.release = self.read("proc/sys/kernel/osrelease")
        self.wsl = next((name for word, name in WSL.items() if word in self.release), "")
        self.container = next((name for file, name in CONTAINERS.items() if (root / file).exists()), "")
        self.modules = sorted(path.name for path in root.glob("sys/module/kvm_*"))

    def read(self, path: str) -> str:
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def table(self, path: str, separator: str) -> dict[str, str]:
        """The lines `name: value` of a file; of several with one name, the last."""
        lines = (line.partition(separator) for line in self.read(path).splitlines())
        return {name.strip(): value.strip(' "') for name, _, value in lines}

    def account(self, file: str, number: int) -> list[str]:
        """The fields of a user in /etc/passwd, or of a group in /etc/group."""
        entries = (line.split(":") for line in self.read(f"etc/{file}").splitlines())
        return next((fields for fields in entries if fields[2:3] == [str(number)]), [str(number), ""])


class Device:
    """Whose is /dev/kvm, and are we among them?"""

    def __init__(self, host: Host) -> None:
        status = (host.root / "dev/kvm").stat()
        owner, user = (host.account("passwd", uid)[0] for uid in (status.st_uid, os.getuid()))
        self.group, *_, users = host.account("group", status.st_gid)
        self.gid = status.st_gid
        self.for_group = self.group != "root" and status.st_mode & 0o060 == 0o060
        self.is_member = self.gid in (os.getegid(), *os.getgroups())
        self.is_entered = user in users.split(",")  # counts from the next login on
        membership = f"you are {'' if self.is_member else 'not '}in the group {self.group}"
        self.text = f"({owner}:{self.group} {status.st_mode & 0o777:o}; {membership})"


def _system(host: Host) -> Fact:
    name = host.table("etc/os-release", "=").get("PRETTY_NAME", "a system without a name")
    words = [name, f"Linux {host.release}", host.wsl, host.container and f"in a container ({host.container})"]
    return Fact(OK, "system", ", ".join(filter(None, words)))


def _foreign() -> str:
    machine = platform.machine()
    return "" if machine == "x86_64" else f"the VMM and its guests are x86_64, this machine is {machine}"


def _cpu(host: Host) -> Fact:
    if foreign := _foreign():
        return Fact(MEND, "cpu", foreign, "an emulating container may do: docker run --platform=linux/amd64")
    words = [host.cpu.get("vendor_id", "unknown"), host.flag or "neither vmx nor svm"]
    return Fact(OK if host.flag else NOTE, "cpu", ", ".join(words + ["in a virtual machine"] * host.virtual))


def _module(host: Host) -> Fact:
    if not host.modules:
        return Fact(NOTE, "module", "neither kvm_intel nor kvm_amd")
    places = [(name, f"sys/module/{module}/parameters/{name}") for module in host.modules for name in PARAMETERS]
    parameters = [f"{name}={value}" for name, path in places if (value := host.read(path))]
    return Fact(OK, "module", " ".join([*host.modules, *parameters]))


# ---- /dev/kvm ----


def _kvm(host: Host, problem: str) -> Fact:
    device = Device(host) if (host.root / "dev/kvm").exists() else None
    words = [problem.removeprefix(str(engine.DEVICE)).lstrip(": ") or "usable", *([device.text] if device else [])]
    mend = ""
    if device and os.strerror(errno.EACCES) in problem:
        mend = _mend_permission(host, device)
    elif problem:
        mend = _mend_kvm(host, problem)
    return Fact(MEND if problem else OK, "/dev/kvm", " ".join(words), mend)


def _mend_permission(host: Host, device: Device) -> str:
    causes = [
        (not device.for_group, "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm"),
        (host.container, f"start the container with --group-add={device.gid}"),
        (device.is_entered, f"log in again: you came into the group {device.group} after this login"),
        (True, f"sudo usermod -aG {device.group} $USER, then log in again"),
    ]
    return next(mend for applies, mend in causes if applies)


def _mend_kvm(host: Host, problem: str) -> str:
    """For the first cause that applies: what lies deepest comes first."""
    incapable = not host.flag and not host.modules
    nested = NESTED.get(host.read("sys/class/dmi/id/sys_vendor"), NESTED_ELSEWHERE)
    # On older kernels an AMD CPU has its flag even where the firmware has turned it off.
    load = f"sudo modprobe {MODULES.get(host.flag)}; where that is refused: {FIRMWARE}"
    causes = [
        (os.strerror(errno.EBUSY) in problem, "end the other hypervisor that uses the CPU (VirtualBox, VMware?)"),
        ("makes no VM" in problem, "the kernel's log may say why: sudo dmesg | grep -i kvm"),
        (host.wsl == "WSL 1", "in PowerShell: wsl --set-version NAME 2, with a NAME from wsl --list"),
        (incapable and host.wsl, NESTED_ON_WSL),
        (incapable and host.virtual, nested),
        (incapable, FIRMWARE),
        (host.container, "start the container with --device=/dev/kvm"),
        (not host.modules, load),
        (True, MAKE_DEVICE),
    ]
    return next(mend for applies, mend in causes if applies)


# ---- packages and caches ----


def _missing(group: str) -> str:
    """What tools/setup finds missing; "" if nothing is."""
    environment = os.environ | {"SETUP": "never"}
    done = subprocess.run([SETUP, group], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    return done.stderr.strip().removeprefix("setup: ") if done.returncode else ""


def _packages(group: str, missing: str) -> Fact:
    if not missing:
        return Fact(OK, "packages", f"{group}: all there")
    mend = f"tools/setup {group}" if shutil.which("apt-get") else "install them, or work in a container: Containerfile"
    # What tools/setup says of how it goes on is not for here.
    return Fact(MEND, "packages", f"{group}: {re.split('; as root|, which', missing)[0]}", mend)


def _prepared() -> list[str]:
    """The engines that have a cache."""
    return [name for name in cache.RECIPES if any(cache.folder().glob(f"{name}-*/manifest"))]


def _cache_problem() -> str:
    """Why no cache can be made; "" if one can."""
    place = next(path for path in (cache.folder(), *cache.folder().parents) if os.path.exists(path))
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"no place for a cache: {error.strerror}"
    free = shutil.disk_usage(place).free
    return f"{free >> 20} MiB free, {cache.NEEDED >> 20} are needed" if free < cache.NEEDED else ""


def _caches(problem: str) -> Fact:
    there = f"{cache.folder()}: {' and '.join(_prepared()) or 'nothing'} prepared"
    if problem:
        return Fact(MEND, "caches", f"{there}; {problem}", "export KVMLAB_CACHE=DIR, for a folder elsewhere")
    return Fact(OK, "caches", f"{there}, space for more")


# ---- the engines ----


def _engine_problems(kvm_problem: str, missing: dict[str, str], cache_problem: str) -> dict[str, str]:
    """Why each engine will not work; "" if it will."""
    problems = {"kvm": kvm_problem or (missing["run"] and "packages are missing")}
    for name in cache.RECIPES:
        no_cache = cache_problem if name not in _prepared() else ""
        problems[name] = "packages are missing" if missing[name] else no_cache
    return {name: _foreign() or problem for name, problem in problems.items()}


def _auto(problems: dict[str, str]) -> Fact:
    """What ENGINE=auto takes need not be what works."""
    chosen, line = engine.choose(ANY_LESSON, "auto", "", trace=False)
    line = line.removeprefix("engine: ")
    if not (problem := problems[chosen.name]):
        return Fact(OK, "ENGINE=auto", line)
    others = [f"say ENGINE={name}" for name in problems if not problems[name]]
    return Fact(MEND, "ENGINE=auto", f"{line}, but {problem}", next(iter(others), ""))


def main(root: Path = Path("/")) -> int:
    host = Host(root)
    kvm_problem, cache_problem = engine.kvm_problem(), _cache_problem()
    missing = {group: _missing(group) for group in GROUPS}
    problems = _engine_problems(kvm_problem, missing, cache_problem)
    facts = [_system(host), _cpu(host), _module(host), _kvm(host, kvm_problem)]
    facts += [_packages(group, what) for group, what in missing.items()]
    facts.append(_caches(cache_problem))
    for name, problem in problems.items():
        facts.append(Fact(NOTE if problem else OK, f"ENGINE={name}", problem or engine.ENGINES[name].what))
    facts.append(_auto(problems))
    print(*facts, sep="\n")
    return 0 if "" in problems.values() else 1


if __name__ == "__main__":
    sys.exit(main())
