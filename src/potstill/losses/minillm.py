"""Reverse KL of whole answers, by policy gradient on sampled ones: MiniLLM, Gu et al., arXiv:2306.08543.

The gradient of KL(q ‖ p) between whole answers is, with r_t = log p(y_t) − log q(y_t) and answers y from a sampler s (the
paper's equations 2 to 5):

    −E_s Σ_t W_t · [ ∇ Σ_v q(v)·(log p(v) − log q(v)) + R_{t+1} · ∇ log q(y_t) ],   R_t = Σ_{i≥t} r_i

The first term is the single step's, exact over the vocabulary; the second is the long term's, of what comes after. W_t makes
up for the sampler, s = αp + (1−α)q. Everything else that the paper and its authors' code do trades bias for variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from potstill.core.component import Settings
from potstill.data.batches import SAMPLED, SHARE, Batch, StepRow, packed_rows
from potstill.divergences._safe import FLOOR
from potstill.divergences.reverse_kl import ReverseKL
from potstill.edges.families import logits_of
from potstill.edges.packed import packs, tie_of
from potstill.losses.head import Loss, fused_head, logit_chunks, response_hidden
from potstill.losses.objective import weighted_sum
from potstill.losses.targets import Dense, Signal

# what a row of a step brings along of each response token
LOGQ = "logq"  # log-probability under the student that sampled
WEIGHT = "importance"
ADVANTAGE = "advantage"

TINY = 1e-8  # added to a variance before division, as the authors have it
MOST_LOG_RATIO = 20.0  # nats between two students a few updates apart; beyond, exp would overflow and its gradient be NaN


class Estimator(Settings):
    """How the gradient of the reverse KL of whole answers is estimated from samples.

    Exact in expectation, as a sum over tokens: `importance = "sequence"` (or alpha = 0), gamma = 1, length_norm and whiten
    false, reward_clip and clip 0, `returns` and `single_step` as they are, one update per sample. The defaults are the paper's,
    with the discount of its authors' code.
    """

    alpha: float = Field(
        default=0.2, ge=0, lt=1, description="share of the teacher in the distribution that tokens are drawn from"
    )
    importance: Literal["token", "sequence", "off"] = Field(
        default="token",
        description="weights that make up for alpha: q/(αp+(1−α)q) of each token alone (the paper's: biased, steady), their "
        "products along the answer (exact, of high variance), or none",
    )
    gamma: float = Field(default=0.95, ge=0, le=1, description="discount of a reward for each token that it lies ahead")
    returns: Literal["after", "from"] = Field(
        default="after",
        description="rewards that a token answers for: those after it, as in the paper, because its own step is an exact term; "
        "or its own as well, as in the authors' code",
    )
    length_norm: bool = Field(default=True, description="divide the return by the number of rewards in it")
    whiten: bool = Field(default=True, description="bring the returns of a step's samples to mean 0 and variance 1")
    reward_scaling: float = Field(default=1.0, gt=0, description="rewards are divided by it; whitening undoes it")
    reward_clip: float = Field(
        default=50.0,
        ge=0,
        description="largest reward, in nats, after scaling (the authors' 100 after scaling by 0.5); 0: none",
    )
    clip: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="how far importance times ratio may go from 1 and still be learned, as in PPO; 0: any",
    )
    single_step: Literal["weighted", "unweighted", "off"] = Field(
        default="weighted",
        description="KL(q‖p) of each step over the vocabulary: weighted as in the paper, plain as in the authors' code, or off",
    )


# --- of one answer: R response tokens, in order, float64 ---


def rewards(logp_R: np.ndarray, logq_R: np.ndarray, scaling: float = 1.0, clip: float = 0.0) -> np.ndarray:
    """log p(y_t) − log q(y_t) in nats, divided by `scaling`, clipped to ±`clip` unless 0; finite where p has no mass."""
    found_R = (np.maximum(logp_R, FLOOR) - logq_R) / scaling
    return found_R.clip(-clip, clip) if clip else found_R


def importance_weights(logq_R: np.ndarray, sampled_R: np.ndarray) -> np.ndarray:
    """q(y_t) / s(y_t) of each token alone; at most 1/(1−α) where s = αp + (1−α)q."""
    return np.exp(logq_R - sampled_R)


def returns_after(reward_R: np.ndarray, weight_R: np.ndarray, gamma: float) -> np.ndarray:
    """Σ_{i>t} γ^(i−t−1)·r_i·Π_{t<j≤i} w_j of each token t; 0 of the last.

    The weights let a reward count as often as the student, not the sampler, would have come to it. The paper's product in
    equation 5 ends at t: what comes after is then still the sampler's.
    """
    found_R, later = np.zeros_like(reward_R), 0.0
    for t in range(len(reward_R) - 1, 0, -1):
        later = weight_R[t] * (reward_R[t] + gamma * later)
        found_R[t - 1] = later
    return found_R


def advantages(reward_R: np.ndarray, weight_R: np.ndarray, estimator: Estimator) -> np.ndarray:
    """What each token answers for, before whitening.

    Args:
        weight_R: of each token alone; rewards count by their products in a `sequence`, else as they are.
    """
    carried_R = weight_R if estimator.importance == "sequence" else np.ones_like(weight_R)
    found_R = returns_after(reward_R, carried_R, estimator.gamma)
    ahead_R = np.arange(len(reward_R) - 1, -1, -1)  # rewards after each token
    if estimator.returns == "from":
        found_R, ahead_R = reward_R + estimator.gamma * found_R, ahead_R + 1
    # the paper's equation 6 divides T−t rewards by T−t−1, which is 0 for the last but one
    return found_R / np.maximum(ahead_R, 1) if estimator.length_norm else found_R


# --- of a step's samples ---


def whitened(advantages: Sequence[np.ndarray], weights: Sequence[float]) -> list[np.ndarray]:
    """(A − mean) / √(variance + 1e-8) over all tokens of all answers, each counted by its row's weight."""
    count = sum(weight * len(each) for each, weight in zip(advantages, weights, strict=True))
    mean = sum(weight * each.sum() for each, weight in zip(advantages, weights, strict=True)) / count
    variance = sum(weight * ((each - mean) ** 2).sum() for each, weight in zip(advantages, weights, strict=True)) / count
    return [(each - mean) / np.sqrt(variance + TINY) for each in advantages]


@dataclass(frozen=True)
class Judged:
    """A step's samples with all that stays as it was when they were drawn.

    Attributes:
        rows: each with `logq`, `importance` and `advantage` of its response tokens in `given`.
        figures: means over their tokens: `reward` (nats, as it was before scaling), `importance`, `effective_share` (how many
            equally weighted tokens vary as little, of all), `gap` (nats between the sampler's own log-probabilities and what
            student and teacher say of the same tokens when they read whole answers).
    """

    rows: list[StepRow]
    figures: dict[str, float]


def judged(
    model: Any, signal: Signal, rows: Sequence[StepRow], estimator: Estimator, vocab: int, micro_batch_tokens: int
) -> Judged:
    """Importance weights and advantages of a step's samples, before any of them is learned from.

    Args:
        model: the student that sampled them, as it was then.
        signal: what the teacher says; Dense.
        rows: sampled answers, each with `sampled` in `given`.
        vocab: leading token ids that both share, and that were drawn from.
        micro_batch_tokens: of one forward pass; those of training, so that the first update's ratios are 1.
    """
    logq, logp = log_probabilities(model, signal, rows, vocab, micro_batch_tokens)
    sampled = [np.asarray(row.given[SAMPLED], dtype=np.float64) for row in rows]
    weight = [
        np.ones_like(q) if estimator.importance == "off" else importance_weights(q, s)
        for q, s in zip(logq, sampled, strict=True)
    ]
    reward = [rewards(p, q, estimator.reward_scaling, estimator.reward_clip) for p, q in zip(logp, logq, strict=True)]
    found = [advantages(r, w, estimator) for r, w in zip(reward, weight, strict=True)]
    if estimator.whiten:
        found = whitened(found, [row.weight for row in rows])
    if estimator.importance == "sequence":
        weight = [w.cumprod() for w in weight]
    told = [
        replace(row, given={**row.given, LOGQ: q, WEIGHT: w, ADVANTAGE: a})
        for row, q, w, a in zip(rows, logq, weight, found, strict=True)
    ]
    return Judged(told, _figures(logq, logp, sampled, weight, estimator.alpha))


def log_probabilities(
    model: Any, signal: Signal, rows: Sequence[StepRow], vocab: int, micro_batch_tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """log q and log p of each row's response tokens over the shared vocabulary: float64 [R] each, in the rows' order."""
    logq, logp = ([np.empty(0)] * len(rows) for _ in range(2))
    for group, batch in packed_rows(rows, micro_batch_tokens, share=packs(model)):
        both = _log_probabilities(model, signal, batch.to(model.device), vocab)
        for found, values_N in zip((logq, logp), both, strict=True):
            for i, values_R in zip(group, values_N.double().cpu().split(batch.responses), strict=True):
                found[i] = values_R.numpy()
    return logq, logp


@torch.no_grad()
def _log_probabilities(model: Any, signal: Signal, batch: Batch, vocab: int) -> tuple[Tensor, Tensor]:
    said = signal(batch)
    assert isinstance(said, Dense)
    heads = (
        (response_hidden(model, batch), model.get_output_embeddings(), logits_of(model.config)),
        (said.hidden_ND, said.head, said.form),
    )
    both = []
    for hidden_ND, head, form in heads:
        parts = []
        for tokens, logits_CV in logit_chunks(hidden_ND, head, form=form):
            parts.append(_of_targets(F.log_softmax(logits_CV[:, :vocab], dim=-1), batch.target_N[tokens]))
        both.append(torch.cat(parts))
    return both[0], both[1]


def _of_targets(log_BV: Tensor, target_B: Tensor) -> Tensor:
    return log_BV.gather(-1, target_B[:, None]).squeeze(-1)


def _figures(
    logq: list[np.ndarray], logp: list[np.ndarray], sampled: list[np.ndarray], weight: list[np.ndarray], alpha: float
) -> dict[str, float]:
    q_N, p_N, s_N, w_N = (np.concatenate(each) for each in (logq, logp, sampled, weight))
    mixed_N = np.logaddexp(np.log(alpha) + p_N, np.log1p(-alpha) + q_N) if alpha else q_N
    return {
        "reward": float(rewards(p_N, q_N).mean()),
        "importance": float(w_N.mean()),
        "effective_share": float(w_N.sum() ** 2 / (len(w_N) * (w_N**2).sum())),
        "gap": float(np.abs(mixed_N - s_N).mean()),
    }


# --- what is minimised ---


class MiniLLM:
    """Σ [ −min(ρ·w·A, clip(ρ·w, 1±ε)·A) + w·KL(q ‖ p) ] over sampled response tokens, and Σ CE over those of plain text.

    ρ = q now / q when it sampled, w the importance weight, A the advantage: the last three stay as `judged` found them. Sampled
    rows bring `logq`, `importance` and `advantage`; any row may bring `share`, a factor of its loss. Divided by the response
    tokens of the whole step, elsewhere.

    Args:
        signal: what the teacher says; Dense.
        vocab: leading token ids that both tokenizers share; policy and divergence see no padded logits beyond.
    """

    def __init__(self, signal: Signal, estimator: Estimator, vocab: int) -> None:
        self.signal, self.estimator, self.vocab = signal, estimator, vocab
        self.divergence = ReverseKL()

    def __call__(self, model: Any, batch: Batch) -> Loss:
        return self._policy(model, batch) if batch.sampled else self._text(model, batch)

    def _policy(self, model: Any, batch: Batch) -> Loss:
        said = self.signal(batch)
        assert isinstance(said, Dense)

        def terms(logits_BV: Tensor, teacher_BV: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            assert teacher_BV is not None
            old_B, w_B, advantage_B = (batch.given_N[name][tokens].to(logits_BV.dtype) for name in (LOGQ, WEIGHT, ADVANTAGE))
            logq_BV = F.log_softmax(logits_BV[:, : self.vocab], dim=-1)
            logq_B = _of_targets(logq_BV, batch.target_N[tokens])
            gain_B, clipped_B = surrogate(logq_B, old_B, w_B, advantage_B, self.estimator.clip)
            total_B, parts = -gain_B, {"long_term": -gain_B, "clipped": clipped_B.to(gain_B.dtype), "nll": -logq_B}
            if self.estimator.single_step != "off":
                with torch.no_grad():
                    logp_BV = F.log_softmax(teacher_BV[:, : self.vocab].to(logits_BV.dtype), dim=-1)
                kl_B = self.divergence(logp_BV, logq_BV)
                total_B = total_B + (w_B * kl_B if self.estimator.single_step == "weighted" else kl_B)
                parts["reverse_kl"] = kl_B
            shown = {name: weighted_sum(value_B.detach(), batch, tokens) for name, value_B in parts.items()}
            return weighted_sum(_shared(total_B, batch, tokens), batch, tokens), shown

        tie = tie_of(model)
        return fused_head(
            response_hidden(model, batch, tie),
            model.get_output_embeddings(),
            terms,
            teacher_hidden_ND=said.hidden_ND,
            teacher_head=said.head,
            form=logits_of(model.config),
            teacher_form=said.form,
            tie=tie,
        )

    def _text(self, model: Any, batch: Batch) -> Loss:
        def terms(logits_BV: Tensor, _: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            ce_B = F.cross_entropy(logits_BV, batch.target_N[tokens], reduction="none")
            return weighted_sum(_shared(ce_B, batch, tokens), batch, tokens), {"ce": weighted_sum(ce_B.detach(), batch, tokens)}

        tie = tie_of(model)
        hidden_ND = response_hidden(model, batch, tie)
        return fused_head(hidden_ND, model.get_output_embeddings(), terms, form=logits_of(model.config), tie=tie)


def surrogate(logq_B: Tensor, old_B: Tensor, weight_B: Tensor, advantage_B: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """min(ρ·w·A, clip(ρ·w, 1±ε)·A) with ρ = exp(log q − old), and whether the clipped one was less; gradient through log q.

    PPO's (Schulman et al., arXiv:1707.06347, equation 7), with the importance weight inside the clip, as the authors of MiniLLM
    have it: a token whose weight alone lies beyond 1±ε is clipped in its first update.
    """
    ratio_B = (logq_B - old_B).clamp(max=MOST_LOG_RATIO).exp() * weight_B
    gain_B = ratio_B * advantage_B
    if not clip:
        return gain_B, torch.zeros_like(gain_B, dtype=torch.bool)
    bounded_B = ratio_B.clamp(1 - clip, 1 + clip) * advantage_B
    return torch.minimum(gain_B, bounded_B), bounded_B.detach() < gain_B.detach()


def _shared(loss_B: Tensor, batch: Batch, tokens: slice) -> Tensor:
    return loss_B * batch.given_N[SHARE][tokens].to(loss_B.dtype) if SHARE in batch.given_N else loss_B
