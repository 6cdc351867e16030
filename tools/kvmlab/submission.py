"""What is taken from a submission: the files in which students write, whole, and nothing else.

Whole, since a student may write a function of their own beside the marked regions. That lets no more in
than the regions would: what is in one of them is C code, and can do all that the rest of its file can.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from kvmlab import repository
from kvmlab.lesson import UsageError
from kvmlab.machine import MachineError
from kvmlab.repository import GitError

FILE_MOST = 1 << 20
ARCHIVE_MOST = 64 << 20  # unpacked
MEMBERS_MOST = 10_000

# A repository may name programs that git starts to fetch what it lacks.
_GIT = {"GIT_ALLOW_PROTOCOL": "none", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1"}


class RefusedError(Exception):
    """There is something in the submission that nothing good comes from; says in one line what and where. The student
    reads it: it names what is in the submission, and nothing of the machine that it lies on."""


def read(submission: str, wanted: Iterable[str], project: Path) -> dict[str, bytes]:
    """Those of the wanted files that are in the submission: a folder, a tar or zip file, or a revision of this
    project (HEAD~1) or of a repository (path:HEAD~1)."""
    path, names = Path(submission), set(wanted)
    if path.is_dir():
        found = _from_folder(path, names)
    elif path.is_file():
        if path.stat().st_size > ARCHIVE_MOST:  # a zip file's table of contents is read whole
            raise RefusedError(f"{_shown(path.name)}: longer than {ARCHIVE_MOST >> 20} MiB")
        found = _from_zip(path, names) if zipfile.is_zipfile(path) else _from_tar(path, names)
    else:
        found = _from_git(*_revision(submission, project), names)
    if not found:
        likely = min(names, key=lambda name: (not name.startswith("lessons/"), name))
        raise RefusedError(f"no file of a lesson is in it, such as {likely}")
    return found


def _shown(name: str) -> str:
    """A name that may be anything, for a line of text."""
    return name if name.isprintable() else ascii(name)


def _limited(content: bytes, name: str) -> bytes:
    if len(content) > FILE_MOST:
        raise RefusedError(f"{_shown(name)}: longer than {FILE_MOST >> 20} MiB")
    return content


# ---- a folder ----


def _from_folder(folder: Path, wanted: set[str]) -> dict[str, bytes]:
    places = [path for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}lessons/*/*.c")]
    top = _top(wanted, [str(path.relative_to(folder)) for path in places])
    contents = {name: _read_inside(folder, f"{top}/{name}" if top else name) for name in sorted(wanted)}
    return {name: content for name, content in contents.items() if content is not None}


def _top(wanted: set[str], names: Collection[str]) -> str:
    """The folder in which the project lies: "", or the one that everything is in."""
    tops = {name.removesuffix(f"/{end}") for name in names for end in wanted if name.endswith(f"/{end}")}
    whole = any(name in wanted for name in names)
    if len(tops) > 1 and not whole:
        raise RefusedError(f"more than one tree is in it: {', '.join(sorted(map(_shown, tops)))}")
    return "" if whole or not tops else tops.pop()


def _read_inside(folder: Path, name: str) -> bytes | None:
    """A file below the folder, by a path on which there is no link."""
    opened: list[int] = []
    *parents, last = PurePosixPath(name).parts
    try:
        opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for parent in parents:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            opened.append(os.open(parent, flags, dir_fd=opened[-1]))
        # Not waiting for the other end of what may be a pipe.
        opened.append(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=opened[-1]))
        if not stat.S_ISREG(os.fstat(opened[-1]).st_mode):
            raise RefusedError(f"{name}: not a file")
        with os.fdopen(os.dup(opened[-1]), "rb") as file:
            return _limited(file.read(FILE_MOST + 1), name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RefusedError(f"{name}: it, or a folder that it is in, is a link or no file ({error.strerror})") from None
    finally:
        for file_number in opened:
            os.close(file_number)


# ---- archives ----


class _Archive:
    """The members of an archive, as they come by."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.members = 0
        self.kept: dict[str, bytes] = {}

    def add(self, name: str, kind: str, content: Callable[[], bytes]) -> None:
        self.members += 1
        if self.members > MEMBERS_MOST:
            raise RefusedError(f"more than {MEMBERS_MOST} files")
        self._admit(name, kind)
        name = str(PurePosixPath(name))
        if kind == "file" and any(f"/{name}".endswith(f"/{end}") for end in self.wanted):
            if name in self.kept:
                raise RefusedError(f"{_shown(name)}: is there twice")
            self.kept[name] = _limited(content(), name)

    @staticmethod
    def _admit(name: str, kind: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise RefusedError(f"{name!a}: a name that is no UTF-8") from None
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
            raise RefusedError(f"{_shown(name)}: leads out of the submission")
        if kind not in ("file", "folder"):
            raise RefusedError(f"{_shown(name)}: a {kind}")

    def files(self) -> dict[str, bytes]:
        top = _top(self.wanted, self.kept)
        inside = {name.removeprefix(f"{top}/" if top else ""): content for name, content in self.kept.items()}
        return {name: content for name, content in inside.items() if name in self.wanted}


_PACKED: dict[bytes, Callable[[IO[bytes]], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


class _Unpacked(io.RawIOBase):
    """What is unpacked, up to a limit."""

    def __init__(self, file: IO[bytes]) -> None:
        start = file.read(6)
        file.seek(0)
        self.left = ARCHIVE_MOST
        opener = next((opener for magic, opener in _PACKED.items() if start.startswith(magic)), None)
        self.source = opener(file) if opener else file

    def read(self, size: int = -1) -> bytes:
        content: bytes = self.source.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise RefusedError(f"unpacked, longer than {ARCHIVE_MOST >> 20} MiB")
        return content


# Of ValueError is what is no UTF-8, of RuntimeError what has a password or a compression nobody knows.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is said of an archive names it, too."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"{path.name}: {error}") from None
    except _DAMAGED as error:
        why = _shown(str(getattr(error, "strerror", None) or error))
        raise RefusedError(f"{path.name}: not a tar or zip file, or a damaged one ({why})") from None


def _from_tar(path: Path, wanted: set[str]) -> dict[str, bytes]:
    found = _Archive(wanted)
    with (
        _naming(path),
        path.open("rb") as file,
        tarfile.open(fileobj=cast(IO[bytes], _Unpacked(file)), mode="r|") as archive,
    ):
        for member in archive:
            found.add(member.name, _kind_of_member(member), partial(_member, archive, member))
    return found.files()


def _kind_of_member(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "link"
    return "file" if member.isreg() and not member.sparse else "device, a pipe or a sparse file"


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    return content.read(FILE_MOST + 1) if content else b""


def _from_zip(path: Path, wanted: set[str]) -> dict[str, bytes]:
    found = _Archive(wanted)
    with _naming(path), zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > ARCHIVE_MOST:
            raise RefusedError(f"unpacked, longer than {ARCHIVE_MOST >> 20} MiB")
        for info in archive.infolist():
            found.add(info.filename, _kind_of_entry(info), partial(_entry, archive, info))
    return found.files()


def _kind_of_entry(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)  # of an archive made on Unix; else 0
    if stat.S_ISLNK(mode):
        return "link"
    if info.is_dir():
        return "folder"
    return "file" if mode in (0, stat.S_IFREG) else "device or a pipe"


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as content:  # what the archive says of its length need not be true
        return content.read(FILE_MOST + 1)


# ---- git ----


def _revision(submission: str, project: Path) -> tuple[Path, str]:
    """The repository, and the commit."""
    folder, colon, revision = submission.rpartition(":")
    where, name = (Path(folder), revision) if colon and Path(folder).is_dir() else (project, submission)
    done = _git(where, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if done.returncode:
        raise UsageError(f"SUBMISSION={_shown(submission)}: neither a folder nor a file nor a revision that git knows")
    return where, done.stdout.decode().strip()


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return repository.run(folder, "-c", "core.fsmonitor=false", *arguments, **_GIT)
    except GitError as error:
        raise MachineError(str(error)) from None


def _from_git(folder: Path, commit: str, wanted: set[str]) -> dict[str, bytes]:
    found = {}
    listed = _git(folder, "ls-tree", "-z", "--full-tree", "-l", commit, "--", *sorted(wanted))
    if listed.returncode:
        raise RefusedError(f"git cannot read {commit}: the repository is damaged")
    for entry in filter(None, listed.stdout.split(b"\0")):
        about, _, name = entry.decode(errors="surrogateescape").partition("\t")
        mode, _, blob, size = about.split()
        if not mode.startswith("100"):
            raise RefusedError(f"{_shown(name)}: a link or no file")
        if int(size) > FILE_MOST:
            raise RefusedError(f"{_shown(name)}: longer than {FILE_MOST >> 20} MiB")
        found[name] = _git(folder, "cat-file", "blob", blob).stdout
    return found
