"""What keeps every divergence finite, in value and gradient, where a distribution has no mass."""

import math

import torch
from torch import Tensor

FLOOR = -1e4  # nats; exp(FLOOR) is 0 in every dtype, and FLOOR itself is finite in every dtype


def floored(log_NV: Tensor) -> Tensor:
    """-inf becomes a finite floor, so that 0·log 0 is 0 and never NaN."""
    if not log_NV.is_cuda and log_NV.numel() and bool(log_NV.detach().amin() >= FLOOR):
        return log_NV  # nothing to lift: on a CPU looking costs a third of clamping, forth and back
    return log_NV.clamp_min(FLOOR)


def expectation(weight_log_NV: Tensor, a_log_NV: Tensor, b_log_NV: Tensor) -> Tensor:
    """Σ_v w·(a − b) over the last axis, with w, a, b given as logarithms -> [N]."""
    lifted_NV = floored(weight_log_NV)
    a_log_NV = lifted_NV if a_log_NV is weight_log_NV else floored(a_log_NV)
    return (lifted_NV.exp() * (a_log_NV - floored(b_log_NV))).sum(-1)


def mixture(share: float, a_log_NV: Tensor, b_log_NV: Tensor) -> Tensor:
    """log(share·a + (1−share)·b), 0 ≤ share < 1, with a, b given as logarithms -> [N, V]."""
    a_log_NV, b_log_NV = floored(a_log_NV), floored(b_log_NV)
    if share == 0:
        return b_log_NV
    return torch.logaddexp(a_log_NV + math.log(share), b_log_NV + math.log1p(-share))
