"""What an answer is worth. One file per reward; a new file here is a new `kind` in every recipe."""

import traceback
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from potstill.core.component import Component, discover
from potstill.core.errors import UserError
from potstill.core.types import Abstain, Example


@dataclass(frozen=True)
class Answered:
    """One sampled answer to a row.

    Attributes:
        example: the row that was asked, with its reference, its tests and its language.
        text: the answer without the token that ends it.
        tokens: how many were drawn, the one that ends the answer included.
        finished: whether it ended of itself; else it was cut.
    """

    example: Example
    text: str
    tokens: int
    finished: bool


class Reward(Component):
    """A figure for each answer; the weighted sum of a recipe's rewards is what GRPO climbs."""

    title: ClassVar[str] = ""
    runs_programs: ClassVar[bool] = False  # whether it needs a sandbox
    correctness: ClassVar[bool] = False  # whether it judges the answer itself, not its form

    weight: float = Field(default=1.0, gt=0, description="of this reward in the sum")

    def needs_tests(self) -> bool:
        """Whether it abstains on rows that bring no tests."""
        return type(self).runs_programs

    @abstractmethod
    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        """Of each answer its value, or why there is none; an abstention leaves its group and is counted, never zero."""


def values_of(reward: Reward, answers: Sequence[Answered]) -> list[float | Abstain]:
    """What a reward says of some answers.

    Raises:
        UserError: a reward of the user's own failed; names the line.
    """
    try:
        return reward(answers)
    except UserError:
        raise
    except Exception as error:
        if type(reward).__module__.startswith("potstill."):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"rewards: '{reward.kind}' failed with {type(error).__name__}: {error} ({last.filename}, line {last.lineno}); mend "
            "that file, or return Abstain(reason) there. What was learned before is kept as of the last checkpoint"
        ) from error


discover(__name__, __path__)
