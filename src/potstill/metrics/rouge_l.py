"""Rouge-L."""

from typing import ClassVar

from potstill.core.types import Abstain, Example
from potstill.metrics import TextMetric
from potstill.scorers.language import UNKNOWN
from potstill.scorers.rouge import best_rouge_l


class RougeL(TextMetric, kind="rouge_l"):
    """F1 of the longest common subsequence of words, 0 to 100, best over the accepted answers. Lin, 2004.

    Words by script: what stands between blanks and punctuation, letters with their marks; single letters in scripts without
    blanks such as Han, Kana and Thai. In English, words of a–z and 0–9 are those of the package `rouge-score` with its Porter
    stemmer, so that plain English has the package's figure. Punctuation and symbols are no words: a row whose accepted
    answers hold no word is abstained from.
    """

    version: ClassVar[int] = 2  # 2: words by script
    unit: ClassVar[str] = "0–100"
    title: ClassVar[str] = "Rouge-L"

    def __call__(self, answer: str, example: Example) -> float | Abstain:
        found = best_rouge_l(answer, example)
        return found if isinstance(found, Abstain) else 100 * found

    def unfit(self, language: str) -> str | None:
        if language in ("", UNKNOWN):
            return "the language is not known, so words are not stemmed: figures on English are lower than rouge-score's"
        return None
