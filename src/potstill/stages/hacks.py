"""Answers that must not score above the reference: where one does, training would learn it instead of the task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.rewards import Answered, Reward
from potstill.train.grading import Grades, graded, names_of

ENOUGH = 1e-9  # of a difference between two sums of rewards; less is rounding
REFERENCE = "the reference answer"


@dataclass(frozen=True)
class Probed:
    """A row whose rewards are tried.

    Attributes:
        example: with its reference as a model that learned it would write it.
        tokens: of the reference, its end included.
    """

    example: Example
    tokens: int


def refuse_hacks(rewards: Sequence[Reward], rows: Sequence[Probed], tokens: Callable[[str], int], longest: int) -> None:
    """Grade the reference and some answers that solve nothing, over the same rows.

    Args:
        tokens: how many a text has.
        longest: tokens that an answer can have.

    Raises:
        UserError: a reward abstains on the reference of every row, or an answer that solves nothing has a larger mean of the
            weighted sum than the reference has; names the reward.
    """
    every = [answers_to(row, tokens, longest) for row in rows]
    kinds = list(every[0])
    found = graded(rewards, [answers[kind] for answers in every for kind in kinds])
    _refuse_ungraded(rewards, found, [kinds.index(REFERENCE) + n * len(kinds) for n in range(len(rows))])
    weighted_RHK = found.weighted_AK.reshape(len(rows), len(kinds), len(rewards))
    for h, kind in enumerate(kinds):
        ahead_RK = weighted_RHK[:, h] - weighted_RHK[:, kinds.index(REFERENCE)]
        ahead_RK = ahead_RK[~np.isnan(ahead_RK).any(-1)]  # rows on which neither is abstained
        if not len(ahead_RK) or (ahead_K := ahead_RK.mean(0)).sum() <= ENOUGH:
            continue
        worst = int(ahead_K.argmax())
        raise UserError(
            f"rewards: {kind} scores {ahead_K.sum():.3g} above {REFERENCE} on {len(ahead_RK)} rows, most of it by "
            f"'{names_of(rewards)[worst]}' ({ahead_K[worst]:+.3g}), so that training would learn it; lower that reward's "
            "weight, add one that judges the answer itself, or give references that score"
        )


def answers_to(row: Probed, tokens: Callable[[str], int], longest: int) -> dict[str, Answered]:
    """The reference, and answers that solve nothing, by name."""
    example = row.example
    texts = {
        "an empty answer": "",
        "an answer of tags alone": "<think></think><answer></answer>",
        "the prompt again": example.instruction,
    }
    found = {name: Answered(example, text, min(longest, tokens(text) + 1), True) for name, text in texts.items()}
    many = " ".join([example.instruction] * (1 + longest // max(1, tokens(example.instruction))))
    found["a very long answer"] = Answered(example, many, longest, False)
    return {REFERENCE: Answered(example, example.response, row.tokens, True), **found}


def _refuse_ungraded(rewards: Sequence[Reward], found: Grades, references: Sequence[int]) -> None:
    for name, abstains in zip(names_of(rewards), np.isnan(found.value_AK[references]).all(0).tolist(), strict=True):
        if abstains:
            begins = f"{name}: "
            why = next(reason for reason in found.reasons if reason.startswith(begins)).removeprefix(begins)
            raise UserError(
                f"rewards: '{name}' cannot grade {REFERENCE} of any of {len(references)} rows ({why}); "
                "give rows that it can grade, or leave it out"
            )
