"""What grading a submission comes to: the words that the grader and everything that shows a grade share."""

from dataclasses import dataclass

NOT_JUDGED = "not judged: the grader failed, not the submission; tell your instructor"


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
    is_fault_of_grader: bool = False  # then the problem is NOT_JUDGED, and the points are none of the student's

    def verdict(self, check: CheckResult) -> str:
        return "----" if self.is_fault_of_grader else "pass" if check.passed else "FAIL"

    @property
    def outcome(self) -> str:
        return "not judged" if self.is_fault_of_grader else f"{self.points} of {self.total} points"

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
    def is_fault_of_grader(self) -> bool:
        return any(lesson.is_fault_of_grader for lesson in self.lessons)

    @property
    def points(self) -> int:
        return sum(lesson.points for lesson in self.lessons)

    @property
    def total(self) -> int:
        return sum(lesson.total for lesson in self.lessons)
