"""What grading a submission comes to: the words that the grader and everything that shows a grade share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckResult:
    """One check of a lesson, over all seeds."""

    check: str
    worth: int
    passed: bool
    message: str = ""  # why it failed, for the student
    seed: int = 0  # the first seed for which it failed

    @property
    def points(self) -> int:
        return self.worth if self.passed else 0

    @property
    def title(self) -> str:
        return self.check.replace("_", " ")


@dataclass(frozen=True)
class LessonResult:
    """One lesson: every check is there, also where nothing could be judged."""

    number: int
    name: str
    title: str
    engine: str
    seeds: list[int]
    checks: list[CheckResult]
    problem: str = ""  # one line: why nothing could be judged; then no check has passed

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks)

    @property
    def total(self) -> int:
        return sum(check.worth for check in self.checks)


@dataclass(frozen=True)
class Grade:
    """One submission."""

    submission: str
    lessons: list[LessonResult]
    seconds: float = 0.0

    @property
    def points(self) -> int:
        return sum(lesson.points for lesson in self.lessons)

    @property
    def total(self) -> int:
        return sum(lesson.total for lesson in self.lessons)
