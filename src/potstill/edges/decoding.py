"""Many answers at once: a prompt is read once for all of its answers, rows that have ended leave, waiting ones enter."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.edges.checked import cache_name, places
from potstill.edges.drawing import Drawing
from potstill.edges.models import Model
from potstill.edges.packed import packs, prepare
from potstill.edges.rooms import autocast_type, can_be_reordered, in_rooms, roomy

BATCH_ROWS = 64  # answers that are in flight together
CHANGE = 0.125  # share of the rows in flight that have ended, from which on others take their places, or they leave
ANY = 0  # a token where none counts


@dataclass(frozen=True)
class Drawn:
    """One answer.

    Attributes:
        ids: its tokens, the one that ends it included.
        logp_N: float32, of each token, as `Drawing` gives them; empty where they were not wanted.
        finished: whether it ended of itself; else it was cut.
    """

    ids: list[int]
    logp_N: np.ndarray
    finished: bool


class InFlight(Protocol):
    """Rows that are continued token by token; see `Batch`.

    Attributes:
        joins: whether other rows can take the places of some.
        moves: whether rows can be picked without reading them again.
    """

    joins: bool
    moves: bool

    @property
    def logits_BV(self) -> Tensor:
        """float32, of the next token."""
        ...

    def step(self, token_B: Tensor, live_B: Tensor) -> None: ...

    def pick(self, rows: list[int]) -> None: ...

    def alone(self, rows: list[int]) -> Any: ...

    def join(self, other: Any, slots: list[int], rows: list[int]) -> None: ...

    def trim(self) -> None: ...


Read = Callable[[Sequence[Sequence[int]]], InFlight]  # prompts that begin together


@contextmanager
def undisturbed(model: Model) -> Iterator[None]:
    """While inside, a model does not train: no dropout, no gradients. Afterwards all is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), cast_once(model):
            yield
    finally:
        for module in training:
            module.training = True
        # autocast keeps weights that it has cast; those cast in here know of no gradient
        torch.clear_autocast_cache()


@contextmanager
def cast_once(model: Model) -> Iterator[None]:
    """While inside, under autocast, linear layers have their weights in its type: it would cast them at every token.

    Products are the same to the bit. A table that an output layer shares with the input stays as it is for the input.
    """
    to = autocast_type(model.device)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_cast(m.weight)] if to is not None else []
    own = [layer.weight for layer in layers]
    try:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight = nn.Parameter(weight.detach().to(to), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight = weight


def _is_cast(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == torch.float32


def draw_answers(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    drawing: Drawing,
    uniform: Callable[[int, int], np.ndarray] | None = None,
    scored: bool = True,
    most: int = BATCH_ROWS,
    on_ended: Callable[[int, int], None] | None = None,
    read: Read | None = None,
) -> list[list[Drawn]]:
    """`samples` answers of each prompt; each equal to that of one row at a time, to rounding.

    Equal prompts are read once. The longest ones come first: so a row that enters is not longer than those in flight, and what
    is in flight need not be moved for it. Where a model's cache cannot be joined (see `in_rooms`), rows enter together only.

    Args:
        prompts: token ids, at least one each.
        uniform: for sampling, numbers in [0, 1) by prompt and sample: [max_new_tokens] in float64.
        scored: whether log-probabilities are wanted.
        most: rows in flight.
        on_ended: gets, after every token, how many answers have ended, of how many.
        read: how prompts are read and continued; default: by the model alone.

    Raises:
        UserError: the model's logits are not numbers.
    """
    rows = [[_Row() for _ in range(samples)] for _ in prompts]
    waiting = _waiting(prompts, rows, uniform)
    flight = _Flight(read or partial(Batch, model), waiting, most, frozenset(stop_ids), max_new_tokens, drawing, scored)
    with undisturbed(model):
        while flight.fill():
            flight.draw()
            if on_ended is not None:
                on_ended(flight.ended, len(prompts) * samples)
            flight.step()
    return [[Drawn(row.ids, np.array(row.logp, dtype=np.float32), row.finished) for row in of_prompt] for of_prompt in rows]


@dataclass(eq=False)
class _Row:
    """An answer on its way.

    Attributes:
        uniform: makes the numbers that draw its tokens; they are made when the row enters.
    """

    uniform: Callable[[], np.ndarray] | None = None
    uniform_N: np.ndarray | None = None
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False
    ended: bool = False

    @property
    def u(self) -> float:
        """The number that draws the next token."""
        return 0.0 if self.ended or self.uniform_N is None else float(self.uniform_N[len(self.ids)])


@dataclass(eq=False)
class _Group:
    """The rows of one prompt that wait, and the prompt as a batch of one row where it has been read already."""

    prompt: Sequence[int]
    rows: list[_Row] = field(default_factory=list)
    read: InFlight | None = None


def _waiting(
    prompts: Sequence[Sequence[int]], rows: list[list[_Row]], uniform: Callable[[int, int], np.ndarray] | None
) -> list[_Group]:
    """Longest prompts first."""
    groups: dict[tuple[int, ...], _Group] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        group = groups.setdefault(tuple(prompts[i]), _Group(prompts[i]))
        for s, row in enumerate(rows[i]):
            row.uniform = partial(uniform, i, s) if uniform is not None else None
            group.rows.append(row)
    return [group for group in groups.values() if group.rows]


@dataclass(eq=False)
class _Entering:
    """Rows that enter, and where each one's prompt is in a batch that was read.

    Attributes:
        spent: whether nothing else is taken from that batch.
    """

    batch: InFlight
    picks: list[int]
    rows: list[_Row]
    spent: bool


@dataclass(eq=False)
class _Flight:
    """The rows that are continued together, and those that wait to be."""

    read: Read
    waiting: list[_Group]
    most: int
    stops: frozenset[int]
    max_new_tokens: int
    drawing: Drawing
    scored: bool
    slots: list[_Row] = field(default_factory=list)  # a row for each of the batch's
    batch: InFlight | None = None
    ended: int = 0

    def fill(self) -> bool:
        """Let waiting rows enter, or rows that have ended leave, where enough have ended. Whether any row is in flight."""
        free = [b for b, row in enumerate(self.slots) if row.ended]
        if self.batch is None or len(free) == len(self.slots):
            self.slots, self.batch = [], None  # gone before others come
            if self.waiting:
                self._begin()
        elif len(free) >= CHANGE * len(self.slots) and free:
            if self.waiting and self.batch.joins:
                self._enter(free)
            elif self.batch.moves:
                kept = [b for b, row in enumerate(self.slots) if not row.ended]
                self.batch.pick(kept)
                self.slots = [self.slots[b] for b in kept]
        return self.batch is not None

    def draw(self) -> None:
        """One token for every row in flight."""
        assert self.batch is not None
        u_B, logits_BV = None, self.batch.logits_BV
        if self.drawing.temperature > 0:
            u_B = torch.tensor([row.u for row in self.slots], dtype=torch.float64).to(logits_BV.device)
        self.token_B, logp_B = self.drawing(logits_BV, u_B, self.scored)
        logp = logp_B.tolist() if logp_B is not None and self.scored else None
        for b, token in enumerate(self.token_B.tolist()):
            row = self.slots[b]
            if row.ended:
                continue
            row.ids.append(token)
            if logp is not None:
                row.logp.append(logp[b])
            row.finished = token in self.stops
            row.ended = row.finished or len(row.ids) == self.max_new_tokens
            self.ended += row.ended

    def step(self) -> None:
        """Let the model read what was drawn."""
        assert self.batch is not None
        live = [not row.ended for row in self.slots]
        if any(live):
            self.batch.step(self.token_B, torch.tensor(live).to(self.token_B.device))

    def _begin(self) -> None:
        """The first rows, or the next ones after all have ended."""
        first, *others = self._entering(self.most)
        self.slots = [row for entering in (first, *others) for row in entering.rows]
        picks = first.picks + [first.picks[0]] * (len(self.slots) - len(first.rows))
        batch: InFlight = first.batch if first.spent else first.batch.alone([0])
        batch.pick(picks)
        self.batch = batch
        self._write(others, list(range(len(first.rows), len(self.slots))))

    def _enter(self, free: list[int]) -> None:
        entering = self._entering(len(free))
        for slot, row in zip(free, (row for each in entering for row in each.rows), strict=False):
            self.slots[slot] = row
        self._write(entering, free)

    def _write(self, entering: list[_Entering], slots: list[int]) -> None:
        assert self.batch is not None
        for each in entering:
            self.batch.join(each.batch, slots[: len(each.rows)], each.picks)
            slots = slots[len(each.rows) :]
        if entering:
            self.batch.trim()

    def _entering(self, places: int) -> list[_Entering]:
        """The next rows, their prompts read: at most one batch from before, at most one new one."""
        taken: list[tuple[_Group, list[_Row]]] = []
        while places and self.waiting:
            group = self.waiting[0]
            rows, group.rows = group.rows[:places], group.rows[places:]
            places -= len(rows)
            taken.append((group, rows))
            for row in rows:
                row.uniform_N = row.uniform() if row.uniform is not None else None
            if not group.rows:
                del self.waiting[0]
        found = [
            _Entering(group.read, [0] * len(rows), rows, not group.rows) for group, rows in taken if group.read is not None
        ]
        new = [(group, rows) for group, rows in taken if group.read is None]
        if new:
            batch = self.read([group.prompt for group, _ in new])
            picks = [p for p, (_, rows) in enumerate(new) for _ in rows]
            found.append(_Entering(batch, picks, [row for _, rows in new for row in rows], True))
            last = new[-1][0]
            if last.rows and batch.joins:
                last.read = batch.alone([len(new) - 1])
        return found


class Batch:
    """Rows that are read and then continued token by token.

    Attributes:
        logits_BV: float32, of the next token.
        mask_BT: 1 at a row's tokens, 0 at padding, which is on the left; and at what a row that has ended was given.
        count_B: a row's tokens.
        joins: whether other rows can take the places of some.
        moves: whether rows can be picked without reading them again.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]]) -> None:
        if packs(model):  # others attend as they are: some make their mask only for a kind of attention that they know
            prepare(model)
        self.model, self.prompts = model, prompts
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._read()

    def _read(self) -> None:
        width = max(map(len, self.prompts))
        ids_BT = torch.full((len(self.prompts), width), ANY)
        mask_BT = torch.zeros((len(self.prompts), width), dtype=torch.long)
        for b, prompt in enumerate(self.prompts):
            ids_BT[b, width - len(prompt) :] = torch.as_tensor(prompt)
            mask_BT[b, width - len(prompt) :] = 1
        self.mask_BT = mask_BT.to(self.model.device)
        self.count_B = self.mask_BT.sum(-1)
        self.cache: Any = None
        self._run(ids_BT.to(self.model.device), (self.mask_BT.cumsum(-1) - 1).clamp(min=0))
        self.joins, self.moves = in_rooms(self.cache, self.model.config), can_be_reordered(self.cache)

    def step(self, token_B: Tensor, live_B: Tensor) -> None:
        """Read one more token of each row; one that has ended stays at the position where it is."""
        self.mask_BT = torch.cat([self.mask_BT, live_B.long()[:, None]], dim=-1)
        self._run(token_B[:, None], self.count_B[:, None])
        self.count_B = self.count_B + live_B

    def pick(self, rows: list[int]) -> None:
        """Continue with these rows; one that is named twice is there twice."""
        if rows == list(range(len(self.count_B))):
            return
        if not self.moves:
            self.prompts = [self.prompts[b] for b in rows]
            self._read()
            return
        index_B = torch.tensor(rows, device=self.count_B.device)
        self.cache.reorder_cache(index_B)
        self._narrow(index_B)
        self.trim()

    def alone(self, rows: list[int]) -> "Batch":
        """These rows in a batch of their own; asked of one that joins."""
        index_B = torch.tensor(rows, device=self.count_B.device)
        other = copy.copy(self)
        other.cache = copy.copy(self.cache)
        other.cache.layers = [layer.alone(index_B) if hasattr(layer, "alone") else layer for layer in self.cache.layers]
        other._narrow(index_B)
        return other

    def join(self, other: "Batch", slots: list[int], rows: list[int]) -> None:
        """Rows of another batch in the place of ours; the narrower ones are padded on the left."""
        slots_N, rows_N = (torch.tensor(each, device=self.count_B.device) for each in (slots, rows))
        width = other.mask_BT.shape[-1]
        self._resize(max(0, width - self.mask_BT.shape[-1]))
        for layer, theirs in zip(roomy(self.cache), roomy(other.cache), strict=True):
            layer.write(slots_N, theirs, rows_N)
        self.mask_BT[slots_N] = 0
        self.mask_BT[slots_N, self.mask_BT.shape[-1] - width :] = other.mask_BT[rows_N]
        self.count_B[slots_N], self.logits_BV[slots_N] = other.count_B[rows_N], other.logits_BV[rows_N]

    def trim(self) -> None:
        """Drop the padding that all rows share."""
        if self.joins:
            self._resize(-int(self.mask_BT.any(0).long().argmax()))

    def _resize(self, columns: int) -> None:
        if columns:
            for layer in roomy(self.cache):
                layer.resize(columns)
            self.mask_BT = F.pad(self.mask_BT, (columns, 0))

    def _narrow(self, index_B: Tensor) -> None:
        self.mask_BT, self.count_B = self.mask_BT[index_B], self.count_B[index_B]
        self.logits_BV = self.logits_BV[index_B]

    def _run(self, ids_BT: Tensor, places_BT: Tensor) -> None:
        more = places(self.model, places_BT)
        if self.cache is not None:
            more[cache_name(self.model)] = self.cache
        out = self.model(input_ids=ids_BT, attention_mask=self.mask_BT, use_cache=True, **self.few, **more)
        self.logits_BV = out.logits[:, -1].float()
        if self.cache is None:
            self.cache = out.past_key_values
