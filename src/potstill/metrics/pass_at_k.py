"""Whether one of several programs passes."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from potstill.core.types import Abstain, Example
from potstill.metrics import Judged, SampledMetric
from potstill.sandbox.grader import Grade
from potstill.scorers.programs import Judging, grades_of, outcomes_of, pass_at_k


class PassAtK(SampledMetric, kind="pass_at_k"):
    """100 · (1 − C(n−c, k) / C(n, k)): the chance that one of k answers passes, from n samples of which c pass, without bias.

    Chen et al., arXiv:2107.03374, eq. 1. Samples are drawn at `temperature` over the whole vocabulary, apart from the answers
    of `decoding`. A sample that the sandbox could not judge leaves n; a row with fewer than k judged samples, or without
    tests, is abstained from.
    """

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "pass@k"
    runs_programs: ClassVar[bool] = True

    k: int = Field(default=4, ge=1, description="answers that may be tried")
    samples: int = Field(default=8, ge=1, le=1000, description="answers drawn for each row, k or more")
    judging: Judging = Judging()

    @model_validator(mode="after")
    def _enough(self) -> "PassAtK":
        if self.samples < self.k:
            raise ValueError(f"samples = {self.samples} must be at least k = {self.k}")
        return self

    def __call__(self, answers: Sequence[Sequence[str]], examples: Sequence[Example]) -> list[float | Abstain]:
        return [one.score for one in self.judged(answers, examples)]

    def judged(self, answers: Sequence[Sequence[str]], examples: Sequence[Example]) -> list[Judged]:
        flat = [answer for drawn in answers for answer in drawn]
        rows = [example for drawn, example in zip(answers, examples, strict=True) for _ in drawn]
        grades = grades_of(flat, rows, self.judging.limits())
        both = iter(zip(grades, outcomes_of(flat, rows, grades), strict=True))
        found = [[next(both) for _ in drawn] for drawn in answers]
        return [Judged(self._estimate([grade for grade, _ in row]), tuple(how for _, how in row)) for row in found]

    def _estimate(self, grades: Sequence[Grade | Abstain]) -> float | Abstain:
        reasons = [grade.reason for grade in grades if isinstance(grade, Abstain)]
        judged = [grade for grade in grades if not isinstance(grade, Abstain)]
        if len(judged) < self.k:
            return Abstain(reasons[0] if reasons else f"fewer than {self.k} samples")
        passed = sum(grade.outcome == "pass" for grade in judged)
        return 100 * pass_at_k(len(judged), passed, self.k)
