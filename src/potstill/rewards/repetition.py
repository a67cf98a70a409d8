"""Against answers that repeat themselves."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.rouge import repeated, units


class Repetition(Reward, kind="repetition"):
    """−`penalty` · (1 − different / all n-grams of words and marks), between −`penalty` and 0; Yeo et al., arXiv:2502.03373.

    Words of any script, as in `scorers/rouge.py`. Unlike in Open R1 and the paper's code, where an answer too short for one
    n-gram is worth the best value, such an answer is worth the worst: to say nothing is no way not to repeat oneself.
    """

    title: ClassVar[str] = "Repetition"

    n: int = Field(default=3, ge=1, le=20, description="words of an n-gram")
    penalty: float = Field(default=0.1, gt=0, le=1, description="of an answer that only repeats")

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [0.0 - self.penalty * self._repeated(answer.text) for answer in answers]

    def _repeated(self, text: str) -> float:
        return repeated(text, self.n) if len(units(text)) >= self.n else 1.0
