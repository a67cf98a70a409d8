"""Rounding a matrix to four bits so that its outputs, not its weights, stay close.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*,
arXiv:2210.17323. Shape suffixes: O outputs, I inputs, G groups of inputs, N rows of calibration data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.quant.descent import descend
from potstill.quant.packed import Packed, code_range

CLIP_FACTORS = [1 - step / 40 for step in range(17)]  # the first is no clipping at all, so that a search never loses to none
WORDS = {4: "four", 8: "eight"}
CHUNK = 1024  # rows whose products are summed in their own float32, before float64 adds them up


class NotDivisible(ValueError):
    """A width that does not divide into groups."""


class Hessian:
    """H = Σ x xᵀ over all input rows x of one layer, up to a constant the Hessian of its squared output error.

    Products of up to `CHUNK` rows are summed in float32, which is several times as fast, and these sums in float64: 10⁵ rows
    summed in float32 alone leave too few digits for the inverse. Rows in float64 stay in it.
    """

    def __init__(self, width: int) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, weights: Tensor | None = None, y: Tensor | None = None) -> None:
        """Add every row of x, shaped [..., in]; the sum follows x to its device.

        Args:
            weights: how often each row counts, one number a row; default: once.
            y: of x's shape: x yᵀ is summed in place of x xᵀ.
        """
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # Apple's GPUs know no float64
        x_NI = x.detach().reshape(-1, x.shape[-1]).to(device)
        x_NI = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
        y_NI = x_NI if y is None else y.detach().reshape(x_NI.shape).to(x_NI)
        if weights is not None:
            root_N1 = weights.to(x_NI).reshape(-1, 1).sqrt()
            x_NI, y_NI = x_NI * root_N1, y_NI * root_N1
        if self.sum_II.device != device:
            self.sum_II = self.sum_II.to(device)
        for x_CI, y_CI in zip(x_NI.split(CHUNK), y_NI.split(CHUNK), strict=True):
            self.sum_II += x_CI.T @ y_CI
        self.rows += x_NI.shape[0]


def group_scales(
    weight_OI: Tensor, group: int, *, bits: int = 4, clip_search: bool = False, importance_I: Tensor | None = None
) -> Tensor:
    """float16 scales [out, in / group] that map each group's largest magnitude to the lowest code, −8 of four bits.

    scale = −w* / 8, where w* is the group's entry of largest magnitude, so a scale is negative where w* is
    positive: the side that needs it gets the eighth step. With `clip_search`, of 17 shrunken scales the one of
    least squared rounding error is taken, group by group. A group of zeros has scale 0, as has one too small for
    float16.

    Args:
        importance_I: what a search multiplies squared errors with, by input: the Hessian's diagonal; default: 1.

    Raises:
        NotDivisible: the width does not divide into groups.
        UserError: the weights are not finite, or larger than 8 times float16's largest number, 65,504.
    """
    weight_OI = weight_OI.detach()
    outputs, inputs = weight_OI.shape
    if inputs % group:
        raise NotDivisible(f"a width of {inputs} does not divide into groups of {group}; keep this layer at full precision")
    if not torch.isfinite(weight_OI).all():
        raise UserError("the weights hold NaN or infinity; quantise a checkpoint from before the training diverged")
    lowest, _ = code_range(bits)
    weight_OGK = weight_OI.double().reshape(outputs, inputs // group, group)
    peak_OG = weight_OGK.gather(-1, weight_OGK.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_OG = (peak_OG / lowest).to(torch.float16)
    if best_OG.isinf().any():
        most = int(-lowest * torch.finfo(torch.float16).max)
        raise UserError(
            f"a weight of {float(peak_OG.abs().max()):,.0f} needs a scale that float16 cannot hold; {WORDS[bits]} bits reach "
            f"{most:,} at most: leave this model unquantised"
        )
    if not clip_search:
        return best_OG
    importance_GK = 1.0 if importance_I is None else importance_I.to(weight_OGK).reshape(-1, group)
    least_OG = torch.full_like(peak_OG, torch.inf)
    for factor in CLIP_FACTORS:
        scale_OG = (factor * peak_OG / lowest).to(torch.float16)
        scale_OGK = scale_OG.double()[..., None]
        error_OG = ((weight_OGK - scale_OGK * _round(weight_OGK, scale_OGK, bits)).square() * importance_GK).sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def round_to_nearest(weight_OI: Tensor, group: int = 32, *, bits: int = 4, clip_search: bool = False) -> Packed:
    """The control: GPTQ's scales, every weight rounded alone, code = clamp(round(w / scale), −8, 7).

    Raises:
        NotDivisible, UserError: as `group_scales`.
    """
    scales_OG = group_scales(weight_OI, group, bits=bits, clip_search=clip_search)
    codes_OI = _round(weight_OI.detach().double(), _spread(scales_OG, group), bits)
    return Packed(codes_OI.to(torch.int8), scales_OG, group, bits)


@dataclass(frozen=True)
class Solved:
    """What `solve` did with one layer.

    Attributes:
        packed: the codes.
        damping: λ that made the Hessian positive definite; more than was asked for where it had to be raised.
        dead_columns: inputs that were zero in every calibration row; their weights are rounded to nearest.
        rounded_rows: outputs for which rounding to nearest was at least as good as the solver, and was taken.
    """

    packed: Packed
    damping: float
    dead_columns: int
    rounded_rows: int


def gptq(weight_OI: Tensor, hessian_II: Tensor, **settings: Any) -> Packed:
    """The codes of `solve`, whose arguments and errors it has."""
    return solve(weight_OI, hessian_II, **settings).packed


def solve(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    damping: float = 0.01,
    block: int = 128,
    clip_search: bool = False,
    by_activation: bool = True,
    sweeps: int = 0,
    wanted_OI: Tensor | None = None,
) -> Solved:
    """Codes that nearly minimise tr((W − Q) H (W − Q)ᵀ), column by column, and no row worse than rounding to nearest.

    With U the upper Cholesky factor of (H + λ·mean(diag H)·1)⁻¹, so that UᵀU is that inverse, each column i is
    rounded and its error is spread over the columns still to come:

        e = (w_i − q_i) / U_ii,    w_j ← w_j − e·U_ij  for j > i

    Columns beyond the present block of `block` receive their share in one product at its end, which changes speed
    and nothing else. Unlike the paper, scales are fixed in float16 before the solve, so that the file holds exactly
    what was solved for; and because the method is greedy, each output row whose error on the calibration rows (H
    undamped) is not smaller than that of `round_to_nearest` is taken from there. Where `sweeps` allow, `descend`
    then improves codes and scales, with the same promise.

    Args:
        weight_OI: the layer's matrix, any float type; solved in float64 on the Hessian's device.
        hessian_II: `Hessian.sum_II`; its scale does not matter.
        bits: 4 or 8.
        group: columns that share a scale.
        damping: λ, as a share of the mean of H's diagonal.
        clip_search: see `group_scales`; errors count by H's diagonal.
        by_activation: take the columns of the largest inputs first, while most columns are left to make up for their
            errors; codes stay in the stored order, and so do the groups.
        sweeps: most passes of `descend` over all columns.
        wanted_OI: what is solved for, see `wanted_weights`; default: the matrix itself.

    Raises:
        NotDivisible: the width does not divide into groups.
        UserError: weights or Hessian are not finite, weights too large, or no damping up to 10⁴·λ makes H positive definite.
    """
    assert hessian_II.shape == (weight_OI.shape[1], weight_OI.shape[1])
    weight_OI = weight_OI.detach().to(hessian_II.device, torch.float64)
    wanted_OI = weight_OI if wanted_OI is None else wanted_OI
    damped_II, upper_II, damped = _inverse_cholesky(hessian_II, damping, by_activation)
    importance_I = hessian_II.diagonal()
    scales_OG = group_scales(wanted_OI, group, bits=bits, clip_search=clip_search, importance_I=importance_I)
    scales_OI = _spread(scales_OG, group)
    order_I = _order(hessian_II) if by_activation else slice(None)
    codes_OI = torch.empty_like(weight_OI)
    codes_OI[:, order_I] = _column_by_column(wanted_OI[:, order_I].clone(), scales_OI[:, order_I], upper_II, block, bits)
    solved, nearest = Packed(codes_OI.to(torch.int8), scales_OG, group, bits), round_to_nearest(weight_OI, group, bits=bits)
    best, rounded_O = _better_rows(_judged(solved, wanted_OI, hessian_II), _judged(nearest, wanted_OI, hessian_II))
    if sweeps:
        best, _ = _better_rows(_judged(descend(wanted_OI, best.packed, damped_II, sweeps), wanted_OI, hessian_II), best)
    return Solved(
        packed=best.packed,
        damping=damped,
        dead_columns=int((hessian_II.diagonal() == 0).sum()),
        rounded_rows=int((rounded_O & (solved.codes_OI != nearest.codes_OI).any(1)).sum()),
    )


@dataclass(frozen=True)
class _Judged:
    """Codes, E H Eᵀ of each output row, and the most that float64 can have got wrong in it."""

    packed: Packed
    error_O: Tensor
    unsure_O: Tensor


def _judged(packed: Packed, wanted_OI: Tensor, hessian_II: Tensor) -> _Judged:
    """Rounding is at most inputs · ε · |E| |H| |E|ᵀ, and because |H_ij|² ≤ H_ii H_jj, at most inputs · ε · (Σ |e_i| √H_ii)²."""
    off_OI = wanted_OI - packed.dequantise().to(wanted_OI)
    bound_O = (off_OI.abs() @ hessian_II.diagonal().clamp(min=0).sqrt()).square()
    return _Judged(packed, row_errors(off_OI, hessian_II), len(hessian_II) * torch.finfo(torch.float64).eps * bound_O)


def _better_rows(one: _Judged, other: _Judged) -> tuple[_Judged, Tensor]:
    """The rows of `one` that are surely better, else those of `other`; and which are of `other`."""
    better_O = one.error_O + one.unsure_O + other.unsure_O < other.error_O
    codes_OI = torch.where(better_O[:, None], one.packed.codes_OI, other.packed.codes_OI)
    scales_OG = torch.where(better_O[:, None], one.packed.scales_OG, other.packed.scales_OG)
    packed = Packed(codes_OI, scales_OG, one.packed.group, one.packed.bits)
    error_O = torch.where(better_O, one.error_O, other.error_O)
    return _Judged(packed, error_O, torch.where(better_O, one.unsure_O, other.unsure_O)), ~better_O


def wanted_weights(weight_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, damping: float, share: float) -> Tensor:
    """Weights that give, on the inputs there are, the outputs that the inputs of full precision had; float64 [out, in].

    With X the layer's inputs in the model of full precision and X̃ those behind quantised layers, the least squares of
    X̃ W'ᵀ = X Wᵀ are W' = W + W Dᵀ H⁻¹, D = X̃ᵀ(X − X̃): what codes are solved for then makes up for the errors before them.
    The idea is that of GPTAQ (Li et al., arXiv:2504.02692), which spreads the same difference column by column.

    Args:
        drift_II: D.
        damping: of H, as in `solve`.
        share: of the difference; D is an estimate from few rows, and all of it is no better than a part.
    """
    weight_OI = weight_OI.detach().to(hessian_II.device, torch.float64)
    for _, damped_II in _dampings(hessian_II, damping):
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            return weight_OI + share * torch.cholesky_solve(drift_II @ weight_OI.T, lower_II).T
    raise _indefinite(hessian_II, damping)


def _order(hessian_II: Tensor) -> Tensor:
    """Columns by falling diagonal of H, equal ones as they stand."""
    return hessian_II.diagonal().argsort(descending=True, stable=True)


def _column_by_column(weight_OI: Tensor, scales_OI: Tensor, upper_II: Tensor, block: int, bits: int = 4) -> Tensor:
    """Codes, as float64; the weights are used up."""
    codes_OI = torch.zeros_like(weight_OI)
    for start in range(0, weight_OI.shape[1], block):
        here = slice(start, start + block)
        work_OB, upper_BB = weight_OI[:, here], upper_II[here, here]  # a view: updates below land in weight_OI
        errors_OB = torch.zeros_like(work_OB)
        for i in range(work_OB.shape[1]):
            scale_O = scales_OI[:, start + i]
            code_O = _round(work_OB[:, i], scale_O, bits)
            codes_OI[:, start + i] = code_O
            errors_OB[:, i] = (work_OB[:, i] - scale_O * code_O) / upper_BB[i, i]
            work_OB[:, i + 1 :].addr_(errors_OB[:, i], upper_BB[i, i + 1 :], alpha=-1)
        weight_OI[:, start + block :] -= errors_OB @ upper_II[here, start + block :]
    return codes_OI


def row_errors(error_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """E H Eᵀ of each output row: its squared error on the calibration rows, with E = W − dequantised."""
    return ((error_OI @ hessian_II) * error_OI).sum(1)


def output_error(weight_OI: Tensor, packed: Packed, hessian_II: Tensor) -> float:
    """Squared error of the layer's outputs on the calibration rows, as a share of the outputs' squares.

    tr(E H Eᵀ) / tr(W H Wᵀ) with E = W − dequantised; 0 where the layer's outputs were all zero.
    """
    weight_OI = weight_OI.detach().to(hessian_II.device, torch.float64)
    error_OI = weight_OI - packed.dequantise().to(weight_OI)
    energy = ((weight_OI @ hessian_II) * weight_OI).sum()
    return float(row_errors(error_OI, hessian_II).sum() / energy) if energy > 0 else 0.0


def _spread(scales_OG: Tensor, group: int) -> Tensor:
    return scales_OG.double().repeat_interleave(group, dim=1)


def _round(weight: Tensor, scale: Tensor, bits: int = 4) -> Tensor:
    steps = torch.where(scale == 0, 0.0, weight / torch.where(scale == 0, 1.0, scale))
    return steps.round().clamp(*code_range(bits))


def _inverse_cholesky(hessian_II: Tensor, damping: float, by_activation: bool = False) -> tuple[Tensor, Tensor, float]:
    """H + λ·mean(diag H)·1 in the stored order; upper U with UᵀU its inverse, in the order of solving; and λ.

    λ is the damping, raised tenfold while H stays indefinite.
    """
    order_I = _order(hessian_II) if by_activation else slice(None)
    for raised, damped_II in _dampings(hessian_II, damping):
        lower_II, failed = torch.linalg.cholesky_ex(damped_II[order_I][:, order_I])
        if failed:
            continue
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed:
            return damped_II, upper_II, raised
    raise _indefinite(hessian_II, damping)


def _dampings(hessian_II: Tensor, damping: float) -> Iterator[tuple[float, Tensor]]:
    """λ and H + λ·mean(diag H)·1, of the damping and of up to 10⁴ times as much."""
    if not torch.isfinite(hessian_II).all():
        raise UserError("GPTQ: the layer's calibration inputs hold NaN or infinity; check that the model's loss is finite")
    hessian_II = hessian_II.to(torch.float64, copy=True)
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean() if not dead_I.all() else 1.0
    # H is positive semidefinite, so the rest of a dead column is zero too: any positive entry leaves it on its own.
    diagonal_I[dead_I] = mean
    for raised in (damping * 10**attempt for attempt in range(5)):
        yield raised, hessian_II + torch.eye(len(hessian_II)).to(hessian_II) * (raised * mean)


def _indefinite(hessian_II: Tensor, damping: float) -> UserError:
    return UserError(
        f"GPTQ: the Hessian of {len(hessian_II)} inputs is not positive definite, even with damping {damping * 10**4:g}; "
        "calibrate on more rows, raise the damping, or use the method 'rtn'"
    )
