"""Rewards for tests; a kind is there while a test needs it, so that no other test finds it in the registry."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward


@contextmanager
def tiny_rewards() -> Iterator[None]:
    """While inside, the kinds `vowels`, `overlap` and others below can be named in recipes."""

    class Vowels(Reward, kind="vowels"):
        """Share of vowels in an answer: a reward of the form."""

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [sum(c in "aeiou" for c in a.text.lower()) / (len(a.text) + 4) for a in answers]

    class Overlap(Reward, kind="overlap"):
        """Share of the reference's characters that an answer has: it looks at the row, and counts as correctness."""

        correctness: ClassVar[bool] = True

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [_overlap(a) for a in answers]

    class Exact(Reward, kind="exact"):
        """1 where an answer is the reference: a tiny model never gets there."""

        correctness: ClassVar[bool] = True

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [float(a.text == a.example.response) for a in answers]

    class Programs(Reward, kind="programs"):
        """Needs a row's tests."""

        correctness: ClassVar[bool] = True
        runs_programs: ClassVar[bool] = True

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [1.0 if a.example.tests else Abstain("the row has no tests") for a in answers]

    class Unsure(Reward, kind="unsure"):
        """Abstains."""

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [Abstain("nobody knows") for _ in answers]

    class Odd(Reward, kind="odd"):
        """1 where an answer's characters are odd in number: groups are often equal."""

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [float(len(a.text) % 2) for a in answers]

    class Long(Reward, kind="long"):
        """Characters of an answer: anything beats a short reference."""

        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [float(len(a.text)) for a in answers]

    try:
        yield
    finally:
        for kind in ("vowels", "overlap", "exact", "programs", "unsure", "odd", "long"):
            del Reward.kinds[kind]


def _overlap(answer: Answered) -> float:
    wanted = set(answer.example.response.lower())
    return len(wanted & set(answer.text.lower())) / len(wanted)
