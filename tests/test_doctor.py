"""`make doctor`: what it sees on machines of many kinds, and what it says to type there."""

import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from kvmlab import cache, doctor, engine
from kvmlab.doctor import MEND, NOTE, OK, Fact
from kvmlab.plugin import ROOT

DENIED = f"/dev/kvm: {os.strerror(errno.EACCES)}"
FORBIDDEN = f"/dev/kvm: {os.strerror(errno.EPERM)}"
ABSENT = f"/dev/kvm: {os.strerror(errno.ENOENT)}"
BUSY = f"/dev/kvm makes no VM: {os.strerror(errno.EBUSY)}"
NO_MEMORY = f"/dev/kvm makes no VM: {os.strerror(errno.ENOMEM)}"
NO_KVM = "/dev/kvm is not KVM"

NO_NASM = "missing packages: nasm; as root: apt-get install nasm"


class Report(NamedTuple):
    """What the doctor said."""

    status: int
    text: str

    def fact(self, what: str, group: str = "") -> Fact:
        """The line about this, and below it what to type."""
        lines = self.text.splitlines()
        at = next((i for i, line in enumerate(lines) if line[4:].startswith(f"{what:13}{group}")), None)
        assert at is not None, f"nothing about {what} in:\n{self.text}"
        below = [line.strip() for line in lines[at + 1 : at + 2] if line.startswith(" ")]
        return Fact(lines[at][:4].strip(), what, lines[at][17:], *below)


class Host:
    """A machine: at first an Intel one that has all that is needed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = folder / "root"
        self.caches = folder / "caches"
        self.patch = monkeypatch
        self._setup = folder / "setup"
        self._capsys = capsys
        self.cpu("GenuineIntel", "fpu vmx")
        self.write("etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian 12"')
        self.write("etc/passwd", f"root:x:999998:\nann:x:{os.getuid()}:")
        self.write("proc/sys/kernel/osrelease", "6.1.0-18-amd64")
        self.write("sys/module/kvm_intel/parameters/ept", "Y")
        self.write("sys/module/kvm_intel/parameters/vpid", "N")
        self.write("dev/kvm").chmod(0o660)
        self.group("kvm")
        self.kvm_problem("")
        self.missing()
        self.patch.setattr(doctor, "SETUP", self._setup)
        self.patch.setattr(platform, "machine", lambda: "x86_64")
        self.patch.setattr(shutil, "which", lambda command: f"/usr/bin/{command}")
        self.patch.setenv("KVMLAB_CACHE", str(self.caches))

    def write(self, path: str, text: str = "") -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")
        return place

    def cpu(self, vendor: str, flags: str) -> None:
        self.write("proc/cpuinfo", f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor\t: 1")

    def group(self, name: str, members: str = "") -> None:
        """How the group of /dev/kvm is called: the number is our own, since nobody can give a file to any other."""
        gid = (self.root / "dev/kvm").stat().st_gid
        self.write("etc/group", f"daemon:x:999999:\n{name}:x:{gid}:{members}")

    def outsider(self) -> None:
        """The session has not the group of /dev/kvm."""
        self.patch.setattr(os, "getgroups", list)
        self.patch.setattr(os, "getegid", lambda: -1)
        self.kvm_problem(DENIED)

    def kvm_problem(self, problem: str) -> None:
        self.patch.setattr(engine, "kvm_problem", lambda: problem)

    def without_kvm(self, vendor: str = "GenuineIntel", flags: str = "fpu") -> None:
        """No module, no device, and what the CPU says."""
        shutil.rmtree(self.root / "sys/module")
        (self.root / "dev/kvm").unlink()
        self.kvm_problem(ABSENT)
        self.cpu(vendor, flags)

    def missing(self, **groups: str) -> None:
        """What tools/setup says of these groups."""
        cases = "".join(f"{group}) echo 'setup: {said}' >&2; exit 5 ;;\n" for group, said in groups.items())
        self._setup.write_text(f'#!/bin/sh\n[ "$SETUP" = never ] || exit 9\ncase $1 in\n{cases}esac\n')
        self._setup.chmod(0o755)

    def prepare(self, name: str) -> None:
        (self.caches / f"{name}-0123").mkdir(parents=True)
        (self.caches / f"{name}-0123" / "manifest").touch()

    def full(self) -> None:
        self.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7 << 20))

    def doctor(self) -> Report:
        status = doctor.main(self.root)
        return Report(status, self._capsys.readouterr().out)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, monkeypatch, capsys)


def test_where_nothing_is_missing_every_line_is_ok(host: Host) -> None:
    assert host.doctor() == (
        0,
        f"""\
ok  system       Debian 12, Linux 6.1.0-18-amd64
ok  cpu          GenuineIntel, vmx
ok  module       kvm_intel ept=Y vpid=N
ok  /dev/kvm     usable (ann:kvm 660; you are in the group kvm)
ok  packages     run: all there
ok  packages     test: all there
ok  packages     svm: all there
ok  packages     vmx: all there
ok  caches       {host.caches}: nothing prepared, space for more
ok  ENGINE=kvm   this machine's /dev/kvm
ok  ENGINE=svm   emulated AMD
ok  ENGINE=vmx   emulated Intel
ok  ENGINE=auto  kvm (this machine's /dev/kvm)
""",
    )


# ---- the machine ----

Change = Callable[[Host], object]

# What the machine is like, and the line about it.
MACHINES: dict[str, tuple[Change, Fact]] = {
    "WSL 1": (
        lambda host: host.write("proc/sys/kernel/osrelease", "4.4.0-19041-Microsoft"),
        Fact(OK, "system", "Debian 12, Linux 4.4.0-19041-Microsoft, WSL 1"),
    ),
    "WSL 2": (
        lambda host: host.write("proc/sys/kernel/osrelease", "5.15.90.1-microsoft-standard-WSL2"),
        Fact(OK, "system", "Debian 12, Linux 5.15.90.1-microsoft-standard-WSL2, WSL 2"),
    ),
    "Docker": (
        lambda host: host.write(".dockerenv"),
        Fact(OK, "system", "Debian 12, Linux 6.1.0-18-amd64, in a container (Docker)"),
    ),
    "Podman": (
        lambda host: host.write("run/.containerenv"),
        Fact(OK, "system", "Debian 12, Linux 6.1.0-18-amd64, in a container (Podman)"),
    ),
    "LXC": (
        lambda host: host.write("run/systemd/container", "lxc"),
        Fact(OK, "system", "Debian 12, Linux 6.1.0-18-amd64, in a container (LXC or the like)"),
    ),
    "a virtual machine": (
        lambda host: host.cpu("AuthenticAMD", "fpu svm hypervisor"),
        Fact(OK, "cpu", "AuthenticAMD, svm, in a virtual machine"),
    ),
    "no virtualization": (
        lambda host: host.cpu("AuthenticAMD", "fpu hypervisor"),
        Fact(NOTE, "cpu", "AuthenticAMD, neither vmx nor svm, in a virtual machine"),
    ),
    "no x86": (
        lambda host: host.patch.setattr(platform, "machine", lambda: "aarch64"),
        Fact(
            MEND,
            "cpu",
            "the VMM and its guests are x86_64, this machine is aarch64",
            "an emulating container may do: docker run --platform=linux/amd64",
        ),
    ),
    "AMD's module too": (
        lambda host: host.write("sys/module/kvm_amd/parameters/npt", "1"),
        Fact(OK, "module", "kvm_amd kvm_intel npt=1 ept=Y vpid=N"),
    ),
    "no module": (Host.without_kvm, Fact(NOTE, "module", "neither kvm_intel nor kvm_amd")),
}


@pytest.mark.parametrize("case", MACHINES)
def test_the_machine_is_recognized(host: Host, case: str) -> None:
    change, fact = MACHINES[case]
    change(host)
    assert host.doctor().fact(fact.what) == fact


# ---- /dev/kvm ----

LOAD = "sudo modprobe {}; where that is refused: " + doctor.FIRMWARE

# What is wrong with /dev/kvm on which machine, and what to type.
HINTS: dict[str, tuple[list[Change], str]] = {
    "not in the group": ([Host.outsider], "sudo usermod -aG kvm $USER, then log in again"),
    "not yet in the group": (
        [Host.outsider, lambda host: host.group("kvm", "bob,ann")],
        "log in again: you came into the group kvm after this login",
    ),
    "root's group": (
        [Host.outsider, lambda host: host.group("root")],
        "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm",
    ),
    "not for its group": (
        [Host.outsider, lambda host: (host.root / "dev/kvm").chmod(0o640)],
        "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm",
    ),
    "root's group, in a container": (
        [Host.outsider, lambda host: host.group("root"), lambda host: host.write(".dockerenv")],
        "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm",
    ),
    "a group of the container's host": (
        [Host.outsider, lambda host: host.write(".dockerenv"), lambda host: host.write("etc/group")],
        f"start the container with --group-add={os.getgid()}",
    ),
    "another hypervisor": (
        [lambda host: host.kvm_problem(BUSY)],
        "end the other hypervisor that uses the CPU (VirtualBox, VMware?)",
    ),
    "no VM": (
        [lambda host: host.kvm_problem(NO_MEMORY)],
        "the kernel's log may say why: sudo dmesg | grep -i kvm",
    ),
    "WSL 1": (
        [Host.without_kvm, lambda host: host.write("proc/sys/kernel/osrelease", "4.4.0-19041-Microsoft")],
        "in PowerShell: wsl --set-version NAME 2, with a NAME from wsl --list",
    ),
    "WSL 2 without nesting": (
        [
            lambda host: host.without_kvm(flags="fpu hypervisor"),
            lambda host: host.write("proc/sys/kernel/osrelease", "5.15.90.1-microsoft-standard-WSL2"),
        ],
        doctor.NESTED_ON_WSL,
    ),
    "off in the firmware": ([Host.without_kvm], doctor.FIRMWARE),
    "not given to the container": (
        [lambda host: host.without_kvm(flags="fpu vmx"), lambda host: host.write("run/.containerenv")],
        "start the container with --device=/dev/kvm",
    ),
    "forbidden to the container": (
        [lambda host: host.write(".dockerenv"), lambda host: host.kvm_problem(FORBIDDEN)],
        "start the container with --device=/dev/kvm",
    ),
    "Intel without the module": (
        [lambda host: host.without_kvm(flags="fpu vmx")],
        LOAD.format("kvm_intel"),
    ),
    "AMD without the module": (
        [lambda host: host.without_kvm("AuthenticAMD", "fpu svm")],
        LOAD.format("kvm_amd"),
    ),
    "no device": (
        [lambda host: (host.root / "dev/kvm").unlink(), lambda host: host.kvm_problem(ABSENT)],
        doctor.MAKE_DEVICE,
    ),
    "no KVM": ([lambda host: host.kvm_problem(NO_KVM)], doctor.MAKE_DEVICE),
}


@pytest.mark.parametrize("case", HINTS)
def test_an_unusable_kvm_is_told_what_to_type(host: Host, case: str) -> None:
    changes, mend = HINTS[case]
    for change in changes:
        change(host)
    report = host.doctor()
    assert (report.fact("/dev/kvm").mark, report.fact("/dev/kvm").mend) == (MEND, mend)
    assert report.fact("ENGINE=kvm").mark == NOTE
    assert report.fact("ENGINE=auto").text == f"svm (emulated AMD; {engine.kvm_problem()})"
    assert report.status == 0


# Who made the virtual machine, by its DMI tables, and what turns nested virtualization on there.
NESTED = {
    "QEMU": "-cpu host",
    "VMware, Inc.": "Virtualize Intel VT-x/EPT or AMD-V/RVI",
    "innotek GmbH": "VBoxManage modifyvm NAME --nested-hw-virt on",
    "Microsoft Corporation": "Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true",
    "Another, Inc.": "where this virtual machine is configured",
}


@pytest.mark.parametrize("vendor", NESTED)
def test_a_virtual_machine_is_told_how_it_gets_virtualization_of_its_own(host: Host, vendor: str) -> None:
    host.without_kvm(flags="fpu hypervisor")
    host.write("sys/class/dmi/id/sys_vendor", vendor)
    fact = host.doctor().fact("/dev/kvm")
    assert (fact.mark, fact.text) == (MEND, "No such file or directory")
    assert NESTED[vendor] in fact.mend


def test_permission_is_shown_with_owner_group_and_mode(host: Host) -> None:
    host.outsider()
    assert host.doctor().fact("/dev/kvm").text == "Permission denied (ann:kvm 660; you are not in the group kvm)"


def test_a_user_and_a_group_without_names_are_shown_by_their_numbers(host: Host) -> None:
    host.write("etc/passwd")
    host.write("etc/group")
    gid = os.getgid()
    assert host.doctor().fact("/dev/kvm").text == f"usable ({os.getuid()}:{gid} 660; you are in the group {gid})"


# ---- packages and caches ----


def test_missing_packages_are_named_with_the_command_that_installs_them(host: Host) -> None:
    host.missing(svm=NO_NASM)
    report = host.doctor()
    assert report.fact("packages", "svm") == Fact(MEND, "packages", "svm: missing packages: nasm", "tools/setup svm")
    assert report.fact("packages", "vmx") == Fact(OK, "packages", "vmx: all there")


def test_without_apt_get_the_container_is_named(host: Host) -> None:
    host.missing(svm="missing, by the names of Debian packages: nasm")
    host.patch.setattr(shutil, "which", lambda _: None)
    fact = host.doctor().fact("packages", "svm")
    assert fact.text == "svm: missing, by the names of Debian packages: nasm"
    assert fact.mend == "install them, or work in a container: Containerfile"


@pytest.mark.parametrize(("group", "name"), {"run": "kvm", "svm": "svm", "vmx": "vmx"}.items())
def test_an_engine_without_its_packages_will_not_work(host: Host, group: str, name: str) -> None:
    host.missing(**{group: NO_NASM})
    report = host.doctor()
    works = {other: report.fact(f"ENGINE={other}").mark == OK for other in engine.ENGINES}
    assert works == {other: other != name for other in engine.ENGINES}
    assert report.fact(f"ENGINE={name}").text == "packages are missing"


def test_a_full_disk_is_named_with_how_much_is_needed(host: Host) -> None:
    host.full()
    needed = f"7 MiB free, {cache.NEEDED >> 20} are needed"
    report = host.doctor()
    there = f"{host.caches}: nothing prepared; {needed}"
    assert report.fact("caches") == Fact(MEND, "caches", there, "export KVMLAB_CACHE=DIR, for a folder elsewhere")
    assert report.fact("ENGINE=svm") == Fact(NOTE, "ENGINE=svm", needed)


@pytest.mark.parametrize("place", ["/proc/caches", f"{__file__}/caches"])
def test_a_folder_for_caches_that_cannot_be_written_is_named(host: Host, place: str) -> None:
    host.patch.setenv("KVMLAB_CACHE", place)
    fact = host.doctor().fact("caches")
    assert fact.mark == MEND
    assert f"{place}: nothing prepared; no place for a cache: " in fact.text


def test_an_engine_with_a_cache_needs_no_space(host: Host) -> None:
    host.full()
    host.prepare("svm")
    report = host.doctor()
    assert f"{host.caches}: svm prepared; 7 MiB free" in report.fact("caches").text
    assert (report.fact("ENGINE=svm").mark, report.fact("ENGINE=vmx").mark) == (OK, NOTE)


# ---- the engines ----


def test_where_no_engine_will_work_the_status_is_1(host: Host) -> None:
    host.kvm_problem(NO_KVM)
    host.full()
    report = host.doctor()
    problem = f"7 MiB free, {cache.NEEDED >> 20} are needed"
    taken = f"svm (emulated AMD; {NO_KVM}), but {problem}"
    assert (report.status, report.fact("ENGINE=auto")) == (1, Fact(MEND, "ENGINE=auto", taken))


def test_where_auto_takes_what_will_not_work_another_engine_is_named(host: Host) -> None:
    host.kvm_problem(NO_KVM)
    host.missing(svm=NO_NASM)
    report = host.doctor()
    taken = f"svm (emulated AMD; {NO_KVM}), but packages are missing"
    assert (report.status, report.fact("ENGINE=auto")) == (0, Fact(MEND, "ENGINE=auto", taken, "say ENGINE=vmx"))


def test_on_another_architecture_no_engine_will_work(host: Host) -> None:
    host.patch.setattr(platform, "machine", lambda: "aarch64")
    report = host.doctor()
    assert [report.fact(f"ENGINE={name}").mark for name in engine.ENGINES] == [NOTE] * 3
    assert report.status == 1


def test_on_this_machine_the_verdict_is_that_of_the_engines(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": "tools", "PYTHONDONTWRITEBYTECODE": "1", "KVMLAB_CACHE": str(tmp_path)}
    call = [sys.executable, "-m", "kvmlab.doctor"]
    done = subprocess.run(call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    report = Report(done.returncode, done.stdout)
    problem = engine.kvm_problem()
    assert report.fact("/dev/kvm").mark == (MEND if problem else OK)
    assert report.fact("ENGINE=kvm").mark == (NOTE if problem else OK)
    _, line = engine.choose(doctor.ANY_LESSON, "auto", "", trace=False)
    assert f"engine: {report.fact('ENGINE=auto').text}".startswith(line)
    # In a new folder the emulated machines' kernel is missing: tools/setup has still to fetch it.
    for name in cache.RECIPES:
        assert report.fact("packages", name).mend, report.text
        assert report.fact(f"ENGINE={name}") == Fact(NOTE, f"ENGINE={name}", "packages are missing")
    assert report.status == (1 if problem else 0)
