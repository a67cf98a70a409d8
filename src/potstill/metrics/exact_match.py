"""Exact match."""

import re
import unicodedata
from typing import ClassVar, Literal

from pydantic import Field

from potstill.core.types import Example
from potstill.metrics import TextMetric


def words(text: str) -> str:
    """NFC, lower case, punctuation out, runs of blanks to one."""
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())


def whitespace(text: str) -> str:
    """NFC; blank lines and blanks at the end of a line out, runs of blanks within a line to one.

    Indentation stays, for it is meaning in Python; that of the first line goes, as answers come stripped.
    """
    lines = unicodedata.normalize("NFC", text).strip().splitlines()
    return "\n".join(line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in lines if line.strip())


class ExactMatch(TextMetric, kind="exact_match"):
    """100 when the answer, normalised, equals an accepted one, else 0.

    "words" is as in SQuAD, but keeps articles. It takes `a - b` for `a + b`: code needs "whitespace".
    """

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Exact match"

    normalisation: Literal["words", "whitespace"] = Field(
        default="words",
        description="what does not count: case, punctuation and blanks (words), or blanks that are no indentation (whitespace)",
    )

    def __call__(self, answer: str, example: Example) -> float:
        normalise = words if self.normalisation == "words" else whitespace
        return 100.0 * (normalise(answer) in {normalise(reference) for reference in example.references})
