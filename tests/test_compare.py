"""`make compare`: the machines that a lesson names, in one table."""

from collections.abc import Callable

import pytest
from variants import Variant, regions, write_stubs

from kvmlab.compare import aligned
from kvmlab.engine import Engine

pytest_plugins = ["variants"]

StartVariant = Callable[[str], Variant]

COMPARE = """
from kvmlab.compare import Machine

MACHINES = [Machine("svm"), Machine("svm", "npt=0"), Machine("auto", options=("--memory=48",))]


def table(runs):
    yield "", *(run.engine for run in runs)
    yield "memory", *(run.events[0].memory_mib for run in runs)
    yield "seed", *(run.events[0].seed for run in runs)
    yield "npf", *(len(run.all("trace", point="kvm_exit", reason="npf")) for run in runs)
    yield "invlpg", *(run.one("statistics", when="end").invlpg for run in runs)
"""


@pytest.fixture
def ours(variant: StartVariant) -> Variant:
    ours = variant("02-paging")
    (ours.folder / "compare.py").write_text(COMPARE)
    return ours


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in output.splitlines()[-4:]}


def test_each_machine_is_a_column(ours: Variant, engines: dict[str, Engine]) -> None:
    if not {"kvm", "svm"} <= engines.keys():
        pytest.skip("this session is without kvm or svm: --engines=kvm,svm,vmx")
    shown = ours.make("compare", "LESSON=2", "SEED=1234")
    assert (shown.status, shown.errors) == (0, ""), str(shown)
    title, first, second, third, heading, *_ = shown.output.splitlines()
    assert title == "lesson 2: From gva to gpa: paging (SEED=1234)"
    assert (first, second) == ("engine: svm (emulated AMD)", "engine: svm (emulated AMD) npt=0")
    assert third == "engine: kvm (this machine's /dev/kvm) --memory=48"
    assert heading.split() == ["svm", "svm", "kvm"]
    table = rows(shown.output)
    assert table["memory"] == ["32", "32", "48"]
    assert table["seed"] == ["1,234"] * 3
    npf, without, untraced = map(int, table["npf"])
    assert npf > 50
    assert (without, untraced) == (0, 0)
    assert table["invlpg"][0] == "0", "with nested paging KVM sees no INVLPG"
    assert int(table["invlpg"][1]) > 30


def test_an_engine_takes_the_machines_that_are_its_own(ours: Variant, engines: dict[str, Engine]) -> None:
    if "svm" not in engines:
        pytest.skip("this session is without svm: --engines=kvm,svm,vmx")
    shown = ours.kvmlab("compare", "2", "--engine=svm")
    assert shown.status == 0, str(shown)
    assert [len(columns) for columns in rows(shown.output).values()] == [2] * 4


def test_else_those_that_may_be_any(ours: Variant) -> None:
    shown = ours.kvmlab("compare", "2", "--engine=kvm")
    assert (shown.status, rows(shown.output)["memory"]) == (0, ["48"]), str(shown)


def test_a_lesson_that_compares_nothing_says_so_in_one_line(variant: StartVariant) -> None:
    ours = variant("02-paging")
    shown = ours.kvmlab("compare", "2")
    assert (shown.status, shown.output.count("\n")) == (2, 1), str(shown)
    assert shown.errors == f"kvmlab: lesson 2 has nothing to compare: no compare.py lies in {ours.folder}\n"


def test_an_engine_that_the_lesson_does_not_compare_is_refused(ours: Variant) -> None:
    path = ours.folder / "compare.py"
    path.write_text(path.read_text().replace('"auto"', '"kvm"'))
    shown = ours.kvmlab("compare", "2", "--engine=vmx")
    assert shown.status == 2
    assert shown.errors == "kvmlab: ENGINE=vmx: lesson 2 compares machines of svm, kvm\n", str(shown)


def test_a_lesson_that_is_not_written_yet_is_named_instead(ours: Variant) -> None:
    write_stubs(ours, regions("02-paging"))
    ours.make_all()
    shown = ours.kvmlab("compare", "2", "--engine=kvm")
    assert shown.status == 1
    assert "not written yet: map_page" in shown.errors.splitlines()[0]
    assert shown.errors.splitlines()[-1] == "no table: on kvm the run ended with status 1"
    assert "invlpg" not in shown.output


def test_what_a_machine_lacks_leads_to_status_77(ours: Variant) -> None:
    guest = ours.folder / "guest.c"
    guest.write_text(guest.read_text().replace("    stage_map();", '    CANNOT("it has no magic");\n    stage_map();'))
    ours.make_all()
    shown = ours.kvmlab("compare", "2", "--engine=kvm")
    assert shown.status == 77
    assert shown.errors == "kvmlab: lesson 2 cannot run on ENGINE=kvm: it has no magic\n", str(shown)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert list(aligned([["", "a", "bcd"], ["exits", 12345, 6], ["none", "-", 0]])) == [
        "            a  bcd",
        "exits  12,345    6",
        "none        -    0",
    ]
