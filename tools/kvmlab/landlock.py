"""Landlock: give up all files but some, for this process and its children (landlock(7), linux/landlock.h).

It needs no privileges and works in containers in which bubblewrap may not make a namespace.
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
_ALL = (1 << 13) - 1  # what version 1 of the interface knows: LANDLOCK_ACCESS_FS_EXECUTE to _MAKE_SYM
_EXECUTE, _READ_FILE, _READ_DIR, _OF_FILES = 1 << 0, 1 << 2, 1 << 3, 0b111

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: object) -> int:
    answer: int = getattr(_libc, function)(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return answer


def keep_only(readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """From now on, only what lies below these can be read, and only what lies below the latter be written."""
    attributes = struct.pack("=Q", _ALL)
    rules = _call("syscall", _CREATE_RULESET, attributes, len(attributes), 0)
    allowed = dict.fromkeys(readable, _EXECUTE | _READ_FILE | _READ_DIR) | dict.fromkeys(writable, _ALL)
    for path, access in allowed.items():
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access if path.is_dir() else access & _OF_FILES, beneath)
        _call("syscall", _ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0)
        os.close(beneath)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("syscall", _RESTRICT_SELF, rules, 0)
    os.close(rules)
