"""What training took up to some step: tokens read and written, and floating-point operations, from what it counted."""

from dataclasses import dataclass
from typing import Any, Protocol

from potstill.edges.models import Size


@dataclass(frozen=True)
class Tally:
    """What training counted from its start up to some step.

    Attributes:
        rows: rows of data taken, counted in every epoch.
        tokens: that the student learned from: prompts and responses.
        response_tokens: of these, those in the loss.
        sampled_tokens: of the response tokens, those that the student wrote, each time that they were learned.
        generated_tokens: that were drawn while it trained, each once.
    """

    rows: float
    tokens: float
    response_tokens: float
    sampled_tokens: float = 0.0
    generated_tokens: float = 0.0


@dataclass(frozen=True)
class Bought:
    """What answers took that a teacher wrote before training; None: unknown."""

    tokens: float | None = 0.0
    flops: float | None = 0.0


@dataclass(frozen=True)
class Basis:
    """Whom and what a tally is of.

    Attributes:
        teacher: None: there is none, or nothing is known of it.
        kept: what is kept of the teacher for rows of data: `hidden`, `topk` or `live`; "" without a teacher.
        rows: different rows of data.
        prompt, response: mean tokens of one.
        bought: what all of these rows took, where a teacher wrote them.
        reference: the model that a stage names as the one to stay near to; None: it names none, or nothing is known of it.
    """

    student: Size
    teacher: Size | None
    kept: str
    rows: int
    prompt: float
    response: float
    bought: Bought = Bought()
    reference: Size | None = None

    @property
    def data_tokens(self) -> float:
        """Of all rows of data, once."""
        return self.rows * (self.prompt + self.response)


@dataclass(frozen=True)
class Spent:
    """What training took; None where it cannot be known.

    Attributes:
        read: tokens that the student learned from.
        written: tokens drawn for it: its own while it trained, and its teacher's before, of the rows that were read by then.
        flops: floating-point operations of all models, without validations.
    """

    read: float
    written: float | None
    flops: float | None


class Spends(Protocol):
    """What is asked of a stage."""

    def flops(self, tally: Tally, basis: Basis) -> float | None: ...


def spent(stage: Spends, tally: Tally, basis: Basis) -> Spent:
    """What a stage took: a row that a teacher wrote is paid for when it is read for the first time."""
    share = min(1.0, tally.rows / basis.rows) if basis.rows else 0.0
    own, bought = stage.flops(tally, basis), basis.bought
    return Spent(
        tally.tokens,
        tally.generated_tokens + share * bought.tokens if bought.tokens is not None else None,
        own + share * bought.flops if own is not None and bought.flops is not None else None,
    )


def own_tokens(tally: Tally, basis: Basis, asked: float) -> float:
    """Of the tokens learned from, those in rows that the student wrote: answers, and their prompts.

    Args:
        asked: of the tally's rows of data, those whose prompts were answered; the others were read as they are, at their mean
            length.
    """
    as_they_are = (tally.rows - asked) * basis.prompt
    return tally.sampled_tokens + max(0.0, tally.tokens - tally.response_tokens - as_they_are)


def tally_of(counted: dict[str, Any], whole: dict[str, Any], rows: int) -> Tally:
    """The tally at a validation.

    Args:
        counted: its line in metrics.jsonl. Where the line has no counts, as older versions wrote it, they are taken to have
            grown in proportion to the steps.
        whole: the stage's summary.
        rows: different rows of data.
    """
    share = counted["step"] / whole["steps"] if whole["steps"] else 0.0
    names = ("tokens", "response_tokens", "sampled_tokens", "generated_tokens")
    return Tally(counted["epoch"] * rows, *(counted.get(name, share * whole.get(name, 0)) for name in names))
