"""The few nouns that several rooms share."""

from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """One row: what is asked, what may be shortened, what is answered.

    Attributes:
        key: rows with equal keys are kin: they fall into the same split (but for sources with splits of their own), and the
            bootstrap draws them together. Equal means equal but for Unicode composition, case and white space.
        instruction: the last user turn without its context; never shortened.
        response: the target text, without any end-of-turn marker.
        context: supporting text shown with the instruction; shortened first when the row is too long.
        references: every accepted answer, `response` among them; scored by the best.
        history: earlier turns of the conversation, oldest first.
        language: ISO 639-1 code; decides, for one, whether Rouge stems. Empty where the row names none: its source
            then tells it from the rows. "und" where the rows do not tell either.
        tag: a group for breakdowns in the report, such as the category or the phrasing.
        weight: what each of its response tokens counts in a training loss; evaluation counts all rows alike.
    """

    key: str
    instruction: str
    response: str
    context: str = ""
    references: tuple[str, ...] = ()
    history: tuple[Turn, ...] = field(default=())
    language: str = ""
    tag: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", (self.response,))


@dataclass(frozen=True)
class Abstain:
    """A score that could not be given, and why; never counted as zero."""

    reason: str
