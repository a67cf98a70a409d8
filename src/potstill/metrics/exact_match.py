"""Exact match."""

import re
import unicodedata
from typing import ClassVar

from potstill.core.types import Example
from potstill.metrics import TextMetric


def normalise(text: str) -> str:
    """NFC, lower case, punctuation out, runs of blanks to one."""
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())


class ExactMatch(TextMetric, kind="exact_match"):
    """100 when the answer equals an accepted one after `normalise`, else 0. As in SQuAD, but articles are kept."""

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Exact match"

    def __call__(self, answer: str, example: Example) -> float:
        return 100.0 * (normalise(answer) in {normalise(reference) for reference in example.references})
