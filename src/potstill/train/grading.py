"""What sampled answers are worth: each reward's figure, their weighted sum, and each reward's part in the advantages."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from potstill.core.errors import UserError
from potstill.core.types import Abstain
from potstill.rewards import Answered, Reward, values_of


def names_of(rewards: Sequence[Reward]) -> list[str]:
    """One name for each reward: its kind, with its number where the kind occurs more than once."""
    kinds = [str(reward.kind) for reward in rewards]
    return [kind if kinds.count(kind) == 1 else f"{kind}_{kinds[: i + 1].count(kind)}" for i, kind in enumerate(kinds)]


@dataclass(frozen=True)
class Grades:
    """What rewards say of some answers.

    Attributes:
        value_AK: of answer a and reward k, unweighted; NaN where the reward abstains.
        weight_K: of each reward in the sum.
        reasons: why rewards abstained, `NAME: REASON`, and how often.
    """

    value_AK: np.ndarray
    weight_K: np.ndarray
    reasons: Mapping[str, int]

    @property
    def weighted_AK(self) -> np.ndarray:
        return self.value_AK * self.weight_K

    @property
    def total_A(self) -> np.ndarray:
        """Σ_k weight · value; NaN where any reward abstains: without one of its parts a sum is no reward."""
        return self.weighted_AK.sum(-1)


def graded(rewards: Sequence[Reward], answers: Sequence[Answered]) -> Grades:
    """All rewards of all answers, each reward asked once.

    Raises:
        UserError: a reward gives something else than a finite number or an `Abstain` for each answer.
    """
    value_AK, reasons = np.full((len(answers), len(rewards)), math.nan), Counter[str]()
    for k, (name, reward) in enumerate(zip(names_of(rewards), rewards, strict=True)):
        found = values_of(reward, answers)
        if len(found) != len(answers):
            raise UserError(f"rewards: '{name}' gave {len(found)} values for {len(answers)} answers; it must give one for each")
        for a, value in enumerate(found):
            if isinstance(value, Abstain):
                reasons[f"{name}: {value.reason}"] += 1
                continue
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UserError(
                    f"rewards: '{name}' gave {value!r} for the answer {answers[a].text[:60]!r} to "
                    f"{answers[a].example.instruction[:60]!r}; it must give a finite number, or abstain with a reason"
                )
            value_AK[a, k] = float(value)
    return Grades(value_AK, np.array([reward.weight for reward in rewards], dtype=np.float64), reasons)


def refuse_unfit(rewards: Sequence[Reward], references: Sequence[Answered]) -> None:
    """Refuse a reward that grades no reference: it would grade no answer, and one that it abstains on is not learned.

    Raises:
        UserError: one abstains on all of them, or gives no number.
    """
    found = graded(rewards, references)
    for k, name in enumerate(names_of(rewards)):
        if np.isnan(found.value_AK[:, k]).all():
            begins = f"{name}: "
            why = next(reason for reason in found.reasons if reason.startswith(begins)).removeprefix(begins)
            raise UserError(
                f"rewards: '{name}' grades the reference of none of {len(references)} rows ({why}); "
                "name data that it can grade, or leave it out"
            )


def attribution(groups: Sequence[np.ndarray]) -> np.ndarray | None:
    """Each reward's share of the advantages' variance: cov(w_k·r_k, R) / var(R), both less their group's mean; sums to 1.

    R = Σ_k w_k·r_k. Negative where a reward works against the sum. None where no group's sum varies.

    Args:
        groups: weighted values [G, K] of each group.
    """
    if not groups:
        return None
    centred_AK = np.concatenate([weighted_GK - weighted_GK.mean(0) for weighted_GK in groups])
    total_A = centred_AK.sum(-1)
    variance = float(total_A @ total_A)
    return (centred_AK * total_A[:, None]).sum(0) / variance if variance > 0 else None
