"""`make run` and `check`, as a user types them."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import one_line
from variants import ENVIRONMENT, NAMES, Shown, Variant, command

from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]

README = (ROOT / "README.md").read_text()
StartVariant = Callable[[str], Variant]


def said(shown: Shown) -> list[str]:
    """What was said about an error, but for make's own last word."""
    return [line for line in shown.errors.splitlines() if not re.match(r"make(\[\d+\])?: \*\*\* ", line)]


# ---- make run ----


def test_make_run_shows_title_console_exits_and_verdict_in_this_order(variant: StartVariant) -> None:
    ours = variant("01-vm-exit")
    call = ["make", f"LESSONS={ours.lessons}", f"BUILD={ours.build}", "run", "LESSON=1", "SEED=5"]
    done = subprocess.run(
        call, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    lines = [
        r"lesson 1: What a VM exit is \(SEED=5\)",
        r"lesson 1: what a VM exit is",
        r"halt: nothing left to do",
        r"exits: \d+, [\d.]+ ms in the guest, [\d.]+ ms in the VMM",
        r" +\d+ IO",
        r"slowest: exit \d+ .*",
        r"  pass  1/1  nonce is read once and before the answer",
        r"  pass  1/1  halt is the last exit",
        r"lesson 1: 12 of 12 points",
    ]
    seen = done.stdout.splitlines()
    places = [next((i for i, line in enumerate(seen) if re.fullmatch(wanted, line)), None) for wanted in lines]
    assert None not in places, f"some of these lines are missing, at {places}:\n{done.stdout}"
    assert places == sorted(places, key=lambda place: place or 0), done.stdout
    assert (places[0], places[-1]) == (0, len(seen) - 1), done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_found_by_number_and_by_name(variant: StartVariant, name: str) -> None:
    ours = variant(name)
    number = name.split("-")[0]
    for called in (number, number.lstrip("0"), name):
        shown = ours.make("run", f"LESSON={called}")
        assert (shown.status, shown.failed) == (0, []), str(shown)


def test_each_run_has_another_seed_unless_one_is_given(variant: StartVariant) -> None:
    ours = variant("01-vm-exit")
    first, second = (ours.make("run", "LESSON=1").output.splitlines()[0] for _ in range(2))
    assert first != second
    given = ours.make("run", "LESSON=1", "SEED=0x10")
    assert given.output.startswith("lesson 1: What a VM exit is (SEED=16)\n")


@pytest.mark.parametrize("name", ["run", "check", "debug", "hint", "watch", "reset"])
def test_without_a_lesson_one_line_says_what_to_type(name: str) -> None:
    shown = command("make", name)
    assert shown.status != 0
    (line,) = said(shown)
    assert line == f"kvmlab: which lesson? say LESSON=n, as in: make {name} LESSON=1"


@pytest.mark.parametrize("name", ["run", "check", "hint", "watch", "reset"])
@pytest.mark.parametrize("called", ["99", "0", "paging"])
def test_a_lesson_that_does_not_exist_is_named_in_one_line(name: str, called: str) -> None:
    shown = command("make", name, f"LESSON={called}")
    assert shown.status != 0
    (line,) = said(shown)
    assert line == f"kvmlab: there is no lesson {called}: make list shows those there are"


@pytest.mark.parametrize("seed", ["bad", "-1", "1.5", "0x10000000000000000"])
def test_a_seed_that_is_none_is_named_in_one_line(variant: StartVariant, seed: str) -> None:
    shown = variant("01-vm-exit").make("run", "LESSON=1", f"SEED={seed}")
    assert shown.status != 0
    assert said(shown) == [f"kvmlab: SEED={seed}: expected a number from 0 to {(1 << 64) - 1}"]


def test_make_debug_stops_at_guest_main_and_ends_with_gdb(variant: StartVariant) -> None:
    shown = variant("01-vm-exit").make("debug", "LESSON=1", "SEED=5")
    assert re.search(r"^Temporary breakpoint 1, guest_main \(\)\s+at .*guest\.c:\d+$", shown.output, re.M), str(shown)
    assert (shown.status, said(shown)) == (0, ["vmm: ended: killed by gdb"]), str(shown)


@pytest.mark.parametrize("engine", ["svm", "vmx"])
def test_make_debug_says_in_one_line_that_it_is_for_kvm(variant: StartVariant, engine: str) -> None:
    shown = variant("01-vm-exit").make("debug", "LESSON=1", f"ENGINE={engine}")
    assert said(shown) == [
        f"kvmlab: make debug is for ENGINE=kvm: no line leads into the emulated machine of {engine}"
    ], str(shown)


def test_a_session_of_make_debug_reads_as_in_the_readme() -> None:
    """Each line in its place; where the text has dots, anything may stand."""
    (quoted,) = re.findall(r"^    make debug LESSON=7 SEED=7\n(.*?)^$", README, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in quoted.splitlines()]
    typed = [line.removeprefix("(gdb) ") for line in lines if line.startswith("(gdb) ")]
    done = subprocess.run(
        ["make", "debug", "LESSON=7", "SEED=7"],
        cwd=ROOT,
        env=ENVIRONMENT | {"COLUMNS": "120"},
        input="".join(f"{command}\n" for command in typed),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    shown = done.stdout
    for line in lines:
        pattern = ".*".join(re.escape(part) for part in line.removeprefix("(gdb) ").split("..."))
        if not line.startswith("(gdb) "):
            found = re.search(pattern, shown)
            assert found, f"README.md shows: {line}\nmake debug shows:\n{done.stdout}{done.stderr}"
            shown = shown[found.end() :]
    assert done.returncode == 0, done


def test_a_host_half_is_debugged_as_the_readme_says() -> None:
    (quoted,) = re.findall(r"^    gdb --args (.*)$", README, re.MULTILINE)
    commands = ["-ex", "break interrupt_decide", "-ex", "run", "-ex", "kill"]
    shown = command("gdb", "-nx", "-batch", *commands, "--args", *quoted.split())
    assert re.search(r"^Breakpoint 1, interrupt_decide \(.* at lessons/07.*/host\.c:\d+$", shown.output, re.M), shown


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def shown_until(master: int, pattern: bytes) -> str:
    seen = b""
    while not re.search(pattern, seen, re.DOTALL):
        assert select.select([master], [], [], 60)[0], seen.decode()
        seen += os.read(master, 4096)
    return seen.decode()


def interrupt(master: int, command: bytes) -> None:
    """Have gdb do this, and stop it by Ctrl-C. One that comes before gdb has read the command takes it away."""
    for _ in range(20):
        os.write(master, command)
        shown_until(master, command.strip())
        os.write(master, b"\3")
        if "received signal SIGINT" in shown_until(master, rb"(received signal SIGINT|Quit).*\(gdb\) "):
            return
    raise AssertionError(f"{command!r} was never interrupted")


@contextlib.contextmanager
def session_of(make: subprocess.Popen[bytes]) -> Iterator[None]:
    """If the test fails, all that make has started ends, too."""
    try:
        yield
    except BaseException:
        subprocess.run(["pkill", "--signal", "KILL", "--session", str(make.pid)], check=False)
        raise


def test_ctrl_c_in_make_debug_is_for_gdb_and_not_for_make(variant: StartVariant, terminal: tuple[int, int]) -> None:
    """Neither while the guest runs nor at gdb's prompt; and all is as before when gdb is left."""
    master, slave = terminal
    home = variant("01-vm-exit")
    before = termios.tcgetattr(slave)
    jump_to_itself = b"set *(short *)$pc = 0xfeeb\n"
    command = ["setsid", "--ctty", "make", f"LESSONS={home.lessons}", f"BUILD={home.build}", "debug", "LESSON=1"]
    environment = ENVIRONMENT | {"TERM": "dumb"}
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave) as make,
        session_of(make),
    ):
        shown_until(master, rb"\(gdb\) ")
        os.write(master, jump_to_itself)
        shown_until(master, rb"\(gdb\) ")
        interrupt(master, b"continue\n")
        interrupt(master, b"next\n")
        os.write(master, b"\3")
        shown_until(master, b"Quit")
        os.write(master, b"quit\n")
        shown_until(master, b"vmm: ended: killed by gdb")
        assert make.wait(20) == 0
    assert termios.tcgetattr(slave) == before


def test_the_greatest_seed_works(variant: StartVariant) -> None:
    shown = variant("01-vm-exit").make("run", "LESSON=1", f"SEED={(1 << 64) - 1}")
    assert (shown.status, shown.points) == (0, 12), str(shown)


@pytest.mark.parametrize("file", ["events.jsonl", "my events.jsonl"])
def test_the_events_go_to_the_file_that_is_named(variant: StartVariant, tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    shown = variant("01-vm-exit").make("run", "LESSON=1", "SEED=7", f"EVENTS={path}")
    assert shown.status == 0, str(shown)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert kinds.count("exit") > 100


def test_events_that_cannot_be_written_are_explained_in_one_line(variant: StartVariant, tmp_path: Path) -> None:
    shown = variant("01-vm-exit").kvmlab("run", "1", f"--events={tmp_path / 'no' / 'such' / 'folder'}")
    assert shown.status == 5
    assert said(shown) == [f"kvmlab: cannot write the events to {tmp_path}/no/such/folder: No such file or directory"]


def test_the_exit_status_of_a_solution_is_0(variant: StartVariant) -> None:
    ours = variant("01-vm-exit")
    assert ours.make("run", "LESSON=1").status == 0
    assert ours.run().status == 0


WRONG = {"nonce-echoed": 1, "nonce-beyond-the-device": 3, "halt-with-interrupts-on": 4, "null-device": 5}


@pytest.mark.parametrize(("mutant", "status"), WRONG.items(), ids=WRONG)
def test_the_exit_status_tells_what_went_wrong(variant: StartVariant, mutant: str, status: int) -> None:
    wrong = variant("01-vm-exit")
    wrong.patch(mutant)
    shown = wrong.make("run", "LESSON=1")
    assert shown.status == 2, "make's own status for any failure"
    assert re.search(rf"\[.*\] Error {status}$", shown.errors.rstrip()), str(shown)
    assert wrong.run().status == status


@pytest.mark.parametrize(("ends", "status"), {"exit": 0, "panic": 1, "": 1}.items())
def test_a_lesson_may_end_by_what_the_vmm_calls_a_failure(variant: StartVariant, ends: str, status: int) -> None:
    ours = variant("02-paging")
    guest, toml = ours.folder / "guest.c", ours.folder / "lesson.toml"
    source = guest.read_text()
    guest.write_text(source[: source.rindex("}")] + "    guest_exit(1);\n}\n")
    toml.write_text(f'ends = "{ends}"\n' + toml.read_text())
    ours.make_all()
    shown = ours.run()
    assert (shown.status, shown.failed) == (status, []), str(shown)


def test_an_end_that_is_foreseen_does_not_outweigh_a_failed_check(variant: StartVariant) -> None:
    wrong = variant("01-vm-exit")
    wrong.patch("nonce-echoed")
    toml = wrong.folder / "lesson.toml"
    toml.write_text('ends = "halt"\n' + toml.read_text())
    wrong.make_all()
    assert wrong.run().status == 1


RERUN = """
def test_again(run, rerun):
    other = rerun("--memory=32")
    assert other is rerun("--memory=32")
    assert other is not rerun()
    assert (other.seed, other.engine, other.one("start").memory_mib) == (run.seed, run.engine, 32)
"""


def test_a_check_may_run_the_lesson_again_on_another_machine(variant: StartVariant) -> None:
    ours = variant("01-vm-exit")
    (ours.folder / "test_lesson.py").write_text(RERUN)
    toml = ours.folder / "lesson.toml"
    toml.write_text(re.sub(r"\[points\]\n(.+\n)+", "[points]\nagain = 1\n", toml.read_text()))
    for command_name in ("run", "check"):
        shown = ours.make(command_name, "LESSON=1")
        assert (shown.status, shown.points) == (0, 1), str(shown)


# ---- once it is built ----


def test_a_second_run_builds_nothing(variant: StartVariant, tmp_path: Path) -> None:
    ours = variant("02-paging")
    for tool in ("gcc", "cc", "as", "ld", "nasm"):
        path = tmp_path / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {tool} was called >&2\nexit 1\n")
        path.chmod(0o755)
    without_tools = f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}"
    assert ours.make("run", "LESSON=2").status == 0
    shown = ours.make("run", "LESSON=2", path=without_tools)
    assert (shown.status, shown.failed) == (0, []), str(shown)
    (ours.folder / "guest.c").touch()
    assert "gcc was called" in ours.make("run", "LESSON=2", path=without_tools).errors


def test_a_second_run_takes_no_time_to_speak_of(variant: StartVariant) -> None:
    """Under a second on a machine that does nothing else, which a test machine is not."""
    ours = variant("02-paging")
    started = time.monotonic()
    assert ours.make("run", "LESSON=2").status == 0
    seconds = time.monotonic() - started
    print(f"make run LESSON=2: {seconds:.2f} s")
    assert seconds < 5


# ---- make check ----


def test_make_check_judges_several_seeds(variant: StartVariant) -> None:
    shown = variant("01-vm-exit").make("check", "LESSON=1")
    assert (shown.status, shown.failed, shown.points) == (0, [], 12), str(shown)
    seeds = re.search(r"\(seeds (\d+), (\d+), (\d+)\)", shown.output)
    assert seeds, str(shown)
    assert len(set(seeds.groups())) == 3


def test_make_check_names_the_run_to_look_at(variant: StartVariant) -> None:
    wrong = variant("02-paging")
    wrong.patch("lazy-end-off-by-one")
    shown = wrong.make("check", "LESSON=2", "SEED=7")
    assert shown.failed == ["faults_outside_the_lazy_region_are_not_swallowed"], str(shown)
    assert shown.output.splitlines()[-1] == "to see that run: make run LESSON=2 SEED=7"


def test_make_check_says_why_a_run_ended_early(variant: StartVariant) -> None:
    wrong = variant("02-paging")
    wrong.patch("tables-always-new")
    shown = wrong.make("check", "LESSON=2", "SEED=7")
    assert shown.points == 0
    assert "             vmm: the guest crashed: unhandled exception #PF (page fault)" in shown.output, str(shown)


@pytest.mark.parametrize("command_name", ["run", "check"])
def test_a_host_that_refuses_is_no_failed_check(variant: StartVariant, command_name: str) -> None:
    """Nothing ran, so nothing is graded: the VMM's own line and its status, and no points."""
    refused = variant("01-vm-exit")
    vmm = refused.build / "lessons" / "01-vm-exit" / "vmm"
    vmm.write_text("#!/bin/sh\necho 'vmm: cannot open /dev/kvm: Permission denied' >&2\nexit 5\n")
    shown = refused.kvmlab(command_name, "1", "--seed=7")
    assert shown.status == 5, str(shown)
    assert shown.errors.splitlines() == ["vmm: cannot open /dev/kvm: Permission denied"]
    assert "points" not in shown.output


def test_a_check_without_points_is_an_error(variant: StartVariant) -> None:
    """Else it would be judged and never shown; points for a check that is not there would be given away."""
    wrong = variant("01-vm-exit")
    toml = wrong.folder / "lesson.toml"
    toml.write_text(toml.read_text().replace("halt_is_the_last_exit = 1", "no_such_check = 1"))
    shown = wrong.kvmlab("check", "1", "--seed=7")
    assert shown.status == 2
    one_line(shown.errors, "kvmlab: lesson.toml and ", "do not name the same checks: halt_is_the_last_exit, no_such")
    assert "points" not in shown.output


@pytest.mark.parametrize(("old", "new"), {'title = "': "title = ", "[points]": "[marks]"}.items())
def test_a_lesson_toml_that_makes_no_sense_is_named_in_one_line(variant: StartVariant, old: str, new: str) -> None:
    wrong = variant("01-vm-exit")
    toml = wrong.folder / "lesson.toml"
    toml.write_text(toml.read_text().replace(old, new))
    shown = wrong.kvmlab("list")
    assert (shown.status, shown.output) == (2, ""), str(shown)
    one_line(shown.errors, f"kvmlab: {toml} cannot be used: ")


# ---- the tool behind make ----


@pytest.mark.parametrize("arguments", [[], ["dance"], ["run", "1", "--loud"], ["run", "1", "2"]], ids=" ".join)
def test_nonsense_gets_one_line_and_status_2(variant: StartVariant, arguments: list[str]) -> None:
    shown = variant("01-vm-exit").kvmlab(*arguments)
    assert (shown.status, shown.output) == (2, "")
    (line,) = said(shown)
    assert line.startswith("kvmlab: ")
    assert line.endswith("; make help lists the commands")
