"""Cross-entropy and a divergence from the teacher, over response tokens."""

import math
import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import UserError
from potstill.data.batches import Batch
from potstill.divergences import Divergence
from potstill.edges.families import PLAIN, logits_of
from potstill.edges.packed import tie_of
from potstill.losses.head import Kernel, Loss, fused_head, response_hidden
from potstill.losses.objective import weighted_sum
from potstill.losses.targets import Buckets, Signal

# What a GPU computes the distillation loss by: `plain` PyTorch, or `triton`, a kernel for some divergences. The kernel was
# never run on a GPU; it becomes the default where benchmarks/kd_step.py shows it faster.
KERNEL = "plain"


class Distillation:
    """Σ w·[(1−r)·CE + r·T²·D(softmax(z_p/T), softmax(z_q/T))]; Hinton et al., arXiv:1503.02531, the paper's eqs. (3), (4).

    Args:
        signal: what the teacher says.
        divergence: D, unreduced.
        ratio: r, 0 … 1; the paper uses 0.5.
        temperature: T > 0; T² keeps the gradient's scale.
        vocab: leading token ids that both tokenizers share; the divergence sees no padded logits beyond. The
            cross-entropy does, as in SFT, so that r = 0 is SFT exactly.
    """

    def __init__(self, signal: Signal, divergence: Divergence, ratio: float, temperature: float, vocab: int) -> None:
        self.signal, self.divergence, self.ratio, self.temperature, self.vocab = signal, divergence, ratio, temperature, vocab

    def __call__(self, model: Any, batch: Batch) -> Loss:
        T, r = self.temperature, self.ratio
        said = self.signal(batch)

        def terms(logits_BV: Tensor, teacher_BV: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            if isinstance(said, Buckets):
                logp, logq = said.logp_NK1[tokens].to(logits_BV.dtype), self._buckets(logits_BV, said.ids_NK[tokens])
                ce_B = F.cross_entropy(logits_BV, batch.target_N[tokens], reduction="none")
            else:
                assert teacher_BV is not None
                with torch.no_grad():
                    logp = F.log_softmax(self._scaled(teacher_BV).to(logits_BV.dtype), dim=-1)
                logq = F.log_softmax(self._scaled(logits_BV), dim=-1)
                ce_B = self._cross_entropy(logits_BV, logq, batch.target_N[tokens])
            ce = weighted_sum(ce_B if r < 1 else ce_B.detach(), batch, tokens)
            divergence = weighted_sum(self.divergence(logp, logq), batch, tokens)
            parts = {"ce": ce.detach(), "divergence": divergence.detach(), **self._gap(logits_BV, ce_B, batch, tokens)}
            return (1 - r) * ce + r * T**2 * divergence, parts

        tie = tie_of(model)
        dense = None if isinstance(said, Buckets) else said
        form, teacher_form = logits_of(model.config), dense.form if dense else PLAIN
        hidden_ND = response_hidden(model, batch, tie)
        return fused_head(
            hidden_ND,
            model.get_output_embeddings(),
            terms,
            teacher_hidden_ND=dense.hidden_ND if dense else None,
            teacher_head=dense.head if dense else None,
            form=form,
            teacher_form=teacher_form,
            tie=tie,
            kernel=self._kernel(batch, hidden_ND)
            if _triton_wanted() and dense is not None and form.plain and teacher_form.plain
            else None,
        )

    def _kernel(self, batch: Batch, hidden_ND: Tensor) -> Kernel | None:
        """None where plain PyTorch has to do it."""
        from potstill.losses import kernels

        form = kernels.form_of(self.divergence)
        if form is None or not kernels.runs_on(hidden_ND.device) or hidden_ND.dtype == torch.float64:
            return None
        T, r = self.temperature, self.ratio

        def kernel(logits_CV: Tensor, teacher_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            weight_C = None if batch.weight_N is None else batch.weight_N[tokens]
            ce, divergence = kernels.overwrite_by_gradient(
                logits_CV, teacher_CV, batch.target_N[tokens], weight_C, form, ratio=r, temperature=T, vocab=self.vocab
            )
            return (1 - r) * ce + r * T**2 * divergence, {"ce": ce, "divergence": divergence}

        return kernel

    def _scaled(self, logits_BV: Tensor) -> Tensor:
        shared_BV = logits_BV if logits_BV.shape[-1] == self.vocab else logits_BV[:, : self.vocab]
        return shared_BV if self.temperature == 1 else shared_BV / self.temperature

    def _cross_entropy(self, logits_BV: Tensor, logq_BV: Tensor, target_B: Tensor) -> Tensor:
        """−log q(target) over all logits; at T = 1 from the softmax of the shared ones and the few logits beyond."""
        if self.temperature != 1:
            return F.cross_entropy(logits_BV, target_B, reduction="none")
        target_B1 = target_B[:, None]
        ce_B1 = -logq_BV.gather(-1, target_B1)
        if logits_BV.shape[-1] > self.vocab:
            shared_B1 = logits_BV.gather(-1, target_B1) + ce_B1  # log Σ exp of the shared logits
            beyond_B1 = logits_BV[:, self.vocab :].logsumexp(-1, keepdim=True)
            ce_B1 = ce_B1 + F.softplus(beyond_B1 - shared_B1)
        return ce_B1.squeeze(-1)

    def _buckets(self, logits_BV: Tensor, ids_BK: Tensor) -> Tensor:
        """log q of the k tokens, and of all others together."""
        scaled_BV = self._scaled(logits_BV)
        inside_BK = scaled_BV.gather(-1, ids_BK)
        if ids_BK.shape[-1] == self.vocab:
            logq_BK = inside_BK.log_softmax(-1)
            return torch.cat([logq_BK, torch.full_like(logq_BK[:, :1], -math.inf)], dim=-1)
        # from the other logits themselves: 1 − Σ would lose what is small to rounding
        rest_B1 = scaled_BV.scatter(-1, ids_BK, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([inside_BK, rest_B1], dim=-1).log_softmax(-1)

    def _gap(self, logits_BV: Tensor, ce_B: Tensor, batch: Batch, tokens: slice) -> dict[str, Tensor]:
        """Σ |log q as the sampler had it − log q here|, where the rows bring the sampler's along."""
        if "logp" not in batch.given_N:
            return {}
        if logits_BV.shape[-1] > self.vocab:  # the sampler drew from the shared tokens alone
            ce_B = F.cross_entropy(logits_BV.detach()[:, : self.vocab], batch.target_N[tokens], reduction="none")
        return {"gap": weighted_sum((batch.given_N["logp"][tokens] + ce_B.detach()).abs(), batch, tokens)}


class OnPolicy:
    """One distillation of the rows of data, another of what the student wrote; no gradient flows through what was drawn."""

    def __init__(self, data: Distillation, samples: Distillation) -> None:
        self.data, self.samples = data, samples

    def __call__(self, model: Any, batch: Batch) -> Loss:
        return (self.samples if batch.sampled else self.data)(model, batch)


def _triton_wanted() -> bool:
    choice = os.environ.get("POTSTILL_KERNEL", KERNEL)
    if choice not in ("plain", "triton"):
        raise UserError(f"POTSTILL_KERNEL={choice}: must be plain or triton")
    if choice == "triton" and find_spec("triton") is None:
        raise UserError("POTSTILL_KERNEL=triton: the package triton is not here; builds of torch for CUDA bring it along")
    return choice == "triton"
