"""What is measured of a model. One file per metric; six shapes of metric, by what each needs to see."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from potstill.core.component import Component, discover
from potstill.core.types import Abstain, Example

if TYPE_CHECKING:
    from potstill.edges.assisted import Drafting


@dataclass(frozen=True)
class Judged:
    """A row's score.

    Attributes:
        outcomes: how each program that it rests on ended, see `scorers/programs.py`; empty where none was run.
    """

    score: float | Abstain
    outcomes: tuple[str, ...] = ()


class Metric(Component):
    """A figure about a model; how it is summed over rows, seeds and models is decided elsewhere, once."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    title: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = False  # whether it compares a model with a teacher
    runs_programs: ClassVar[bool] = False  # whether it needs a sandbox


class TextMetric(Metric):
    """Scores one generated answer against a row."""

    @abstractmethod
    def __call__(self, answer: str, example: Example) -> float | Abstain:
        """The score, or why there can be none: which rows are abstained from depends on the row, never on the answer."""

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> list[float | Abstain]:
        """The score of each answer; a metric that judges many at once faster than one by one overrides this."""
        return [self(answer, example) for answer, example in zip(answers, examples, strict=True)]

    def judged(self, answers: Sequence[str], examples: Sequence[Example]) -> list[Judged]:
        """The score of each answer with what it rests on; a metric that runs programs overrides this."""
        return [Judged(score) for score in self.scores(answers, examples)]

    def unfit(self, language: str) -> str | None:
        """Why figures on rows of this language (ISO 639-1, or "und") may mislead; None where they do not."""
        return None


class SampledMetric(Metric):
    """Scores several answers to each row, drawn for it alone."""

    samples: int = Field(default=8, ge=1, description="answers drawn for each row")
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    seed: int = Field(default=11, ge=0, description="of sampling")

    @abstractmethod
    def __call__(self, answers: Sequence[Sequence[str]], examples: Sequence[Example]) -> list[float | Abstain]:
        """Of each row the score of its answers, or why there can be none."""

    def judged(self, answers: Sequence[Sequence[str]], examples: Sequence[Example]) -> list[Judged]:
        """The score of each row with what it rests on; a metric that runs programs overrides this."""
        return [Judged(score) for score in self(answers, examples)]


class TokenMetric(Metric):
    """Scores every response token from the model's own distribution; averaged over tokens, not rows."""

    per_byte: ClassVar[str] = ""  # unit of the sum divided by the text's bytes; "" where the sum depends on how text is cut

    @abstractmethod
    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        """`logq_NV` the model, `target_N` the token ids that stand there, `logp_NV` the teacher -> [N]."""


class AnswerMetric(Metric):
    """Scores every token of the model's own answer, averaged over the answer's tokens, then over rows."""

    @abstractmethod
    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        """`logq_NV` the model, `target_N` the token ids that it wrote, `logp_NV` the teacher -> [N]."""


class ModelMetric(Metric):
    """Measures the model itself, once."""

    def tokens(self) -> int:
        """Tokens that it decodes one by one, which is what it costs."""
        return 0

    @abstractmethod
    def __call__(self, model: Any, tokenizer: Any) -> float: ...

    def problems(self, config: Any) -> list[str]:
        """Why a model cannot be measured, as far as its transformers config tells, each naming the field to change."""
        return []


class DraftMetric(Metric):
    """Scores how the model does as its teacher's draft model, of some rows; measured of every model but the teacher."""

    needs_teacher: ClassVar[bool] = True

    drafts: int = Field(default=4, ge=1, description="tokens that the model writes before the teacher looks")
    rows: int = Field(default=16, ge=1, description="the first so many test rows are answered")
    new_tokens: int = Field(default=64, ge=2, description="longest answer")
    seed: int = Field(default=12, ge=0, description="of sampling")

    def settings(self) -> tuple[int, ...]:
        """Equal where two metrics are scored from the same answers."""
        return self.drafts, self.rows, self.new_tokens, self.seed

    def tokens(self) -> int:
        """Tokens that the teacher decodes one by one, with and without drafts."""
        return 2 * self.rows * self.new_tokens

    @abstractmethod
    def scores(self, draftings: Sequence["Drafting"]) -> list[float | Abstain]:
        """Of each answer; their mean is the figure of all answers together, see `pooled`."""


def pooled(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> list[float]:
    """Scores of rows whose mean is a ratio of sums over the rows: Σ a / Σ b, or (Σ a · Σ c) / (Σ b · Σ d).

    A mean of the rows' own ratios would weigh short answers most. Row i has R · (1 + Σ (a[i]/ā − 1) − Σ (b[i]/b̄ − 1)), R being
    the ratio, x̄ a mean over rows, and the sums over the columns `above` and `below`: Taylor's linearisation, on whose spread
    over rows the ratio's standard error rests (Woodruff, A simple method for approximating the variance of a complicated
    estimate, 1971). The score of one row may lie outside the scale.
    """
    over, under = ([sum(column) / len(column) for column in columns] for columns in (above, below))
    if not all(over):
        return [0.0] * len(above[0])
    ratio = math.prod(over) / math.prod(under)
    ups = [sum(column[i] / mean - 1 for column, mean in zip(above, over, strict=True)) for i in range(len(above[0]))]
    downs = [sum(column[i] / mean - 1 for column, mean in zip(below, under, strict=True)) for i in range(len(above[0]))]
    return [ratio * (1 + up - down) for up, down in zip(ups, downs, strict=True)]


discover(__name__, __path__)
