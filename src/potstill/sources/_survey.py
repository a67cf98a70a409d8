"""One pass over a source's rows: which language they are in, and which keys belong together because their rows ask the same."""

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from potstill.core.types import Example, Turn
from potstill.scorers.language import Guess, guess
from potstill.scorers.text import key_form
from potstill.sources._cells import digest

SAMPLE = 256  # rows from which the language is detected
SHOWN = 400  # characters of each


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells.

    Attributes:
        language: of the rows that name none themselves.
        named: the languages that rows name themselves.
        unnamed: whether any row names none.
        kin: place of a key → place of the key that stands for all keys joined with it; only joined keys are in it.
    """

    language: Guess
    named: frozenset[str]
    unnamed: bool
    kin: Mapping[int, int]


def survey(rows: Iterable[Example], *, join: bool) -> Survey:
    """Look at all rows once, in memory that grows by 16 bytes a row where keys are to be joined, else not at all.

    Args:
        join: whether keys of rows that ask the same are joined; False where the key is what is asked.
    """
    named: set[str] = set()
    keys, asked = array("Q"), array("Q")

    def unnamed() -> Iterator[tuple[bytes, str, str]]:
        for row in rows:
            if join:
                keys.append(place(row.key))
                asked.append(place(asked_key(row.instruction, row.context, row.history)))
            if row.language:
                named.add(row.language)
            else:
                yield _order(row), row.response[:SHOWN], row.instruction[:SHOWN]

    drawn = heapq.nsmallest(SAMPLE, unnamed())
    language = guess([(response, instruction) for _, response, instruction in drawn])
    return Survey(language, frozenset(named), bool(drawn), _joined(keys, asked) if join else {})


def asked_key(instruction: str, context: str = "", history: Iterable[Turn] = ()) -> str:
    """The key of what a row asks: equal for texts that differ in composition, case, white space or line ends only.

    Of a conversation the first question of the user, so that the turns of one conversation have one key, also where each is a
    row of its own with all turns before it.
    """
    opening = next((turn.content for turn in history if turn.role == "user"), None)
    return digest(key_form(instruction), key_form(context)) if opening is None else digest(key_form(opening), "")


def place(key: str) -> int:
    """Where a key lies among 2⁶⁴ places, evenly spread; keys of one form lie in one place."""
    return int.from_bytes(hashlib.blake2b(key_form(key).encode(), digest_size=8).digest(), "big")


def _order(row: Example) -> bytes:
    """An order that no row's place in the file has a part in."""
    return hashlib.blake2b(f"{row.instruction}\0{row.response}".encode(), digest_size=8, person=b"potstill tongue").digest()


def _joined(keys: array, asked: array) -> dict[int, int]:
    """Joins keys that share a question, and those joined with them (connected components)."""
    key_N, asked_N = (np.frombuffer(each, dtype=np.uint64) if each else np.zeros(0, np.uint64) for each in (keys, asked))
    order_N = np.argsort(asked_N, kind="stable")
    key_N, asked_N = key_N[order_N], asked_N[order_N]
    shared = np.flatnonzero((asked_N[1:] == asked_N[:-1]) & (key_N[1:] != key_N[:-1]))
    leader: dict[int, int] = {}

    def lead(key: int) -> int:
        while (above := leader.setdefault(key, key)) != key:
            leader[key] = key = leader[above]
        return key

    for i in shared.tolist():
        a, b = sorted((lead(int(key_N[i])), lead(int(key_N[i + 1]))), key=_rank)
        leader[b] = a
    return {key: lead(key) for key in list(leader)}


def _rank(key: int) -> bytes:
    """Which of the joined keys stands for all: by another hash than the place, else the joined would crowd into the test."""
    return hashlib.blake2b(key.to_bytes(8, "big"), digest_size=8, person=b"potstill kin").digest()
