"""Tokenised rows on disk, so that memory stays flat however many there are."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import TOO_LONG, Renderer
from potstill.data.templates import LeftOut
from potstill.edges.tokens import beginning, begun, decode, encode

Pair = tuple[list[int], list[int]]
WeightedPair = tuple[list[int], list[int], float]
NumberedPair = tuple[list[int], list[int], float, int]


@dataclass
class Counts:
    """What became of the rows.

    Attributes:
        rows: kept.
        prompt_tokens: of the kept rows.
        response_tokens: likewise, end of turn included; these are the tokens that are learned.
        context_shortened: kept rows whose context lost its end.
        ends_removed: kept rows whose answer brought an end of turn of its own, which was taken off.
        begins_with: the BOS that prompts begin with; empty when they have none.
        longest: tokens of the longest row that was too long; 0 where none was.
        dropped: rows left out, by reason.
    """

    rows: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    context_shortened: int = 0
    ends_removed: int = 0
    begins_with: str = ""
    longest: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class TokenStore:
    """Rows of tokens, memory-mapped: `store[i]` is the pair (prompt ids, response ids)."""

    def __init__(self, folder: Path, counts: Counts) -> None:
        self.counts = counts
        self._ids = np.memmap(folder / "ids.u32", dtype=np.uint32, mode="r")
        self._starts = np.memmap(folder / "starts.i64", dtype=np.int64, mode="r")  # prompt, response, prompt, …, end
        self._weights = np.memmap(folder / "weights.f32", dtype=np.float32, mode="r")
        self._numbers = np.memmap(folder / "numbers.i64", dtype=np.int64, mode="r")

    def __len__(self) -> int:
        return (len(self._starts) - 1) // 2

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        a, b, c = self._starts[2 * i : 2 * i + 3]
        return self._ids[a:b], self._ids[b:c]

    def digest(self) -> str:
        """SHA-256 of all tokens, boundaries and weights: equal for the same rows in the same order."""
        hashed = hashlib.sha256()
        for array_ in (self._ids, self._starts, self._weights):
            hashed.update(array_.data)
        return hashed.hexdigest()

    def length(self, i: int) -> int:
        """Prompt and response together, in tokens."""
        return int(self._starts[2 * i + 2] - self._starts[2 * i])

    def response_length(self, i: int) -> int:
        return int(self._starts[2 * i + 2] - self._starts[2 * i + 1])

    def largest_id(self) -> int:
        """Of all rows."""
        return int(self._ids.max())

    def weight(self, i: int) -> float:
        """What each of the row's response tokens counts in the loss."""
        return float(self._weights[i])

    def number(self, i: int) -> int:
        """Of the row, in its source's split, from 0; where the rows came without numbers, in this store."""
        return int(self._numbers[i])

    @classmethod
    def write(
        cls, folder: Path, pairs: Iterable[Pair | WeightedPair | NumberedPair], counts: Counts, what: str
    ) -> "TokenStore":
        """Stream pairs, pairs with a weight, or with a weight and a number, to disk.

        Raises:
            UserError: no row is left; says why each was dropped.
        """
        folder.mkdir(parents=True, exist_ok=True)
        total = 0
        with (
            (folder / "ids.u32").open("wb") as ids,
            (folder / "starts.i64").open("wb") as starts,
            (folder / "weights.f32").open("wb") as weights,
            (folder / "numbers.i64").open("wb") as numbers,
        ):
            array("q", [0]).tofile(starts)
            for prompt, response, *more in pairs:
                weight, number = (*more, *(1.0, counts.rows)[len(more) :])
                array("f", [weight]).tofile(weights)
                array("q", [number]).tofile(numbers)
                array("I", [*prompt, *response]).tofile(ids)
                array("q", [total + len(prompt), total + len(prompt) + len(response)]).tofile(starts)
                total += len(prompt) + len(response)
                counts.rows += 1
                counts.prompt_tokens += len(prompt)
                counts.response_tokens += len(response)
        if counts.rows == 0:
            why = ", ".join(f"{n:,} {reason}" for reason, n in counts.dropped.items()) or "the split is empty"
            hint = to_raise(counts.dropped)
            raise UserError(f"{what}: no row is left ({why}){f'; raise {hint}' if hint else ''}")
        return cls(folder, counts)


def to_raise(left_out: Mapping[str, int], longest: int = 0) -> str:
    """The fields that would let rows in that are too long; "" where none is. `longest`: tokens of the longest, 0: unknown."""
    names = {TOO_LONG: "prompts.max_prompt_tokens", "response too long": "prompts.max_tokens"}
    fields = " and ".join(field for reason, field in names.items() if left_out.get(reason))
    return f"{fields}: the longest that does not fit has {longest:,} tokens" if fields and longest else fields


def too_many_left_out(kept: int, left_out: Mapping[str, int], longest: int, most: float) -> str:
    """Why so few rows fit that training on them, or a study of them, would be of other data; "" where enough do.

    Args:
        most: the largest share of the rows that may be too long.
    """
    lost = sum(n for reason, n in left_out.items() if "too long" in reason)
    if lost <= most * (kept + lost):
        return ""
    raised = f"raise {to_raise(left_out, longest)}"
    return f"{lost:,} of {kept + lost:,} rows are too long, more than most_left_out = {most:g} allows; {raised}"


def weighted_pairs(
    examples: Iterable[Example], renderer: Renderer, counts: Counts, aside: Mapping[int, str] | None = None
) -> Iterator[NumberedPair]:
    """Prompt, response, weight and number of each row that fits; what does not is counted, never cut in silence.

    A row's number is its place among all rows, from 0, those that do not enter included.

    Args:
        aside: numbers of rows that must not enter, and why.

    Raises:
        UserError: a row whose prompt and answer are not what the chat template writes; see `Renderer.row`.
    """
    counts.begins_with = renderer.begins_with
    for number, example in enumerate(examples):
        if why := "weight 0" if example.weight == 0 else (aside or {}).get(number):
            counts.dropped[why] += 1
            continue
        try:
            row = renderer.row(example)
        except LeftOut as left:
            counts.dropped[str(left)] += 1
            counts.longest = max(counts.longest, left.tokens)
            continue
        counts.context_shortened += row.shortened
        counts.ends_removed += row.end_removed
        yield row.prompt, row.response, example.weight, number


def instruction_pairs(examples: Iterable[Example], renderer: Renderer, counts: Counts) -> Iterator[Pair]:
    """Prompt and response of each row that fits: `weighted_pairs` where weights do not matter."""
    for prompt, response, *_ in weighted_pairs(examples, renderer, counts):
        yield prompt, response


def text_pairs(texts: Iterable[str], tokenizer: Any, max_tokens: int) -> Iterable[Pair]:
    """Plain text for pretraining: texts end to end, cut into windows without padding.

    Each text begins as `tokenizer(text)` begins it and ends with an end-of-sequence token. A window that does not begin a text
    is prompted by BOS, else by the end of sequence.
    """
    eos = tokenizer.eos_token_id
    start = beginning(tokenizer) or [eos]
    own = len(beginning(tokenizer))
    waiting: list[int] = []

    def window(ids: list[int]) -> Pair:
        begins = own and ids[:own] == start and len(ids) > own
        return (ids[:own], ids[own:]) if begins else (start, ids)

    size = max_tokens - len(start)
    for text in texts:
        waiting += [*begun(tokenizer, encode(tokenizer, text)), eos]
        while len(waiting) >= size:
            yield window(waiting[:size])
            del waiting[:size]
    if waiting:
        yield window(waiting)


def mask_preview(store: TokenStore, tokenizer: Any, limit: int = 120) -> list[tuple[str, bool]]:
    """The first row's tokens and whether each is learned, for a person to check."""
    prompt, response = store[0]
    marked = [(int(i), False) for i in prompt] + [(int(i), True) for i in response]
    if len(marked) > limit:  # the boundary and the end of turn are what one wants to see
        begin = max(0, min(len(prompt) - limit // 2, len(marked) - limit))
        marked = marked[begin : begin + limit]
    return [(decode(tokenizer, [i]), learned) for i, learned in marked]
