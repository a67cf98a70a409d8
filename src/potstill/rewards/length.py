"""Short where right, long where wrong."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.numbers import judged_answer
from potstill.scorers.programs import Judging, grades_of

# value at the shortest and at the longest answer
_RIGHT = (1.0, 0.8)
_WRONG = (-0.5, -0.1)


class Length(Reward, kind="length"):
    """Cosine of the answer's length in tokens, less a penalty for over-long ones.

    With x = (tokens − shortest) / (longest − shortest), between 0 and 1, and c = ½ (1 + cos πx): a right answer is worth 0.8 +
    0.2 c, a wrong one −0.1 − 0.4 c (Yeo et al., arXiv:2502.03373; the bounds are Open R1's and the paper's). From `longest` on,
    `penalty` · min(1, (tokens − longest) / window) is taken off (in the way of DAPO, arXiv:2503.14476, whose window ends at the
    limit of tokens). Values lie between −0.1 − 0.4 − penalty and 1, and a right answer is always worth more than any wrong one.

    Length counts tokens; the paper's code counts characters. What is right is said by the row's tests or by its answer; rows
    that do not tell are abstained from.
    """

    title: ClassVar[str] = "Length"
    runs_programs: ClassVar[bool] = True  # under `right = "tests"`, the default
    correctness: ClassVar[bool] = False  # wrong answers gain by length alone, up to 0.4

    right: Literal["tests", "answer"] = Field(
        default="tests", description="an answer is right when its program passes all tests, or when its answer is the row's"
    )
    shortest: int = Field(default=0, ge=0, description="tokens up to which an answer is as good as the shortest one")
    longest: int = Field(default=512, ge=1, description="tokens from which an answer is over-long")
    window: int = Field(default=128, ge=1, description="tokens beyond `longest` over which the penalty grows to its full value")
    penalty: float = Field(default=0.5, ge=0, le=0.8, description="full penalty of an over-long answer")
    judging: Judging = Judging()

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Length":
        if self.shortest >= self.longest:
            raise ValueError(f"shortest = {self.shortest} must be less than longest = {self.longest}")
        return self

    def needs_tests(self) -> bool:
        return self.right == "tests"

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [
            right if isinstance(right, Abstain) else self._value(right, answer.tokens)
            for right, answer in zip(self._right(answers), answers, strict=True)
        ]

    def _right(self, answers: Sequence[Answered]) -> list[bool | Abstain]:
        texts, examples = [answer.text for answer in answers], [answer.example for answer in answers]
        if self.right == "answer":
            found = map(judged_answer, texts, examples)
            return [value if isinstance(value, Abstain) else value == 1.0 for value in found]
        grades = grades_of(texts, examples, self.judging.limits())
        return [grade if isinstance(grade, Abstain) else grade.outcome == "pass" for grade in grades]

    def _value(self, right: bool, tokens: int) -> float:
        at_shortest, at_longest = _RIGHT if right else _WRONG
        along = _between_0_and_1((tokens - self.shortest) / (self.longest - self.shortest))
        cosine = 0.5 * (1 + math.cos(math.pi * along))
        over = self.penalty * _between_0_and_1((tokens - self.longest) / self.window)
        return at_longest + (at_shortest - at_longest) * cosine - over


def _between_0_and_1(share: float) -> float:
    return min(1.0, max(0.0, share))
