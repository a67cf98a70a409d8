"""How much of the format an answer has."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.thoughts import OPEN, TAGS, tags_in_place


class TagCount(Reward, kind="tag_count"):
    """Share of the tags `<think>`, `</think>`, `<answer>`, `</answer>` that stand once and in order: 0, ¼, ½, ¾ or 1.

    A partial score beside `think_format`, which stays 0 for ever in a small model that never writes all four. The counting is
    Open R1's (Hugging Face, 2025); that a tag must not stand before its predecessors is ours.
    """

    title: ClassVar[str] = "Tags"

    opened: bool = Field(default=False, description="whether the prompt itself ends with `<think>`, as some chat templates do")

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [tags_in_place(OPEN * self.opened + answer.text) / len(TAGS) for answer in answers]
