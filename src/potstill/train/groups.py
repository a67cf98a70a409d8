"""Rounds of groups: several answers to each prompt, rewarded, compared within their group, and learned in some steps."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from pydantic import Field

from potstill.core.errors import UserError
from potstill.data.batches import SHARE, Order, StepRow
from potstill.data.rollout import Engine, Rollout, Sampling
from potstill.data.store import TokenStore
from potstill.losses.judging import ADVANTAGE
from potstill.losses.policy import PolicyGradient, advantages, shares, without_signal
from potstill.train.grading import Grades, attribution
from potstill.train.loop import Optim, tokens_of
from potstill.train.practice import FRUITLESS, asked_of, of_answers
from potstill.train.rounds import Drawn, Judge, PerRound, RoundLessons, all_cut, drawn_row, lasting

Grade = Callable[[Sequence[int], Sequence[Rollout]], Grades]  # rows of the store, and an answer to each


class GroupSamples(PerRound):
    """How many answers a prompt gets, how they are drawn, and for how many steps they are learned."""

    per_prompt: int = Field(default=8, ge=2, description="group size: answers to each prompt")
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer, in tokens; a longer one is cut there")
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="of sampling, over the whole vocabulary; the policy is the distribution at it"
    )
    updates: int = Field(default=1, ge=1, description="optimiser steps that each learn from all answers of a round")
    patience: int = Field(
        default=20,
        ge=0,
        description="rounds one after the other without a group whose rewards differ, after which training ends; 0: it goes on",
    )


@dataclass(frozen=True)
class Graded(Drawn):
    """A round's answers, graded.

    Attributes:
        silent: rounds one after the other, up to this one, without a group whose rewards differ.
        ungraded: rounds one after the other, up to this one, in which no answer was graded.
    """

    silent: int = 0
    ungraded: int = 0


@dataclass(frozen=True)
class Group:
    """The answers to one prompt.

    Attributes:
        row: of the store.
        answers: G of them.
        value_GK: each reward's, unweighted; NaN where it abstains.
        weighted_GK: the same times the rewards' weights.
    """

    row: int
    answers: Sequence[Rollout]
    value_GK: np.ndarray
    weighted_GK: np.ndarray

    @property
    def total_G(self) -> np.ndarray:
        return self.weighted_GK.sum(-1)

    @property
    def graded_G(self) -> np.ndarray:
        """Whether no reward abstains."""
        return ~np.isnan(self.total_G)

    @property
    def silent(self) -> bool:
        """Whether there is nothing to learn from it."""
        return without_signal(self.total_G[self.graded_G])


@dataclass(frozen=True)
class Draws:
    """All that a round drew.

    Attributes:
        first: the group of each prompt as it was drawn first.
        learned: the groups that are learned.
        generated: tokens drawn.
        again: groups of other prompts, which were drawn in place of those without signal.
        reasons: why rewards abstained, and how often.
    """

    first: Sequence[Group]
    learned: Sequence[Group]
    generated: int
    again: int
    reasons: Mapping[str, int]

    @property
    def answers(self) -> int:
        """All that were drawn; groups are of one size."""
        return (len(self.first) + self.again) * len(self.first[0].answers)


class Groups(RoundLessons):
    """What each step reads: the answers of its round that teach, with advantages and with what normalises their losses.

    A round answers the prompts of its rows of data `per_prompt` times each. An answer on which a reward abstains leaves its
    group; cut answers count in their group and, where `policy` masks them, not in the loss. Figures of rewards are of the
    round's own prompts, because those that replace silent ones are learned by what their rewards are. Which prompts and tokens
    are drawn follows from the seed, the step, the prompt, and how often prompts were replaced before.

    Args:
        grade: rewards of answers to rows of the store.
        objective: what learns from the answers; its ratios are shown.
        names: of the rewards, in the order of `grade`.
        judge: gets sampled rows, and gives them with log-probabilities as the trainer has them, and figures; asked where
            several updates learn from them.
        watch: gets the number of finished answers, and of all.
        say: gets a line for a person.
    """

    def __init__(
        self,
        store: TokenStore,
        optim: Optim,
        samples: GroupSamples,
        objective: PolicyGradient,
        engine: Engine,
        grade: Grade,
        names: Sequence[str],
        judge: Judge,
        seed: int,
        watch: Callable[[int, int], None],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(store, optim, samples, False, seed, Graded())
        self.others = Order(len(store), len(store), seed + 2**32)  # another seed than any stage's
        self.samples, self.objective, self.engine, self.grade, self.names = samples, objective, engine, grade, names
        self.policy = objective.policy
        self.judge, self.watch, self.say, self.said = judge, watch, say, False

    def _lesson(self, others: Sequence[int]) -> list[StepRow]:
        self.objective.forget()
        return list(self.drawn.rows)

    def figures(self) -> Mapping[str, float]:
        low, high = self.objective.ratios
        ratios = {"samples_ratio_min": low, "samples_ratio_max": high} if low <= high else {}
        return {**super().figures(), **ratios}

    def _draw(self, number: int, step: int, asked: Sequence[int]) -> Graded:
        draws = self._drawn(number, step, asked)
        self._tell(draws)
        rows = [row for group in draws.learned for row in self._rows(group)]
        streaks = self._streaks(draws, rows)
        self._refuse(step, draws, streaks)
        rows = self._teaching(self._normalised(rows, draws.learned))
        # in its only update an answer is learned by what it was drawn by, which the objective finds as it learns
        told, figures = self.judge(rows) if rows and self.samples.updates > 1 else (rows, {})
        judged = {f"samples_{name}": value for name, value in figures.items()}
        return replace(
            streaks,
            round=number,
            rows=tuple(map(lasting, told)),
            figures={**figures_of(draws, self.names), **judged},
            generated=self.drawn.generated + draws.generated,
        )

    def _drawn(self, number: int, step: int, asked: Sequence[int]) -> Draws:
        """Groups of a round's prompts; in place of those without signal others', as often as `policy.redraws` says."""
        first, learned, reasons = list[Group](), list[Group](), Counter[str]()
        others, rows, generated, again = self._others(number, asked), list(asked), 0, 0
        for attempt in range(1 + self.policy.redraws):
            found, why, tokens = self._groups(step, attempt, rows)
            first, again = first or found, again + (len(found) if attempt else 0)
            learned += [group for group in found if not (self.policy.redraws and group.silent)]
            reasons, generated = reasons + why, generated + tokens
            rows = list(islice(others, sum(group.silent for group in found))) if attempt < self.policy.redraws else []
            if not rows:
                break
        return Draws(first, learned, generated, again, reasons)

    def _others(self, number: int, asked: Sequence[int]) -> Iterator[int]:
        """The rows that a round does not ask, in an order of its own, so that nothing of it has to be kept."""
        taken = set(asked)
        yield from (row for row in self.others.step(number) if row not in taken)

    def _groups(self, step: int, attempt: int, rows: Sequence[int]) -> tuple[list[Group], Counter[str], int]:
        """A group for each row, why rewards abstained, and the tokens drawn."""
        size = self.samples.per_prompt
        sampling = Sampling(temperature=self.samples.temperature, max_new_tokens=self.samples.max_new_tokens)
        seed = attempt << 64 | self.seed << 32 | step
        found = self.engine(asked_of(self.data.store, rows), size, sampling, seed, self.watch)
        grades = self.grade([row for row in rows for _ in range(size)], found)
        parts = [slice(n * size, (n + 1) * size) for n in range(len(rows))]
        groups = [
            Group(row, found[part], grades.value_AK[part], grades.weighted_AK[part])
            for row, part in zip(rows, parts, strict=True)
        ]
        return groups, Counter(grades.reasons), sum(len(each.ids) for each in found)

    def _rows(self, group: Group) -> list[StepRow]:
        """A group's answers that are learned, each token with its answer's advantage."""
        weight, (prompt,) = self.data.store.weight(group.row), asked_of(self.data.store, [group.row])
        answers = [answer for answer, graded in zip(group.answers, group.graded_G, strict=True) if graded]
        advantage_G = advantages(group.total_G[group.graded_G], self.policy.group_std)
        found = []
        for answer, advantage in zip(answers, advantage_G, strict=True):
            if self.policy.learns(answer.finished):
                row = drawn_row([prompt], replace(answer, prompt=0), weight)
                found.append(_with(row, ADVANTAGE, float(advantage)))
        return found

    def _normalised(self, rows: Sequence[StepRow], learned: Sequence[Group]) -> list[StepRow]:
        if not rows:
            return []
        whole = math.fsum(self.data.store.weight(group.row) * group.graded_G.sum() for group in learned)
        lengths, weights = [len(row.response) for row in rows], [row.weight for row in rows]
        found = shares(lengths, weights, self.policy.normaliser, whole, self.samples.max_new_tokens)
        return [_with(row, SHARE, share) for row, share in zip(rows, found, strict=True)]

    def _teaching(self, rows: Sequence[StepRow]) -> list[StepRow]:
        """Without the answers of advantage 0, whose loss and gradient are 0 where the policy's gain is all that is minimised.

        The shares of the others make up for it that the step is divided by fewer tokens. Where none would be left the shortest
        answer stays: with a gradient of 0 the optimiser still makes its step.
        """
        if self.policy.beta or self.policy.beta_kd or not rows:
            return list(rows)
        teaching = [row for row in rows if row.given[ADVANTAGE].any()] or [min(rows, key=len)]
        part = tokens_of(teaching) / tokens_of(rows)
        return [_with(row, SHARE, part * float(row.given[SHARE][0])) for row in teaching]

    def _streaks(self, draws: Draws, rows: Sequence[StepRow]) -> Graded:
        """For how many rounds it has been so."""
        before = self.drawn
        assert isinstance(before, Graded)
        ungraded = not any(group.graded_G.any() for group in draws.first)
        silent = all(group.silent for group in draws.learned)
        all_masked = not rows and any(group.graded_G.any() for group in draws.learned)
        return Graded(
            fruitless=before.fruitless + 1 if all_masked else 0,
            silent=before.silent + 1 if silent else 0,
            ungraded=before.ungraded + 1 if ungraded else 0,
        )

    def _refuse(self, step: int, draws: Draws, streaks: Graded) -> None:
        """Raises:
        UserError: nothing has been learned for too long; says why.
        """
        if streaks.ungraded == FRUITLESS:
            raise UserError(
                f"step {step + 1}: in {FRUITLESS} rounds no answer could be graded ({_commonest(draws.reasons)}); "
                "look at what that reward needs, or leave it out of `rewards`"
            )
        if streaks.fruitless == FRUITLESS:
            raise all_cut(step, self.samples.max_new_tokens, "policy.cut = 'counted'")
        if self.samples.patience and streaks.silent == self.samples.patience:
            totals = np.concatenate([group.total_G[group.graded_G] for group in draws.first])
            mean = f"{totals.mean():.3g} on average" if len(totals) else "none"
            raise UserError(
                f"step {step + 1}: in samples.patience = {streaks.silent} rounds no group's rewards differed "
                f"(the last: {mean}), so that there is nothing to learn from; begin with a model that sometimes succeeds, or "
                "easier rows, add a reward that gives part of the credit, or raise samples.per_prompt; where all answers are "
                f"right, the rows are learned: set optim.steps = {max(1, step + 1 - self.samples.patience)}"
            )

    def _tell(self, draws: Draws) -> None:
        """Say once that rewards abstain."""
        if draws.reasons and not self.said:
            self.said = True
            abstained = sum(int((~group.graded_G).sum()) for group in draws.first)
            answers = sum(len(group.answers) for group in draws.first)
            self.say(f"{abstained} of a round's {answers} answers were not graded: {_commonest(draws.reasons)}")


def figures_of(draws: Draws, names: Sequence[str]) -> dict[str, float]:
    """What the curves show of a round; what nothing is known of is left out."""
    first = draws.first
    totals = [group.total_G[group.graded_G] for group in first]
    spreads = [total_G.std(ddof=1) for total_G in totals if len(total_G) > 1]
    all_totals, value_AK = np.concatenate(totals), np.concatenate([group.value_GK for group in first])
    found = {f"samples_{name}": value for name, value in _means(all_totals, value_AK, names).items()}
    parts = attribution([group.weighted_GK[group.graded_G] for group in draws.learned if not group.silent])
    if spreads:
        found["samples_spread"] = float(np.mean(spreads))
    if parts is not None:
        found |= {f"samples_attribution_{name}": float(part) for name, part in zip(names, parts, strict=True)}
    return {
        **of_answers([answer for group in first for answer in group.answers]),
        **found,
        "samples_silent": sum(group.silent for group in first) / len(first),
        "samples_abstained": 1 - len(all_totals) / len(value_AK),
        "samples_redrawn": draws.again / len(first),
        "samples_drawn": draws.answers,
    }


def _means(total_A: np.ndarray, value_AK: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Of the weighted sum and of each reward, where any answer has one."""
    given = {f"reward_{name}": value_A[~np.isnan(value_A)] for name, value_A in zip(names, value_AK.T, strict=True)}
    return {name: float(values.mean()) for name, values in {"reward_total": total_A, **given}.items() if len(values)}


def _commonest(reasons: Mapping[str, int]) -> str:
    return max(reasons, key=lambda reason: reasons[reason], default="no reason given")


def _with(row: StepRow, name: str, value: float) -> StepRow:
    return replace(row, given={**row.given, name: np.full(len(row.response), value)})
