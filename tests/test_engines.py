"""The engines: the same run on each of them, which of them is taken and why, and what a user reads when
an emulated one goes wrong."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from variants import ENVIRONMENT, NAMES, Variant, command, is_done

from kvmlab import cache, engine, lesson, machine, runner, trace
from kvmlab.engine import CannotRun, Engine, Svm, Vmx
from kvmlab.lesson import UsageError
from kvmlab.machine import MachineError
from kvmlab.plugin import ROOT
from kvmlab.runner import Built

pytest_plugins = ["variants"]

StartVariant = Callable[[str], Variant]
Engines = dict[str, Engine]


def of_session(engines: Engines, name: str) -> None:
    if name not in engines:
        pytest.skip(f"this session is without {name}: --engines=kvm,svm,vmx")


@pytest.fixture
def _svm(engines: Engines) -> None:
    of_session(engines, "svm")


@pytest.fixture
def _vmx(engines: Engines) -> None:
    of_session(engines, "vmx")


# ---- the same on every engine ----


def told(run: runner.Run) -> list[dict[str, object]]:
    """The events, without times, without KVM's counters, and without the rip of a write, which may be that of
    the next instruction."""
    events = []
    for event in run.events:
        if event.kind == "statistics":
            continue
        varying = {"ns", "guest_ns", "vmm_ns"} | ({"rip", "symbol"} if event.get("is_write") else set())
        events.append({name: value for name, value in event.fields.items() if name not in varying})
    return events


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_leaves_the_same_events_on_every_engine(engines: Engines, build: Path, name: str) -> None:
    """But where a host half injects: when the guest takes an event is the engine's choice, in part. And but for a
    device that svm alone has."""
    built = runner.lesson_built(build, name)
    vfio = lesson.load(ROOT / "lessons" / name).vfio
    runs = [runner.run(built, seed=5, vfio=vfio, engine=this) for this in engines.values()]
    able = [run for run in runs if not run.lacking]
    for run in able:
        assert is_done(run, name), run.errors
        assert run.output == able[0].output
        if not run.one("entry") and not (vfio and run.engine == "svm"):
            assert told(run) == told(able[0])


@pytest.mark.parametrize("case", ["empty_idt", "enter_empty_space"])
def test_every_engine_knows_what_a_triple_fault_began_with(engines: Engines, build: Path, case: str) -> None:
    crash = Built(build / "vmm" / "vmm", build / "tests" / "crash.elf")
    faults = []
    for this in engines.values():
        run = runner.run(crash, [f"--append=case={case}"], engine=this)
        (fault,) = run.all("triple_fault")
        faults.append([fault.get(name) for name in ("rip", "symbol", "vector", "error_code", "cr2")])
    assert None not in faults[0]
    assert all(fault == faults[0] for fault in faults)


@pytest.mark.usefixtures("_vmx")
def test_an_entry_that_intel_refuses_is_explained_in_one_line(engines: Engines, build: Path) -> None:
    """On AMD the same interrupt is delivered, although interrupts are off."""
    halves = Built(support.make_half(build, "interrupts/vmm"), support.make_half(build, "interrupts/image.elf"))
    command = f"--append=command={support.half_command('interrupts', 'NOT_READY')}"
    run = runner.run(halves, [command], engine=engines["vmx"])
    assert (run.status, run.end.how) == (5, "host failure")
    support.one_line(run.errors, "the CPU refused the VM entry with an interrupt injected while RFLAGS.IF was 0: ")
    if "svm" in engines:
        assert runner.run(halves, [command], engine=engines["svm"]).all("exit", device="report")


# ---- which engine, and why ----


@pytest.fixture
def paging() -> lesson.Lesson:
    return lesson.find(ROOT / "lessons", "2")


def test_kvm_is_taken_where_it_works(paging: lesson.Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "kvm_problem", lambda: "")
    chosen, line = engine.choose(paging, "auto", "", trace=False)
    assert (chosen.name, line) == ("kvm", "engine: kvm (this machine's /dev/kvm)")


def test_else_svm_is_taken_and_the_line_says_why(paging: lesson.Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "kvm_problem", lambda: "/dev/kvm: Permission denied")
    chosen, line = engine.choose(paging, "auto", "", trace=False)
    assert (chosen.name, line) == ("svm", "engine: svm (emulated AMD; /dev/kvm: Permission denied)")


@pytest.mark.parametrize(("wanted", "taken"), {"auto": "vmx", "vmx": "vmx", "kvm": "", "svm": ""}.items())
def test_an_engine_that_cannot_run_the_lesson_is_not_taken(
    variant: StartVariant, monkeypatch: pytest.MonkeyPatch, wanted: str, taken: str
) -> None:
    monkeypatch.setattr(engine, "kvm_problem", lambda: "")
    ours = variant("01-vm-exit")
    with (ours.folder / "lesson.toml").open("a") as toml:
        toml.write('[not_on]\nkvm = "it has no magic"\nsvm = "it has no pixie dust"\n')
    this = lesson.load(ours.folder)
    if taken:
        assert engine.choose(this, wanted, "", trace=False)[0].name == taken
        return
    with pytest.raises(CannotRun, match=f"lesson 1 cannot run on ENGINE={wanted}: it has no "):
        engine.choose(this, wanted, "", trace=False)
    shown = ours.run(engine=wanted)
    assert shown.status == 77, str(shown)
    assert shown.errors == f"kvmlab: lesson 1 cannot run on ENGINE={wanted}: {this.not_on[wanted]}\n"


# The emulated machines have no file of this name.
LACKING = """
static void lab_setup(void) {
    if (access("/etc/passwd", F_OK) == 0)
        host_cannot("it has no magic");"""


@pytest.mark.parametrize("command_name", ["run", "check"])
@pytest.mark.usefixtures("_svm")
def test_auto_goes_on_to_an_engine_that_turns_out_to_be_able(variant: StartVariant, command_name: str) -> None:
    ours = variant("01-vm-exit")
    host = ours.folder / "host.c"
    source = host.read_text().replace("\nstatic void lab_setup(void) {", LACKING)
    host.write_text("#include <unistd.h>\n" + source)
    ours.make_all()
    shown = ours.kvmlab(command_name, "1", "--seed=1")
    assert (shown.status, shown.points) == (0, 12), str(shown)
    assert "engine: svm (emulated AMD; kvm: it has no magic)\n" in shown.output
    shown = ours.kvmlab(command_name, "1", "--seed=1", "--engine=kvm")
    assert shown.status == 77, str(shown)
    assert shown.errors.splitlines()[-1] == "kvmlab: lesson 1 cannot run on ENGINE=kvm: it has no magic"
    assert "points" not in shown.output


@pytest.mark.parametrize("command_name", ["run", "check"])
@pytest.mark.usefixtures("_vmx")
def test_no_second_machine_is_started_for_the_checks(variant: StartVariant, tmp_path: Path, command_name: str) -> None:
    """There is one already, which the tests share. Any other would be a bochs that PATH leads to."""
    ours = variant("01-vm-exit")
    bochs = tmp_path / "bin" / "bochs"
    bochs.parent.mkdir()
    bochs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    bochs.chmod(0o755)
    call = ours.call(command_name, "1", "--seed=1", "--engine=vmx")
    shown = command(*call, PYTHONPATH="tools", PATH=f"{bochs.parent}:{ENVIRONMENT['PATH']}")
    assert (shown.status, shown.points) == (0, 12), str(shown)
    assert not (tmp_path / "started").exists()


def test_what_needs_a_kernel_of_its_own_is_not_done_to_this_machines(paging: lesson.Lesson) -> None:
    with pytest.raises(CannotRun, match="KTRACE needs a kernel of its own: svm or vmx"):
        engine.choose(paging, "kvm", "", trace=True)
    chosen, line = engine.choose(paging, "auto", "npt=0", trace=False)
    assert chosen.name == "svm"
    assert "KVM_PARAMS needs a kernel of its own" in line


def test_an_engine_that_does_not_exist_is_named(variant: StartVariant) -> None:
    shown = variant("01-vm-exit").run(engine="xen")
    assert (shown.status, shown.errors) == (2, "kvmlab: ENGINE=xen: there are auto, kvm, svm, vmx\n")


def test_a_missing_device_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "DEVICE", tmp_path / "kvm")
    assert engine.kvm_problem() == f"{tmp_path}/kvm: No such file or directory"


def test_a_file_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(engine, "DEVICE", tmp_path / "kvm")
    assert engine.kvm_problem() == f"{tmp_path}/kvm is not KVM"


def test_a_device_that_we_may_not_open_is_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert engine.kvm_problem() == "/dev/kvm: Permission denied"


@pytest.mark.usefixtures("_svm")
def test_a_lesson_runs_where_dev_kvm_is_a_file(variant: StartVariant, tmp_path: Path) -> None:
    ours = variant("02-paging")
    (tmp_path / "file").touch()
    hide = f'mount --bind {tmp_path}/file /dev/kvm && exec "$@"'
    if command("unshare", "--mount", "sh", "-c", hide, "sh", "true").status:
        pytest.skip("only root may put a file in the place of /dev/kvm")
    make = ["make", f"LESSONS={ours.lessons}", f"BUILD={ours.build}", "run", "LESSON=2"]
    shown = command("unshare", "--mount", "sh", "-c", hide, "sh", *make)
    assert (shown.status, shown.points) == (0, 20), str(shown)
    assert "engine: svm (emulated AMD; /dev/kvm is not KVM)\n" in shown.output


# ---- KVM's parameters and tracepoints ----

PAGING_EXITS = {"svm": ("npf", "npt=0"), "vmx": ("EPT_VIOLATION", "ept=0 vpid=0")}


@pytest.mark.parametrize("name", PAGING_EXITS)
def test_second_level_faults_are_traced_and_gone_with_shadow_paging(engines: Engines, build: Path, name: str) -> None:
    of_session(engines, name)
    reason, params = PAGING_EXITS[name]
    built = runner.lesson_built(build, "02-paging")
    counts = []
    for this in (engine.ENGINES[name]("", True), engine.ENGINES[name](params, True)):
        run = runner.run(built, seed=5, engine=this)
        assert run.status == 0, run.errors
        exits = run.all("trace", point="kvm_exit")
        assert len(exits) > 500
        counts.append(len([event for event in exits if event.reason == reason]))
        assert [event.seq for event in run.events] == list(range(len(run.events)))
    assert counts[0] > 50
    assert counts[1] == 0


@pytest.mark.usefixtures("_svm")
def test_a_run_with_ktrace_shows_what_kvm_did(variant: StartVariant) -> None:
    ours = variant("02-paging")
    shown = ours.make("run", "LESSON=2", "ENGINE=svm", "KTRACE=1", "KVM_PARAMS=npt=1")
    assert (shown.status, shown.points) == (0, 20), str(shown)
    assert re.search(r"^what KVM did, by its tracepoints:$", shown.output, re.MULTILINE)
    assert re.search(r"^  kvm_exit +\d+ io, \d+ npf", shown.output, re.MULTILINE), str(shown)


@pytest.mark.usefixtures("_svm")
def test_a_lesson_may_have_every_run_traced(variant: StartVariant) -> None:
    ours = variant("02-paging")
    toml = ours.folder / "lesson.toml"
    toml.write_text("trace = true\n" + toml.read_text())
    shown = ours.make("run", "LESSON=2", "ENGINE=svm")
    assert (shown.status, shown.points) == (0, 20), str(shown)
    assert "what KVM did" not in shown.output, "the student has not asked for it"
    assert '"kind": "trace"' in (ours.build / "lessons" / "02-paging" / "events.jsonl").read_text()


def test_a_trace_stands_before_the_exit_that_it_led_to() -> None:
    kinds = ["start", "exit", "exit", "device", "exit", "end"]
    events = [{"seq": i, "ns": 1000 * i, "kind": kind, "version": 1} for i, kind in enumerate(kinds)]
    record = "".join(json.dumps(event) + "\n" for event in events)
    line = "   vmm-78      [000] d..1.  2.{:06}: {}\n"
    said = ["kvm_entry: vcpu 0", "kvm_userspace_exit: reason restart (4)", "kvm_userspace_exit: reason KVM_EXIT_IO (2)"]
    said += ["kvm_exit: vcpu 0 reason npf rip 0x1", "kvm_userspace_exit: reason KVM_EXIT_MMIO (6)", "kvm_entry: last"]
    text = "# tracer: nop\n" + "".join(line.format(i, what) for i, what in enumerate(said))
    merged = [json.loads(event) for event in trace.merge(record.encode(), text).splitlines()]
    shown = [event.get("point", event["kind"]) for event in merged]
    assert shown[:6] == ["start", "kvm_entry", "kvm_userspace_exit", "exit", "kvm_userspace_exit", "exit"]
    assert shown[6:] == ["device", "kvm_exit", "kvm_userspace_exit", "exit", "kvm_entry", "end"]
    assert [event["seq"] for event in merged] == list(range(12))
    assert (merged[7]["reason"], merged[7]["ns"]) == ("npf", 3000)


@pytest.mark.usefixtures("_svm")
def test_a_parameter_that_kvm_has_not_is_named(build: Path) -> None:
    with pytest.raises(UsageError, match=r"KVM_PARAMS=ept=0: the KVM of svm has no ept=; it has .*\bnpt\b"):
        runner.run(runner.lesson_built(build, "02-paging"), engine=Svm("ept=0"))


@pytest.mark.usefixtures("_svm")
@pytest.mark.parametrize("name", ["run", "check"])
def test_a_parameter_that_kvm_has_not_gets_one_line_and_status_2(variant: StartVariant, name: str) -> None:
    shown = variant("02-paging").kvmlab(name, "2", "--engine=svm", "--kvm-params=ept=0")
    assert shown.status == 2
    assert re.fullmatch(r"kvmlab: KVM_PARAMS=ept=0: .*\n", shown.errors), str(shown)


@pytest.mark.usefixtures("_vmx")
def test_a_value_that_kvm_refuses_leaves_the_machine_usable(engines: Engines, build: Path) -> None:
    built = runner.lesson_built(build, "02-paging")
    for _ in range(2):
        with pytest.raises(MachineError, match=r"KVM cannot be loaded with the parameters .*ept=perhaps"):
            runner.run(built, engine=Vmx("ept=perhaps"))
    assert runner.run(built, engine=engines["vmx"]).status == 0


# ---- when it goes wrong ----


@pytest.mark.usefixtures("_vmx")
def test_a_guest_that_nothing_stops_hangs_on_vmx_too(variant: StartVariant, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of its own, for it is of no use afterwards."""
    monkeypatch.delenv(engine.SHARED_VMX)
    monkeypatch.setattr(machine, "PATIENCE", 5)
    wrong = variant("01-vm-exit")
    wrong.patch("spin-instead-of-halt")
    wrong.make_all()
    with contextlib.closing(Vmx()) as vmx:
        run = runner.run(runner.lesson_built(wrong.build, wrong.name), time_limit=1, engine=vmx)
    assert run.status == 4
    assert run.errors.startswith("vmm: the guest hangs: with interrupts off")
    assert run.errors.count("\n") == 1


class Watched(subprocess.Popen[str]):
    """A run on svm of a guest that never ends, once it has printed its first line."""

    def __init__(self, ours: Variant) -> None:
        call = ours.call("run", ours.name, "--engine=svm")
        environment = ENVIRONMENT | {"PYTHONPATH": "tools"}
        pipe = subprocess.PIPE
        super().__init__(call, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.stdout
        while "from gva to gpa\n" not in (line := self.stdout.readline()):
            assert line, self.communicate()
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        self.emulator = int(children[0])
        self.emulator_end = os.pidfd_open(self.emulator)

    def emulator_is_gone(self) -> bool:
        return bool(select.select([self.emulator_end], [], [], 20)[0])


@pytest.fixture
def endless(variant: StartVariant) -> Variant:
    ours = variant("02-paging")
    guest = ours.folder / "guest.c"
    text = guest.read_text()
    title = 'printf("lesson 2: from gva to gpa\\n");'
    assert title in text
    guest.write_text(text.replace(title, f"{title}\n    for (;;)\n        cpuid(0, 0);"))
    ours.make_all()
    return ours


@pytest.mark.usefixtures("_svm")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_no_emulator_outlives_the_run(endless: Variant, number: signal.Signals, status: int) -> None:
    with Watched(endless) as run:
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
        assert run.emulator_is_gone()
    assert (run.returncode, errors) == (status, "kvmlab: interrupted\n" if number == signal.SIGINT else "")


@pytest.mark.usefixtures("_svm")
def test_a_killed_emulator_gets_one_line_and_status_5(endless: Variant) -> None:
    with Watched(endless) as run:
        os.kill(run.emulator, signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (5, "kvmlab: the emulator died\n")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache, as far as svm needs it, for this test to damage."""
    place = cache.ready("svm")
    home = tmp_path / "cache"
    shutil.copytree(cache.folder() / "packages", home / "packages")
    try:
        shutil.copytree(place, home / place.name, copy_function=os.link)
    except shutil.Error:  # on another file system
        shutil.copytree(place, home / place.name, dirs_exist_ok=True)
    monkeypatch.setenv("KVMLAB_CACHE", str(home))
    return home / place.name


def damage(state: Path, content: bytes, size: int) -> None:
    state.unlink()  # the file has another name, in the true cache
    state.write_bytes(content)
    os.truncate(state, size)


@pytest.mark.usefixtures("_svm")
@pytest.mark.parametrize("size", ["truncated", "of the same size"])
def test_a_damaged_cache_is_made_again(
    own_cache: Path, build: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = own_cache / "state"
    damage(state, b"not QEMU's", 1000 if size == "truncated" else state.stat().st_size)
    assert runner.run(runner.lesson_built(build, "02-paging"), engine=Svm()).status == 0
    said = capsys.readouterr().err
    truncated = "engine svm: preparing what it starts from: state has 1000 bytes, not "
    assert (truncated if size == "truncated" else "engine svm: state is not as it was made\n") in said


@pytest.mark.usefixtures("_svm")
@pytest.mark.parametrize("name", ["svm", "vmx"])
def test_two_working_trees_may_share_a_cache(engines: Engines, tmp_path: Path, name: str) -> None:
    of_session(engines, name)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    ask = [sys.executable, "-c", f"from kvmlab import cache; print(cache.ready('{name}'))"]
    environment = {"PYTHONPATH": str(tmp_path / "tools"), "KVMLAB_CACHE": str(cache.folder())}
    shown = command(*ask, folder=tmp_path, **environment)
    assert (shown.output, shown.errors) == (f"{cache.ready(name)}\n", "")


def test_two_runs_that_need_a_cache_make_it_once(own_cache: Path, variant: StartVariant) -> None:
    shutil.rmtree(own_cache)
    ours = variant("02-paging")
    call = ours.call("run", ours.name, "--engine=svm")
    environment = ENVIRONMENT | {"PYTHONPATH": "tools", "KVMLAB_CACHE": str(own_cache.parent)}
    pipe = subprocess.PIPE
    both = [subprocess.Popen(call, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    said = "".join(run.communicate(timeout=120)[1] for run in both)
    assert [run.returncode for run in both] == [0, 0], said
    assert said.count("starting the emulated machine once") == 1, said
    assert "another run is preparing it; waiting for that" in said


@pytest.mark.usefixtures("_svm")
def test_a_full_disk_is_named_in_one_line(own_cache: Path, variant: StartVariant, tmp_path: Path) -> None:
    ours = variant("02-paging")
    mount = 'mount -t tmpfs -o size=$SIZE none "$PLACE" && cp -rn "$PACKAGES" "$PLACE"; exec "$@"'
    if command("unshare", "--mount", "true").status:
        pytest.skip("only root may mount a small file system")
    call = ["unshare", "--mount", "sh", "-c", mount, "sh", *ours.call("run", ours.name, "--engine=svm")]
    full = tmp_path / "full"
    full.mkdir()
    packages = own_cache.parent / "packages"
    environment = {"PLACE": str(full), "KVMLAB_CACHE": str(full), "SIZE": "40m", "PACKAGES": str(packages)}
    shown = command(*call, folder=ROOT, PYTHONPATH="tools", **environment)
    assert (shown.status, shown.errors.count("\n")) == (5, 2), str(shown)
    assert re.search(rf"^kvmlab: {full} has \d+ MiB of free space; 600 are needed$", shown.errors, re.MULTILINE)
    environment |= {"TMPDIR": str(full), "KVMLAB_CACHE": str(own_cache.parent), "SIZE": "64k", "PACKAGES": "/dev/null"}
    shown = command(*call, folder=ROOT, PYTHONPATH="tools", **environment)
    assert shown.status == 5, str(shown)
    assert shown.errors.splitlines()[-1].startswith("kvmlab: [Errno 28] No space left on device"), str(shown)
