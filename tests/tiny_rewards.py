"""Rewards for tests; a kind is there while a test needs it, so that no other test finds it in the registry."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward


@contextmanager
def tiny_rewards() -> Iterator[None]:
    """While inside, the kinds `vowels`, `overlap` and `odd` can be named in recipes."""

    class Vowels(Reward, kind="vowels"):
        """Share of vowels in an answer: a reward of the form."""

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [sum(c in "aeiou" for c in a.text.lower()) / (len(a.text) + 4) for a in answers]

    class Overlap(Reward, kind="overlap"):
        """Share of the reference's characters that an answer has: it looks at the row, and counts as correctness."""

        correctness: ClassVar[bool] = True

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [_overlap(a) for a in answers]

    class Odd(Reward, kind="odd"):
        """1 where an answer's tokens are odd in number, abstaining from answers that were cut."""

        cut: str = "abstain"

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [float(a.tokens % 2) if a.finished or self.cut != "abstain" else Abstain("it was cut") for a in answers]

    try:
        yield
    finally:
        for kind in ("vowels", "overlap", "odd"):
            del Reward.kinds[kind]


def _overlap(answer: Answered) -> float:
    wanted = set(answer.example.response.lower())
    return len(wanted & set(answer.text.lower())) / len(wanted)
