"""The zip that Gradescope makes an autograder of: its "Autograder Specifications"."""

import os
import stat
import zipfile
from pathlib import Path

from kvmlab import cache
from kvmlab.handout import files

# So that the same tree gives the same zip: the first that the format can express.
_TIME = (1980, 1, 1, 0, 0, 0)
_SCRIPTS = ("setup.sh", "run_autograder")


def write(source: Path, destination: Path, lesson: str) -> None:
    """setup.sh and run_autograder at the root, with the name of the lesson, if it is to be one alone; the trusted tree
    under kvmlab/, with the kernel for svm."""
    content = {name: source / "tools" / "gradescope" / name for name in _SCRIPTS}
    content |= {f"kvmlab/{path}": source / path for path in files(source)}
    content |= {f"kvmlab/build/engines/packages/{path.name}": path for path in cache.folder().glob("packages/*.deb")}
    destination.parent.mkdir(parents=True, exist_ok=True)
    new = destination.with_name(f".{destination.name}.new")
    with zipfile.ZipFile(new, "w") as archive:
        for name in sorted(content):
            is_program = bool(content[name].stat().st_mode & stat.S_IXUSR)
            _add(archive, name, content[name].read_bytes(), is_program)
        _add(archive, "lesson", lesson.encode())
    os.replace(new, destination)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, is_program: bool = False) -> None:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.external_attr = (stat.S_IFREG | (0o755 if is_program else 0o644)) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)
