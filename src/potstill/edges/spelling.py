"""From tokens that come one by one to text that can be shown at once."""

from collections.abc import Collection, Sequence

from potstill.edges import tokens
from potstill.edges.models import Tokenizer

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character yet
MOST_WAITING = 8  # tokens: a character has at most 4 bytes, and one more may have begun; more spell broken text


class Spelling:
    """Text of one answer, token by token: joined, the pieces are what `tokens.decode` makes of all tokens at once.

    A character of several tokens comes with its last one. Some tokenizers spell a token otherwise at the beginning of a text:
    therefore the last tokens are spelt again together with each new one.

    Args:
        hidden: tokens that are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int] = ()) -> None:
        self._tokenizer, self._hidden = tokenizer, frozenset(hidden)
        self._before: list[int] = []  # shown already
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What can be shown now; "" while a character is not complete."""
        if token in self._hidden:
            return ""
        self._waiting.append(token)
        text = self._text()
        if text.endswith(UNFINISHED) and len(self._waiting) < MOST_WAITING:
            return ""
        return self._shown(text)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._shown(self._text()) if self._waiting else ""

    def _text(self) -> str:
        before = tokens.decode(self._tokenizer, self._before)
        return tokens.decode(self._tokenizer, [*self._before, *self._waiting])[len(before) :]

    def _shown(self, text: str) -> str:
        self._before, self._waiting = self._waiting, []
        return text


class Stops:
    """Holds back the end of a text while it may be the beginning of a stop string.

    Attributes:
        met: whether one has come; nothing is shown after it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.met = False

    def add(self, text: str) -> str:
        """What can be shown of the text so far."""
        if self.met:
            return ""
        self._held += text
        places = [at for at in (self._held.find(string) for string in self._strings) if at >= 0]
        if places:
            self.met = True
            return self._held[: min(places)]
        keep = max((self._overlap(string) for string in self._strings), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return "" if self.met else held

    def _overlap(self, string: str) -> int:
        """Characters at the end of what is held that begin the string."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
