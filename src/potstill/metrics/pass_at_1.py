"""Whether the program of an answer passes."""

from collections.abc import Sequence
from typing import ClassVar

from potstill.core.types import Abstain, Example
from potstill.metrics import Judged, TextMetric
from potstill.scorers.programs import Judging, grades_of, outcomes_of


class PassAt1(TextMetric, kind="pass_at_1"):
    """100 when the answer's program passes all of its row's tests in the sandbox, else 0. Chen et al., arXiv:2107.03374, k = 1.

    One answer a row, as `decoding` says. Which part of an answer is its program is in `scorers/code.py`: the last fenced block
    of Python after the thought, else the whole answer. Rows without tests are abstained from, and runs that the sandbox could
    not judge.
    """

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "pass@1"
    runs_programs: ClassVar[bool] = True

    judging: Judging = Judging()

    def __call__(self, answer: str, example: Example) -> float | Abstain:
        return self.scores([answer], [example])[0]

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> list[float | Abstain]:
        return [one.score for one in self.judged(answers, examples)]

    def judged(self, answers: Sequence[str], examples: Sequence[Example]) -> list[Judged]:
        grades = grades_of(answers, examples, self.judging.limits())
        scores = [grade if isinstance(grade, Abstain) else 100.0 * (grade.outcome == "pass") for grade in grades]
        return [Judged(score, (how,)) for score, how in zip(scores, outcomes_of(answers, examples, grades), strict=True)]
