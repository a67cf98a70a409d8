"""Training rows whose question is nearly that of a held-out row. MinHash and LSH by `datasketch`; Broder, 1997."""

import hashlib
import heapq
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from potstill.core.types import Example, Split
from potstill.scorers.text import key_form
from potstill.sources._cells import digest

MOST = 50_000  # training rows that are compared when nothing is dropped: 4 seconds for each ten thousand of Dolly's length
MOST_HELD_OUT = 20_000
READ = 20_000  # characters of a prompt that are compared
SHINGLE = 5  # characters
SAMPLE = 256  # instructions in which what most begin or end with is looked for
FEW = 16  # different instructions: of fewer, what most share may be what they ask
BOILERPLATE = 20  # characters: a shorter beginning, such as "what is the", is common speech
_PERMUTATIONS, _SEED = 64, 1
_SHOWN = 5

Parted = Callable[[], Iterator[tuple[Split, Example]]]


@dataclass(frozen=True)
class NearPair:
    """A training row and the held-out row that it nearly repeats; similarity between 0 and 1."""

    training: str
    held_out: str
    split: Split
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    """How many rows nearly stand on both sides of the split.

    Attributes:
        count: held-out rows that a training row nearly repeats, by split.
        held_out: held-out rows compared, by split.
        held_out_rows: held-out rows in all.
        training: training rows that nearly repeat a held-out row, of those compared.
        compared: training rows compared.
        rows: training rows in all.
        similarity: from which on two questions are near, the Jaccard index of their runs of five characters.
        examples: the nearest pairs, at most five.
        dropped: whether such training rows are left out of training.
    """

    count: dict[Split, int]
    held_out: dict[Split, int]
    held_out_rows: int
    training: int
    compared: int
    rows: int
    similarity: float
    examples: tuple[NearPair, ...]
    dropped: bool

    @property
    def total(self) -> int:
        """Held-out rows that a training row nearly repeats."""
        return sum(self.count.values())

    def sentence(self) -> str:
        """What a person must know, or the empty text where no row is near."""
        if not self.total:
            return ""
        parts = [f"{n:,} of {self.held_out[split]:,} {split} rows" for split, n in self.count.items() if n]
        kept = 'stay in training; splits.near_duplicates = "drop" leaves them out'
        then = "are left out of training" if self.dropped else kept
        return (
            f"{' and '.join(parts)} are nearly repeated by training rows{self._part()}: {self.training:,} training rows {then}"
        )

    def _part(self) -> str:
        looked = sum(self.held_out.values())
        if (self.compared, looked) == (self.rows, self.held_out_rows):
            return ""
        return (
            f" (compared: {self.compared:,} of {self.rows:,} training rows and {looked:,} of {self.held_out_rows:,} held-out "
            "rows, drawn by a hash)"
        )


def none_looked_for(similarity: float) -> NearDuplicates:
    """Of a source with splits of its own, which repeats its questions on purpose or was published so."""
    return NearDuplicates({}, {}, 0, 0, 0, 0, similarity, (), False)


def near_duplicates(
    parted: Parted, similarity: float, *, dropped: bool = False, most: int = MOST
) -> tuple[NearDuplicates, frozenset[bytes]]:
    """Compare every training row with the held-out ones; also the `identity` of each training row that is near one.

    Two rows are near when their instructions and their whole prompts (earlier turns, context, instruction) both have a Jaccard
    index of at least `similarity`: one passage asked two questions is not a repetition. What most instructions of the source
    begin or end with is left out of the comparison. Chats are also near when the last question and its answer are the same,
    whatever was said before. Deterministic, the same in any order.

    Args:
        parted: gives each row with its split, from the beginning at every call.
        most: at most about so many training rows are compared, drawn by a hash; all where they are dropped.
    """
    sizes: Counter[Split] = Counter()
    usual = _usual(row for _, row in parted())

    def held_out() -> Iterator[tuple[bytes, _Held]]:
        for split, row in parted():
            sizes[split] += 1
            if split != "train":
                yield (
                    _order(row),
                    _Held(split, row.instruction, usual.asked(row), usual.prompt(row), _repeated(row), bool(row.history)),
                )

    drawn = heapq.nsmallest(MOST_HELD_OUT, held_out()) if not dropped else sorted(held_out())
    held, rows = _HeldOut(similarity, [row for _, row in drawn], usual), sizes["train"]
    share = 1.0 if dropped else min(1.0, most / max(rows, 1))
    repeated: set[int] = set()
    identities: set[bytes] = set()
    pairs: list[tuple[float, str, int]] = []
    training = compared = 0
    for split, row in parted():
        if split != "train" or not _within(row, share):
            continue
        compared += 1
        if near := held.near(row):
            training += 1
            identities.add(identity(row))
            repeated.update(i for _, i in near)
            pairs = heapq.nlargest(_SHOWN, [*pairs, *((alike, row.instruction, i) for alike, i in near)])
    splits: tuple[Split, ...] = ("validation", "test")
    found = NearDuplicates(
        count={split: sum(held.rows[i].split == split for i in repeated) for split in splits},
        held_out={split: sum(each.split == split for each in held.rows) for split in splits},
        held_out_rows=sizes["validation"] + sizes["test"],
        training=training,
        compared=compared,
        rows=rows,
        similarity=similarity,
        examples=tuple(NearPair(text, held.rows[i].instruction, held.rows[i].split, alike) for alike, text, i in pairs),
        dropped=dropped,
    )
    return found, frozenset(identities)


@dataclass(frozen=True, order=True)
class _Held:
    split: Split
    instruction: str
    asked: str
    prompt: str
    repeated: bytes
    in_chat: bool


@dataclass(frozen=True)
class _Usual:
    """What most instructions of a source begin and end with, which tells nothing of what one asks."""

    begin: str = ""
    end: str = ""

    def asked(self, row: Example) -> str:
        """The instruction without it, in the form of keys."""
        return key_form(self._bare(row.instruction))

    def prompt(self, row: Example) -> str:
        """All that a row asks, from its end back."""
        parts = (*(turn.content for turn in row.history), row.context, self._bare(row.instruction))
        return key_form("\n".join(parts)[-READ:])

    def _bare(self, instruction: str) -> str:
        return key_form(instruction).removeprefix(self.begin).removesuffix(self.end)


def _usual(rows: Iterable[Example]) -> _Usual:
    """The beginning and the end that more than half of a sample of the different instructions share, drawn by a hash."""
    asked = {key_form(text) for _, text in heapq.nsmallest(SAMPLE, ((_order(row), row.instruction) for row in rows))}
    if len(asked) < FEW:
        return _Usual()
    begin = _shared(sorted(asked))
    rest = sorted(text.removeprefix(begin)[::-1] for text in asked)
    return _Usual(begin, _shared(rest)[::-1])


def _shared(texts: list[str]) -> str:
    """The longest beginning of more than half of some sorted texts, "" where it is short."""
    more_than_half = len(texts) // 2 + 1
    begins = (_common(a, b) for a, b in zip(texts, texts[more_than_half - 1 :], strict=False))
    longest = max(begins, key=len, default="")
    return longest if len(longest) >= BOILERPLATE else ""


def _common(a: str, b: str) -> str:
    return a[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))]


class _HeldOut:
    """The held-out rows, found by their likeness to another row."""

    def __init__(self, similarity: float, rows: list[_Held], usual: _Usual) -> None:
        from datasketch import MinHash, MinHashLSH

        self.rows, self._usual = rows, usual
        self._repeated: dict[bytes, list[int]] = {}
        self._similarity = similarity
        self._blank = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=zlib.crc32)
        # a miss is worse than a second look: every pair that the index proposes is compared in full
        self._index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        for i, row in enumerate(rows):
            self._repeated.setdefault(row.repeated, []).append(i)
            self._index.insert(i, self._signature(_shingles(row.prompt)))

    def near(self, row: Example) -> list[tuple[float, int]]:
        """Likeness and number of each held-out row that this row nearly repeats."""
        asked, prompt = _shingles(self._usual.asked(row)), _shingles(self._usual.prompt(row))
        chats = self._repeated.get(_repeated(row), [])
        found = {i: 1.0 for i in chats if row.history or self.rows[i].in_chat}
        for i in cast(list[int], self._index.query(self._signature(prompt))):
            alike = min(_jaccard(prompt, _shingles(self.rows[i].prompt)), _jaccard(asked, _shingles(self.rows[i].asked)))
            if alike >= self._similarity:
                found[i] = max(alike, found.get(i, 0.0))
        return [(found[i], i) for i in sorted(found)]

    def _signature(self, shingles: set[str]) -> Any:
        signature = self._blank.copy()
        signature.update_batch([shingle.encode() for shingle in shingles])
        return signature


def identity(row: Example) -> bytes:
    """Of what is compared of a row."""
    return digest(_Usual().prompt(row), key_form(row.response)).encode()


def _repeated(row: Example) -> bytes:
    """Of a last question, its context and its answer, whatever was said before."""
    return digest(key_form(row.instruction), key_form(row.context), key_form(row.response)).encode()


def _shingles(text: str) -> set[str]:
    text = f" {text} "
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def _order(row: Example) -> bytes:
    """An order that no row's place in the file has a part in."""
    return hashlib.blake2b(_Usual().prompt(row).encode(), digest_size=8, person=b"potstill near").digest()


def _within(row: Example, share: float) -> bool:
    return share == 1 or int.from_bytes(_order(row), "big") / 2**64 < share
