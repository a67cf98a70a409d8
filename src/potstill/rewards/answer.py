"""Whether an answer is right, where right is a text or a number."""

from collections.abc import Sequence
from typing import ClassVar

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.numbers import judged_answer


class Answer(Reward, kind="answer"):
    """1 when the answer's final part equals that of an accepted answer, else 0.

    Final is what follows `####` or stands inside `\\boxed{…}`, else all that follows the thought. Numbers are compared exactly,
    as the row's language writes them (3/4 = 0.75, $1,234.50 = 1234.5, in Spanish 1.234,5); other answers by `exact_form`:
    without case, outer quotes and final punctuation. Rows whose accepted answers are empty, and rows that ask for a program
    with tests, are abstained from.
    """

    title: ClassVar[str] = "Answer"
    correctness: ClassVar[bool] = True

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [judged_answer(answer.text, answer.example) for answer in answers]
