"""`make grade`: what it takes from a submission, and that nothing but a solution gets points out of it."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kvmlab_server import become_kvmlab
from support import assume_different_owner
from variants import ENVIRONMENT, Shown, command

from kvmlab import cache, lesson, machine, markers, repository, runner, sandbox, witness
from kvmlab import grade as grade_
from kvmlab import submission as submissions
from kvmlab.engine import ENGINES, kvm_problem
from kvmlab.grades import NOT_JUDGED
from kvmlab.machine import Job, MachineError, Outcome
from kvmlab.plugin import ROOT

pytest_plugins = ["variants"]

LESSON = "lessons/01-vm-exit"
TOTAL = sum(lesson.load(ROOT / LESSON).points.values())
HOST, GUEST = f"{LESSON}/host.c", f"{LESSON}/guest.c"
SEED = 7


@dataclass(frozen=True)
class Graded:
    """What the grader has written, and what it has shown."""

    result: dict[str, Any]
    shown: Shown

    @property
    def checks(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.result["lessons"][0]["checks"]
        return found

    @property
    def points(self) -> int:
        return sum(check["worth"] for check in self.checks if check["passed"])

    @property
    def problem(self) -> str:
        return str(self.result["lessons"][0]["problem"])

    @property
    def engine(self) -> str:
        return str(self.result["lessons"][0]["engine"])

    @property
    def is_fault_of_grader(self) -> bool:
        return self.result["lessons"][0]["is_fault_of_grader"] is True


@dataclass(frozen=True)
class Submission:
    """A folder with what a student hands in for lesson 1."""

    folder: Path

    def put(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def solve(self) -> None:
        for path in (HOST, GUEST):
            self.put(path, (ROOT / path).read_text())

    def write_nothing(self) -> None:
        for path in (HOST, GUEST):
            self.put(path, markers.student_version((ROOT / path).read_text()))

    def append(self, code: str, path: str = HOST) -> None:
        self.put(path, (self.folder / path).read_text() + code)

    def attack(self, body: str) -> None:
        """Do this in the VMM's process before main() begins."""
        self.append(f"\n{INCLUDES}\n__attribute__((constructor)) static void attack(void) {{\n{body}\n}}\n")

    def grade(self, engine: str = "auto", seeds: str = str(SEED), **environment: str) -> Graded:
        if engine == "kvm" and (problem := no_sandbox_for_kvm()):
            pytest.skip(problem)
        return grade(forked, self.folder, engine, seeds, **environment)


def no_sandbox_for_kvm() -> str:
    """Why nothing is graded on kvm here: in a container, say, where bubblewrap may not make a namespace."""
    return kvm_problem() or sandbox.problem(kvm=True)


BOTH = pytest.mark.parametrize("engine", ["kvm", "svm"])

INCLUDES = "\n".join(
    f"#include <{name}.h>"
    for name in "arpa/inet dirent errno fcntl netinet/in signal stdio stdlib string sys/ioctl sys/prctl sys/socket "
    "sys/stat sys/un unistd".split()
)


def grade(
    kvmlab: Callable[..., Shown], submission: Path, engine: str = "auto", seeds: str = str(SEED), **environment: str
) -> Graded:
    arguments = [f"--submission={submission}", "--lesson=1", f"--engine={engine}", "--format=json"]
    shown = kvmlab("grade", *arguments, *([f"--seeds={seeds}"] if seeds else []), **environment)
    return Graded(json.loads(shown.output) if shown.output else {}, shown)


def kvmlab(*arguments: str, **environment: str) -> Shown:
    python = {"PYTHONPATH": "tools", "PYTHONDONTWRITEBYTECODE": "1"}
    return command(sys.executable, "-m", "kvmlab", *arguments, folder=ROOT, **(environment | python))


def forked(*arguments: str, **environment: str) -> Shown:
    """The same in a child of this process: with what a test has put in place of the grader's parts."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("output", "errors")}
        about = {"arguments": arguments, "folder": str(ROOT), "environment": ENVIRONMENT | environment}
        child = os.fork()
        if child == 0:
            os._exit(become_kvmlab(about | paths))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Shown(status, *(Path(path).read_text() for path in paths.values()))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that every grading begins with, built once: it takes longer than all else."""
    tree = tmp_path_factory.mktemp("prepared") / "tree"
    grade_._prepare(tree)
    return tree


@pytest.fixture
def submission(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    monkeypatch.setattr(grade_, "_prepare", lambda tree: shutil.copytree(prepared, tree, symlinks=True))
    made = Submission(tmp_path / "submission")
    made.solve()
    return made


def expect_nothing(graded: Graded, problem: str = "") -> None:
    assert (graded.points, graded.shown.status, graded.is_fault_of_grader) == (0, 1, False), str(graded.shown)
    assert graded.engine in ENGINES
    assert problem in graded.problem, str(graded.shown)
    assert [check["worth"] for check in graded.checks] == list(lesson.load(ROOT / LESSON).points.values())


# ---- what is graded ----


def test_a_solution_gets_all_points(submission: Submission, engines: dict[str, Any]) -> None:
    able = [engine for engine in engines if engine != "kvm" or not no_sandbox_for_kvm()]
    how = [grade(kvmlab, submission.folder), *(submission.grade(engine) for engine in able)]
    for graded in how:
        assert (graded.points, graded.problem, graded.shown.status) == (TOTAL, "", 0), str(graded.shown)


@BOTH
def test_what_is_not_written_gets_no_points(submission: Submission, engine: str) -> None:
    submission.write_nothing()
    graded = submission.grade(engine)
    expect_nothing(graded)
    assert "not written yet" in graded.checks[0]["message"]


def test_what_is_not_in_the_submission_is_the_stub_and_never_the_solution(submission: Submission) -> None:
    (submission.folder / HOST).unlink()
    graded = submission.grade()
    assert 0 < graded.points < TOTAL or "not written yet" in str(graded.checks), str(graded.shown)


def test_a_function_beside_the_marked_regions_is_taken_along(submission: Submission) -> None:
    text = (submission.folder / GUEST).read_text()
    own = "static uint32_t mine(uint32_t x) { return x << 8 | x >> 24; }\n\nvoid guest_main(void)"
    assert "void guest_main(void)" in text
    submission.put(
        GUEST,
        text.replace("void guest_main(void)", own)
        + "\nuint32_t used(void);\nuint32_t used(void) { return mine(1); }\n",
    )
    assert submission.grade().points == TOTAL


def test_each_grading_has_seeds_of_its_own_and_says_which(submission: Submission) -> None:
    first, second = (submission.grade(seeds="") for _ in range(2))
    assert first.result["lessons"][0]["seeds"] != second.result["lessons"][0]["seeds"]
    seeds = ",".join(map(str, first.result["lessons"][0]["seeds"]))
    assert f"SEEDS={seeds}\n" in first.shown.errors


def test_what_does_not_build_is_said_in_a_line_with_its_place(submission: Submission) -> None:
    submission.append("\nint broken\n")
    expect_nothing(submission.grade(), f"it does not build: {HOST}:")


@pytest.mark.slow
def test_three_gradings_on_a_busy_machine_are_equal(submission: Submission) -> None:
    with busy():
        graded = [submission.grade() for _ in range(3)]
    assert [each.result["lessons"] for each in graded] == [graded[0].result["lessons"]] * 3
    assert graded[0].points == TOTAL, str(graded[0].shown)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A busy loop on each core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


# ---- points that nobody has earned ----


def c_string(content: bytes) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in content) + '"'


@pytest.fixture(scope="module")
def recorded(build: Path) -> runner.Run:
    """A run of the solution, with another seed."""
    if problem := kvm_problem():
        pytest.skip(problem)
    return runner.run(runner.lesson_built(build, "01-vm-exit"), seed=SEED + 1)


def lines_of(run: runner.Run) -> bytes:
    return b"".join(json.dumps(event.recorded).encode() + b"\n" for event in run.events)


@BOTH
def test_printing_what_a_solution_prints_gets_nothing(
    submission: Submission, engine: str, recorded: runner.Run
) -> None:
    submission.write_nothing()
    submission.attack(f'printf("%s", {c_string(recorded.output.encode())}); fflush(stdout);')
    expect_nothing(submission.grade(engine))


@BOTH
def test_a_verdict_that_the_submission_writes_counts_for_nothing(submission: Submission, engine: str) -> None:
    verdict = "lesson 1: 12 of 12 points\n"
    submission.write_nothing()
    submission.attack(f"fputs({c_string(verdict.encode())}, stdout); fputs({c_string(verdict.encode())}, stderr);"
                      "fflush(NULL); _exit(0);")  # fmt: skip
    expect_nothing(submission.grade(engine), "the VMM ended before it recorded anything")


WRITE_RECORD = """
    static const char record[] = RECORD;
    int file = open("events.jsonl", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    _exit(file < 0 || write(file, record, sizeof record - 1) < 0);
"""


@BOTH
def test_the_events_of_another_run_are_not_believed(submission: Submission, engine: str, recorded: runner.Run) -> None:
    submission.write_nothing()
    submission.attack(WRITE_RECORD.replace("RECORD;", f"{c_string(lines_of(recorded))};"))
    expect_nothing(submission.grade(engine), f"it does not begin with the start of a run with seed {SEED}")


@pytest.mark.parametrize("engine", ["kvm", "svm"])
def test_a_record_with_the_right_seed_is_not_believed_without_the_run(
    submission: Submission, build: Path, engine: str
) -> None:
    """The best that a forger can write: what a solution does with this very seed."""
    run = runner.run(runner.lesson_built(build, "01-vm-exit"), seed=SEED)
    submission.write_nothing()
    submission.attack(WRITE_RECORD.replace("RECORD;", f"{c_string(lines_of(run))};"))
    expect_nothing(submission.grade(engine), "KVM_RUN came back 0 times")


def at_the_end(submission: Submission, function: str) -> None:
    """Have the host half call this when the run is over."""
    text = (submission.folder / HOST).read_text()
    half = "const struct host_half host_half = {.setup = lab_setup, .end = lab_end};\n"
    assert half in text
    submission.put(HOST, text.replace(half, "") + half.replace(".end = lab_end", f".end = {function}"))


@BOTH
def test_events_that_a_host_half_adds_in_the_vmms_name_are_not_believed(submission: Submission, engine: str) -> None:
    submission.append("""
static void pretend(void) {
    lab_end();
    event_begin("exit");
    event_number("exit", 1);
    event_string("reason", "IO");
    event_end();
}
""")
    at_the_end(submission, "pretend")
    expect_nothing(submission.grade(engine), "not to be trusted")


BEHIND_THE_RECORDER = """
static int vcpu_file(void) {
    char path[40], to[80];
    for (int fd = 3; fd < 64; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(path, to, sizeof to - 1);
        to[size < 0 ? 0 : size] = 0;
        if (strstr(to, "kvm-vcpu"))
            return fd;
    }
    return -1;
}
"""


@pytest.mark.parametrize(
    ("engine", "request_", "words"),
    [
        ("kvm", "KVM_RUN, 0", "KVM_RUN came back"),
        ("svm", "KVM_RUN, 0", "KVM_RUN came back"),
        ("kvm", "KVM_NMI, 0", "injections, and KVM was asked for 1"),
    ],
)
def test_an_ioctl_behind_the_recorders_back_is_found_out(
    submission: Submission, engine: str, request_: str, words: str
) -> None:
    body = f"static void sneak(void) {{ lab_end(); ioctl(vcpu_file(), {request_}); }}\n"
    submission.append(f"{INCLUDES}{BEHIND_THE_RECORDER}{body}")
    at_the_end(submission, "sneak")
    graded = submission.grade(engine)
    expect_nothing(graded, "not to be trusted")
    assert words in graded.problem


HIDDEN = """
    struct sock_filter all[] = {{.code = BPF_RET | BPF_K, .k = SECCOMP_RET_ALLOW}};
    struct sock_fprog filter = {1, all};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (CALL)
        abort();
"""


@pytest.mark.parametrize(
    "call", ["syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter)", "prctl(PR_SET_SECCOMP, 2, &filter)"]
)
def test_what_could_hide_system_calls_from_the_witness_is_found_out(submission: Submission, call: str) -> None:
    submission.append("\n#include <linux/filter.h>\n#include <linux/seccomp.h>\n#include <sys/syscall.h>\n")
    submission.attack(HIDDEN.replace("CALL", call))
    expect_nothing(submission.grade("kvm"), "system calls were filtered")


@BOTH
def test_a_record_that_is_broken_off_hides_no_exits(submission: Submission, engine: str) -> None:
    body = "lab_end(); fflush(NULL); for (int i = 0; i < 9; i++) ioctl(vcpu_file(), KVM_RUN, 0); raise(SIGKILL);"
    submission.append(f"{INCLUDES}{BEHIND_THE_RECORDER}static void sneak(void) {{ {body} }}\n")
    at_the_end(submission, "sneak")
    expect_nothing(submission.grade(engine), "KVM_RUN came back")


@pytest.mark.parametrize("name", ["vmm", "a b", "a\n", "x-9 [0] x 1.1:"])
def test_a_thread_hides_from_the_kernels_trace_by_no_name(name: str) -> None:
    line = f"{name:>16}-123     [000] ...1.    12.345678: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n"
    assert witness.seen_by_kernel(line * 2).returns == [("123", "IO")] * 2


def test_in_an_emulated_machine_a_submission_cannot_write_to_the_witness_or_the_answers(submission: Submission) -> None:
    submission.attack("""
    int reached = 0;
    const char *paths[] = {"/sys/kernel/tracing/trace_marker", "/sys/kernel/tracing/trace", "/dev/mem", "/dev/port",
                           "/job/x", "/init"};
    for (unsigned i = 0; i < sizeof paths / sizeof *paths; i++)
        reached |= (open(paths[i], O_WRONLY | O_CREAT, 0666) >= 0) << i;
    reached |= !iopl(3) << 10 | !mount("none", "/sys/kernel", "tmpfs", 0, NULL) << 11 | !unlink("events.jsonl") << 12;
    fprintf(stderr, "vmm: reached %#x as %d\\n", (unsigned)reached, (int)geteuid());
    _exit(0);
""")
    submission.put(HOST, "#include <sys/io.h>\n#include <sys/mount.h>\n" + (submission.folder / HOST).read_text())
    expect_nothing(submission.grade("svm"), "reached 0 as 20000")


RECORD = b'{"seq":0,"ns":0,"kind":"start","version":1,"seed":7}\n'
HOSTILE = {
    "objects": b"{}\n" * 9,
    "empty lines": b"\n" * (1 << 24),
    "carriage returns": RECORD + b"\r" * (1 << 24),
    "lists": b"[1]\n",
    "depth": RECORD + b"[" * (1 << 24),
    "not a number": RECORD + b'{"seq":NaN,"kind":"exit","exit":Infinity}\n',
    "a number of 16 million digits": RECORD + b'{"seq":"0x' + b"f" * (1 << 24) + b'"}\n',
    "no kind": RECORD + b'{"seq":1}\n',
    "a seed that is none": RECORD.replace(b"7", b"[]"),
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_is_refused_in_a_line_before_it_costs_anything(record: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(grade_.DistrustedError) as refused:
        grade_._agree(record, machine.Job(["./vmm", "--seed=7"], {}), witness.Seen([]))
    assert len(str(refused.value)) < 500
    assert time.monotonic() - began < 5


def test_tests_tools_makefile_and_vmm_of_the_submission_are_not_used(submission: Submission) -> None:
    for path in ("Makefile", "vmm/vmm.c", "guest/boot.asm", "tools/kvmlab/judge.py", f"{LESSON}/lesson.toml"):
        submission.put(path, "this would break everything\n")
    submission.put(f"{LESSON}/test_lesson.py", "def test_nothing() -> None:\n    pass\n")
    submission.put("conftest.py", "raise SystemExit(0)\n")
    assert submission.grade().points == TOTAL
    submission.write_nothing()
    expect_nothing(submission.grade())


# ---- what a submission can be ----


def folder_of(paths: dict[str, bytes], home: Path) -> Path:
    for path, content in paths.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(content)
    return home


def tar_of(paths: dict[str, bytes], home: Path, mode: str = "w:gz") -> Path:
    home.mkdir(exist_ok=True)
    with tarfile.open(home / "work.tar", mode) as archive:
        for path, content in paths.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return home / "work.tar"


def zip_of(paths: dict[str, bytes], home: Path) -> Path:
    home.mkdir(exist_ok=True)
    with zipfile.ZipFile(home / "work.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in paths.items():
            archive.writestr(path, content)
    return home / "work.zip"


MINE = {HOST: b"host", GUEST: b"guest"}
FORMS = {"folder": folder_of, "tar": tar_of, "zip": zip_of}
BEYOND = {"Makefile": b"x", f"{LESSON}/test_lesson.py": b"x", f"{LESSON}/own.c": b"x"}
Pack = Callable[[dict[str, bytes], Path], Path]


def taken(what: Path | str, project: Path = ROOT) -> dict[str, bytes]:
    return submissions.read(str(what), MINE, project)


@pytest.mark.parametrize("top", ["", "mine/", "a/b/"])
@pytest.mark.parametrize("pack", FORMS.values(), ids=FORMS)
def test_a_submission_is_a_folder_or_an_archive_and_only_the_students_files_are_taken(
    pack: Pack, top: str, tmp_path: Path
) -> None:
    packed = pack({f"{top}{path}": content for path, content in (MINE | BEYOND).items()}, tmp_path / "x")
    assert taken(packed) == MINE


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_file_may_be_compressed(mode: str, tmp_path: Path) -> None:
    assert taken(tar_of(MINE, tmp_path, mode)) == MINE


def test_a_submission_is_a_revision_of_git(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    git("init")
    folder_of(MINE, tmp_path)
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / HOST).write_bytes(b"later")
    git("commit", "-am", "two")
    assert taken(f"{tmp_path}:HEAD~1") == MINE
    assert taken("HEAD", tmp_path)[HOST] == b"later"
    (tmp_path / HOST).unlink()
    (tmp_path / HOST).symlink_to("/etc/passwd")
    git("commit", "-am", "three")
    with pytest.raises(submissions.RefusedError, match=rf"^{HOST}: a link"):
        taken("HEAD", tmp_path)


def test_a_revision_may_lie_in_a_repository_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(MINE, tmp_path / "alice")
    repository.commit_all(tmp_path / "alice", "one")
    assume_different_owner(tmp_path, monkeypatch)
    assert taken(f"{tmp_path}/alice:HEAD") == MINE


def test_what_does_not_exist_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    shown = kvmlab("grade", f"--submission={tmp_path / 'none'}")
    assert shown.status == 2
    assert shown.errors.splitlines()[-1].startswith(f"kvmlab: SUBMISSION={tmp_path / 'none'}: neither a folder nor")


# ---- submissions that are refused ----


def tar_with(member: tarfile.TarInfo) -> Callable[[Path], Path]:
    def make(home: Path) -> Path:
        path = tar_of(MINE, home, "w")
        with tarfile.open(path, "a") as archive:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        return path

    return make


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def zip_link(home: Path) -> Path:
    path = zip_of(MINE, home)
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    return path


def folder_with_link(link: str) -> Callable[[Path], Path]:
    """One of the paths is a link to what would otherwise do."""

    def make(home: Path) -> Path:
        folder_of(MINE, home)
        (home / link).rename(home / "elsewhere")
        (home / link).symlink_to(home / "elsewhere")
        return home

    return make


def folder_with_pipe(home: Path) -> Path:
    folder_of({GUEST: b"x"}, home)
    os.mkfifo(home / HOST)
    return home


REFUSED = {
    "a link in a tar file": (tar_with(tar_member("etc", tarfile.SYMTYPE, "/etc")), "work.tar: etc: a link"),
    "a hard link": (tar_with(tar_member("x", tarfile.LNKTYPE, HOST)), "work.tar: x: a link"),
    "a device": (tar_with(tar_member("x", tarfile.CHRTYPE)), "work.tar: x: a device"),
    "a pipe": (tar_with(tar_member("x", tarfile.FIFOTYPE)), "work.tar: x: a device, a pipe"),
    "a tar file that leads out": (tar_with(tar_member("a/../../x")), "work.tar: a/../../x: leads out"),
    "an absolute path": (tar_with(tar_member("/etc/x")), "work.tar: /etc/x: leads out"),
    "the same twice": (tar_with(tar_member(HOST)), f"work.tar: {HOST}: is there twice"),
    "no UTF-8": (tar_with(tar_member("\udcff.c")), "work.tar: '\\udcff.c': a name that is no UTF-8"),
    "a link in a zip file": (zip_link, "work.zip: link: a link"),
    "a zip file that leads out": (lambda home: zip_of({"../x": b""}, home), "work.zip: ../x: leads out"),
    "a path of Windows": (lambda home: zip_of({"..\\x": b""}, home), "leads out"),
    "too long a file": (lambda home: zip_of({HOST: bytes(2 << 20)}, home), f"work.zip: {HOST}: longer than 1 MiB"),
    "a zip bomb": (lambda home: zip_of({"x": bytes(65 << 20)}, home), "work.zip: unpacked, longer than 64 MiB"),
    "a tar bomb": (lambda home: tar_of({"x": bytes(65 << 20)}, home), "work.tar: unpacked, longer than 64 MiB"),
    "a long archive": (lambda home: long(zip_of(MINE, home)), "work.zip: longer than 64 MiB"),
    "many files": (lambda home: zip_of({f"{i}": b"" for i in range(10_001)}, home), "more than 10000 files"),
    "no archive": (lambda home: folder_of({"work": b"hello"}, home) / "work", "work: not a tar or zip file"),
    "a cut archive": (lambda home: cut(tar_of({HOST: os.urandom(9999)}, home)), "work.tar: not a tar or zip file"),
    "a link to a file": (folder_with_link(HOST), f"{HOST}: it, or a folder"),
    "a link to a folder": (folder_with_link(LESSON), f"{GUEST}: it, or a folder"),
    "a pipe in a folder": (folder_with_pipe, f"{HOST}: not a file"),
    "nothing of a lesson": (lambda home: folder_of({"x": b""}, home), "no file of a lesson is in it"),
    "two trees": (lambda home: folder_of({f"a/{HOST}": b"", f"b/{HOST}": b""}, home), "more than one tree"),
}


def long(path: Path) -> Path:
    os.truncate(path, (64 << 20) + 1)
    return path


def cut(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2)
    return path


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_submission_needs_is_refused_in_a_line_that_names_it(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    with pytest.raises(submissions.RefusedError) as refused:
        taken(make(tmp_path / "x"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value), "where the submission lies is not the student's business"


def test_of_a_submission_with_nothing_in_it_a_file_is_named_that_could_be(tmp_path: Path) -> None:
    everything = grade_.student_files(lesson.load_all(ROOT / "lessons"))
    with pytest.raises(submissions.RefusedError, match=f"^no file of a lesson is in it, such as {GUEST}$"):
        submissions.read(str(tmp_path), everything, ROOT)


def test_a_refused_submission_has_a_result_too(submission: Submission) -> None:
    (submission.folder / HOST).unlink()
    (submission.folder / HOST).symlink_to(ROOT / HOST)
    expect_nothing(submission.grade(), f"refused: {HOST}: ")


# ---- what cannot be read ----


@pytest.mark.parametrize("path", ["/etc/shadow", str(ROOT / GUEST)], ids=["shadow", "solution"])
def test_the_compiler_sees_no_file_but_those_of_the_student_tree(submission: Submission, path: str) -> None:
    submission.append(f'\n#include "{path}"\n')
    graded = submission.grade()
    expect_nothing(graded, "it does not build")
    assert re.search("No such file|Permission denied", graded.problem)  # under bubblewrap, under Landlock
    assert "root:" not in graded.shown.output


@pytest.fixture
def no_bubblewrap(tmp_path: Path) -> str:
    """A PATH on which bubblewrap is not allowed to do anything, as in a container."""
    sandbox.problem.cache_clear()
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "bwrap").write_text("#!/bin/sh\necho bwrap: Operation not permitted >&2\nexit 1\n")
    (folder / "bwrap").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_without_bubblewrap_an_emulated_machine_is_the_sandbox(submission: Submission, no_bubblewrap: str) -> None:
    graded = submission.grade(PATH=no_bubblewrap)
    assert (graded.points, graded.engine) == (TOTAL, "svm"), str(graded.shown)
    assert "engine: svm (emulated AMD; kvm: no sandbox here: bwrap: Operation not permitted)" in graded.shown.errors


@pytest.mark.parametrize("path", ["/etc/shadow", str(ROOT / GUEST)], ids=["shadow", "solution"])
def test_without_bubblewrap_the_compiler_sees_no_other_file_either(
    submission: Submission, no_bubblewrap: str, path: str
) -> None:
    submission.append(f'\nasm(".incbin \\"{path}\\"");\n')
    expect_nothing(submission.grade(PATH=no_bubblewrap), "it does not build")


def in_sandbox(script: str, **place: Any) -> str:
    if problem := sandbox.problem(kvm=False):
        pytest.skip(problem)
    ended = sandbox.run(["sh", "-c", script], sandbox.Place("/job", **place), 20.0)
    assert not ended.is_late
    return (ended.output + ended.errors).decode()


def test_the_sandbox_has_no_environment_but_a_path() -> None:
    names = {line.partition("=")[0] for line in in_sandbox("env").splitlines()}
    assert names <= {"PATH", "PWD", "_", "SHLVL"}


def test_the_sandbox_has_no_processes_and_no_files_of_others() -> None:
    processes = in_sandbox("echo /proc/[0-9]*").split()
    assert len(processes) <= 4
    for path in ("/etc/shadow", "/root", "/home", str(ROOT), "/sys/kernel", "/dev/kvm"):
        assert "No such file" in in_sandbox(f"ls {path}"), path
    files = in_sandbox("readlink /proc/self/fd/*").splitlines()
    assert [name for name in files if not name.startswith(("/proc/", "/tmp/kvmlab-", "/dev/null"))] == []


@pytest.mark.parametrize("where", ["/", "/usr/bin", "/dev", "/proc/sys/kernel"])
def test_the_sandbox_can_be_written_to_nowhere_but_in_its_own_memory(where: str) -> None:
    assert "no\n" in in_sandbox(f"touch {where}/x || echo no")
    assert in_sandbox("touch /tmp/x /job/x && echo yes") == "yes\n"


# ---- whose fault it is ----


def expect_not_judged(graded: Graded, why: str) -> None:
    """A result, in which the student reads nothing but whose fault it is."""
    assert (graded.shown.status, graded.is_fault_of_grader) == (5, True), str(graded.shown)
    assert (graded.points, graded.problem) == (0, NOT_JUDGED)
    assert graded.engine in ENGINES
    assert f"kvmlab: lesson 1 was not judged: {why}\n" in graded.shown.errors
    assert why not in graded.shown.output


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


LOCKED = PermissionError(errno.EACCES, "Permission denied", "/cache/svm.lock")


def test_an_emulated_machine_that_cannot_be_started_is_the_graders_fault(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ready", raising(LOCKED))
    expect_not_judged(submission.grade("svm"), str(LOCKED))


def test_a_sandbox_that_fails_also_without_the_submission_is_the_graders_fault(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bubblewrap says of it looks as if a VMM had ended before it began."""
    monkeypatch.setattr(grade_._SandboxedKvm, "run", lambda *_: Outcome(1, errors=b"bwrap: no namespace\n"))
    expect_not_judged(submission.grade("kvm"), "on kvm not even tests/hello.elf runs: bwrap: no namespace")


@pytest.mark.parametrize("error", [MachineError("the emulator died"), PermissionError(errno.EACCES, "denied", "/x")])
def test_an_emulated_machine_that_only_the_submission_breaks_is_its_fault(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, error: Exception, tmp_path: Path
) -> None:
    its_own = machines_that_break(monkeypatch, error, tmp_path)
    expect_nothing(submission.grade("svm"), "the emulator died" if isinstance(error, MachineError) else "denied")
    assert its_own.read_text() == "broke\nbroke\n"


def machines_that_break(monkeypatch: pytest.MonkeyPatch, error: Exception, home: Path, times: int = 2) -> Path:
    """As often as that, with whatever is not the grader's own; what is left of it."""
    log = home / "log"
    log.touch()
    run = grade_._SvmSandbox.run

    def broken(engine: grade_._SvmSandbox, job: Job) -> Outcome:
        if "tests" in job.files["image.elf"].parts or log.read_text().count("broke") == times:
            return run(engine, job)
        with log.open("a") as file:
            print("broke", file=file)
        raise error

    monkeypatch.setattr(grade_._SvmSandbox, "run", broken)
    return log


def test_an_emulated_machine_that_breaks_once_costs_no_points(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machines_that_break(monkeypatch, MachineError("the emulator died"), tmp_path, times=1)
    assert submission.grade("svm").points == TOTAL


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", ["_prepare", "_make", "_apart"])
def test_a_full_disk_leaves_a_result_that_says_so(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(f"kvmlab.grade.{part}", raising(FULL))
    expect_not_judged(submission.grade(), str(FULL))


def test_a_fault_of_the_grader_with_one_lesson_leaves_the_others_their_results(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grade_, "_build", lambda _, of: raising(FULL)() if of.number == 1 else "it does not build")
    lessons = lesson.load_all(ROOT / "lessons")[:2]
    first, second = grade_.grade(str(submission.folder), lessons, "auto", [SEED]).lessons
    assert [(each.problem, each.is_fault_of_grader) for each in (first, second)] == [
        (NOT_JUDGED, True),
        ("it does not build", False),
    ]


def test_a_compiler_that_fails_also_without_the_submission_is_the_graders_fault(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = sandbox.Ended(2, errors=b"as: error: No space left on device")
    monkeypatch.setattr(sandbox, "build", lambda *_: full)
    expect_not_judged(submission.grade(), "nothing can be built: it does not build: as: error: No space left on device")


# ---- submissions that do harm ----


@pytest.fixture
def short_limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the VMM's own and ten seconds, but two, or as many as the test says: it waits for them to be over."""
    monkeypatch.setattr(grade_, "LATE", getattr(request, "param", 2) - machine.TIME_LIMIT)


@BOTH
def test_a_submission_that_exits_in_a_constructor_gets_nothing(submission: Submission, engine: str) -> None:
    submission.attack("exit(0);")
    expect_nothing(submission.grade(engine), "the VMM ended before it recorded anything")


@pytest.mark.usefixtures("short_limit")
@BOTH
def test_a_submission_that_sleeps_gets_nothing_for_the_time_limit(submission: Submission, engine: str) -> None:
    submission.attack("sleep(1000);")
    expect_nothing(submission.grade(engine), "the time limit")


@pytest.mark.usefixtures("short_limit")
def test_a_submission_that_forks_without_end_is_ended_with_all_its_processes(submission: Submission) -> None:
    name = f"bomb{os.getpid()}"
    submission.attack(f'prctl(PR_SET_NAME, "{name}"); setsid(); for (;;) fork();')
    expect_nothing(submission.grade("kvm"), "the time limit")
    assert [path for path in Path("/proc").glob("[0-9]*/comm") if read_if_there(path) == f"{name}\n"] == []


@pytest.mark.parametrize("short_limit", [5], indirect=True)
@pytest.mark.usefixtures("short_limit")
def test_on_svm_it_is_ended_too_and_the_next_lesson_is_graded_as_if_nothing_had_been(submission: Submission) -> None:
    submission.attack("setsid(); for (;;) fork();")
    for path in (ROOT / "lessons/02-paging").glob("*.c"):
        submission.put(str(path.relative_to(ROOT)), path.read_text())
    lessons = [lesson.load(ROOT / "lessons" / name) for name in ("01-vm-exit", "02-paging")]
    first, second = grade_.grade(str(submission.folder), lessons, "svm", [SEED]).lessons
    assert (first.points, first.problem.partition(":")[0]) == (0, "the time limit")
    assert (second.points, second.problem) == (second.total, "")


def read_if_there(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


FILL = """
    static char block[1 << 20];
    signal(SIGXFSZ, SIG_IGN);
    const char *names[] = {"events.jsonl", "/tmp/x", "/job/x", "/dev/shm/x", "/proc/self/fd/1", "/proc/self/fd/2"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        for (int copy = 0; copy < 100; copy++) {
            char name[80];
            snprintf(name, sizeof name, i && i < 4 ? "%s%d" : "%s", names[i], copy);
            int file = open(name, O_WRONLY | O_CREAT | O_APPEND, 0666);
            while (file >= 0 && write(file, block, sizeof block) > 0)
                ;
            close(file);
        }
    _exit(0);
"""


@BOTH
def test_a_submission_that_fills_all_it_can_write_to_comes_to_a_limit(submission: Submission, engine: str) -> None:
    before = os.statvfs("/tmp").f_bavail * os.statvfs("/tmp").f_bsize
    submission.attack(FILL)
    expect_nothing(submission.grade(engine))
    assert os.statvfs("/tmp").f_bavail * os.statvfs("/tmp").f_bsize > before - (1 << 30)


def test_an_initializer_of_10_gb_ends_the_compiler_and_not_the_grader(submission: Submission) -> None:
    submission.append("\nchar huge[10000000000] = {1};\nchar *use(void);\nchar *use(void) { return huge; }\n")
    expect_nothing(submission.grade(), "build")


@BOTH
def test_a_submission_that_kills_its_parents_ends_only_itself(submission: Submission, engine: str) -> None:
    submission.attack("kill(getppid(), SIGKILL); kill(1, SIGKILL); kill(-1, SIGKILL); raise(SIGKILL);")
    expect_nothing(submission.grade(engine))


@BOTH
def test_a_submission_reaches_no_network(submission: Submission, engine: str) -> None:
    submission.attack("""
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(22)};
    inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
    int file = socket(AF_INET, SOCK_STREAM, 0);
    if (file < 0 || connect(file, (struct sockaddr *)&to, sizeof to))
        fprintf(stderr, "vmm: no network: %s\\n", strerror(errno));
    _exit(0);
""")
    graded = submission.grade(engine)
    expect_nothing(graded, "no network")
    links = in_sandbox("cat /proc/net/dev").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in links] == ["lo"]
    assert len(in_sandbox("cat /proc/net/route").splitlines()) == 1


@BOTH
def test_a_submission_cannot_write_where_the_results_go(submission: Submission, tmp_path: Path, engine: str) -> None:
    if engine == "kvm" and (problem := no_sandbox_for_kvm()):
        pytest.skip(problem)
    results = tmp_path / "results.json"
    results.touch()
    results.chmod(0o666)
    submission.attack(f'int file = open("{results}", O_WRONLY); _exit(file < 0 ? 3 : write(file, "{{}}", 2) != 2);')
    arguments = [f"--submission={submission.folder}", "--lesson=1", f"--seeds={SEED}", f"--engine={engine}"]
    assert forked("grade", *arguments, "--format=json", f"--output={results}").status == 1
    assert json.loads(results.read_text())["lessons"][0]["problem"]
