"""Exact match."""

from typing import ClassVar, Literal

from pydantic import Field

from potstill.core.types import Example
from potstill.metrics import TextMetric
from potstill.scorers.text import exact_form, same_code


class ExactMatch(TextMetric, kind="exact_match"):
    """100 when the answer, normalised, equals an accepted one, else 0.

    "text" overlooks Unicode's composition (NFC), outer white space and quotes, final punctuation of any script (but `5!` is not
    `5`), leading `¡ ¿`, typographic forms of quotes and apostrophes, and case; "whitespace" is for code: blank lines, and how
    many blanks stand between two words, where they are neither indentation nor part of a string literal.
    """

    version: ClassVar[int] = 3  # 3: final punctuation of any script; string literals of several lines
    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Exact match"

    normalisation: Literal["text", "whitespace"] = Field(
        default="text",
        description="what does not count: final punctuation and outer quotes (text), or blanks (whitespace: for code)",
    )
    fold_case: bool = Field(default=True, description='whether case does not count, under "text"; of code it always counts')

    def __call__(self, answer: str, example: Example) -> float:
        return 100.0 * any(self._same(answer, reference, example.language) for reference in example.references)

    def _same(self, answer: str, reference: str, language: str) -> bool:
        if self.normalisation == "whitespace":
            return same_code(answer, reference)
        forms = (exact_form(text, fold_case=self.fold_case, language=language) for text in (answer, reference))
        return len(set(forms)) == 1
