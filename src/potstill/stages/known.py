"""Which rows a model was trained on, as sorted hashes of what they ask, so that no test row is taken for a new one."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from potstill.core.types import Example
from potstill.scorers.text import key_form

FILE = "trained_rows.u64"  # in the artifact of a model that was trained


def question_hash(row: Example) -> int:
    """64 bits of BLAKE2b over the `key_form` of all that a row asks: earlier turns, context, instruction, results of tools.

    The parts are joined, so that a context in a column of its own and one inside the instruction are the same question.
    """
    parts = [turn.content for turn in row.history] + [row.context, row.instruction] + [turn.content for turn in row.since]
    data = key_form("\n".join(parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"potstill asked").digest(), "big")


def question_hashes(rows: Iterable[Example]) -> np.ndarray:
    """Hashes [N] of rows, in their order."""
    return np.fromiter((question_hash(row) for row in rows), dtype=np.uint64)


class Noted:
    """Rows that pass through, whose hashes are kept; rows of weight 0 teach nothing and are not."""

    def __init__(self) -> None:
        self._hashes: set[int] = set()

    def __call__(self, rows: Iterable[Example]) -> Iterator[Example]:
        for row in rows:
            if row.weight:
                self._hashes.add(question_hash(row))
            yield row

    def save(self, folder: Path) -> None:
        """Write the hashes, sorted, each once."""
        np.array(sorted(self._hashes), dtype="<u8").tofile(folder / FILE)


def trained_rows(folder: Path) -> np.ndarray:
    """The hashes that a model's folder holds, sorted; empty where it holds none."""
    path = folder / FILE
    return np.fromfile(path, dtype="<u8") if path.is_file() else np.zeros(0, dtype=np.uint64)
