"""What a pass of a model takes on this machine: measured on small copies, so that no weights are needed.

Two copies of one and two layers and of a small vocabulary give what a layer takes; the head, timed by itself, is taken to cost
in proportion to its vocabulary, and the optimiser to the parameters. So a model of billions of parameters is timed in seconds.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.batches import Batch, micro_batches, pack
from potstill.edges.blank import new_model
from potstill.edges.decoding import BATCH_ROWS
from potstill.edges.experts import layers_with_experts
from potstill.edges.machine import free_memory
from potstill.edges.models import cut_layers, device, size_of
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.head import response_hidden
from potstill.train.loop import Optim, autocast, optimizer_for

LEAST_TOKENS, MOST_TOKENS = 128, 512  # of the pass that is timed; longer passes are taken to grow in proportion
PASS_FLOP = 2.5e11  # of a layer's training pass at most, where the least tokens allow it: a large layer sees fewer tokens
ENTRIES = 8_192  # of the vocabulary of a copy
REPEATS, LEAST_S = 2, 0.25  # timed so often at least and so long; the fastest counts: other work disturbs it least
ENOUGH_S = 2.0  # after which nothing is timed again
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
        decode: seconds for one more token of `BATCH_ROWS` answers.
        alone: seconds for one more token of one answer.
    """

    layers: int
    forward: Pass
    training: Pass
    optimiser: float
    decode: Pass
    alone: Pass
    head: float

    def step_seconds(self, tokens: float) -> float:
        """Of one optimiser step over so many tokens."""
        return tokens * self.training.of(self.layers) + self.optimiser

    def forward_seconds(self, tokens: float) -> float:
        return tokens * self.forward.of(self.layers)

    def scored_seconds(self, tokens: float, responses: float) -> float:
        """Of a forward pass over so many tokens, with the logits of those that are responses."""
        return self.forward_seconds(tokens + self.head * responses)

    def decode_seconds(self, rows: int, new_tokens: float) -> float:
        """Of answers decoded in batches."""
        full, rest = divmod(rows, BATCH_ROWS)
        batch, alone = self.decode.of(self.layers), self.alone.of(self.layers)
        last = alone + rest / BATCH_ROWS * max(0.0, batch - alone) if rest else 0.0
        return new_tokens * (full * batch + last)

    def alone_seconds(self, new_tokens: float) -> float:
        """Of one answer by itself."""
        return new_tokens * self.alone.of(self.layers)


def probe(config: Any, lengths: Sequence[tuple[int, int]], precision: str = "auto") -> Probe | None:
    """Time a config's passes over rows of these (prompt, response) lengths; takes seconds. None: too little memory is free.

    The copies have random weights; their values do not matter to the time that products take.
    """
    entries = min(config.vocab_size, ENTRIES)
    cuts = [_cut(config, layers, entries) for layers in (1, 2)]
    sizes = [size_of(cut) for cut in cuts]
    if BYTES * sizes[1].parameters > free_memory(device()):
        return None
    batch = _batch(entries, lengths, _tokens(sizes[1].active - sizes[0].active))
    one, two = (_Copy(cut, batch, precision) for cut in cuts)
    whole, tokens = size_of(config), len(batch.ids_T)
    head, more = _Head(whole.hidden, entries, precision), config.vocab_size / entries - 1  # in units of a copy's

    def line(part: Callable[[_Copy], None], besides: Callable[[], None] | None = None, per: int = 1) -> Pass:
        of_one, of_two = _in_turn(lambda: part(one), lambda: part(two))
        each = max(0.0, of_two - of_one)
        rest = more * _in_turn(besides)[0] if besides is not None and more > 0 else 0.0
        return Pass((max(0.0, of_one - each) + rest) / per, each / per)

    training = line(_Copy.train, lambda: head.train(len(batch.place_N)), tokens)
    (step,) = _in_turn(two.step)
    one.freeze()
    two.freeze()
    return Probe(
        config.num_hidden_layers,
        forward=line(_Copy.forward, per=tokens),
        training=training,
        optimiser=step * whole.parameters / sizes[1].parameters,
        decode=line(lambda each: each.decode(BATCH_ROWS), lambda: head.logits(BATCH_ROWS)),
        alone=line(lambda each: each.decode(1), lambda: head.logits(1)),
        head=whole.hidden * whole.vocab / max(1, whole.active),
    )


def _cut(config: Any, layers: int, entries: int) -> Any:
    """The config of a copy; of a mixture the layers that have experts, which are most of them."""
    usual = [layer for layer, has in enumerate(layers_with_experts(config)) if has] or range(config.num_hidden_layers)
    cut = cut_layers(config, [usual[layer % len(usual)] for layer in range(layers)])
    cut.vocab_size = entries
    cut.pad_token_id = None  # it may lie outside of the smaller vocabulary
    return cut


def _tokens(layer: int) -> int:
    """How many tokens to time a layer of so many parameters with."""
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, PASS_FLOP / (6 * max(1, layer)))))


class _Head:
    """A head of a small vocabulary by itself."""

    def __init__(self, hidden: int, entries: int, precision: str) -> None:
        self.weight_VD = torch.full((entries, hidden), 0.02, device=device(), requires_grad=True)
        self.precision = precision

    def logits(self, tokens: int) -> None:
        with torch.inference_mode():
            F.linear(self._hidden(tokens), self.weight_VD)

    def train(self, tokens: int) -> None:
        """Logits, their cross-entropy, and its gradients."""
        target_N = torch.zeros(tokens, dtype=torch.long, device=device())
        with autocast(self.precision):
            logits_NV = F.linear(self._hidden(tokens).requires_grad_(), self.weight_VD)
        F.cross_entropy(logits_NV.float(), target_N).backward()

    def _hidden(self, tokens: int) -> Tensor:
        return torch.full((tokens, self.weight_VD.shape[1]), 0.02, device=device())


class _Copy:
    """A copy of a model, and what can be done with it."""

    def __init__(self, config: Any, batch: Batch, precision: str) -> None:
        self.model, self.batch, self.precision = _filled(new_model(config)).to(device()), batch.to(device()), precision
        self.model.requires_grad_(True).train()
        self.optimiser = optimizer_for(self.model, Optim())

    def train(self) -> None:
        with autocast(self.precision):
            loss = CrossEntropy()(self.model, self.batch)
        loss.total.backward()

    def step(self) -> None:
        self.optimiser.step()

    def freeze(self) -> None:
        """Give gradients and averages back; from now on for inference."""
        self.optimiser.zero_grad(set_to_none=True)
        self.optimiser.state.clear()
        self.model.requires_grad_(False).eval()

    def forward(self) -> None:
        with torch.inference_mode(), autocast(self.precision):
            response_hidden(self.model, self.batch)

    def decode(self, rows: int) -> None:
        with torch.inference_mode():
            self.model(input_ids=torch.zeros((rows, 1), dtype=torch.long, device=device()))


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


def _in_turn(*works: Callable[[], None]) -> list[float]:
    """The fastest time of each, after one for warming up; A B A B, so that other work on the machine disturbs all alike."""
    fastest, spent, n = [math.inf] * len(works), 0.0, 0
    while n <= REPEATS or (spent < LEAST_S and n < 50):
        for number, work in enumerate(works):
            begun = time.perf_counter()
            work()
            if device().type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - begun
            if n:
                fastest[number] = min(fastest[number], taken)
                spent += taken
        n += 1
        if n > 1 and spent > ENOUGH_S:
            break
    return fastest
