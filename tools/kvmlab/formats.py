"""A grade as those want it who read it: a person, a program, a classroom's web site.

What a check says of a submission may hold whatever the submission made it hold. shown() makes it safe for every
format at once, before any of them sees it.
"""

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

from kvmlab.grades import CheckResult, Grade, LessonResult

LONGEST = 10_000
# A step of GitHub's reporter gets a result in an environment variable, which Linux limits to 128 KiB: execve(2),
# "Limits on size of arguments and environment". This holds for a lesson of 40 checks.
LONGEST_ON_GITHUB = 500
JSON_VERSION = 2

# What XML 1.0 does not allow ("Characters"), what moves a terminal's cursor, what ends a line or turns the
# direction of the text around it.
_UNSAFE = re.compile(r"[^\t\n\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def shown(text: str, longest: int = LONGEST) -> str:
    """The text with its unsafe characters spelled out, cut where it is too long to be read."""
    left_out = len(text) - longest
    if left_out > 0:
        text = f"{text[:longest]}\n... and {left_out} more characters"
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str, longest: int = 200) -> str:
    return " ".join(shown(text, longest).split())


def safe(grade: Grade, longest: int = LONGEST) -> Grade:
    """The same grade, with nothing in it that could harm who reads it."""

    def check(result: CheckResult) -> CheckResult:
        return dataclasses.replace(result, message=shown(result.message, longest))

    def lesson(result: LessonResult) -> LessonResult:
        checks = [check(one) for one in result.checks]
        return dataclasses.replace(result, checks=checks, problem=one_line(result.problem))

    lessons = [lesson(one) for one in grade.lessons]
    return dataclasses.replace(grade, submission=one_line(grade.submission), lessons=lessons)


def _why(lesson: LessonResult, check: CheckResult) -> str:
    """All there is to say of a check that failed."""
    if lesson.problem:
        return lesson.problem
    return "\n".join(line for line in (check.message, rerun(lesson, check)) if line)


def rerun(lesson: LessonResult, check: CheckResult) -> str:
    """What a student types to see what the grader saw."""
    return f"to see that run: make run LESSON={lesson.number} SEED={check.seed}"


# ---- for people ----


def table(grade: Grade) -> str:
    lines = [f"submission: {grade.submission} ({grade.seconds:.1f} s)"]
    for lesson in grade.lessons:
        lines += _lesson_lines(lesson)
    return "\n".join([*lines, f"total: {grade.points} of {grade.total} points", ""])


def _lesson_lines(lesson: LessonResult) -> Iterator[str]:
    yield f"lesson {lesson.number}: {lesson.title} ({lesson.engine}, seeds {', '.join(map(str, lesson.seeds))})"
    if lesson.problem:
        yield f"  {lesson.problem}"
    for check in lesson.checks:
        yield f"  {lesson.verdict(check)}  {check.points}/{check.worth}  {check.title}"
        if not check.passed and not lesson.problem:
            yield from (f"             {line}" for line in _why(lesson, check).splitlines())
    yield f"lesson {lesson.number}: {lesson.outcome}"


# ---- our own JSON ----


class FormatError(Exception):
    """This is no grade as JSON, or one of another version."""


def as_json(grade: Grade) -> str:
    """{"version": 2, "submission", "seconds", "points", "total", "lessons": [{"number", "name", "title", "engine",
    "seeds", "problem", "is_fault_of_grader", "points", "total", "checks": [{"check", "title", "worth", "points",
    "passed", "message", "seed"}]}]}: the fields of kvmlab.grades. A reader must refuse a version that it does not
    know; new fields alone do not make a new version (but one that changes what the points mean does)."""

    def lesson(result: LessonResult) -> dict[str, Any]:
        checks = [vars(check) | {"title": check.title, "points": check.points} for check in result.checks]
        return vars(result) | {"points": result.points, "total": result.total, "checks": checks}

    lessons = [lesson(one) for one in grade.lessons]
    data = {"version": JSON_VERSION} | vars(grade) | {"points": grade.points, "total": grade.total, "lessons": lessons}
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str | bytes) -> Grade:
    try:
        data = json.loads(text)
        if data["version"] != JSON_VERSION:
            raise FormatError(f"a grade of version {one_line(str(data['version']))}: expected {JSON_VERSION}")
        return Grade(str(data["submission"]), [_lesson(lesson) for lesson in data["lessons"]], float(data["seconds"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"not a grade as JSON: {one_line(repr(error))}") from None


def _lesson(data: dict[str, Any]) -> LessonResult:
    name, title, engine = (str(data[key]) for key in ("name", "title", "engine"))
    seeds, checks = [int(seed) for seed in data["seeds"]], [_check(check) for check in data["checks"]]
    is_fault_of_grader = _bool(data, "is_fault_of_grader")
    return LessonResult(
        int(data["number"]), name, title, engine, seeds, checks, str(data["problem"]), is_fault_of_grader
    )


def _check(data: dict[str, Any]) -> CheckResult:
    passed = _bool(data, "passed")
    return CheckResult(str(data["check"]), int(data["worth"]), passed, str(data["message"]), int(data["seed"]))


def _bool(data: dict[str, Any], name: str) -> bool:
    value = data[name]
    if not isinstance(value, bool):  # "false" would count as true
        raise TypeError(f"{name} is {value!r}")
    return value


# ---- test results ----


def junit(grade: Grade) -> str:
    """JUnit XML as Jenkins' xUnit plugin defines it (junit-10.xsd): a testsuite for each lesson. What could not be
    judged is an error, what was wrong a failure."""
    root = ElementTree.Element("testsuites", name=grade.submission, time=f"{grade.seconds:.3f}")
    for lesson in grade.lessons:
        failed = str(sum(not check.passed for check in lesson.checks))
        failures, errors = ("0", failed) if lesson.problem else (failed, "0")
        counts = {"tests": str(len(lesson.checks)), "failures": failures, "errors": errors}
        suite = ElementTree.SubElement(root, "testsuite", {"name": lesson.name, **counts})
        properties = ElementTree.SubElement(suite, "properties")
        about = {"engine": lesson.engine, "seeds": ",".join(map(str, lesson.seeds)), "points": lesson.points}
        for name, value in (about | {"total": lesson.total}).items():
            ElementTree.SubElement(properties, "property", name=name, value=str(value))
        for check in lesson.checks:
            _junit_case(suite, lesson, check)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _junit_case(suite: ElementTree.Element, lesson: LessonResult, check: CheckResult) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=lesson.name, name=check.title)
    if not check.passed:
        why = _why(lesson, check)
        kind = "error" if lesson.problem else "failure"
        element = ElementTree.SubElement(case, kind, type=kind, message=one_line(why.partition("\n")[0]))
        element.text = why
    ElementTree.SubElement(case, "system-out").text = f"{check.points} of {check.worth} points"


def tap(grade: Grade) -> str:
    """The Test Anything Protocol, version 13 (testanything.org, "TAP13"): each failure has a YAML block, in which
    every string is one of JSON, which YAML is a superset of."""
    cases = [(lesson, check) for lesson in grade.lessons for check in lesson.checks]
    lines = ["TAP version 13", f"1..{len(cases)}", f"# submission: {grade.submission}"]
    for number, (lesson, check) in enumerate(cases, start=1):
        outcome = "ok" if check.passed else "not ok"
        lines.append(f"{outcome} {number} - lesson {lesson.number}: {check.title} ({check.points}/{check.worth})")
        if not check.passed:
            why = json.dumps(_why(lesson, check), ensure_ascii=False)
            lines += ["  ---", f"  message: {why}", "  severity: fail", f"  seed: {check.seed}", "  ..."]
    return "\n".join([*lines, f"# {grade.points} of {grade.total} points", ""])


# ---- classrooms ----


def gradescope(grade: Grade) -> str:
    """results.json, as in Gradescope's "Autograder Specifications", "Output format"."""
    tests = [
        {
            "name": f"lesson {lesson.number}: {check.title}",
            "number": f"{lesson.number}.{number}",
            "score": check.points,
            "max_score": check.worth,
            "status": "passed" if check.passed else "failed",
            "output": "" if check.passed else _why(lesson, check),
            "output_format": "text",
        }
        for lesson in grade.lessons
        for number, check in enumerate(lesson.checks, start=1)
    ]
    runs = [
        f"lesson {lesson.number}: {lesson.outcome} on {lesson.engine}, "
        f"seeds {', '.join(map(str, lesson.seeds))}{lesson.problem and f': {lesson.problem}'}"
        for lesson in grade.lessons
    ]
    # What the grader prints is for the instructor.
    how = {"execution_time": grade.seconds, "stdout_visibility": "hidden", "output_format": "text"}
    return json.dumps({"score": grade.points, **how, "output": "\n".join(runs), "tests": tests}, indent=1) + "\n"


def classroom(grade: Grade) -> str:
    """Results for the autograding-grading-reporter of GitHub Classroom, in the form that its graders give them
    (autograding-command-grader: JSON in base64), as lines for $GITHUB_OUTPUT: one for each lesson, `lesson-1`, and
    one for each check, `lesson-1-check-1`. Report either those or these: the reporter adds up what it gets.
    (In its table a lesson's checks all weigh the same; what it hands on to the classroom has our points.)"""
    lines = []
    for lesson in grade.lessons:
        lines.append(f"lesson-{lesson.number}={_runner(lesson, lesson.checks)}")
        for number, check in enumerate(lesson.checks, start=1):
            lines.append(f"lesson-{lesson.number}-check-{number}={_runner(lesson, [check])}")
    return "\n".join([*lines, ""])


def _runner(lesson: LessonResult, checks: list[CheckResult]) -> str:
    """What one grader gives. The reporter shows a message only with the status error."""
    bad = "error" if lesson.problem else "fail"
    tests = [
        {
            "name": f"lesson {lesson.number}: {check.title}",
            "status": "pass" if check.passed else bad,
            "score": check.points,
            "message": "" if check.passed else _why(lesson, check),
            "test_code": f"make check LESSON={lesson.number}",
            "filename": "",
            "line_no": 0,
            "duration": 0,
        }
        for check in checks
    ]
    status = "pass" if all(check.passed for check in checks) else bad
    worth = sum(check.worth for check in checks)
    result = {"version": 1, "status": status, "max_score": worth, "tests": tests}
    return base64.b64encode(json.dumps(result, ensure_ascii=False).encode()).decode()


def autolab(grade: Grade) -> str:
    """Autolab takes the last line as the scores (its documentation, "Guide for Lab Authors") and the one before it
    as what to show of them ("Formatted Feedback", semantic). A lesson is a problem, by the name of its folder.

    It puts quotes around each word before a colon in the scores that has none: no name may hold a colon."""
    stages: dict[str, Any] = {lesson.name: _stage(lesson) for lesson in grade.lessons}
    feedback = {"_presentation": "semantic", "stages": list(stages)} | stages
    scores = {lesson.name: lesson.points for lesson in grade.lessons}
    return f"{table(grade)}{json.dumps(feedback)}\n{json.dumps({'scores': scores})}\n"


def _stage(lesson: LessonResult) -> dict[str, dict[str, object]]:
    def case(check: CheckResult) -> dict[str, object]:
        return {"passed": True} if check.passed else {"passed": False, "hint": _why(lesson, check)}

    return {f"{check.title} ({check.points}/{check.worth})": case(check) for check in lesson.checks}


FORMATS: dict[str, Callable[[Grade], str]] = {
    "table": table,
    "json": as_json,
    "junit": junit,
    "tap": tap,
    "gradescope": gradescope,
    "classroom": classroom,
    "autolab": autolab,
}


def formatted(grade: Grade, name: str) -> str:
    """The grade in one of FORMATS. It can be written as UTF-8, and where it is one of JSON, as ASCII."""
    return FORMATS[name](safe(grade, LONGEST_ON_GITHUB if name == "classroom" else LONGEST))
