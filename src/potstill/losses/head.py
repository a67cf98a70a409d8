"""The output head fused with what is asked of its logits: nothing of shape [tokens, vocabulary] outlives a chunk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.data.batches import Batch
from potstill.edges.families import PLAIN, Logits
from potstill.edges.packed import Tie, final_hidden

# (student logits [B, V], teacher logits [B, V] or None, which of the N tokens) -> (sum to differentiate, sums to show)
Terms = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, dict[str, Tensor]]]
# the same, done: overwrites the student's logits by the gradient of the sum; logits [C, V] as the heads' products give them
Kernel = Callable[[Tensor, Tensor, slice], tuple[Tensor, dict[str, Tensor]]]

CHUNK_BYTES = 96 << 20  # of a chunk's float32 logits: tall enough for matrix products at full rate
BLOCK_BYTES = 5 << 20  # of a block's: the many element-wise passes over it then stay in the processor's cache
GPU_BYTES = 256 << 20  # of both on a GPU, which has the bandwidth and wants few, large kernels; a dozen fit on any


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's response tokens, in nats: `total` is differentiated, `parts` are shown."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def response_hidden(model: Any, batch: Batch, tie: Tie | None = None) -> Tensor:
    """Final hidden states [N, D] where a response token is predicted; prompts never reach the head."""
    hidden_TD = final_hidden(model, batch.ids_T, batch.position_T, batch.lengths, tie, batch.shared)
    # not by [place_N]: where rows share a prompt its last token stands there several times, and several threads of a CPU
    # would add their gradients in any order
    return hidden_TD.index_select(0, batch.place_N)


def chunk_bytes(device: torch.device) -> int:
    """Bytes of a chunk's float32 logits; free memory does not decide, because chunk size decides the rounding."""
    return GPU_BYTES if device.type == "cuda" else CHUNK_BYTES


def fused_head(
    hidden_ND: Tensor,
    head: nn.Linear,
    terms: Terms,
    *,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    form: Logits = PLAIN,
    teacher_form: Logits = PLAIN,
    tie: Tie | None = None,
    kernel: Kernel | None = None,
    chunk: int | None = None,
    block: int | None = None,
) -> Loss:
    """Sum of `terms` over all tokens, with gradients for hidden states, head weight and bias, in one pass.

    For each chunk of tokens: student and teacher logits by two matrix products; then, block by block, the terms and their
    gradient with respect to the logits, which overwrites these; then the gradients of hidden states and weight by two more
    products. `terms` is differentiated as it stands, so every divergence works from its own definition. The same as the
    plain computation to rounding, in the memory of one chunk. The idea of computing gradients in the forward pass is
    Liger's, arXiv:2410.10989; the two levels and the teacher beside the student are ours.

    Args:
        hidden_ND: final hidden states where a response token is predicted.
        head: the student's output layer, its weight tied or not.
        terms: what is asked of the logits; see `Terms`. Logits come in float32, or float64 for a float64 model.
        teacher_hidden_ND, teacher_head: the same of a teacher; no gradient flows there.
        form, teacher_form: what the networks do to the products, see `logits_of`.
        tie: the one that `hidden_ND` was made with, where the head's weight is the embedding's.
        kernel: does what `terms` says on a whole chunk at once, where there is a teacher and both forms are plain.
        chunk, block: tokens per chunk and block; by default from `chunk_bytes` and, on a CPU, what its cache holds.
    """
    job = _Job(terms, teacher_hidden_ND, teacher_head, form, teacher_form, tie, kernel, chunk, block)
    total = _FusedHead.apply(hidden_ND, head.weight, head.bias, job)
    return Loss(total, job.parts)


def logit_chunks(
    hidden_ND: Tensor, head: nn.Linear, chunk: int | None = None, form: Logits = PLAIN
) -> Iterator[tuple[slice, Tensor]]:
    """Logits [C, V] of one chunk after another, in float32 at least, for use without gradients."""
    size = chunk or max(1, chunk_bytes(hidden_ND.device) // (4 * head.weight.shape[0]))
    for begin in range(0, hidden_ND.shape[0], size):
        rows = slice(begin, min(begin + size, hidden_ND.shape[0]))
        yield rows, form(_wide(_linear(hidden_ND[rows], head.weight, head.bias)))


def _linear(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return F.linear(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V)


def _wide(logits: Tensor) -> Tensor:
    """In float32, or float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass
class _Job:
    terms: Terms
    teacher_hidden_ND: Tensor | None
    teacher_head: nn.Linear | None
    form: Logits
    teacher_form: Logits
    tie: Tie | None
    kernel: Kernel | None
    chunk: int | None
    block: int | None
    parts: dict[str, Tensor] = field(default_factory=dict)

    def run(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]
    ) -> tuple[Tensor, list[Tensor | None]]:
        N, V = hidden_ND.shape[0], weight_VD.shape[0]
        chunk = self.chunk or max(1, chunk_bytes(hidden_ND.device) // (4 * V))
        block = self.block or (chunk if hidden_ND.is_cuda else max(1, BLOCK_BYTES // (4 * V)))
        grad_hidden = torch.empty_like(hidden_ND) if needed[0] else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and needed[2] else None
        total = torch.zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device)
        for begin in range(0, N, chunk):
            rows = slice(begin, min(begin + chunk, N))
            logits_CV = _linear(hidden_ND[rows], weight_VD, bias_V)
            product = logits_CV.dtype  # autocast's under autocast, else the weight's
            teacher_CV = None
            if self.teacher_hidden_ND is not None and self.teacher_head is not None:
                teacher_CV = _linear(self.teacher_hidden_ND[rows], self.teacher_head.weight, self.teacher_head.bias)
            if self.kernel is not None:
                assert teacher_CV is not None
                assert self.form.plain
                assert self.teacher_form.plain
                total += self._added(*self.kernel(logits_CV, teacher_CV, rows))
            else:
                logits_CV, teacher_CV = _wide(logits_CV), None if teacher_CV is None else _wide(teacher_CV)
                for first in range(0, logits_CV.shape[0], block):
                    inner = slice(first, min(first + block, logits_CV.shape[0]))
                    total += self._block(logits_CV, teacher_CV, inner, begin, any(needed))
            if not any(needed):
                continue
            slope_CV = logits_CV.to(product)  # the logits are gone, their gradient stands there
            if grad_hidden is not None:
                grad_hidden[rows] = slope_CV @ weight_VD
            if needed[1]:
                states_CD = hidden_ND[rows].to(product)
                if grad_weight is None:  # written where a sum would have to begin with zeros: a pass over [V, D] less
                    grad_weight = (slope_CV.T @ states_CD).to(weight_VD.dtype)
                elif product == weight_VD.dtype:
                    grad_weight.addmm_(slope_CV.T, states_CD)
                else:  # under autocast, of which in-place products know nothing
                    grad_weight += slope_CV.T @ states_CD
            if grad_bias is not None:
                grad_bias += slope_CV.sum(0, dtype=grad_bias.dtype)
        if needed[1] and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VD)  # no token at all
        return total, [grad_hidden, grad_weight, grad_bias]

    def _block(self, logits_CV: Tensor, teacher_CV: Tensor | None, inner: slice, offset: int, differentiate: bool) -> Tensor:
        teacher_BV = self.teacher_form(teacher_CV[inner]) if teacher_CV is not None else None
        tokens = slice(offset + inner.start, offset + inner.stop)
        with torch.enable_grad():
            logits_BV = logits_CV[inner].detach().requires_grad_(differentiate)
            loss, parts = self.terms(self.form(logits_BV), teacher_BV, tokens)
            if differentiate:
                (slope_BV,) = torch.autograd.grad(loss, logits_BV)
                logits_CV[inner] = slope_BV
        return self._added(loss.detach(), parts)

    def _added(self, loss: Tensor, parts: dict[str, Tensor]) -> Tensor:
        for name, value in parts.items():
            self.parts[name] = self.parts[name] + value if name in self.parts else value
        return loss


class _FusedHead(torch.autograd.Function):
    """Gradients are found on the way forward; on the way back they are only scaled."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:
        total, ctx.grads = job.run(hidden_ND.detach(), weight_VD.detach(), bias_V, ctx.needs_input_grad)
        ctx.tie = job.tie
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the fused head's gradients can be taken once"
        for grad in grads:
            if grad is not None:
                grad.mul_(scale)
        if ctx.tie is None:
            return *grads, None
        ctx.tie.gradient = grads[1]  # handed over, not returned as well: autograd may copy what it is given, and miss additions
        return grads[0], None, grads[2], None
