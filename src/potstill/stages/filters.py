"""Which of a teacher's answers are kept, and why the others are not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, field_validator, model_validator

from potstill.core.component import Settings
from potstill.core.types import Abstain, Example
from potstill.metrics import Metric, TextMetric
from potstill.metrics.rouge_l import RougeL
from potstill.rollouts.journal import Answer
from potstill.scorers.language import UNKNOWN, language_of
from potstill.scorers.rouge import repeated
from potstill.scorers.text import nfc

EMPTY, CUT, SHORT, LONG = "empty", "cut at max_new_tokens", "too short", "too long"
REPEATS, LANGUAGE, DUPLICATE, REFERENCE = "repeats itself", "another language", "said before", "equals a reference"
REASONING = "reasoning without an answer"
BELOW, NOT_BEST, UNSCORED = "below filters.least", "not the best", "could not be scored"


class Repetition(Settings):
    """How much of an answer may repeat what it said before."""

    n: int = Field(default=4, ge=1, description="words or marks in a row that count as one")
    most: float = Field(default=0.5, ge=0, le=1, description="largest share of such runs that stood in the answer before")


class Filters(Settings):
    """What an answer must be to be kept; each can be off, and each counts what it leaves out. Empty answers are never kept."""

    finished: bool = Field(default=True, description="only answers that ended of themselves")
    min_characters: int = Field(default=1, ge=1, description="shortest answer")
    max_characters: int | None = Field(default=None, ge=1, description="longest answer; default: no limit")
    repetition: Repetition | None = Field(default=Repetition(), description="answers in a loop; false: not looked for")
    language: str = Field(
        default="off",
        pattern="^(off|row|[a-z]{2})$",
        description='only answers in this language (ISO 639-1), or in that of the "row"; those too short to tell are kept',
    )
    duplicates: Literal["drop", "keep"] = Field(
        default="drop", description="answers that were given before to the same question, but for the number of blanks"
    )
    references: Literal["drop", "keep"] = Field(default="keep", description="answers that equal a reference of their row")
    least: float | None = Field(
        default=None,
        description="only answers to which `metric` gives this or better: with pass_at_1 or answer and 100 rejection sampling "
        "(Yuan et al., arXiv:2308.01825); where it cannot score, the answer is left out",
    )
    best: Literal["likelihood", "metric"] | None = Field(
        default=None, description="keep one answer a row: the likeliest (mean log-probability), or the best by `metric`"
    )
    metric: Metric = Field(
        default=RougeL(), description="text metric that compares an answer with its row's references or tests"
    )

    @field_validator("repetition", mode="before")
    @classmethod
    def _false_is_off(cls, value: object) -> object:
        return None if value is False else value

    @field_validator("metric")
    @classmethod
    def _of_texts(cls, metric: Metric) -> Metric:
        if not isinstance(metric, TextMetric):
            raise ValueError(f"'{metric.kind}' does not compare texts; name a text metric, such as rouge_l")
        return metric

    @model_validator(mode="after")
    def _they_fit(self) -> "Filters":
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters = {self.max_characters} is less than min_characters = {self.min_characters}")
        if self.best != "metric" and self.least is None and self.metric != RougeL():
            raise ValueError('metric is for least, or for best = "metric"; set one of them, or leave metric out')
        return self


@dataclass(frozen=True)
class Judged:
    """An answer, and what the filters say of it.

    Attributes:
        sample: its number among those of its row.
        reason: why it is left out; "" where it is kept.
        score: by which the best was taken; None where that was not asked for.
    """

    sample: int
    answer: Answer
    reason: str = ""
    score: float | None = None


class Sieve:
    """The filters over all rows in turn; remembers what was said to which question."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, example: Example, answers: Sequence[Answer]) -> list[Judged]:
        """All answers of a row, in their order."""
        question = _question(example)
        judged: list[Judged] = []
        here: set[tuple[str, ...]] = set()
        for sample, answer in enumerate(answers):
            form = (*question, _form(answer.text))
            again = self.filters.duplicates == "drop" and (form in self._said or form in here)
            judged.append(Judged(sample, answer, next(self._reasons(example, answer), DUPLICATE if again else "")))
            here.add(form)
        if self.filters.least is not None or self.filters.best == "metric":
            judged = self._measured(example, judged)
        judged = self._best(judged) if self.filters.best is not None else judged
        self._said |= {(*question, _form(one.answer.text)) for one in judged if not one.reason}
        return judged

    def _reasons(self, example: Example, answer: Answer) -> Iterator[str]:
        """What is wrong with an answer, the cheapest first."""
        filters, text = self.filters, answer.text
        if not text.strip():
            yield REASONING if answer.reasoned else EMPTY
        if filters.finished and not answer.finished:
            yield CUT
        if len(text) < filters.min_characters:
            yield SHORT
        if filters.max_characters is not None and len(text) > filters.max_characters:
            yield LONG
        if filters.repetition is not None and repeated(text, filters.repetition.n) > filters.repetition.most:
            yield REPEATS
        if filters.language != "off" and self._foreign(example, text):
            yield LANGUAGE
        if filters.references == "drop" and _form(text) in map(_form, example.references):
            yield REFERENCE

    def _foreign(self, example: Example, text: str) -> bool:
        wanted = example.language if self.filters.language == "row" else self.filters.language
        return wanted not in ("", UNKNOWN) and language_of(text) not in (wanted, UNKNOWN)

    def _measured(self, example: Example, judged: Sequence[Judged]) -> list[Judged]:
        """Those that are kept so far with their scores by `metric`; left out where there is none, or one below `least`."""
        metric, least = self.filters.metric, self.filters.least
        assert isinstance(metric, TextMetric)
        texts = [one.answer.text for one in judged if not one.reason]
        scored = metric.runs_programs or any(map(str.strip, example.references))
        scores = iter(metric.scores(texts, [example] * len(texts)) if scored else [Abstain("no reference")] * len(texts))
        found = []
        for one in judged:
            score = None if one.reason else next(scores)
            if score is None:
                found.append(one)
            elif isinstance(score, Abstain):
                found.append(replace(one, reason=UNSCORED))
            else:
                below = least is not None and self._sign * score < self._sign * least
                found.append(replace(one, reason=BELOW if below else "", score=score))
        return found

    def _best(self, judged: Sequence[Judged]) -> list[Judged]:
        """One of those that are kept so far; of equal ones the first."""
        if self.filters.best == "likelihood":
            judged = [self._likely(one) if not one.reason else one for one in judged]
            sign = 1
        else:
            sign = self._sign
        left = [one for one in judged if not one.reason]
        best = max(left, key=lambda one: sign * (one.score or 0.0), default=None)
        return [one if one.reason or one is best else replace(one, reason=NOT_BEST) for one in judged]

    def _likely(self, one: Judged) -> Judged:
        score = one.answer.mean_logp
        return replace(one, reason="" if score is not None else UNSCORED, score=score)

    @property
    def _sign(self) -> int:
        return 1 if self.filters.metric.higher_is_better else -1


def _form(text: str) -> str:
    """The form in which two answers count as the same one: composed letters, and blanks of any number."""
    return " ".join(nfc(text).split())


def _question(example: Example) -> tuple[str, ...]:
    turns = (part for turn in (*example.history, *example.since) for part in (turn.role, turn.content))
    return (example.instruction, example.context, *turns)
