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
    of_targets,
    per_row,
    shared,
    surrogate,
)
from potstill.losses.objective import weighted_sum
from potstill.losses.targets import Dense, Signal

REF = "reference"  # what a row brings along of each response token: its log-probability under the reference
JUDGED = (LOGQ, WEIGHT, "gap", REF, "kl_exact")  # found once of each response token; the last two with a reference
GIVEN, SHOWN = (LOGQ, WEIGHT, REF), (WEIGHT, "gap", "kl_exact")  # of these, what the loss reads, and what is shown

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
    division by standard deviation or length. `dapo`: with the standard deviation, and others in place of silent prompts.
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
        description="how often a round replaces prompts whose groups have equal rewards by other prompts; what still has equal "
        "rewards is then left out (DAPO's dynamic sampling); 0: groups stay as they are",
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
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"must be a preset's name ({', '.join(PRESETS)}) or a table")
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


# --- of a batch's answers: N response tokens ---


def over_answers(value_N: Tensor, ratio: Ratio, responses: Sequence[int]) -> Tensor:
    """Of each answer, at each of its tokens: the sum where the ratio is the product over its tokens, else the mean."""
    parts = value_N.split(list(responses))
    return torch.cat([(part_R.sum() if ratio == "sequence" else part_R.mean()).expand_as(part_R) for part_R in parts])


def sampler_weights(apart_N: Tensor, ratio: Ratio, cap: float, responses: Sequence[int]) -> Tensor:
    """min(π_trainer / π_sampler, cap) of each token, or of the whole answer, by product or mean, where the ratio is its.

    Args:
        apart_N: log π_trainer − log π_sampler.
        responses: tokens of each answer; not looked at where the ratio is that of tokens.
    """
    if not cap:
        return torch.ones_like(apart_N)
    if ratio != "token":
        apart_N = over_answers(apart_N, ratio, responses)
    return apart_N.clamp(max=math.log(cap)).exp()


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

    Rows bring `advantage`, and `share`, a factor of their loss; see `shares`. They bring `logq`, `importance` and, with a
    reference, `reference` where `judged` has found them. Else they bring `sampled`, this is their only update, and the same is
    found here: what an answer is learned by is then what it was drawn by, and its ratio 1. Divided by the response tokens of
    the whole step, elsewhere. Nothing of [tokens, vocabulary] is kept.

    Args:
        vocab: leading token ids that are drawn from; all distributions are over these.
        temperature: that answers are drawn at; student, reference and teacher are all taken at it.
        signal: what a teacher says; Dense. Needed where `beta_kd` > 0.
        reference: what k3 is measured from; Dense. Needed where `beta` > 0.

    Attributes:
        ratios: smallest and largest ρ since `forget`; (inf, 0) before any.
    """

    def __init__(
        self,
        policy: Policy,
        vocab: int,
        temperature: float = 1.0,
        signal: Signal | None = None,
        reference: Signal | None = None,
    ) -> None:
        self.policy, self.vocab, self.temperature = policy, vocab, temperature
        self.signal, self.reference = signal, reference
        self.divergence = ReverseKL()
        self.forget()

    def forget(self) -> None:
        """Before a step."""
        self.ratios = (math.inf, 0.0)

    def judged(self, model: Any, rows: Sequence[StepRow], micro_batch_tokens: int) -> Judged:
        """`logq`, `importance` and, with a reference, `reference` of answers that several updates learn from.

        Figures are means over the tokens, each counted by its row's weight: `gap` (nats between sampler and trainer),
        `importance`, and with a reference `kl_exact` (KL(π ‖ π_ref) over the vocabulary, in nats).

        Args:
            model: the student that sampled the rows, as it was then.
            rows: sampled answers, each with `sampled` in `given`.
            micro_batch_tokens: of one forward pass; those of training, so that the first update's ratios are 1.
        """

        def read(batch: Batch) -> list[Tensor]:
            hidden_ND, head, form = response_hidden(model, batch), model.get_output_embeddings(), logits_of(model.config)
            logq_N, *of_reference = self._read(hidden_ND, head, form, batch, self._reference(batch))
            return list(self._judgement(logq_N, batch.given_N[SAMPLED], batch.responses, *of_reference).values())

        found = dict(zip(JUDGED, per_row(model, rows, read, micro_batch_tokens), strict=False))
        given = [{name: found[name][i] for name in GIVEN if name in found} for i in range(len(rows))]
        told = [replace(row, given={**row.given, **of_row}) for row, of_row in zip(rows, given, strict=True)]
        weight_N = np.concatenate([np.full(len(row.response), row.weight) for row in rows])
        figures = {name: np.average(np.concatenate(found[name]), weights=weight_N) for name in SHOWN if name in found}
        return Judged(told, {name: float(value) for name, value in figures.items()})

    def __call__(self, model: Any, batch: Batch) -> Loss:
        assert batch.sampled
        tie = tie_of(model)
        hidden_ND, head, form = response_hidden(model, batch, tie), model.get_output_embeddings(), logits_of(model.config)
        said = self._teacher(batch)
        batch, whole, beforehand = self._beforehand(hidden_ND.detach(), head, form, batch)
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
        return replace(loss, parts=loss.parts | beforehand)

    def _reference(self, batch: Batch) -> Dense | None:
        said = self.reference(batch) if self.reference is not None else None
        assert said is None or isinstance(said, Dense)
        return said

    def _teacher(self, batch: Batch) -> Dense | None:
        if not self.policy.beta_kd:
            return None
        assert self.signal is not None
        said = self.signal(batch)
        assert isinstance(said, Dense)
        return said

    @torch.no_grad()
    def _beforehand(
        self, hidden_ND: Tensor, head: Any, form: Any, batch: Batch
    ) -> tuple[Batch, _Whole | None, dict[str, Tensor]]:
        """What whole answers or a reference ask before any token is differentiated, the sums to show of it among that."""
        fresh = LOGQ not in batch.given_N
        reference = self._reference(batch) if fresh else None
        if self.policy.ratio == "token" and reference is None:
            return batch, None, {}
        logq_N, *of_reference = self._read(hidden_ND, head, form, batch, reference)
        shown: dict[str, Tensor] = {}
        if fresh:
            found = self._judgement(logq_N, batch.given_N[SAMPLED], batch.responses, *of_reference)
            batch = replace(batch, given_N={**batch.given_N, **{name: found[name] for name in GIVEN if name in found}})
            shown = {name: weighted_sum(found[name], batch, slice(None)) for name in SHOWN if name in found}
        return batch, None if self.policy.ratio == "token" else self._whole(logq_N, batch), shown

    def _read(self, hidden_ND: Tensor, head: Any, form: Any, batch: Batch, reference: Dense | None) -> list[Tensor]:
        """log π of each response token, and with a reference log π_ref and KL(π ‖ π_ref): [N] each."""
        parts = []
        for tokens, logits_CV in logit_chunks(hidden_ND, head, form=form):
            logq_CV, target_C = log_policy(logits_CV, self.vocab, self.temperature), batch.target_N[tokens]
            found = [of_targets(logq_CV, target_C)]
            if reference is not None:
                states_CD = reference.hidden_ND[tokens]
                ((_, theirs_CV),) = logit_chunks(states_CD, reference.head, logits_CV.shape[0], reference.form)
                logref_CV = log_policy(theirs_CV, self.vocab, self.temperature).to(logq_CV.dtype)
                found += [of_targets(logref_CV, target_C), self.divergence(logref_CV, logq_CV)]
            parts.append(found)
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _judgement(
        self, logq_N: Tensor, sampled_N: Tensor, responses: Sequence[int], *of_reference: Tensor
    ) -> dict[str, Tensor]:
        """What stays of each response token as it was when the answers were drawn, by the names of `JUDGED`: float64 [N]."""
        apart_N = logq_N.double() - sampled_N.double()
        weight_N = sampler_weights(apart_N, self.policy.ratio, self.policy.sampler_cap, responses)
        found = (logq_N, weight_N, apart_N.abs(), *of_reference)
        return {name: value_N.double() for name, value_N in zip(JUDGED, found, strict=False)}

    def _given(self, logq_B: Tensor, batch: Batch, tokens: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is given of each token, and what of it is still to be shown."""
        given = {name: values_N[tokens] for name, values_N in batch.given_N.items()}
        found = {} if LOGQ in given else self._judgement(logq_B.detach(), given[SAMPLED], ())  # of tokens, not of answers
        shown = {name: found[name] for name in SHOWN if name in found}
        return {name: values_B.to(logq_B.dtype) for name, values_B in {**given, **found}.items()}, shown

    def _policy(
        self, logq_B: Tensor, batch: Batch, tokens: slice, whole: _Whole | None, ratios: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token but for the teacher's part, and what of it is shown."""
        given, parts = self._given(logq_B, batch, tokens)
        kl_B = k3(logq_B, given[REF]) if REF in given else None
        parts |= {} if kl_B is None else {"kl": kl_B}
        if whole is None:
            ratios.append((logq_B.detach() - given[LOGQ]).clamp(max=MOST_LOG_RATIO).exp())
            ones_B, (low, high) = torch.ones_like(logq_B), (self.policy.eps_low, self.policy.eps_high)
            gain_B, clipped_B = surrogate(logq_B, given[LOGQ], ones_B, given[ADVANTAGE], low, high)
        else:
            gain_B, clipped_B = _carried(whole.gain_N[tokens], whole.gain_slope_N[tokens], logq_B), whole.clipped_N[tokens]
            if whole.kl_N is not None and whole.kl_slope_N is not None:
                kl_B = _carried(whole.kl_N[tokens], whole.kl_slope_N[tokens], logq_B)
        total_B = -given[WEIGHT] * gain_B
        parts |= {"policy": total_B, "clipped": clipped_B.to(total_B.dtype)}
        return (total_B + self.policy.beta * kl_B if self.policy.beta and kl_B is not None else total_B), parts

    def _whole(self, logq_N: Tensor, batch: Batch) -> _Whole:
        """What ratios of whole answers need; `logq_N`: the answers' log-probabilities now."""
        product, logq_N = self.policy.ratio == "sequence", logq_N.double()
        length_N = torch.tensor(batch.responses, device=logq_N.device)[batch.row_N]
        times_N = length_N if product else torch.ones_like(length_N)
        old_N, advantage_N = (batch.given_N[name].double() for name in (LOGQ, ADVANTAGE))
        ratio_N = over_answers(logq_N - old_N, self.policy.ratio, batch.responses).clamp(max=MOST_LOG_RATIO).exp()
        self._note([ratio_N])
        gain_N = ratio_N * advantage_N
        bounded_N = ratio_N.clamp(1 - self.policy.eps_low, 1 + self.policy.eps_high) * advantage_N
        clipped_N = bounded_N < gain_N
        kl_N = kl_slope_N = None
        if product and REF in batch.given_N:
            log_r_N = over_answers(batch.given_N[REF].double() - logq_N, self.policy.ratio, batch.responses)
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
