"""Which rows each optimiser step sees, and how they lie in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data.store import TokenStore

# what a row may bring along of each of its response tokens
SAMPLED = "sampled"  # its log-probability under what it was drawn from
SHARE = "share"  # a factor of its loss
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class StepRow:
    """One row of a step.

    Attributes:
        prompt, response: token ids; a prompt has at least one.
        weight: what each of its response tokens counts.
        sampled: whether the student wrote the response.
        given: what an objective is told of each response token, by name: float32 [response].
    """

    prompt: Any  # a list, or an array as a store has it
    response: Any
    weight: float = 1.0
    sampled: bool = False
    given: Mapping[str, np.ndarray] = field(default_factory=lambda: NOTHING)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Rows end to end, without padding.

    Attributes:
        ids_T: token ids of all rows.
        position_T: position of each token in its row, from 0.
        lengths: tokens of each row.
        place_N: where in T the hidden states stand that predict a response token.
        target_N: the response tokens, in the same order.
        row_N: the row of each.
        responses: response tokens of each row.
        weight_N: of each response token, its row's; None where all are 1.
        sampled: whether the student wrote the responses; then it wrote all of them.
        given_N: what the rows bring along of each response token, by name.
    """

    ids_T: Tensor
    position_T: Tensor
    lengths: tuple[int, ...]
    place_N: Tensor
    target_N: Tensor
    row_N: Tensor
    responses: tuple[int, ...]
    weight_N: Tensor | None = None
    sampled: bool = False
    given_N: Mapping[str, Tensor] = field(default_factory=lambda: NOTHING)

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: t.to(device) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return replace(self, **moved, given_N={name: t.to(device) for name, t in self.given_N.items()})


def pack(pairs: Sequence[tuple[Any, Any]], weights: Sequence[float] | None = None) -> Batch:
    """Lay rows of (prompt ids, response ids) end to end, in the order given; a prompt has at least one token.

    Args:
        weights: of each row, default 1.
    """
    ids, positions, lengths, places, targets, rows = [], [], [], [], [], []
    begin = 0
    for row, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        ids += [np.asarray(prompt, dtype=np.int64), np.asarray(response, dtype=np.int64)]
        positions.append(np.arange(length))
        lengths.append(length)
        places.append(np.arange(begin + len(prompt) - 1, begin + length - 1))
        targets.append(ids[-1])
        rows.append(np.full(len(response), row))
        begin += length
    ids_T, position_T, place_N, target_N, row_N = (
        torch.from_numpy(np.concatenate(part)) for part in (ids, positions, places, targets, rows)
    )
    responses = tuple(len(response) for _, response in pairs)
    weight_N = None
    if weights is not None and any(weight != 1 for weight in weights):
        weight_N = torch.tensor(weights, dtype=torch.float32)[row_N]
    return Batch(ids_T, position_T, tuple(lengths), place_N, target_N, row_N, responses, weight_N)


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


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in groups of at most `max_tokens` tokens (a longer row stands alone), by length.

    By length, because rows of one length are attended together.
    """
    group: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and total + lengths[i] > max_tokens:
            yield group
            group, total = [], 0
        group.append(i)
        total += lengths[i]
    yield group


def step_batches(rows: Sequence[StepRow], max_tokens: int) -> Iterator[Batch]:
    """One step's rows as packed micro-batches; what the student wrote lies apart from what the data say."""
    for sampled in (False, True):
        own = [row for row in rows if row.sampled == sampled]
        for group in micro_batches([len(row) for row in own], max_tokens) if own else ():
            yield pack_rows([own[i] for i in group])


def pack_rows(rows: Sequence[StepRow]) -> Batch:
    """Rows of a step end to end, all of them written by the student or none."""
    batch = pack([(row.prompt, row.response) for row in rows], [row.weight for row in rows])
    names = rows[0].given
    given_N = {name: torch.from_numpy(np.concatenate([row.given[name] for row in rows])) for name in names}
    return replace(batch, sampled=rows[0].sampled, given_N=given_N)


def rows_of(store: TokenStore, rows: Sequence[int]) -> list[StepRow]:
    """Rows of a store, in the order given."""
    return [StepRow(*store[row], store.weight(row)) for row in rows]
