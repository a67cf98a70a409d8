"""Every answer over a tiny vocabulary and length, and what plain forward passes in float64 say of each."""

import copy
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_parts import tiny_model
from torch import Tensor

from potstill.data.batches import SAMPLED, StepRow

END, PROMPT = 0, (1, 2)
Answer = tuple[int, ...]


def answers(vocab: int, longest: int) -> list[Answer]:
    """All that can be sampled: they end with END, or are cut at `longest` tokens."""
    found = []
    for length in range(1, longest + 1):
        for head in product(range(1, vocab), repeat=length - 1):
            found += [(*head, last) for last in range(vocab) if last == END or length == longest]
    return found


class World:
    """A student, the teacher, and what independent forward passes, one answer at a time, say of every answer."""

    def __init__(self, vocab: int, longest: int, padded: int = 0) -> None:
        self.vocab, self.answers = vocab, answers(vocab, longest)
        # GPT-2, because the others' norms compute in float32 whatever their weights are
        self.student = tiny_model("gpt2", vocab + padded, width=8, seed=1, std=0.6).double()
        self.teacher = tiny_model("gpt2", vocab + 2 * padded, width=16, seed=2, std=0.6).double().requires_grad_(False)
        with torch.no_grad():
            self.logp = {y: self.logs(self.teacher, y).tolist() for y in self.answers}
            self.logq = {y: self.logs(self.student, y).tolist() for y in self.answers}

    def logs(self, model: Any, y: Answer) -> Tensor:
        """log-probabilities [R, V] of each step of one answer."""
        logits_TV = model(torch.tensor([[*PROMPT, *y]])).logits[0, len(PROMPT) - 1 : -1, : self.vocab]
        return F.log_softmax(logits_TV, dim=-1)

    def sampler(self, alpha: float) -> dict[Answer, list[float]]:
        """log-probability of each token of each answer under αp + (1−α)q."""

        def drawn(y: Answer, t: int, v: int) -> float:
            return math.log(alpha * math.exp(self.logp[y][t][v]) + (1 - alpha) * math.exp(self.logq[y][t][v]))

        return {y: [drawn(y, t, v) for t, v in enumerate(y)] for y in self.answers}


def gradient(total: Tensor, model: Any) -> Tensor:
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]
    return torch.cat([g.flatten() for g in flat])


def moved(model: Any, by: float, seed: int = 5) -> Any:
    """The same student some updates later."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in found.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return found


def rows_of(step: Sequence[Answer], sampled: dict[Answer, list[float]]) -> list[StepRow]:
    return [StepRow(PROMPT, y, sampled=True, given={SAMPLED: np.array(sampled[y])}) for y in step]


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-12))
