"""Words of any script, and Rouge-L over them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import regex

from potstill.core.types import Abstain, Example
from potstill.scorers.text import exact_form, fold, nfc, primary

# Scripts that part no words by blanks, so that each letter with its marks stands for itself. Korean parts them.
_UNSPACED = (
    r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}ーｰ\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Tai_Le}"
    r"\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}]&&[\p{L}\p{Nl}]]"
)
_JOINER = r"[\u200c\u200d](?=[\p{L}\p{M}])"  # within a word it belongs to the spelling
_WORD = regex.compile(
    rf"(?V1){_UNSPACED}\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--{_UNSPACED}](?:[[\p{{L}}\p{{N}}]--{_UNSPACED}]|\p{{M}}|{_JOINER})*"
)
_UNIT = regex.compile(rf"(?V1){_WORD.pattern.removeprefix('(?V1)')}|[^\s\p{{L}}\p{{M}}\p{{N}}]")
_UNSEEN = regex.compile(r"[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


def units(text: str) -> list[str]:
    """Words as in `words`, unstemmed, and each mark or symbol between them."""
    return _UNIT.findall(_UNSEEN.sub("", fold(nfc(text))))


def repeated(text: str, n: int) -> float:
    """Share of a text's n-grams of `units` that stood in it before: 1 - unique / all; 0 where it has fewer than n units."""
    found = units(text)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def words(text: str, language: str = "") -> list[str]:
    """The words that Rouge compares, case folded; punctuation and symbols are none.

    Letters, marks and digits that stand together are a word; in scripts without blanks (Han, Kana, Thai, Lao, Khmer, Myanmar,
    Tibetan …) each letter with its marks is. In English (`language` "en") words of a–z and 0–9 are those of `rouge-score`,
    with its Porter stemmer; a word with any other letter stays whole.
    """
    found = _WORD.findall(_UNSEEN.sub("", fold(nfc(text), language)))
    if primary(language) != "en":
        return found
    english = _english()
    return [token for word in found for token in (english.tokenize(word) if word.isascii() else (word,))]


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words, 0 to 1; 0 when either is empty. Lin, 2004."""
    return _scorer().score("\n".join(reference), "\n".join(answer))["rougeL"].fmeasure


def best_rouge_l(answer: str, example: Example) -> float | Abstain:
    """`rouge_l` of the words of an answer, best over the accepted answers, 0 to 1; no score where none of these holds a
    word."""
    said = words(answer, example.language)
    references = {reference: words(reference, example.language) for reference in example.references}
    if not any(references.values()):
        return Abstain("no accepted answer holds a word: only symbols or punctuation")
    return max(
        rouge_l(said, wanted) if wanted else float(exact_form(answer) == exact_form(reference))
        for reference, wanted in references.items()
    )


@cache
def _english() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


@cache
def _scorer() -> Any:
    """`rouge-score`, of words that are parted already."""
    from rouge_score.rouge_scorer import RougeScorer

    class Parted:
        def tokenize(self, text: str) -> list[str]:
            return text.split("\n") if text else []

    return RougeScorer(["rougeL"], tokenizer=Parted())
