"""A grade as a page for its student: one file of HTML, which loads nothing and runs nothing."""

from collections.abc import Iterator
from html import escape

from kvmlab.formats import one_line, rerun, safe
from kvmlab.grades import CheckResult, Grade, LessonResult

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100% }
td { border-top: 1px solid #ccc; padding: .2em .8em .2em 0; vertical-align: top }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0; background: #f4f4f4; padding: .5em }
.pass { color: #060 } .FAIL { color: #a00; font-weight: bold }
"""


_UNGRADED = "<p>It could not be graded: tell your instructor, who has been told why.</p>"


def page(name: str, grade: Grade | None) -> str:
    """For the submission of this name. Why there is no grade is not the student's business: it names what is on the
    machine of the grader."""
    title = escape(one_line(name))
    body = list(_grade(safe(grade))) if grade else [_UNGRADED]
    head = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
    ]
    return "\n".join([*head, *body, "</body>\n</html>\n"])


def _grade(grade: Grade) -> Iterator[str]:
    yield f"<p>{grade.points} of {grade.total} points</p>"
    for lesson in grade.lessons:
        yield from _lesson(lesson)


def _lesson(lesson: LessonResult) -> Iterator[str]:
    seeds = ", ".join(map(str, lesson.seeds))
    yield f"<h2>Lesson {lesson.number}: {escape(lesson.title)}</h2>"
    yield f"<p>{lesson.outcome}, on {escape(lesson.engine)} with the seeds {seeds}</p>"
    if lesson.problem:
        yield f"<pre>{escape(lesson.problem)}</pre>"
    yield "<table>"
    yield from (_check(lesson, check) for check in lesson.checks)
    yield "</table>"


def _check(lesson: LessonResult, check: CheckResult) -> str:
    verdict = lesson.verdict(check)
    why = f"<pre>{escape(check.message)}\n{rerun(lesson, check)}</pre>" if check.message else ""
    cells = [f'<td class="{verdict}">{verdict}</td>', f"<td>{check.points}/{check.worth}</td>"]
    return f"<tr>{''.join(cells)}<td>{escape(check.title)}{why}</td></tr>"
