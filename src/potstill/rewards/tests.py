"""Whether an answer's program passes its row's tests."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.programs import Judging, grades_of


class Tests(Reward, kind="tests"):
    """1 when the answer's program passes all of its row's tests, else 0; or the share of the tests that it passes.

    The program is run in the sandbox, by its tests' cases (stdin and stdout) or asserts; which part of an answer is its program
    is in `scorers/code.py`: the last fenced block of Python after the thought, else the whole answer. Rows without tests, and
    runs that the sandbox could not judge, are abstained from. `share` is denser, and worth something to a program that prints
    one constant.
    """

    title: ClassVar[str] = "Tests"
    runs_programs: ClassVar[bool] = True
    correctness: ClassVar[bool] = True

    count: Literal["all", "share"] = Field(default="all", description="all tests or nothing, or the share that passes")
    judging: Judging = Judging()

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        texts, examples = [answer.text for answer in answers], [answer.example for answer in answers]
        return [
            grade if isinstance(grade, Abstain) else self._value(grade.outcome == "pass", grade.share or 0.0)
            for grade in grades_of(texts, examples, self.judging.limits())
        ]

    def _value(self, passed: bool, share: float) -> float:
        return float(passed) if self.count == "all" else share
