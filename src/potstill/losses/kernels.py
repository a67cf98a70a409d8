"""The distillation objective and its gradient with respect to the logits, as one GPU kernel in Triton.

Importing this imports triton, which builds of torch for CUDA bring along; `distillation` does so only where it is asked to.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences._safe import FLOOR

BLOCK = 4096  # logits of a row that are looked at together
WARPS = 8  # of 32 threads; a block has 8 logits or more for each, so that no two threads hold one that is overwritten


@dataclass(frozen=True)
class Form:
    """What a divergence is to the kernel: of_p·KL(p ‖ m) + of_q·KL(q ‖ m), with m = share·p + (1−share)·q."""

    of_p: float
    of_q: float
    share: float


def form_of(divergence: Divergence) -> Form | None:
    """None for a divergence that the kernel cannot do."""
    match divergence.spec():
        case {"kind": "forward_kl"}:
            return Form(1, 0, 0)
        case {"kind": "reverse_kl"}:
            return Form(0, 1, 1)
        case {"kind": "skew_kl", "alpha": alpha}:
            return Form(1, 0, alpha)
        case {"kind": "skew_reverse_kl", "alpha": alpha}:
            return Form(0, 1, 1 - alpha)
        case {"kind": "generalised_jsd", "beta": beta}:
            return Form(beta, 1 - beta, beta)
    return None


def runs_on(device: torch.device) -> bool:
    """A GPU, or any device in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def overwrite_by_gradient(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    target_C: Tensor,
    weight_C: Tensor | None,
    form: Form,
    *,
    ratio: float,
    temperature: float,
    vocab: int,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Σ w·CE and Σ w·D; the student's logits become the gradient of (1−r)·Σ w·CE + r·T²·Σ w·D in their own dtype.

    The same as `Distillation` to rounding: a row is read twice and written once, where that makes some fifteen passes. Sums
    are in float32. With z = T·a, log q = a − log Σ exp a and h = ∂D/∂log q, the gradient is ∂D/∂a = h − q·Σ h; Σ h is −1 for
    the forward KL and 1 + D for the reverse, so that the first reading finds it with the normalisers. For a mixture, and for
    a row where a logarithm is floored, it takes one more reading. Online normalisers: Milakov and Gimelshein,
    arXiv:1805.02867.

    Args:
        logits_CV, teacher_CV: of float32 or narrower, adjacent along the vocabulary, of equal or different widths.
        target_C: token ids.
        weight_C: of each token; None where all are 1.
        vocab: the divergence sees the first so many logits, the cross-entropy all.
    """
    assert logits_CV.stride(1) == teacher_CV.stride(1) == 1
    assert block >= 8 * 32 * WARPS
    ce_C, divergence_C = torch.empty((2, logits_CV.shape[0]), dtype=torch.float32, device=logits_CV.device)
    kind = {0.0: "forward", 1.0: "reverse"}.get(form.share, "mixture")
    _row[(logits_CV.shape[0],)](
        logits_CV,
        teacher_CV,
        target_C,
        target_C if weight_C is None else weight_C,
        ce_C,
        divergence_C,
        logits_CV.shape[1],
        vocab,
        logits_CV.stride(0),
        teacher_CV.stride(0),
        float(ratio),
        float(temperature),
        float(form.of_p),
        float(form.of_q),
        math.log(form.share) if form.share > 0 else 0.0,
        math.log1p(-form.share) if form.share < 1 else 0.0,
        KIND=kind,
        HOT=temperature != 1,
        WEIGHTED=weight_C is not None,
        FLOOR=FLOOR,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,  # a·b + c rounded once; said, because Triton's default is about to change
    )
    return ce_C.sum(), divergence_C.sum()


@triton.jit
def _online(top, total, x_B):
    """Highest so far, and Σ exp(x − highest)."""
    higher = tl.maximum(top, tl.max(x_B, 0))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(x_B - higher), 0)


@triton.jit
def _point(logp_B, logq_B, of_p, of_q, log_share, log_rest, KIND: tl.constexpr, FLOOR: tl.constexpr):
    """The divergence's term at each token of the vocabulary, and its slope in log q, 0 below the floor."""
    p_log_B, q_log_B = tl.maximum(logp_B, FLOOR), tl.maximum(logq_B, FLOOR)
    if KIND == "forward":
        p_B = tl.exp(p_log_B)
        value_B, slope_B = p_B * (p_log_B - q_log_B), -p_B
    elif KIND == "reverse":
        q_B = tl.exp(q_log_B)
        value_B = q_B * (q_log_B - p_log_B)
        slope_B = value_B + q_B
    else:
        p_B, q_B = tl.exp(p_log_B), tl.exp(q_log_B)
        from_p_B, from_q_B = p_log_B + log_share, q_log_B + log_rest
        m_log_B = tl.maximum(from_p_B, from_q_B) + tl.log(1 + tl.exp(-tl.abs(from_p_B - from_q_B)))
        of_m_B = tl.exp(from_q_B - m_log_B)  # q's part of the mixture
        value_B = of_p * p_B * (p_log_B - m_log_B) + of_q * q_B * (q_log_B - m_log_B)
        slope_B = of_q * q_B * (q_log_B - m_log_B + 1 - of_m_B) - of_p * p_B * of_m_B
    return value_B, tl.where(logq_B >= FLOOR, slope_B, 0.0)


@triton.jit
def _row(
    logits_CV,
    teacher_CV,
    target_C,
    weight_C,
    ce_C,
    divergence_C,
    width,
    vocab,
    logits_stride,
    teacher_stride,
    ratio,
    temperature,
    of_p,
    of_q,
    log_share,
    log_rest,
    KIND: tl.constexpr,
    HOT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    logits_V, teacher_V = logits_CV + c * logits_stride, teacher_CV + c * teacher_stride
    target = tl.load(target_C + c)
    at_target = tl.load(logits_V + target).to(tl.float32)  # before its gradient takes its place
    lane_B = tl.arange(0, BLOCK)
    NONE: tl.constexpr = float("-inf")
    LOWEST: tl.constexpr = -3.0e38  # below all, and finite: its differences are never NaN

    # Normalisers. z: the student at temperature 1, all logits; a: at T, the shared ones; b: the teacher likewise.
    z_top, a_top, b_top, a_least, b_least = LOWEST, LOWEST, LOWEST, -LOWEST, -LOWEST
    z_sum, a_sum, b_sum, gap = 0.0, 0.0, 0.0, 0.0
    for begin in range(0, vocab, BLOCK):
        v_B = begin + lane_B
        z_B = tl.load(logits_V + v_B, mask=v_B < vocab, other=NONE).to(tl.float32)
        a_B = z_B / temperature if HOT else z_B
        b_B = tl.load(teacher_V + v_B, mask=v_B < vocab, other=NONE).to(tl.float32)
        b_B = b_B / temperature if HOT else b_B
        if HOT:
            z_top, z_sum = _online(z_top, z_sum, z_B)
        earlier = a_top
        a_top, a_sum = _online(a_top, a_sum, a_B)
        b_top, b_sum = _online(b_top, b_sum, b_B)
        if KIND != "mixture":
            a_least = tl.minimum(a_least, tl.min(tl.where(v_B < vocab, a_B, -LOWEST), 0))
        if KIND == "reverse":  # Σ exp(a)·(a − b)
            b_least = tl.minimum(b_least, tl.min(tl.where(v_B < vocab, b_B, -LOWEST), 0))
            apart_B = tl.where(v_B < vocab, a_B - b_B, 0.0)
            gap = gap * tl.exp(earlier - a_top) + tl.sum(tl.exp(a_B - a_top) * apart_B, 0)
    if not HOT:
        z_top, z_sum = a_top, a_sum
    for begin in range(vocab, width, BLOCK):
        v_B = begin + lane_B
        z_B = tl.load(logits_V + v_B, mask=v_B < width, other=NONE).to(tl.float32)
        z_top, z_sum = _online(z_top, z_sum, z_B)
    z_log, a_log, b_log = tl.log(z_sum), tl.log(a_sum), tl.log(b_sum)

    # Σ of slopes: known where nothing was floored, else by one more reading.
    slopes, unknown = 0.0, vocab
    if KIND == "forward":
        unknown = tl.where(a_least - a_top - a_log >= FLOOR, 0, vocab)
        slopes = tl.where(unknown == 0, -1.0, 0.0)
    if KIND == "reverse":
        unfloored = (a_least - a_top - a_log >= FLOOR) & (b_least - b_top - b_log >= FLOOR)
        unknown = tl.where(unfloored, 0, vocab)
        slopes = tl.where(unfloored, gap / a_sum - (a_top - b_top) - (a_log - b_log) + 1, 0.0)
    for begin in range(0, unknown, BLOCK):
        v_B = begin + lane_B
        a_B = tl.load(logits_V + v_B, mask=v_B < vocab, other=NONE).to(tl.float32)
        a_B = a_B / temperature if HOT else a_B
        b_B = tl.load(teacher_V + v_B, mask=v_B < vocab, other=NONE).to(tl.float32)
        b_B = b_B / temperature if HOT else b_B
        _, slope_B = _point(b_B - b_top - b_log, a_B - a_top - a_log, of_p, of_q, log_share, log_rest, KIND, FLOOR)
        slopes += tl.sum(slope_B, 0)

    # Value and gradient. Lanes beyond the vocabulary are at the floor, where every term is 0.
    weight = tl.load(weight_C + c).to(tl.float32) if WEIGHTED else 1.0
    of_ce, of_d = weight * (1 - ratio), weight * ratio * temperature  # T² by the objective, 1 / T from a = z / T
    divergence = 0.0
    for begin in range(0, vocab, BLOCK):
        v_B = begin + lane_B
        z_B = tl.load(logits_V + v_B, mask=v_B < vocab, other=NONE).to(tl.float32)
        a_B = z_B / temperature if HOT else z_B
        b_B = tl.load(teacher_V + v_B, mask=v_B < vocab, other=NONE).to(tl.float32)
        b_B = b_B / temperature if HOT else b_B
        logq_B = a_B - a_top - a_log
        value_B, slope_B = _point(b_B - b_top - b_log, logq_B, of_p, of_q, log_share, log_rest, KIND, FLOOR)
        divergence += tl.sum(value_B, 0)
        grad_B = of_d * (slope_B - tl.exp(logq_B) * slopes) + of_ce * (
            tl.exp(z_B - z_top - z_log) - tl.where(v_B == target, 1.0, 0.0)
        )
        tl.store(logits_V + v_B, grad_B.to(logits_CV.dtype.element_ty), mask=v_B < vocab)
    for begin in range(vocab, width, BLOCK):
        v_B = begin + lane_B
        z_B = tl.load(logits_V + v_B, mask=v_B < width, other=NONE).to(tl.float32)
        grad_B = of_ce * (tl.exp(z_B - z_top - z_log) - tl.where(v_B == target, 1.0, 0.0))
        tl.store(logits_V + v_B, grad_B.to(logits_CV.dtype.element_ty), mask=v_B < width)
    tl.store(ce_C + c, weight * (z_top - at_target + z_log))
    tl.store(divergence_C + c, weight * divergence)
