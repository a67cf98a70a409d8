"""Rounds of samples, drawn and judged once and learned in several steps, with rows of data beside them as plain text."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import Field

from potstill.core.errors import UserError
from potstill.data.batches import SAMPLED, SHARE, StepRow, rows_of
from potstill.data.rollout import Asked, Engine, Rollout, Sampling
from potstill.data.store import TokenStore
from potstill.losses.judging import LOGQ
from potstill.train.lessons import Data
from potstill.train.loop import Optim, data_of, tokens_of
from potstill.train.practice import FRUITLESS, Answers, Grouped, asked_of, kept, of_answers, row_of

Judge = Callable[[Sequence[StepRow]], tuple[list[StepRow], Mapping[str, float]]]


class PerRound(Grouped):
    """What a round draws, and for how many steps."""

    max_new_tokens: int = Field(default=128, ge=1, description="longest answer, in tokens; a longer one is cut there")
    updates: int = Field(default=4, ge=1, description="optimiser steps that each learn from all answers of a round")

    def problem(self, batch_size: int) -> str | None:
        """Why a round cannot be divided so."""
        if batch_size % self.per_prompt == 0:
            return None
        return (
            f"a step learns from optim.batch_size = {batch_size} answers, which per_prompt = {self.per_prompt} "
            "does not divide; change one of them"
        )


class RoundSamples(PerRound, Answers):
    """What a round draws, for how many steps, and what of it is learned."""


@dataclass(frozen=True)
class Pace:
    """How rows of data are dealt to rounds and steps.

    Attributes:
        prompts: rows that a round answers.
        text: rows that each of its steps reads as they are.
        updates: steps of a round.
    """

    prompts: int
    text: int
    updates: int

    @classmethod
    def of(cls, samples: PerRound, optim: Optim, text: bool) -> "Pace":
        return cls(optim.batch_size // samples.per_prompt, optim.batch_size if text else 0, samples.updates)

    @property
    def rows(self) -> int:
        """Rows of data that a round takes."""
        return self.prompts + self.updates * self.text

    def rounds(self, optim: Optim, rows: int) -> int:
        """Rounds over so many rows."""
        return optim.total_steps(rows, self.rows) if optim.steps is None else math.ceil(optim.steps / self.updates)

    def steps(self, optim: Optim, rows: int) -> int:
        """Optimiser steps over so many rows."""
        return optim.steps if optim.steps is not None else self.updates * self.rounds(optim, rows)

    def parts(self, rows: list[int]) -> tuple[list[int], list[list[int]]]:
        """Of a round's rows those that are answered, and those that each step reads; the last round may be short."""
        asked = max(1, round(self.prompts * len(rows) / self.rows)) if rows else 0
        others, of = rows[asked:], self.updates
        return rows[:asked], [others[len(others) * k // of : len(others) * (k + 1) // of] for k in range(of)]


@dataclass(frozen=True)
class Drawn:
    """A round's answers.

    Attributes:
        round: its number; −1 before the first.
        rows: as they were judged.
        figures: of the round.
        fruitless: rounds one after the other, up to this one, without an answer to learn.
        generated: tokens drawn so far.
    """

    round: int = -1
    rows: tuple[StepRow, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    fruitless: int = 0
    generated: int = 0


class RoundLessons(ABC):
    """Rounds of samples, each drawn once and learned in several steps; what is drawn and learned is a subclass's.

    Args:
        drawn: what there is before the first round.
        text: whether each step reads rows of data too.
    """

    writes = True

    def __init__(self, store: TokenStore, optim: Optim, samples: PerRound, text: bool, seed: int, drawn: Drawn) -> None:
        self.limits, self.seed = samples, seed
        self.pace = Pace.of(samples, optim, text)
        self.data: Data = data_of(store, optim, seed, self.pace.rows)
        self.total = self.pace.steps(optim, len(store))
        self.drawn, self.age = drawn, 0

    @abstractmethod
    def _draw(self, number: int, step: int, asked: Sequence[int]) -> Drawn:
        """A round's answers to rows of data, judged; changes nothing here, because Ctrl-C can end it anywhere."""

    @abstractmethod
    def _lesson(self, others: Sequence[int]) -> list[StepRow]:
        """What a step learns from: the round's answers, and rows of data of its own."""

    @property
    def generated(self) -> int:
        return self.drawn.generated

    def rows(self, step: int) -> list[int]:
        number, age = divmod(step, self.pace.updates)
        asked, others = self.pace.parts(self.data.rows(number))
        return [*(asked if age == 0 else []), *others[age]]

    def __call__(self, step: int) -> list[StepRow]:
        number, age = divmod(step, self.pace.updates)
        asked, others = self.pace.parts(self.data.rows(number))
        if self.drawn.round != number:
            self.drawn = self._draw(number, step, asked)  # at once: who interrupts the drawing finds what was before
        self.age = age
        return self._lesson(others[age])

    def check(self, step: int, means: Mapping[str, float]) -> None:
        """Raises:
        UserError: the probabilities that the answers were drawn by are not those that they are trained by.
        """
        if self.age == 0:
            self.limits.refuse_gap(step, {**self.figures(), **means}.get("samples_gap", 0.0))

    def figures(self) -> Mapping[str, float]:
        return {**self.drawn.figures, "samples_age": float(self.age)}

    def state(self) -> dict[str, Any]:
        """The round's answers and what was found of them: the student that wrote them is no more."""
        return asdict(replace(self.drawn, rows=())) | {"rows": [kept(row) for row in self.drawn.rows]}

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self.drawn = type(self.drawn)(**{**state, "rows": tuple(row_of(*each) for each in state["rows"])})


class Rounds(RoundLessons):
    """What each step reads: all answers of its round, and rows of data of its own.

    A round answers the prompts of its first rows of data with the student as it is then, judges the answers, and gives them to
    each of its steps. The loss of a step is the mean over sampled tokens plus `text` times the mean over those of data, each
    token counted by its row's weight: that is what `SHARE` makes of one sum over both. Which tokens are drawn follows from the
    seed, the step and the prompt.

    Args:
        judge: gets sampled rows with their log-probabilities when they were drawn, and gives them with all that the objective
            wants to know of them, and figures.
        text: weight of the rows of data; 0: none are read.
        watch: gets the number of finished answers, and of all.
    """

    def __init__(
        self,
        store: TokenStore,
        optim: Optim,
        samples: RoundSamples,
        text: float,
        engine: Engine,
        judge: Judge,
        seed: int,
        watch: Callable[[int, int], None],
    ) -> None:
        super().__init__(store, optim, samples, text > 0, seed, Drawn())
        self.samples, self.text, self.engine, self.judge, self.watch = samples, text, engine, judge, watch

    def _draw(self, number: int, step: int, asked: Sequence[int]) -> Drawn:
        store = self.data.store
        prompts = asked_of(store, asked)
        sampling = Sampling(max_new_tokens=self.samples.max_new_tokens)
        found = self.engine(prompts, self.samples.per_prompt, sampling, self.seed << 32 | step, self.watch)
        rows = [drawn_row(prompts, each, store.weight(asked[each.prompt])) for each in found if self.samples.learns(each)]
        told, figures = self.judge(rows) if rows else ([], {})
        fruitless = 0 if rows else self.drawn.fruitless + 1
        if fruitless == FRUITLESS:
            raise all_cut(step, self.samples.max_new_tokens, "samples.cut = 'counted'")
        shown = {**of_answers(found), **{f"samples_{name}": value for name, value in figures.items()}}
        generated = self.drawn.generated + sum(len(each.ids) for each in found)
        return Drawn(number, tuple(map(lasting, told)), shown, fruitless, generated)

    def _lesson(self, others: Sequence[int]) -> list[StepRow]:
        return apart(self.drawn.rows, rows_of(self.data.store, others), self.text)


def all_cut(step: int, max_new_tokens: int, counted: str) -> UserError:
    """No answer of so many rounds ended of itself.

    Args:
        counted: what makes cut answers be learned, in the recipe's words.
    """
    return UserError(
        f"step {step + 1}: every answer of {FRUITLESS} rounds was cut at samples.max_new_tokens = {max_new_tokens}, "
        f"so that no answer is learned; raise it, or learn cut answers too ({counted})"
    )


def apart(samples: Sequence[StepRow], text: Sequence[StepRow], weight: float) -> list[StepRow]:
    """A step's rows, so that its loss, divided by all its tokens, is the samples' mean and `weight` times the text's mean."""
    of_samples, of_text = tokens_of(samples), tokens_of(text)
    whole = of_samples + of_text
    return [
        *(_with(row, whole / of_samples) for row in samples),
        *(_with(row, weight * whole / of_text) for row in text),
    ]


def _with(row: StepRow, share: float) -> StepRow:
    return replace(row, given={**row.given, SHARE: np.full(len(row.response), share, np.float32)})


def drawn_row(prompts: Sequence[Asked], rollout: Rollout, weight: float) -> StepRow:
    """A sampled answer as a row, with the log-probabilities that it was drawn by."""
    return StepRow(prompts[rollout.prompt].ids, rollout.ids, weight, sampled=True, given={SAMPLED: rollout.logp_N})


def lasting(row: StepRow) -> StepRow:
    """What a row brings along, as a checkpoint gives it back; of an answer that was judged, not what it was drawn by."""
    wanted = (name for name in row.given if name != SAMPLED or LOGQ not in row.given)
    given = {name: row.given[name].astype(np.float32) for name in wanted}
    return replace(row, given=given)
