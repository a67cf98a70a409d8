"""Group-relative policy optimisation: GRPO, Shao et al., arXiv:2402.03300, and later forms of it.

Of each prompt G answers are drawn and rewarded. With R_i the reward of answer i and ρ the ratio of its probability now to that
when it was drawn, what is minimised is the normalised sum, over answers i and their tokens t, of

    −w_it · min(ρ_it·A_i, clip(ρ_it, 1−ε, 1+ε_high)·A_i) + β·k3_it + β_kd·KL_it(q ‖ p)

    A_i = R_i − mean_g(R), divided by std_g(R) + 1e-4 where `group_std` asks for it
    k3  = r − log r − 1, r = π_ref / π_now: unbiased for KL(π_now ‖ π_ref) in an answer's first update, and never below 0

w makes up for a sampler whose arithmetic is not the trainer's; p is a teacher. Gradients flow through π_now alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from potstill.core.component import Settings
from potstill.data.batches import SAMPLED, Batch, StepRow
from potstill.divergences._safe import FLOOR
from potstill.divergences.reverse_kl import ReverseKL
from potstill.edges.families import PLAIN, logits_of
from potstill.edges.packed import tie_of
from potstill.losses.head import Loss, fused_head, logit_chunks, response_hidden
from potstill.losses.judging import (
    ADVANTAGE,
    LOGQ,
    MOST_LOG_RATIO,
    WEIGHT,
    Judged,
    importance_weights,
    of_targets,
    per_row,
    shared,
    surrogate,
)
from potstill.losses.objective import weighted_sum
from potstill.losses.targets import Dense, Signal

REF = "reference"  # what a row brings along of each response token: its log-probability under the reference

TINY = 1e-4  # added to a group's standard deviation
EQUAL = 1e-8  # rewards of a group that differ by less are equal: weighted sums of equal parts may round differently

Ratio = Literal["token", "sequence", "sequence_mean"]
Normaliser = Literal["sequence", "tokens", "max_length"]
Preset = Literal["recommended", "paper", "deepseek", "dr_grpo", "dapo"]

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},  # the fields' own defaults
    "paper": {
        "ratio": "sequence",
        "group_std": True,
        "normaliser": "sequence",
        "eps_high": 0.2,
        "beta": 0.04,
        "cut": "counted",
        "sampler_cap": 0.0,
    },
    "deepseek": {
        "ratio": "token",
        "group_std": True,
        "normaliser": "sequence",
        "eps_high": 0.2,
        "beta": 0.04,
        "cut": "counted",
        "sampler_cap": 0.0,
    },
    "dr_grpo": {"normaliser": "max_length", "eps_high": 0.2, "cut": "counted", "sampler_cap": 0.0},
    "dapo": {"group_std": True, "redraws": 3, "sampler_cap": 0.0},
}


class Policy(Settings):
    """What is minimised over groups of rewarded answers; a preset's name alone, or a table whose fields change that preset.

    `recommended`: DAPO's token-level mean, ε_high and masking of cut answers, without the division by the group's standard
    deviation, which favours prompts that are nearly always or nearly never solved (Dr. GRPO). `paper`: equations 5 to 7 as
    written, ratio and KL of whole answers. `deepseek`: DeepSeekMath's, per token, which code of that time runs. `dr_grpo`: no
    division by standard deviation or length. `dapo`: with the standard deviation, and groups without signal drawn again.
    """

    preset: Preset = Field(default="recommended", description="what the fields that are not named are taken from")
    ratio: Ratio = Field(
        default="token",
        description="ρ and its clipping: of each token (DeepSeekMath, arXiv:2402.03300); of the whole sequence, the product "
        "over its tokens (as in DeepSeek-R1, arXiv:2501.12948; k3 is then of the sequence too); or of the sequence by the mean "
        "of the logarithms (GSPO, arXiv:2507.18071, whose ε is 3e-4 and ε_high 4e-4)",
    )
    group_std: bool = Field(
        default=False,
        description="divide advantages by the group's standard deviation (of n − 1 degrees of freedom) + 1e-4; "
        "off: Dr. GRPO, arXiv:2503.20783",
    )
    normaliser: Normaliser = Field(
        default="tokens",
        description="sequence: mean of the answers' own means (DeepSeekMath); tokens: mean over all tokens of the step (DAPO, "
        "arXiv:2503.14476); max_length: the sum divided by answers × samples.max_new_tokens (Dr. GRPO)",
    )
    eps_low: float = Field(default=0.2, gt=0, lt=1, description="ε: ratios below 1 − ε no longer lower an answer's probability")
    eps_high: float = Field(
        default=0.28,
        gt=0,
        description="ε_high: ratios above 1 + ε_high no longer raise it; more than ε in DAPO, against collapse",
    )
    beta: float = Field(
        default=0.0, ge=0, description="β: weight of k3, the KL to the reference; 0: none, and no reference runs"
    )
    beta_kd: float = Field(
        default=0.0,
        ge=0,
        description="weight of the reverse KL to the stage's `teacher` at each token of the same answers, over the vocabulary",
    )
    cut: Literal["counted", "masked"] = Field(
        default="masked",
        description="answers that reach max_new_tokens: learned like others, or left out of the loss (DAPO's overlong "
        "filtering); their rewards stay in their group either way",
    )
    redraws: int = Field(
        default=0,
        ge=0,
        description="how often a round draws new answers to prompts whose groups have equal rewards; prompts that still have "
        "them are then left out (DAPO's dynamic sampling, which takes other prompts instead); 0: groups stay as they are",
    )
    sampler_cap: float = Field(
        default=2.0,
        ge=0,
        description="largest weight w = π_trainer / π_sampler of the moment of drawing, of tokens or sequences as `ratio` says "
        "(truncated importance sampling, Ionides 2008; Yao et al. 2025); 0: no weight",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        """A name alone is a preset; fields that a table names come before those of its preset."""
        if isinstance(given, str):
            given = {"preset": given}
        if not isinstance(given, dict):
            return given
        preset = given.get("preset", "recommended")
        return {**PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given

    def learns(self, finished: bool) -> bool:
        """Whether an answer enters the loss."""
        return finished or self.cut == "counted"


# --- of one group: G answers, float64 ---


def without_signal(reward_G: np.ndarray) -> bool:
    """Whether a group teaches nothing: no two rewards differ by more than 1e-8 of their size."""
    return len(reward_G) < 2 or bool(np.ptp(reward_G) <= EQUAL * max(1.0, float(np.abs(reward_G).max())))


def advantages(reward_G: np.ndarray, group_std: bool) -> np.ndarray:
    """R − mean, divided by the standard deviation + 1e-4 where `group_std`; exactly 0 without signal.

    The papers write `std` alone. Like TRL 1.16 and verl it has n − 1 degrees of freedom here. Because the mean includes the
    answer itself, the expected policy gradient is (G − 1)/G times the true one; the learning rate takes that up.
    """
    if without_signal(reward_G):
        return np.zeros_like(reward_G)
    found_G = reward_G - reward_G.mean()
    return found_G / (reward_G.std(ddof=1) + TINY) if group_std else found_G


def shares(lengths: Sequence[int], weights: Sequence[float], normaliser: Normaliser, whole: float, longest: int) -> list[float]:
    """What the loss of each answer's tokens is multiplied by, so that dividing by the step's response tokens normalises it.

    With W = Σ weight · length, which the training loop divides by: 1 for `tokens`; W / (length · Σ weight) for `sequence`;
    W / (whole · longest) for `max_length`.

    Args:
        lengths, weights: of the answers that are learned; the normalisers `sequence` and `tokens` count these alone.
        whole: Σ weight of all answers of the round, learned or not.
        longest: tokens that an answer can have.
    """
    tokens = math.fsum(weight * length for weight, length in zip(weights, lengths, strict=True))
    if normaliser == "tokens":
        return [1.0] * len(lengths)
    if normaliser == "sequence":
        return [tokens / (length * math.fsum(weights)) for length in lengths]
    return [tokens / (whole * longest)] * len(lengths)


# --- of one answer: R response tokens ---


def sampler_weights(old_R: np.ndarray, sampled_R: np.ndarray, ratio: Ratio, cap: float) -> np.ndarray:
    """min(π_trainer / π_sampler, cap) of each token, or of the whole answer, by product or mean, where the ratio is its."""
    if not cap:
        return np.ones_like(old_R)
    apart_R = old_R - sampled_R
    if ratio == "sequence":
        apart_R = np.full_like(apart_R, apart_R.sum())
    elif ratio == "sequence_mean":
        apart_R = np.full_like(apart_R, apart_R.mean())
    return importance_weights(np.minimum(apart_R, math.log(cap)), np.zeros_like(apart_R))


# --- of a round's answers, before any of them is learned from ---


def judged(
    model: Any,
    reference: Signal | None,
    rows: Sequence[StepRow],
    policy: Policy,
    vocab: int,
    micro_batch_tokens: int,
    temperature: float = 1.0,
) -> Judged:
    """`logq`, `importance` and, with a reference, `reference` of each response token, by the trainer's own arithmetic.

    Figures are means over the tokens: `gap` (nats between sampler and trainer), `importance`, and with a reference `kl_exact`
    (KL(π ‖ π_ref) over the vocabulary, in nats).

    Args:
        model: the student that sampled the rows, as it was then.
        reference: what k3 is measured from; Dense.
        rows: sampled answers, each with `sampled` in `given`.
        vocab: leading token ids that were drawn from; all distributions are over these.
        micro_batch_tokens: of one forward pass; those of training, so that the first update's ratios are 1.
        temperature: that the answers were drawn at; the policy is the distribution that is sampled.
    """

    def read(batch: Batch) -> list[Tensor]:
        return _read(model, reference, batch, vocab, temperature)

    old, *of_reference = per_row(model, rows, read, micro_batch_tokens)
    sampled = [np.asarray(row.given[SAMPLED], dtype=np.float64) for row in rows]
    weight = [sampler_weights(q, s, policy.ratio, policy.sampler_cap) for q, s in zip(old, sampled, strict=True)]
    told = [replace(row, given={**row.given, LOGQ: q, WEIGHT: w}) for row, q, w in zip(rows, old, weight, strict=True)]
    figures = {
        "gap": float(np.abs(np.concatenate(old) - np.concatenate(sampled)).mean()),
        "importance": float(np.concatenate(weight).mean()),
    }
    if of_reference:
        ref, kl = of_reference
        told = [replace(row, given={**row.given, REF: r}) for row, r in zip(told, ref, strict=True)]
        figures["kl_exact"] = float(np.concatenate(kl).mean())
    return Judged(told, figures)


def _read(model: Any, reference: Signal | None, batch: Batch, vocab: int, temperature: float) -> list[Tensor]:
    """log π of each response token, and with a reference log π_ref and KL(π ‖ π_ref): [N] each."""
    said = reference(batch) if reference is not None else None
    assert said is None or isinstance(said, Dense)
    parts = []
    chunks = logit_chunks(response_hidden(model, batch), model.get_output_embeddings(), form=logits_of(model.config))
    for tokens, logits_CV in chunks:
        logq_CV, target_C = log_policy(logits_CV, vocab, temperature), batch.target_N[tokens]
        found = [of_targets(logq_CV, target_C)]
        if said is not None:
            ((_, theirs_CV),) = logit_chunks(said.hidden_ND[tokens], said.head, logits_CV.shape[0], said.form)
            logref_CV = log_policy(theirs_CV, vocab, temperature).to(logq_CV.dtype)
            found += [of_targets(logref_CV, target_C), ReverseKL()(logref_CV, logq_CV)]
        parts.append(found)
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def log_policy(logits_BV: Tensor, vocab: int, temperature: float) -> Tensor:
    """log softmax(z / temperature) over the leading `vocab` ids: what answers are drawn from."""
    cut_BV = logits_BV if logits_BV.shape[-1] == vocab else logits_BV[:, :vocab]
    return F.log_softmax(cut_BV if temperature == 1 else cut_BV / temperature, dim=-1)


# --- what is minimised ---


@dataclass(frozen=True)
class _Whole:
    """Of ratios of whole answers: value and slope of each token's gain and k3, the slope with respect to its log-probability.

    Attributes:
        gain_N, kl_N: each token has its answer's.
        gain_slope_N, kl_slope_N: an answer's slope, times its tokens where the ratio is the product of theirs: a token's loss
            is learned by all tokens of its answer, which share one factor.
        clipped_N: whether an answer was clipped.
    """

    gain_N: Tensor
    gain_slope_N: Tensor
    clipped_N: Tensor
    kl_N: Tensor | None
    kl_slope_N: Tensor | None


class PolicyGradient:
    """Σ [ −w·min(ρA, clip(ρ, 1−ε, 1+ε_high)·A) + β·k3 + β_kd·KL(q ‖ p) ] over sampled response tokens.

    Rows bring `logq`, `importance` and `advantage`, `reference` where there is one, and `share`, a factor of their loss; see
    `judged` and `shares`. Divided by the response tokens of the whole step, elsewhere. Nothing of [tokens, vocabulary] is kept.

    Args:
        vocab: leading token ids that are drawn from.
        temperature: that answers are drawn at; student, reference and teacher are all taken at it.
        signal: what a teacher says; Dense. Needed where `beta_kd` > 0.

    Attributes:
        ratios: smallest and largest ρ since `forget`; (inf, 0) before any.
    """

    def __init__(self, policy: Policy, vocab: int, temperature: float = 1.0, signal: Signal | None = None) -> None:
        self.policy, self.vocab, self.temperature, self.signal = policy, vocab, temperature, signal
        self.divergence = ReverseKL()
        self.forget()

    def forget(self) -> None:
        """Before a step."""
        self.ratios = (math.inf, 0.0)

    def __call__(self, model: Any, batch: Batch) -> Loss:
        assert batch.sampled
        tie = tie_of(model)
        hidden_ND, head, form = response_hidden(model, batch, tie), model.get_output_embeddings(), logits_of(model.config)
        said = self._teacher(batch)
        whole = None if self.policy.ratio == "token" else self._whole(hidden_ND.detach(), head, form, batch)
        ratios: list[Tensor] = []

        def terms(logits_BV: Tensor, teacher_BV: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            logq_BV = log_policy(logits_BV, self.vocab, self.temperature)
            logq_B = of_targets(logq_BV, batch.target_N[tokens])
            total_B, parts = self._policy(logq_B, batch, tokens, whole, ratios)
            parts |= {"nll": -logq_B, "entropy": _entropy(logq_BV.detach())}
            if teacher_BV is not None:
                with torch.no_grad():
                    logp_BV = log_policy(teacher_BV.to(logits_BV.dtype), self.vocab, self.temperature)
                parts["reverse_kl"] = self.divergence(logp_BV, logq_BV)
                total_B = total_B + self.policy.beta_kd * parts["reverse_kl"]
            shown = {name: weighted_sum(value_B.detach(), batch, tokens) for name, value_B in parts.items()}
            return weighted_sum(shared(total_B, batch, tokens), batch, tokens), shown

        loss = fused_head(
            hidden_ND,
            head,
            terms,
            teacher_hidden_ND=said.hidden_ND if said else None,
            teacher_head=said.head if said else None,
            form=form,
            teacher_form=said.form if said else PLAIN,
            tie=tie,
        )
        self._note(ratios)
        return loss

    def _teacher(self, batch: Batch) -> Dense | None:
        if not self.policy.beta_kd:
            return None
        assert self.signal is not None
        said = self.signal(batch)
        assert isinstance(said, Dense)
        return said

    def _policy(
        self, logq_B: Tensor, batch: Batch, tokens: slice, whole: _Whole | None, ratios: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token but for the teacher's part, and what of it is shown."""

        def given(name: str) -> Tensor:
            return batch.given_N[name][tokens].to(logq_B.dtype)

        if whole is None:
            ratios.append((logq_B.detach() - given(LOGQ)).clamp(max=MOST_LOG_RATIO).exp())
        kl_B = k3(logq_B, given(REF)) if REF in batch.given_N else None
        parts = {} if kl_B is None else {"kl": kl_B}
        if whole is None:
            ones_B = torch.ones_like(logq_B)
            gain_B, clipped_B = surrogate(
                logq_B, given(LOGQ), ones_B, given(ADVANTAGE), self.policy.eps_low, self.policy.eps_high
            )
        else:
            gain_B, clipped_B = _carried(whole.gain_N[tokens], whole.gain_slope_N[tokens], logq_B), whole.clipped_N[tokens]
            if whole.kl_N is not None and whole.kl_slope_N is not None:
                kl_B = _carried(whole.kl_N[tokens], whole.kl_slope_N[tokens], logq_B)
        total_B = -given(WEIGHT) * gain_B
        parts |= {"policy": total_B, "clipped": clipped_B.to(total_B.dtype)}
        return (total_B + self.policy.beta * kl_B if self.policy.beta and kl_B is not None else total_B), parts

    @torch.no_grad()
    def _whole(self, hidden_ND: Tensor, head: Any, form: Any, batch: Batch) -> _Whole:
        """What ratios of whole answers need before any token is differentiated: their log-probabilities now."""
        logq_N = torch.cat(
            [
                of_targets(log_policy(logits_CV, self.vocab, self.temperature), batch.target_N[tokens])
                for tokens, logits_CV in logit_chunks(hidden_ND, head, form=form)
            ]
        ).double()
        product = self.policy.ratio == "sequence"

        def of_answers(apart_N: Tensor) -> Tensor:
            """Σ or mean over each answer, at each of its tokens."""
            each = [part_R.sum() if product else part_R.mean() for part_R in apart_N.split(batch.responses)]
            return torch.stack(each)[batch.row_N]

        length_N = torch.tensor(batch.responses, device=logq_N.device)[batch.row_N]
        times_N = length_N if product else torch.ones_like(length_N)
        old_N, advantage_N = (batch.given_N[name].double() for name in (LOGQ, ADVANTAGE))
        ratio_N = of_answers(logq_N - old_N).clamp(max=MOST_LOG_RATIO).exp()
        self._note([ratio_N])
        gain_N = ratio_N * advantage_N
        bounded_N = ratio_N.clamp(1 - self.policy.eps_low, 1 + self.policy.eps_high) * advantage_N
        clipped_N = bounded_N < gain_N
        kl_N = kl_slope_N = None
        if product and REF in batch.given_N:
            log_r_N = of_answers(batch.given_N[REF].double() - logq_N)
            r_N = log_r_N.clamp(max=MOST_LOG_RATIO).exp()
            kl_N, kl_slope_N = r_N - log_r_N - 1, (1 - r_N) * times_N
        return _Whole(
            torch.minimum(gain_N, bounded_N), gain_N.masked_fill(clipped_N, 0.0) * times_N, clipped_N, kl_N, kl_slope_N
        )

    def _note(self, ratios: Sequence[Tensor]) -> None:
        if ratios:
            low, high = self.ratios
            of_all = torch.cat(list(ratios))
            self.ratios = (min(low, float(of_all.min())), max(high, float(of_all.max())))


def k3(logq_B: Tensor, logref_B: Tensor) -> Tensor:
    """r − log r − 1 with r = π_ref / π_now; Schulman, "Approximating KL divergence", 2020.

    Beyond 20 nats the value of r stays, but its slope is never lost: without it the term would push the wrong way.
    """
    log_r_B = logref_B - logq_B
    r_B = log_r_B.detach().clamp(max=MOST_LOG_RATIO).exp()
    return _carried(r_B, -r_B, logq_B) - log_r_B - 1


def _carried(value_B: Tensor, slope_B: Tensor, logq_B: Tensor) -> Tensor:
    """A value whose derivative by log q is known."""
    return (value_B + slope_B * (logq_B - logq_B.detach())).to(logq_B.dtype)


def _entropy(logq_BV: Tensor) -> Tensor:
    return -(logq_BV.exp() * logq_BV.clamp(min=FLOOR)).sum(-1)
