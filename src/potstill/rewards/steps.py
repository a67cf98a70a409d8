"""Whether an answer thinks in steps."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.steps import steps
from potstill.scorers.thoughts import thought_of


class Steps(Reward, kind="steps"):
    """min(1, n / 3) for n different steps that the answer names, between 0 and 1; Open R1's reasoning_steps (Hugging Face,
    2025).

    Steps are `Step k:`, numbered lines, bullets and ordinals, in English and Spanish (`Paso k:`, `Primero,` `Luego,`
    `Finalmente,` …). Of an answer with a thought, the thought is searched. Unlike there, a step counts once and must say
    something, so that `Step 1: Step 1: Step 1:` is not worth three steps, and lines of programs are none.
    """

    title: ClassVar[str] = "Steps"

    enough: int = Field(default=3, ge=1, description="steps that are worth 1")

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [min(1.0, steps(thought_of(answer.text) or answer.text) / self.enough) for answer in answers]
