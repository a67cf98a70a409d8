"""What a pass of a model takes on this machine: measured on small copies, so that no weights are needed.

A pass is taken to cost value(L, V) = a + b·L + c·V for L layers and V vocabulary entries. Three copies give the three: one of
one layer, one of two, and one of one layer and twice the entries. So a model of billions of parameters is timed in seconds.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from potstill.data.batches import Batch, micro_batches, pack
from potstill.edges.blank import new_model
from potstill.edges.machine import free_memory
from potstill.edges.models import device, size_of
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.head import response_hidden
from potstill.train.loop import Optim, autocast, optimizer_for

LEAST_TOKENS, MOST_TOKENS = 128, 512  # of the pass that is timed; longer passes are taken to grow in proportion
PASS_FLOP = 2.5e11  # of a layer's training pass at most, where the least tokens allow it: a large layer sees fewer tokens
ENTRIES = 8_192  # of the vocabulary of a copy
REPEATS, LEAST_S = 2, 0.25  # timed so often at least and so long; the fastest counts: other work disturbs it least
DECODED_ROWS = 64
BYTES = 20  # of a copy for each parameter: weight, gradient, Adam's averages, and what making it takes


@dataclass(frozen=True)
class Pass:
    """Seconds of one thing, by the layers it goes through: value(L) = once + L · each."""

    once: float
    each: float

    def of(self, layers: int) -> float:
        return max(0.0, self.once + layers * self.each)


@dataclass(frozen=True)
class Probe:
    """What was measured of one config.

    Attributes:
        layers: of the whole model.
        forward: seconds per token, final hidden states alone.
        training: seconds per token, forward and backward through the fused head.
        optimiser: seconds per optimiser step.
        head: the head's products for a token, as a share of the layers' products for one.
        decode: seconds for one more token of `DECODED_ROWS` answers.
        alone: seconds for one more token of one answer.
    """

    layers: int
    forward: Pass
    training: Pass
    optimiser: Pass
    decode: Pass
    alone: Pass
    head: float

    def step_seconds(self, tokens: float) -> float:
        """Of one optimiser step over so many tokens."""
        return tokens * self.training.of(self.layers) + self.optimiser.of(self.layers)

    def forward_seconds(self, tokens: float) -> float:
        return tokens * self.forward.of(self.layers)

    def scored_seconds(self, tokens: float, responses: float) -> float:
        """Of a forward pass over so many tokens, with the logits of those that are responses."""
        return self.forward_seconds(tokens + self.head * responses)

    def decode_seconds(self, rows: int, new_tokens: float) -> float:
        """Of answers decoded in batches."""
        full, rest = divmod(rows, DECODED_ROWS)
        batch, alone = self.decode.of(self.layers), self.alone.of(self.layers)
        last = alone + rest / DECODED_ROWS * max(0.0, batch - alone) if rest else 0.0
        return new_tokens * (full * batch + last)

    def alone_seconds(self, new_tokens: float) -> float:
        """Of one answer by itself."""
        return new_tokens * self.alone.of(self.layers)


def probe(config: Any, lengths: Sequence[tuple[int, int]], precision: str = "auto") -> Probe | None:
    """Time a config's passes over rows of these (prompt, response) lengths; takes seconds. None: too little memory is free.

    The copies have random weights; their values do not matter to the time that products take.
    """
    entries = min(config.vocab_size, ENTRIES)
    shapes = [(1, entries), (2, entries)] + ([(1, 2 * entries)] if config.vocab_size > entries else [])
    cuts = [_cut(config, *shape) for shape in shapes]
    sizes = [size_of(cut) for cut in cuts]
    if BYTES * max(size.parameters for size in sizes) > free_memory(device()):
        return None
    batch = _batch(entries, lengths, _tokens(sizes[1].body - sizes[0].body))
    copies = [_Copy(cut, batch, precision) for cut in cuts]
    more = config.vocab_size / entries - 1  # of the vocabulary, in units of a copy's
    figures = [_line(*map(part, copies), more=more) for part in _PARTS]
    whole = size_of(config)
    return Probe(config.num_hidden_layers, *figures, whole.hidden * whole.vocab / max(1, whole.body))


def _cut(config: Any, layers: int, entries: int) -> Any:
    """The config of a copy."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers, cut.vocab_size = layers, entries
    cut.pad_token_id = None  # it may lie outside of the smaller vocabulary
    if getattr(cut, "layer_types", None):
        cut.layer_types = [*cut.layer_types, *cut.layer_types][:layers]
    return cut


def _tokens(layer: int) -> int:
    """How many tokens to time a layer of so many parameters with."""
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, PASS_FLOP / (6 * max(1, layer)))))


def _line(one: float, two: float, wide: float | None = None, *, more: float) -> Pass:
    each = max(0.0, two - one)
    return Pass(max(0.0, one - each) + (max(0.0, wide - one) * more if wide is not None else 0.0), each)


class _Copy:
    """Measured part by part; only the figures outlive that."""

    def __init__(self, config: Any, batch: Batch, precision: str) -> None:
        self.model, self.batch, self.precision = _filled(new_model(config)).to(device()), batch.to(device()), precision
        self.tokens = len(batch.ids_T)
        self.training = self.optimiser = 0.0
        self._train()
        self.forward = self._forward()
        self.decode, self.alone = (self._decode(rows) for rows in (DECODED_ROWS, 1))
        del self.model

    def _train(self) -> None:
        self.model.requires_grad_(True).train()
        optimiser = optimizer_for(self.model, Optim())

        def once() -> None:
            with autocast(self.precision):
                loss = CrossEntropy()(self.model, self.batch)
            loss.total.backward()

        once()
        optimiser.step()
        self.training = _seconds(once) / self.tokens
        self.optimiser = _seconds(optimiser.step)
        optimiser.zero_grad(set_to_none=True)

    def _forward(self) -> float:
        self.model.requires_grad_(False).eval()

        def once() -> None:
            with torch.inference_mode(), autocast(self.precision):
                response_hidden(self.model, self.batch)

        return _seconds(once) / self.tokens

    def _decode(self, rows: int) -> float:
        ids_B1 = torch.zeros((rows, 1), dtype=torch.long, device=device())

        def once() -> None:
            with torch.inference_mode():
                self.model(input_ids=ids_B1)

        return _seconds(once)


_PARTS: tuple[Callable[[_Copy], float], ...] = (
    lambda each: each.forward,
    lambda each: each.training,
    lambda each: each.optimiser,
    lambda each: each.decode,
    lambda each: each.alone,
)


def _batch(entries: int, lengths: Sequence[tuple[int, int]], tokens: int) -> Batch:
    """So many tokens in rows of these lengths, repeated where they are few, the last row cut in proportion."""
    rows: list[tuple[list[int], list[int]]] = []
    left = tokens
    while left > 1:
        prompt, response = lengths[len(rows) % len(lengths)]
        share = min(1.0, left / max(1, prompt + response))
        prompt, response = max(1, round(share * prompt)), max(1, round(share * response))
        rows.append(([len(rows) % entries] * prompt, [(len(rows) + 1) % entries] * response))
        left -= prompt + response
    (group, *_) = micro_batches([len(p) + len(r) for p, r in rows], 2 * tokens)
    return pack([rows[i] for i in group])


@torch.no_grad()
def _filled(model: Any) -> Any:
    """Ordinary numbers, quickly: uninitialised memory may hold NaN, and subnormal numbers slow a processor down."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_((0.02 * torch.randn(parameter.shape[-1], generator=generator)).expand_as(parameter))
    return model


def _seconds(work: Callable[[], Any]) -> float:
    taken: list[float] = []
    while (len(taken) < REPEATS and sum(taken) < 4 * LEAST_S) or (sum(taken) < LEAST_S and len(taken) < 50):
        begun = time.perf_counter()
        work()
        if device().type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken)
