"""What a word was meant to be. Standard library alone."""

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str], least: float = 0.6) -> str:
    """`; did you mean 'x'?` when something known is close to the word, else the empty string.

    Args:
        least: difflib's ratio, from which on two words are close.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=least)
    return f"; did you mean '{close[0]}'?" if close else ""
