"""Exact match."""

from typing import ClassVar, Literal

from pydantic import Field

from potstill.core.types import Example
from potstill.metrics import TextMetric
from potstill.scorers.text import exact_form, whitespace_form


class ExactMatch(TextMetric, kind="exact_match"):
    """100 when the answer, normalised, equals an accepted one, else 0.

    "text" overlooks Unicode's composition (NFC), outer white space and quotes, final `. , ; : ! ?`, leading `¡ ¿`, and case;
    "whitespace" is for code: only blanks that are neither indentation nor between quotes are overlooked.
    """

    version: ClassVar[int] = 2  # 2: symbols, marks and punctuation within the answer count
    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Exact match"

    normalisation: Literal["text", "whitespace"] = Field(
        default="text",
        description="what does not count: final punctuation and outer quotes (text), or blanks (whitespace: for code)",
    )
    fold_case: bool = Field(default=True, description='whether case does not count, under "text"; of code it always counts')

    def __call__(self, answer: str, example: Example) -> float:
        return 100.0 * (self._form(answer, example) in {self._form(reference, example) for reference in example.references})

    def _form(self, text: str, example: Example) -> str:
        if self.normalisation == "whitespace":
            return whitespace_form(text)
        return exact_form(text, fold_case=self.fold_case, language=example.language)
