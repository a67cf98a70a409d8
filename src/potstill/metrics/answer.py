"""Whether the final answer is right."""

from typing import ClassVar

from potstill.core.types import Abstain, Example
from potstill.metrics import TextMetric
from potstill.scorers.numbers import judged_answer


class Answer(TextMetric, kind="answer"):
    """100 when the answer's final part equals that of an accepted answer, else 0: numbers exactly, other answers by their form.

    Final is what follows `####` or stands inside `\\boxed{…}`, else all that follows the thought; of an answer that marks
    nothing, where a number is accepted, its last number. `3/4` is 0.75, `$1,234.50` is 1234.5, `50%` is 50, and in Spanish
    `1.234,5` is 1234.5. Rows that ask for a program with tests are abstained from.
    """

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Answer"

    def __call__(self, answer: str, example: Example) -> float | Abstain:
        found = judged_answer(answer, example)
        return found if isinstance(found, Abstain) else 100 * found
