"""Steps of which a share is what the student writes itself: on-policy distillation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.data.batches import StepRow, rows_of
from potstill.data.rollout import Asked, Engine, Rollout, Sampling
from potstill.data.store import TokenStore
from potstill.train.lessons import Data

FRUITLESS = 3  # steps one after the other without a token to learn, after which training ends


class Grouped(Settings):
    """How many answers a prompt gets, and how far writing and training may be apart."""

    per_prompt: int = Field(default=1, ge=1, description="answers to each prompt in a step")
    max_gap: float = Field(
        default=0.1, gt=0, description="largest mean difference of log-probabilities, in nats, between writing and training"
    )

    def refuse_gap(self, step: int, gap: float) -> None:
        """Raises:
        UserError: the probabilities that the answers were drawn by are not those that they are trained by.
        """
        if gap > self.max_gap:
            raise UserError(
                f"step {step + 1}: log-probabilities of the sampled tokens differ by {gap:.3g} nats on average between "
                f"writing and training, more than samples.max_gap = {self.max_gap:g}; train in float32, or raise it"
            )


class Answers(Grouped):
    """How answers that a student writes are grouped and learned."""

    cut: Literal["counted", "masked"] = Field(
        default="counted", description="answers that reach max_new_tokens: learned like others, or left out"
    )

    def learns(self, rollout: Rollout) -> bool:
        """Whether an answer is learned."""
        return rollout.finished or self.cut == "counted"


class Samples(Sampling, Answers):
    """Which part of a step's rows the student writes, and how; Agarwal et al., GKD, arXiv:2306.13649."""

    share: float = Field(default=1.0, gt=0, le=1, description="λ: of a step's rows, those that the student writes")
    every: int = Field(default=1, ge=1, description="steps from one round of writing to the next, which writes for all of them")

    @model_validator(mode="after")
    def _answers_differ(self) -> "Samples":
        if self.per_prompt > 1 and self.temperature == 0:
            raise ValueError(f"per_prompt = {self.per_prompt} answers at temperature 0 would all be the same; set temperature")
        return self

    def written(self, batch_size: int) -> int:
        """Rows of a whole step that the student writes."""
        return round(self.share * batch_size)

    def problem(self, batch_size: int) -> str | None:
        """Why a step cannot be divided so."""
        written = self.written(batch_size)
        if written == 0:
            return f"share = {self.share:g} of optim.batch_size = {batch_size} is less than a row; raise it"
        if written % self.per_prompt:
            return (
                f"{written} of a step's {batch_size} rows are written by the student, which per_prompt = {self.per_prompt} "
                "does not divide; change optim.batch_size, share or per_prompt"
            )
        return None

    def takes(self, batch_size: int) -> int:
        """Rows of data that a whole step takes: a prompt for each group that is written, and the rest as it is."""
        written = self.written(batch_size)
        return written // self.per_prompt + batch_size - written


class Practice:
    """What each step reads, where the student writes a share of it.

    Prompts are those of the step's rows of data; the first of them are answered by the student as it is at that step, or, where
    it writes every so many steps, as it was then. Which tokens are drawn follows from the seed, the step that they were
    written at, and the prompt.

    Args:
        data: the rows, as many a step as `samples.takes` says.
        engine: the student's own.
        batch_size: rows of a whole step.
        watch: gets the number of finished answers, and of all.
    """

    writes = True

    def __init__(
        self, data: Data, samples: Samples, engine: Engine, batch_size: int, seed: int, watch: Callable[[int, int], None]
    ) -> None:
        self.data, self.samples, self.engine, self.seed, self.watch = data, samples, engine, seed, watch
        self.batch_size, self.total = batch_size, data.total
        self.written: dict[int, list[StepRow]] = {}
        self.seen: dict[int, dict[str, float]] = {}
        self.shown: dict[str, float] = {}
        self.fruitless = self.generated = 0

    def rows(self, step: int) -> list[int]:
        return self.data.rows(step)

    def __call__(self, step: int) -> list[StepRow]:
        if step not in self.written:
            self._write(step)
        others = rows_of(self.data.store, self.rows(step)[self._prompts(step) :])
        own, self.shown = self.written.pop(step), self.seen.pop(step)  # last: who interrupts before finds them again
        rows = [*own, *others]
        self.fruitless = 0 if rows else self.fruitless + 1
        if self.fruitless == FRUITLESS:
            raise UserError(
                f"step {step + 1}: every answer of {FRUITLESS} steps was cut at samples.max_new_tokens = "
                f"{self.samples.max_new_tokens}, so that nothing is learned; raise it, or learn cut answers too "
                "(samples.cut = 'counted')"
            )
        return rows

    def _prompts(self, step: int) -> int:
        """How many of a step's rows of data are answered by the student."""
        groups = self.samples.written(self.batch_size) // self.samples.per_prompt
        return max(1, round(groups * len(self.rows(step)) / self.samples.takes(self.batch_size)))

    def _write(self, step: int) -> None:
        """The answers of this step and of those up to the next round."""
        last = min(self.total, (step // self.samples.every + 1) * self.samples.every)
        asked = {at: self.rows(at)[: self._prompts(at)] for at in range(step, last)}
        prompts = asked_of(self.data.store, [row for rows in asked.values() for row in rows])
        sampling = Sampling(**{name: getattr(self.samples, name) for name in Sampling.model_fields})
        found = self.engine(prompts, self.samples.per_prompt, sampling, self.seed << 32 | step, self.watch)
        written, seen = {}, {}
        answers = iter(found)
        for at, rows in asked.items():
            own = [next(answers) for _ in range(len(rows) * self.samples.per_prompt)]
            written[at] = self._learned(own, prompts)
            seen[at] = {**of_answers(own), "samples_age": float(at - step)}
        self.written, self.seen = written, seen
        self.generated += sum(len(rollout.ids) for rollout in found)

    def _learned(self, rollouts: list[Rollout], prompts: list[Asked]) -> list[StepRow]:
        said = self.samples.whole and self.samples.temperature == 1
        return [
            StepRow(
                prompts[rollout.prompt].ids,
                rollout.ids,
                sampled=True,
                given={"logp": rollout.logp_N.astype(np.float32)} if said else {},
            )
            for rollout in rollouts
            if self.samples.learns(rollout)
        ]

    def check(self, step: int, means: Mapping[str, float]) -> None:
        """Raises:
        UserError: the probabilities that the answers were drawn by are not those that they are trained by.
        """
        if self.shown["samples_age"] == 0:
            self.samples.refuse_gap(step, means.get("samples_gap", 0.0))

    def figures(self) -> Mapping[str, float]:
        return self.shown

    def state(self) -> dict[str, Any]:
        """What was written for later steps, by students that are no more."""
        return {
            "fruitless": self.fruitless,
            "generated": self.generated,
            "seen": {str(step): figures for step, figures in self.seen.items()},
            "written": {str(step): [kept(row) for row in rows] for step, rows in self.written.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.fruitless, self.generated = state.get("fruitless", 0), state.get("generated", 0)
        self.seen = {int(step): figures for step, figures in state.get("seen", {}).items()}
        self.written = {int(step): [row_of(*each) for each in rows] for step, rows in state.get("written", {}).items()}


def asked_of(store: TokenStore, rows: Sequence[int]) -> list[Asked]:
    """The prompts of rows of a store."""
    return [Asked(tuple(int(i) for i in store[row][0])) for row in rows]


def of_answers(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean tokens of answers, and the share that was cut."""
    count = len(rollouts)
    return {
        "samples_length": sum(len(rollout.ids) for rollout in rollouts) / count,
        "samples_cut": sum(not rollout.finished for rollout in rollouts) / count,
    }


Kept = tuple[list[int], list[int], dict[str, list[float]], float]


def kept(row: StepRow) -> Kept:
    """A sampled row as a checkpoint has it, in JSON."""
    given = {name: values.tolist() for name, values in row.given.items()}
    return list(row.prompt), list(row.response), given, row.weight


def row_of(prompt: list[int], response: list[int], given: dict[str, list[float]], weight: float = 1.0) -> StepRow:
    """The row that `kept` was given."""
    arrays = {name: np.array(values, np.float32) for name, values in given.items()}
    return StepRow(prompt, response, weight, sampled=True, given=arrays)
