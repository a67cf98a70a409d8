"""What objectives of sampled answers share: figures found once when answers were drawn, and the clipped gain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data.batches import SHARE, Batch, StepRow, packed_rows
from potstill.edges.packed import packs

# what a row of a step brings along of each response token
LOGQ = "logq"  # log-probability under the student that sampled
WEIGHT = "importance"
ADVANTAGE = "advantage"

MOST_LOG_RATIO = 20.0  # nats between two students a few updates apart; beyond, exp would overflow and its gradient be NaN

Reads = Callable[[Batch], Sequence[Tensor]]  # several values of each response token: [N] each


@dataclass(frozen=True)
class Judged:
    """A step's samples with all that stays as it was when they were drawn.

    Attributes:
        rows: each with what was found of its response tokens in `given`.
        figures: of all of them.
    """

    rows: list[StepRow]
    figures: dict[str, float]


@torch.no_grad()
def per_row(model: Any, rows: Sequence[StepRow], read: Reads, micro_batch_tokens: int) -> list[list[np.ndarray]]:
    """Each value that `read` finds, of each row's response tokens: float64 [R], in the rows' order.

    Args:
        micro_batch_tokens: of one forward pass; those of training, so that the first update's ratios are 1.
    """
    found: list[list[np.ndarray]] = []
    for group, batch in packed_rows(rows, micro_batch_tokens, share=packs(model)):
        for n, values_N in enumerate(read(batch.to(model.device))):
            if n == len(found):
                found.append([np.empty(0)] * len(rows))
            for i, values_R in zip(group, values_N.double().cpu().split(batch.responses), strict=True):
                found[n][i] = values_R.numpy()
    return found


def of_targets(log_BV: Tensor, target_B: Tensor) -> Tensor:
    """The value of each row's token: [B]."""
    return log_BV.gather(-1, target_B[:, None]).squeeze(-1)


def importance_weights(logq_R: np.ndarray, sampled_R: np.ndarray) -> np.ndarray:
    """q(y_t) / s(y_t) of each token alone; at most 1/(1−α) where s = αp + (1−α)q."""
    return np.exp(logq_R - sampled_R)


def surrogate(
    logq_B: Tensor, old_B: Tensor, weight_B: Tensor, advantage_B: Tensor, clip: float, clip_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """min(ρ·w·A, clip(ρ·w, 1−ε, 1+ε_high)·A) with ρ = exp(log q − old), and whether the clipped one was less.

    Gradient flows through log q. PPO's (Schulman et al., arXiv:1707.06347, equation 7), with the importance weight inside the
    clip, as the authors of MiniLLM have it: a token whose weight alone lies beyond is clipped in its first update.

    Args:
        clip: ε; 0: nothing is clipped.
        clip_high: ε_high; default: ε.
    """
    ratio_B = (logq_B - old_B).clamp(max=MOST_LOG_RATIO).exp() * weight_B
    gain_B = ratio_B * advantage_B
    if not clip:
        return gain_B, torch.zeros_like(gain_B, dtype=torch.bool)
    bounded_B = ratio_B.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantage_B
    return torch.minimum(gain_B, bounded_B), bounded_B.detach() < gain_B.detach()


def shared(loss_B: Tensor, batch: Batch, tokens: slice) -> Tensor:
    """Each token's loss times its row's `share`, where rows bring one along."""
    return loss_B * batch.given_N[SHARE][tokens].to(loss_B.dtype) if SHARE in batch.given_N else loss_B
