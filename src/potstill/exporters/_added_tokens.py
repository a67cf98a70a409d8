"""Added tokens that llama.cpp would find elsewhere in a text than the tokenizer does."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from potstill.exporters._networks import INSTEAD


def added_token_problems(added: Sequence[Any]) -> Iterator[str]:
    """llama.cpp looks for added tokens in the raw text, the longest first, and knows none of their flags."""
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(token, flag):
                yield (
                    f"the gguf exporter cannot express {flag} of the added token {token.content!r}: llama.cpp would give "
                    f"other token ids; add the token without {flag}, or {INSTEAD}"
                )
    for one, other in _told_apart_otherwise(added):
        yield (
            f"the added tokens {one.content!r} and {other.content!r} can overlap in a text, and llama.cpp would choose the "
            f"longer where this tokenizer chooses the first; {INSTEAD}"
        )


def _told_apart_otherwise(added: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of which llama.cpp and the tokenizer find different ones, in some text that both could stand in."""
    for one, other in _overlapping(added):
        joints = [k for k in range(1, len(one.content)) if other.content.startswith(one.content[-k:])]
        texts = [one.content + other.content[k:] for k in joints] + [other.content]
        if any(_as_tokenizer(text, one, other) != _as_llamacpp(text, one, other) for text in texts):
            yield one, other


def _overlapping(added: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of which the second begins within the first, or holds it whole; Gemma has 6,384 tokens, so not by trying all."""
    by_content = {token.content: token for token in added}
    by_beginning: dict[str, list[str]] = defaultdict(list)
    for content in by_content:
        for length in range(1, len(content) + 1):
            by_beginning[content[:length]].append(content)
    pairs: dict[tuple[str, str], None] = {}  # each once, in a fixed order
    for content in by_content:
        places = [(start, end) for start in range(len(content)) for end in range(start + 1, len(content) + 1)]
        pairs |= {(content[start:end], content): None for start, end in places if content[start:end] in by_content}
        for start in range(1, len(content)):
            pairs |= {(content, other): None for other in by_beginning.get(content[start:], ())}
    yield from ((by_content[one], by_content[other]) for one, other in pairs if one != other)


def _as_tokenizer(text: str, one: Any, other: Any) -> list[str]:
    """Leftmost first, then the longest; tokens that are not normalised before those that are."""
    pieces = [text]
    for normalised in (False, True):
        pieces = _cut(pieces, [token.content for token in (one, other) if token.normalized == normalised])
    return pieces


def _as_llamacpp(text: str, one: Any, other: Any) -> list[str]:
    """The longest first, wherever it stands; of equal ones that which comes second in the text: their order is open."""
    pieces = [text]
    for token in sorted((other.content, one.content), key=lambda content: -len(content.encode())):
        pieces = _cut(pieces, [token])
    return pieces


def _cut(pieces: list[str], tokens: list[str]) -> list[str]:
    """Pieces of raw text with the tokens cut out of them; what is a token already is marked by a NUL and left alone."""
    if not tokens:
        return pieces
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    made: list[str] = []
    for piece in pieces:
        if piece.startswith("\0"):
            made.append(piece)
            continue
        raw, found = pattern.split(piece), pattern.findall(piece)
        for i, text in enumerate(raw):
            made += [text] if text else []
            made += [f"\0{found[i]}"] if i < len(found) else []
    return made
