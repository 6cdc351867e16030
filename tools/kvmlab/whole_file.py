"""Files that others read: they are there as a whole or not at all."""

import os
import tempfile
from pathlib import Path


def write(file: Path, text: str) -> None:
    """All of it or nothing, whatever interrupts us."""
    try:
        _write(file, text)
    except OSError as error:  # which names a temporary file, or none
        raise OSError(error.errno, error.strerror, str(file)) from None


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".", delete=False, encoding="utf-8") as new:
        try:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
            os.chmod(new.fileno(), 0o644)
            os.replace(new.name, file)
        except BaseException:
            os.unlink(new.name)
            raise
