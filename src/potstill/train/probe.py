"""What a pass of a model takes on this machine: measured on copies of one and two layers, so that no weights are needed."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from potstill.data.batches import Batch, micro_batches, pack
from potstill.edges.blank import new_model
from potstill.edges.models import device
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.head import response_hidden
from potstill.train.loop import Optim, autocast, optimizer_for

MEASURED_TOKENS = 512  # of the pass that is timed; longer passes are taken to grow in proportion
REPEATS, LEAST_S = 2, 0.25  # timed so often at least and so long; the fastest counts: other work disturbs it least
DECODED_ROWS = 64


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
        decode: seconds for one more token of `DECODED_ROWS` answers.
        alone: seconds for one more token of one answer.
    """

    layers: int
    forward: Pass
    training: Pass
    optimiser: Pass
    decode: Pass
    alone: Pass

    def step_seconds(self, tokens: float) -> float:
        """Of one optimiser step over so many tokens."""
        return tokens * self.training.of(self.layers) + self.optimiser.of(self.layers)

    def forward_seconds(self, tokens: float) -> float:
        return tokens * self.forward.of(self.layers)

    def decode_seconds(self, rows: float, new_tokens: float) -> float:
        """Of answers decoded in batches."""
        return math.ceil(rows / DECODED_ROWS) * new_tokens * self.decode.of(self.layers)

    def alone_seconds(self, new_tokens: float) -> float:
        """Of one answer by itself."""
        return new_tokens * self.alone.of(self.layers)


def probe(config: Any, lengths: Sequence[tuple[int, int]], precision: str = "auto") -> Probe:
    """Time a config's passes over rows of these (prompt, response) lengths; takes seconds.

    The copies have random weights; their values do not matter to the time that products take.
    """
    batch = _batch(config, lengths)
    one, two = (_Copy(config, layers, batch, precision) for layers in (1, 2))
    figures = [tuple(part(each) for each in (one, two)) for part in _PARTS]
    return Probe(config.num_hidden_layers, *(_line(*pair) for pair in figures))


def _line(one: float, two: float) -> Pass:
    each = max(0.0, two - one)
    return Pass(max(0.0, one - each), each)


class _Copy:
    """A copy of so many layers, measured part by part."""

    def __init__(self, config: Any, layers: int, batch: Batch, precision: str) -> None:
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = layers
        if getattr(cut, "layer_types", None):
            cut.layer_types = [*cut.layer_types, *cut.layer_types][:layers]
        self.model, self.batch, self.precision = _filled(new_model(cut)).to(device()), batch.to(device()), precision
        self.tokens = len(batch.ids_T)
        self.training = self.optimiser = 0.0
        self._train()
        self.forward = self._forward()
        self.decode, self.alone = (self._decode(rows) for rows in (DECODED_ROWS, 1))

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


def _batch(config: Any, lengths: Sequence[tuple[int, int]]) -> Batch:
    """Rows of these lengths, as many as fit the measured pass, repeated where they are few."""
    rows: list[tuple[list[int], list[int]]] = []
    total = n = 0
    while total < MEASURED_TOKENS and n < 10_000:
        prompt, response = lengths[n % len(lengths)]
        rows.append(([n % config.vocab_size] * max(1, prompt), [(n + 1) % config.vocab_size] * max(1, response)))
        total, n = total + prompt + response, n + 1
    (group, *_) = micro_batches([len(p) + len(r) for p, r in rows], max(total, 1))
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
    while len(taken) < REPEATS or (sum(taken) < LEAST_S and len(taken) < 50):
        begun = time.perf_counter()
        work()
        if device().type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken)
