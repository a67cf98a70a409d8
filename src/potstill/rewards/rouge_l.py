"""Rouge-L as a reward."""

from collections.abc import Sequence
from typing import ClassVar

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.rouge import best_rouge_l


class RougeL(Reward, kind="rouge_l"):
    """F1 of the longest common subsequence of words, 0 to 1, best over the accepted answers; Lin, 2004.

    Words as in the metric of that name. Rows whose accepted answers hold no word are abstained from. It measures likeness to a
    reference, not whether the answer is right.
    """

    title: ClassVar[str] = "Rouge-L"

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [best_rouge_l(answer.text, answer.example) for answer in answers]
