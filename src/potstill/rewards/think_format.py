"""Whether an answer has the whole format."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward
from potstill.scorers.thoughts import OPEN, strict


class ThinkFormat(Reward, kind="think_format"):
    """1 when the answer is `<think>` thought `</think>` `<answer>` answer `</answer>`, else 0; DeepSeek-AI, arXiv:2501.12948.

    Each tag once, in this order, white space alone outside of them, neither part empty. Stricter than the regular expression
    of the paper's code, which takes tags that stand twice and empty parts. Beside it, `tag_count` gives a model that has no
    tag yet something to climb.
    """

    title: ClassVar[str] = "Format"

    opened: bool = Field(default=False, description="whether the prompt itself ends with `<think>`, as some chat templates do")

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [float(strict(OPEN * self.opened + answer.text) is not None) for answer in answers]
