"""Which rows each optimiser step sees, and how they lie in memory."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data.store import TokenStore
from potstill.edges.attention import Shared

# what a row may bring along of each of its response tokens
SAMPLED = "sampled"  # its log-probability under what it was drawn from
SHARE = "share"  # a factor of its loss
NOTHING: Mapping[str, Any] = MappingProxyType({})

# A prompt is read once for all of its rows where that saves this share of their tokens: each layer then copies queries, keys
# and values of whole rows, which takes 0 to 3 % of a pass (SmolLM2, one core of a CPU).
LEAST_SAVED = 1 / 16
# Tokens of a batch's whole rows, in units of the tokens that one pass reads: attention still sees the rows whole.
MOST_WHOLE = 2


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
    """Rows end to end, without padding; a prompt that several of them share may lie there once, before the first of them.

    Attributes:
        ids_T: token ids of all rows.
        position_T: position of each token in its row, from 0.
        lengths: tokens of each whole row.
        place_N: where in T the hidden states stand that predict a response token.
        target_N: the response tokens, in the same order.
        row_N: the row of each.
        responses: response tokens of each row.
        weight_N: of each response token, its row's; None where all are 1.
        sampled: whether the student wrote the responses; then it wrote all of them.
        given_N: what the rows bring along of each response token, by name.
        shared: which rows each token belongs to, where some belong to several; None: each to one.
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
    shared: Shared | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: t.to(device) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor | Shared)}
        return replace(self, **moved, given_N={name: t.to(device) for name, t in self.given_N.items()})

    def whole_ids(self) -> Tensor:
        """Token ids [F] of the rows end to end, each of them whole."""
        return self.ids_T if self.shared is None else self.shared.spread(self.ids_T)

    def key(self) -> bytes:
        """The same for the same rows in the same layout alone, which a model reads with the same bits."""
        layout = (len(self.ids_T), self.lengths, self.responses)
        return repr(layout).encode() + self.whole_ids().cpu().numpy().tobytes()


def pack(
    pairs: Sequence[tuple[Any, Any]],
    weights: Sequence[float] | None = None,
    prompts: Sequence[bytes | None] | None = None,
) -> Batch:
    """Lay rows of (prompt ids, response ids) end to end, in the order given; a prompt has at least one token.

    Args:
        weights: of each row, default 1.
        prompts: of each row its prompt as `prompts_of` has it, which then lies once for all rows that have it; None: it lies
            with its row alone.
    """
    ids, positions, lengths, places, targets, rows = [], [], [], [], [], []
    laid: dict[bytes, int] = {}  # where prompts that rows share begin
    copies: list[tuple[int, int, int]] = []  # where another row's prompt begins, where the same one lies, and its tokens
    begin = 0
    for row, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        ids += [np.asarray(prompt, dtype=np.int64), np.asarray(response, dtype=np.int64)]
        positions.append(np.arange(length))
        lengths.append(length)
        places.append(np.arange(begin + len(prompt) - 1, begin + length - 1))
        targets.append(ids[-1])
        rows.append(np.full(len(response), row))
        if prompts is not None and (prompt_bytes := prompts[row]) is not None:
            first = laid.setdefault(prompt_bytes, begin)
            copies += [(begin, first, len(prompt))] if first < begin else []
        begin += length
    ids_T, position_T, place_N, target_N, row_N = (
        torch.from_numpy(np.concatenate(part)) for part in (ids, positions, places, targets, rows)
    )
    shared = _shared(begin, copies) if copies else None
    if shared is not None:
        ids_T, position_T, place_N = shared.keep(ids_T), shared.keep(position_T), shared.spread_F[place_N]
    responses = tuple(len(response) for _, response in pairs)
    weight_N = None
    if weights is not None and any(weight != 1 for weight in weights):
        weight_N = torch.tensor(weights, dtype=torch.float32)[row_N]
    return Batch(ids_T, position_T, tuple(lengths), place_N, target_N, row_N, responses, weight_N, shared=shared)


def _shared(tokens: int, copies: Sequence[tuple[int, int, int]]) -> Shared:
    """Of whole rows with so many tokens, in which some (begin, first, length) are copies of what begins at `first`."""
    first_F = torch.arange(tokens)
    for begin, first, length in copies:
        first_F[begin : begin + length] = torch.arange(first, first + length)
    return Shared.of(first_F)


def prompts_of(pairs: Sequence[tuple[Any, Any]]) -> list[bytes | None]:
    """Of each row its prompt, where all rows that have it are to read it once: by the token ids alone, whoever wrote them."""
    keys = [_bytes(prompt) for prompt, _ in pairs]
    count, tokens = Counter(keys), Counter[bytes]()
    for key, (prompt, response) in zip(keys, pairs, strict=True):
        tokens[key] += len(prompt) + len(response)
    once = {key for key, rows in count.items() if _saves(_length(key), rows, tokens[key])}
    return [key if key in once else None for key in keys]


def _bytes(prompt: Any) -> bytes:
    return np.asarray(prompt, np.int64).tobytes()


def _length(prompt: bytes | None) -> int:
    """Tokens of what `_bytes` gave."""
    return 0 if prompt is None else len(prompt) // np.dtype(np.int64).itemsize


def _saves(prompt: float, rows: int, tokens: float) -> bool:
    """Whether reading a prompt of so many tokens once, of rows with so many tokens together, is worth it."""
    return rows > 1 and (rows - 1) * prompt >= LEAST_SAVED * tokens


def group_tokens(prompt: float, response: float, rows: int, max_tokens: int) -> float:
    """Tokens that are read of so many rows with one prompt, by mean lengths: what `prompts_of` and `micro_batches` come to."""
    whole = prompt + response
    if not _saves(prompt, rows, rows * whole):
        return rows * whole
    answers = (max_tokens - prompt) / response if response else math.inf
    together = max(1, math.floor(min(answers, MOST_WHOLE * max_tokens / whole)))
    return math.ceil(rows / together) * prompt + rows * response


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


def micro_batches(
    lengths: Sequence[int], max_tokens: int, prompts: Sequence[bytes | None] | None = None
) -> Iterator[list[int]]:
    """Indices of rows in groups of at most `max_tokens` tokens (a longer row stands alone), by length.

    By length, because rows of one length are attended together. Rows that share a prompt stay together where they fit, and
    it counts once in each group; whole, a group's rows have at most `MOST_WHOLE` · `max_tokens` tokens.

    Args:
        prompts: of each row, see `prompts_of`; default: none is shared.
    """
    units: dict[bytes | int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        prompt = prompts[i] if prompts is not None else None
        units.setdefault(i if prompt is None else prompt, []).append(i)
    group: list[int] = []
    read = whole = 0

    def fits(tokens: int, of_whole_rows: int) -> bool:
        return not group or (read + tokens <= max_tokens and whole + of_whole_rows <= MOST_WHOLE * max_tokens)

    for unit in units.values():
        prompt = _length(prompts[unit[0]]) if prompts is not None else 0
        of_unit = sum(lengths[i] for i in unit)
        apart = not fits(of_unit - (len(unit) - 1) * prompt, of_unit)
        for n, i in enumerate(unit):
            more = lengths[i] - (prompt if n else 0)
            if (apart and n == 0) or not fits(more, lengths[i]):
                yield sorted(group, key=lambda i: lengths[i])
                group, read, whole, more = [], 0, 0, lengths[i]
            group.append(i)
            read, whole = read + more, whole + lengths[i]
    yield sorted(group, key=lambda i: lengths[i])


def packed_rows(rows: Sequence[StepRow], max_tokens: int, *, share: bool = True) -> Iterator[tuple[list[int], Batch]]:
    """Packed micro-batches of rows, all of them written by the student or none, each with the indices of its rows.

    Args:
        share: whether prompts that rows share may be read once: not for a model that reads rows of one length as a batch.
    """
    if not rows:
        return
    prompts = prompts_of([(row.prompt, row.response) for row in rows]) if share else [None] * len(rows)
    for group in micro_batches([len(row) for row in rows], max_tokens, prompts):
        yield group, pack_rows([rows[i] for i in group], [prompts[i] for i in group])


def step_batches(rows: Sequence[StepRow], max_tokens: int, *, share: bool = True) -> Iterator[Batch]:
    """One step's rows as packed micro-batches; what the student wrote lies apart from what the data say.

    Args:
        share: see `packed_rows`.
    """
    for sampled in (False, True):
        for _, batch in packed_rows([row for row in rows if row.sampled == sampled], max_tokens, share=share):
            yield batch


def pack_rows(rows: Sequence[StepRow], prompts: Sequence[bytes | None] | None = None) -> Batch:
    """Rows of a step end to end, all of them written by the student or none; `prompts`: see `pack`."""
    batch = pack([(row.prompt, row.response) for row in rows], [row.weight for row in rows], prompts)
    names = rows[0].given
    given_N = {name: torch.from_numpy(np.concatenate([row.given[name] for row in rows])) for name in names}
    return replace(batch, sampled=rows[0].sampled, given_N=given_N)


def rows_of(store: TokenStore, rows: Sequence[int]) -> list[StepRow]:
    """Rows of a store, in the order given."""
    return [StepRow(*store[row], store.weight(row)) for row in rows]
