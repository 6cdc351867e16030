"""The lessons' texts quote a run with SEED=7: what they say is what such a run gives. A lesson's quotes.py has
the quotes: for each engine that the text names, a function that makes them of a run there."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from variants import NAMES, is_done

from kvmlab import lesson, runner
from kvmlab.engine import ENGINES, Engine
from kvmlab.plugin import ROOT
from kvmlab.runner import Run

SEED = 7


def text(name: str) -> str:
    """A lesson's text with its line breaks folded, so that a quote may stand across two lines."""
    return " ".join((ROOT / "lessons" / name / "README.md").read_text().split())


def quotes_of(name: str) -> dict[str, Callable[[Run], list[str]]]:
    module = lesson.load(ROOT / "lessons" / name).module("quotes")
    assert module, f"lessons/{name} has no quotes.py"
    quotes: dict[str, Callable[[Run], list[str]]] = module.QUOTES
    return quotes


@pytest.mark.parametrize(("name", "engine"), [(name, engine) for name in NAMES for engine in quotes_of(name)])
def test_a_text_quotes_what_a_run_gives(name: str, engine: str, build: Path, engines: dict[str, Engine]) -> None:
    """With KVM's trace, where the engine has one; and with parameters of its KVM: "svm npt=0"."""
    engine_name, _, params = engine.partition(" ")
    if engine_name not in engines:
        pytest.skip(f"this session is without {engine_name}: --engines=kvm,svm,vmx")
    built = runner.lesson_built(build, name)
    with contextlib.closing(ENGINES[engine_name](params)) if params else contextlib.nullcontext() as own:
        chosen = own or engines[engine_name]
        run = runner.run(built, seed=SEED, trace=engine_name != "kvm", engine=chosen)
    assert is_done(run, name), run.errors
    said = text(name)
    wrong = [quote for quote in quotes_of(name)[engine](run) if " ".join(quote.split()) not in said]
    assert wrong == [], f"lessons/{name}/README.md does not say this of SEED={SEED}"


@pytest.mark.parametrize("name", NAMES)
def test_a_text_names_files_and_functions_that_exist(name: str) -> None:
    """Names in backquotes that look like a file of the project or a call of its code."""
    folders = [ROOT / folder for folder in ("vmm", "guest", "include", f"lessons/{name}")]
    sources = "".join(path.read_text() for folder in folders for path in folder.glob("*.[ch]"))
    prose = re.sub(r"```.*?```", "", (ROOT / "lessons" / name / "README.md").read_text(), flags=re.DOTALL)
    quoted = set(re.findall(r"`([^`]+)`", prose))
    files = {word for word in quoted if re.fullmatch(r"(vmm|guest|include)/[\w.]+", word)}
    assert [word for word in sorted(files) if not (ROOT / word).exists()] == []
    of_linux = "handle|kvm|io|pio|em|vmx|init|pf|mmu|rmap"
    ours = {word for word in quoted if re.fullmatch(rf"(?!({of_linux})_)[a-z]+_\w+(\(\))?", word)}
    assert [word for word in sorted(ours) if word.removesuffix("()") not in sources] == []
