"""Rouge-L."""

import unicodedata
from functools import cache
from typing import Any, ClassVar

from potstill.core.types import Example
from potstill.metrics import TextMetric


@cache
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        """rouge-score's own tokenizer drops every letter outside a-z, so that Spanish loses its accents."""

        def __init__(self) -> None:
            from rouge_score.tokenizers import DefaultTokenizer

            self.english = DefaultTokenizer(use_stemmer=True)

        def tokenize(self, text: str) -> list[str]:
            import re

            return self.english.tokenize(text) if stem else re.findall(r"\w+", text.lower())

    return RougeScorer(["rougeL"], tokenizer=Words())


class RougeL(TextMetric, kind="rouge_l"):
    """F1 of the longest common subsequence of words, 0 to 100, best over the accepted answers. Lin, 2004.

    By the package `rouge-score`; Porter stemmer and its a-z tokenizer in English only, whole Unicode words (NFC) elsewhere.
    """

    unit: ClassVar[str] = "0–100"
    title: ClassVar[str] = "Rouge-L"

    def __call__(self, answer: str, example: Example) -> float:
        scorer = _scorer(example.language == "en")
        answer, *references = (unicodedata.normalize("NFC", text) for text in (answer, *example.references))
        return 100 * max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
