"""The clauses of VIRTIO 1.2 that are about this device (clauses.toml), and which tests prove them."""

import importlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TypeVar

import pytest

HERE = Path(__file__).parent
Test = TypeVar("Test", bound=Callable[..., None])


@dataclass(frozen=True)
class Clause:
    """A row of the table, which explains the columns."""

    section: str
    strength: str
    says: str
    not_here: str = ""

    def __str__(self) -> str:
        return f"{self.section}: {self.strength} {self.says}"


CLAUSES = [Clause(**row) for row in tomllib.loads((HERE / "clauses.toml").read_text())["clause"]]
_KNOWN = {(clause.section, clause.says): clause for clause in CLAUSES}


def clause(section: str, says: str) -> Callable[[Test], Test]:
    """A test of this name proves this clause. Its docstring names the section too."""
    mark: Callable[[Test], Test] = pytest.mark.clause(_KNOWN[section, says])
    return mark


def all_tests() -> list[FunctionType]:
    """All tests of this folder."""
    modules = [importlib.import_module(f"virtio.{path.stem}") for path in sorted(HERE.glob("test_*.py"))]
    functions = [function for module in modules for function in vars(module).values()]
    return [function for function in functions if isinstance(function, FunctionType) and is_test(function)]


def is_test(function: FunctionType) -> bool:
    return function.__name__.startswith("test_")


def proved_by(function: FunctionType) -> list[Clause]:
    return [mark.args[0] for mark in getattr(function, "pytestmark", []) if mark.name == "clause"]


def covering() -> dict[Clause, list[str]]:
    """The tests of each clause, as pytest names them."""
    covered: dict[Clause, list[str]] = {clause: [] for clause in CLAUSES}
    for function in all_tests():
        for proved in proved_by(function):
            covered[proved].append(f"{function.__module__.removeprefix('virtio.')}.py::{function.__name__}")
    return covered
