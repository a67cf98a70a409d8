"""Which rows each optimiser step sees, and how they lie in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.train.store import TokenStore


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Attention is causal, so real tokens never see the padding behind them.

    Attributes:
        ids_BT: token ids.
        row_N, time_N: where the hidden states stand that predict a response token.
        target_N: the response tokens, in the same order.
        real_tokens: tokens of ids_BT that are not padding.
    """

    ids_BT: Tensor
    row_N: Tensor
    time_N: Tensor
    target_N: Tensor
    real_tokens: int

    def to(self, device: torch.device) -> "Batch":
        ids_BT, row_N, time_N, target_N = (t.to(device) for t in (self.ids_BT, self.row_N, self.time_N, self.target_N))
        return Batch(ids_BT, row_N, time_N, target_N, self.real_tokens)


def collate(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Put rows of (prompt ids, response ids) into one batch; padding is id 0 and is never looked at."""
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids_BT = np.zeros((len(pairs), width), dtype=np.int64)
    rows, times, targets = [], [], []
    for b, (prompt, response) in enumerate(pairs):
        ids_BT[b, : len(prompt)] = prompt
        ids_BT[b, len(prompt) : len(prompt) + len(response)] = response
        rows.append(np.full(len(response), b))
        times.append(np.arange(len(prompt) - 1, len(prompt) + len(response) - 1))
        targets.append(np.asarray(response, dtype=np.int64))
    real = sum(len(prompt) + len(response) for prompt, response in pairs)
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(times)),
        torch.from_numpy(np.concatenate(targets)),
        real,
    )


class Order:
    """The rows of each step, from seed and step number alone, so that a resumed run needs no position to be saved."""

    def __init__(self, rows: int, batch_rows: int, seed: int) -> None:
        self.rows, self.batch_rows, self.seed = rows, batch_rows, seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            self._cached = (epoch, np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows))
        return self._cached[1]

    def step(self, step: int, last: int | None = None) -> list[int]:
        """Rows of one step; epochs follow each other without a gap, and `last` bounds the rows of the whole run."""
        begin = step * self.batch_rows
        end = begin + self.batch_rows if last is None else min(begin + self.batch_rows, last)
        return [int(self._epoch(n // self.rows)[n % self.rows]) for n in range(begin, end)]


def micro_batches(store: TokenStore, rows: list[int], max_tokens: int) -> Iterator[Batch]:
    """Split one step's rows, sorted by length, so that no padded batch exceeds `max_tokens` (one row always fits)."""
    rows = sorted(rows, key=store.length)
    group: list[int] = []
    for row in rows:
        if group and (len(group) + 1) * store.length(row) > max_tokens:
            yield collate([store[i] for i in group])
            group = []
        group.append(row)
    yield collate([store[i] for i in group])
