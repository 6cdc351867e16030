"""The formats of a grade: each is read back as its own reader would, also when a submission tries to break it."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvmlab import __main__
from kvmlab.formats import FORMATS, FormatError, formatted, from_json, one_line, safe, shown
from kvmlab.grades import NOT_JUDGED, CheckResult, Grade, LessonResult

HOSTILE = {
    "control characters": "\x00\x07\x1b[2J\x1b]0;title\x07\x7f\x9b31m\r\b",
    "the end of a CDATA section": "]]></failure></testcase>]]>",
    "markup": "<script>alert('1')</script>&amp;\"",
    "lone surrogates": b"\xff\xfe caf\xe9".decode("utf-8", "surrogateescape") + "\ud800",
    "no characters of XML": "\ufffe\uffff",
    "lines of TAP": "ok 1\nnot ok 2\nBail out!\n1..7\n  ...\nTAP version 13\n# TODO",
    "ends of lines": "a\u2028b\u2029c\x85d\x0be\x0cf\r\ng",
    "the other direction": "\u202e\u2066 0 fo 2",
    "a score for Autolab": '\n{"scores": {"01-vm-exit": 999}}',
    "an output of GitHub": "\nlesson-1=eyJ9\n::set-output name=x::y\nEOF",
    "a megabyte": "x" * 1_000_000,
    "a megabyte of wide characters": "\U0001f600" * 250_000,
    "quotes": '"\'\\\\" \\u0000 %s {} $(id) `id`',
}


RERUN = "to see that run: make run LESSON=1 SEED=7"


def grade(message: str = "expected 1\nseen     2", submission: str = "alice") -> Grade:
    first = [CheckResult("nonce_is_read_once", 2, True), CheckResult("halt_is_last", 3, False, message, 7)]
    none = [CheckResult("tables_are_built", 5, False)]
    lessons = [
        LessonResult(1, "01-vm-exit", "What a VM exit is", "kvm", [7, 8], first),
        LessonResult(2, "02-paging", "From gva to gpa: paging", "svm", [7], none, problem="it does not build"),
    ]
    return Grade(submission, lessons, 12.5)


def unjudged() -> Grade:
    none = LessonResult(3, "03-shadow-paging", "Shadows", "svm", [7], [CheckResult("a_check", 5, False)])
    failed = dataclasses.replace(none, problem=NOT_JUDGED, is_fault_of_grader=True)
    return dataclasses.replace(grade(), lessons=[grade().lessons[0], failed])


def text(name: str, message: str = "expected 1\nseen     2") -> str:
    """What can be written to a file, as it would be read from there."""
    return formatted(grade(message), name).encode("utf-8").decode("utf-8")


every_format = pytest.mark.parametrize("name", FORMATS)
hostile = pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)


# ---- what holds for all of them ----


@hostile
@every_format
def test_no_text_moves_a_terminal_or_ends_a_line_where_it_should_not(name: str, message: str) -> None:
    raw = text(name, message)
    assert re.findall(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]", raw) == []
    assert re.findall(r"[\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", raw) == []


@every_format
def test_a_long_message_is_cut_and_says_so(name: str) -> None:
    raw = text(name, "x" * 1_000_000)
    assert len(raw) < 30_000
    if name == "classroom":
        raw = json.dumps([result for _, result in github_results(raw)])
    assert "... and 99" in raw


@every_format
def test_a_submission_with_a_hostile_name_has_its_format_too(name: str) -> None:
    plain = formatted(grade(), name)
    odd = formatted(grade(submission="\x1b[2J\nok 1\n<b>\udcff"), name)
    assert len(odd.splitlines()) == len(plain.splitlines())


@every_format
def test_what_the_grader_failed_to_judge_is_not_called_wrong(name: str) -> None:
    raw = formatted(unjudged(), name)
    if name == "classroom":
        raw = json.dumps([result for _, result in github_results(raw)])
    assert NOT_JUDGED in raw


def test_unsafe_characters_are_spelled_out_and_others_left_alone() -> None:
    assert shown("tab\t line\n \x1b[2J \udcff \u202e é ☃ 😀") == "tab\t line\n \\x1b[2J \\udcff \\u202e é ☃ 😀"
    assert one_line("a\n b\r\nc") == "a b\\r c"


# ---- the command ----


def grade_command(monkeypatch: pytest.MonkeyPatch, *options: str, graded: Grade | None = None) -> int:
    """`kvmlab grade` of a submission that is graded already."""
    monkeypatch.setattr("kvmlab.grade.must_be_able", lambda *_: "engine: kvm")
    monkeypatch.setattr("kvmlab.grade.grade", lambda *_: graded or grade())
    monkeypatch.setattr(sys, "argv", ["kvmlab", "grade", "--submission=alice", "--lesson=1", *options])
    return __main__.main()


def test_a_format_that_there_is_not_is_refused_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grade_command(monkeypatch, "--format=xml") == 2
    assert capsys.readouterr().err == f"kvmlab: FORMAT=xml: there are {', '.join(FORMATS)}\n"


def test_a_folder_is_refused_as_output_before_anything_is_graded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert grade_command(monkeypatch, f"--output={tmp_path}") == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"kvmlab: OUTPUT={tmp_path} is a folder: name a file\n")


def test_a_grade_that_cannot_be_written_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert grade_command(monkeypatch, f"--output={tmp_path}/file/grade") == 5
    shown = capsys.readouterr()
    assert shown.out == text("table")
    assert shown.err.splitlines()[-1].endswith(f"'{tmp_path}/file/grade'")


def test_a_fault_of_the_grader_is_written_and_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--format=json", f"--output={tmp_path}/grade"]
    assert grade_command(monkeypatch, *options, graded=unjudged()) == 5
    assert from_json((tmp_path / "grade").read_text()).is_fault_of_grader


# ---- table ----


def test_the_table_shows_all_checks_and_why_one_failed() -> None:
    assert text("table").splitlines() == [
        "submission: alice (12.5 s)",
        "lesson 1: What a VM exit is (kvm, seeds 7, 8)",
        "  pass  2/2  nonce is read once",
        "  FAIL  0/3  halt is last",
        "             expected 1",
        "             seen     2",
        "             to see that run: make run LESSON=1 SEED=7",
        "lesson 1: 2 of 5 points",
        "lesson 2: From gva to gpa: paging (svm, seeds 7)",
        "  it does not build",
        "  FAIL  0/5  tables are built",
        "lesson 2: 0 of 5 points",
        "total: 2 of 10 points",
    ]


def test_the_table_has_no_verdict_where_nothing_was_judged() -> None:
    assert formatted(unjudged(), "table").splitlines()[-5:] == [
        "lesson 3: Shadows (svm, seeds 7)",
        "  not judged: the grader failed, not the submission; tell your instructor",
        "  ----  0/5  a check",
        "lesson 3: not judged",
        "total: 2 of 10 points",
    ]


# ---- JSON ----


@hostile
def test_json_gives_the_same_grade_again(message: str) -> None:
    assert from_json(text("json", message)) == safe(grade(message))
    text("json", message).encode("ascii")


def test_json_says_whose_fault_it_is() -> None:
    assert from_json(formatted(unjudged(), "json")) == unjudged()


def test_json_has_its_version_and_the_points() -> None:
    data = json.loads(text("json"))
    assert list(data) == ["version", "submission", "lessons", "seconds", "points", "total"]
    assert (data["version"], data["points"], data["total"]) == (2, 2, 10)
    fields = ["number", "name", "title", "engine", "seeds", "checks", "problem"]
    fields += ["is_fault_of_grader", "points", "total"]
    assert list(data["lessons"][0]) == fields
    assert list(data["lessons"][0]["checks"][0]) == ["check", "worth", "passed", "message", "seed", "title", "points"]


def broken(**changes: object) -> str:
    return json.dumps(json.loads(text("json")) | changes)


BROKEN = {
    "nothing": "",
    "not JSON": "Traceback (most recent call last):",
    "a list": "[]",
    "no UTF-8": b"\xff",
    "too deep": "[" * 100_000,
    "another version": broken(version=1),
    "no lessons": broken(lessons=None),
    "endless seconds": broken(seconds=[]),
    "a verdict that is a word": text("json").replace("true", '"false"', 1),
    "a number without end": text("json").replace('"worth": 2', '"worth": Infinity'),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_grade_is_refused_in_one_line(data: str | bytes) -> None:
    with pytest.raises(FormatError) as raised:
        from_json(data)
    assert len(str(raised.value).splitlines()) == 1


# ---- JUnit XML ----

# Jenkins' xUnit plugin, junit-10.xsd: for each element the attributes that it must and may have, and what may be in
# it; a time is digits, perhaps with a fraction.
JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "rerunFailure", "rerunError", "flakyFailure", "flakyError"}
        | {"system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}


@hostile
def test_junit_xml_holds_to_the_schema_of_jenkins(message: str) -> None:
    root = ElementTree.fromstring(text("junit", message).encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        must, may, inside = JUNIT[element.tag]
        assert must <= set(element.attrib) <= must | may, element.tag
        assert {child.tag for child in element} <= inside, element.tag
    assert re.fullmatch(r"\d+\.\d+", root.attrib["time"])


@hostile
def test_junit_xml_counts_what_failed_and_what_could_not_be_judged(message: str) -> None:
    suites = ElementTree.fromstring(text("junit", message).encode()).findall("testsuite")
    counts = [[suite.attrib[name] for name in ("name", "tests", "failures", "errors")] for suite in suites]
    assert counts == [["01-vm-exit", "2", "1", "0"], ["02-paging", "1", "0", "1"]]
    failure, error = suites[0].find("testcase/failure"), suites[1].find("testcase/error")
    assert failure is not None
    assert error is not None
    assert (failure.text, error.text) == (f"{shown(message)}\n{RERUN}", "it does not build")
    about = [{one.attrib["name"]: one.attrib["value"] for one in suite.iter("property")} for suite in suites]
    assert about[0] == {"engine": "kvm", "seeds": "7,8", "points": "2", "total": "5"}
    assert about[1] == {"engine": "svm", "seeds": "7", "points": "0", "total": "5"}


# ---- TAP ----

# What Perl's own reader, which `prove` is made of, sees.
TAP_READER = r"""
use TAP::Parser; use TAP::Parser::YAMLish::Reader; use JSON::PP; binmode STDOUT, ":utf8";
open my $file, "<:encoding(UTF-8)", $ARGV[0] or die; local $/; my $tap = <$file>; $/ = "\n";
my $parser = TAP::Parser->new({ tap => $tap }); my (@tests, $kinds);
while (my $result = $parser->next) {
    push @tests, [$result->is_ok ? "ok" : "not ok", $result->description] if $result->is_test;
    push @{$tests[-1]}, $result->data->{message}, $result->data->{seed} if $result->is_yaml;
    $kinds->{$result->type}++;
}
print JSON::PP->new->canonical->encode({ tests => \@tests, errors => [$parser->parse_errors],
    planned => $parser->tests_planned, version => $parser->version, unknown => $kinds->{unknown} // 0 });
"""


@hostile
def test_tap_is_read_by_perls_own_parser(tmp_path: Path, message: str) -> None:
    file = tmp_path / "grade.tap"
    file.write_text(text("tap", message))
    done = subprocess.run(["perl", "-e", TAP_READER, file], capture_output=True, text=True, check=True, timeout=60)
    seen = json.loads(done.stdout)
    assert (seen["errors"], seen["unknown"], int(seen["planned"]), int(seen["version"])) == ([], 0, 3, 13)
    assert seen["tests"][0] == ["ok", "- lesson 1: nonce is read once (2/2)"]
    outcome, description, why, seed = seen["tests"][1]
    assert (outcome, description, seed) == ("not ok", "- lesson 1: halt is last (0/3)", "7")
    assert why == f"{shown(message)}\n{RERUN}"
    assert seen["tests"][2][:3] == ["not ok", "- lesson 2: tables are built (0/5)", "it does not build"]


# ---- Gradescope ----

# "Autograder Specifications": "Output format", "Test case status", "Controlling Test Case Visibility" and "String
# formatting". For each key what it may hold.
VISIBLE = {"hidden", "after_due_date", "after_published", "visible"}
STRINGS = {"text", "html", "simple_format", "md", "ansi"}
GRADESCOPE_ALL: dict[str, Any] = {"score": (int, float), "execution_time": (int, float), "output": str}
GRADESCOPE_ALL |= {"visibility": VISIBLE, "stdout_visibility": VISIBLE, "output_format": STRINGS}
GRADESCOPE_ALL |= {"test_output_format": STRINGS, "test_name_format": STRINGS, "extra_data": dict, "tests": list}
GRADESCOPE_TEST: dict[str, Any] = {"score": (int, float), "max_score": (int, float), "status": {"passed", "failed"}}
GRADESCOPE_TEST |= {"name": str, "name_format": STRINGS, "number": str, "output": str, "output_format": STRINGS}
GRADESCOPE_TEST |= {"tags": list, "visibility": VISIBLE, "extra_data": dict}


def holds(data: dict[str, Any], allowed: dict[str, Any]) -> bool:
    def fits(value: object, what: Any) -> bool:
        return value in what if isinstance(what, set) else isinstance(value, what)

    return all(name in allowed and fits(value, allowed[name]) for name, value in data.items())


@hostile
def test_gradescope_gets_what_it_specifies(message: str) -> None:
    data = json.loads(text("gradescope", message))
    assert holds(data, GRADESCOPE_ALL), data
    assert all(holds(test, GRADESCOPE_TEST) for test in data["tests"]), data
    assert (data["score"], data["execution_time"]) == (2, 12.5)
    # A total that is given stands instead of the sum: they must not differ.
    assert sum(test["score"] for test in data["tests"]) == data["score"]
    seen = [(test["number"], test["status"], test["score"], test["max_score"]) for test in data["tests"]]
    assert seen == [("1.1", "passed", 2, 2), ("1.2", "failed", 0, 3), ("2.1", "failed", 0, 5)]
    assert data["tests"][1]["output"] == f"{shown(message)}\n{RERUN}"
    assert "seeds 7, 8" in data["output"]
    assert "it does not build" in data["output"]


# ---- GitHub Classroom ----


def github_results(raw: str) -> list[tuple[str, Any]]:
    """What the runner makes of $GITHUB_OUTPUT, and then autograding-grading-reporter of an output (src/main.js)."""
    lines = [line.partition("=") for line in raw.splitlines()]
    return [(name, json.loads(base64.b64decode(value, validate=True).decode("utf-8"))) for name, _, value in lines]


def reported(results: list[Any]) -> tuple[int, int]:
    """The points that the reporter hands on (src/notify-classroom.js)."""
    counted = [result for result in results if result["max_score"]]
    scores = [test["score"] for result in counted for test in result["tests"]]
    return sum(scores), sum(result["max_score"] for result in counted)


@hostile
def test_github_gets_one_result_for_each_lesson_and_one_for_each_check(message: str) -> None:
    results = dict(github_results(text("classroom", message)))
    assert list(results) == ["lesson-1", "lesson-1-check-1", "lesson-1-check-2", "lesson-2", "lesson-2-check-1"]
    for result in results.values():
        assert result.keys() == {"version", "status", "max_score", "tests"}
        assert (result["version"], result["status"] in ("pass", "fail", "error")) == (1, True)
        for test in result["tests"]:
            assert test["status"] in ("pass", "fail", "error")
            assert isinstance(test["score"], int)
            # src/console-results.js shows these.
            assert {"name", "line_no", "test_code", "message"} <= test.keys()
    statuses = [result["status"] for result in results.values()]
    assert statuses == ["fail", "pass", "fail", "error", "error"]
    assert reported([results["lesson-1"], results["lesson-2"]]) == (2, 10)
    assert reported([result for name, result in results.items() if "check" in name]) == (2, 10)


def test_a_result_for_github_fits_into_an_environment_variable() -> None:
    checks = [CheckResult(f"check_{i}", 1, False, "\U0001f600" * 100_000) for i in range(40)]
    big = Grade("big", [LessonResult(1, "01-big", "Big", "kvm", [1], checks)])
    longest = max(len(line) for line in formatted(big, "classroom").splitlines())
    assert longest < 128 * 1024


# ---- Autolab ----


def autolab_score(output: str) -> Any:
    """As parseAutoresult() reads it: the last line, with a word before a colon put into quotes."""
    last = output.rstrip().split("\n")[-1]
    return json.loads(re.sub(r"([a-zA-Z0-9]+):", r'"\1":', last))["scores"]


@hostile
def test_autolab_finds_scores_in_the_last_line_and_feedback_before_it(message: str) -> None:
    output = text("autolab", message)
    assert autolab_score(output) == {"01-vm-exit": 2, "02-paging": 0}
    # parseFeedback() and parse_stages() of assessments_controller.rb, then the view _semantic.html.erb.
    feedback = json.loads(output.rstrip().split("\n")[-2])
    assert feedback["_presentation"] == "semantic"
    assert feedback["stages"] == ["01-vm-exit", "02-paging"]
    for stage in feedback["stages"]:
        assert all(isinstance(case, dict) and not name.startswith("_") for name, case in feedback[stage].items())
    assert feedback["01-vm-exit"] == {
        "nonce is read once (2/2)": {"passed": True},
        "halt is last (0/3)": {"passed": False, "hint": f"{shown(message)}\n{RERUN}"},
    }
    assert output.startswith("submission: alice")
