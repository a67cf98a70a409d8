"""Rounding a matrix to four bits so that its outputs, not its weights, stay close.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*,
arXiv:2210.17323. Shape suffixes: O outputs, I inputs, G groups of inputs, N rows of calibration data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.quant.packed import Packed

LOWEST, HIGHEST = -8, 7
CLIP_FACTORS = [1 - step / 40 for step in range(17)]  # the first is no clipping at all, so that a search never loses to none


class Hessian:
    """H = Σ x xᵀ over all input rows x of one layer, up to a constant the Hessian of its squared output error.

    In float64: 10⁵ rows summed in float32 leave too few digits for the inverse.
    """

    def __init__(self, width: int) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add every row of x, shaped [..., in]; the sum follows x to its device."""
        device = "cpu" if x.device.type == "mps" else x.device  # Apple's GPUs know no float64
        x_NI = x.detach().reshape(-1, x.shape[-1]).to(device).double()
        self.sum_II = self.sum_II.to(device).addmm_(x_NI.T, x_NI)
        self.rows += x_NI.shape[0]


def group_scales(weight_OI: Tensor, group: int, *, clip_search: bool = False) -> Tensor:
    """float16 scales [out, in / group] that map each group's largest magnitude to −8.

    scale = −w* / 8, where w* is the group's entry of largest magnitude, so a scale is negative where w* is
    positive: the side that needs it gets the eighth step. With `clip_search`, of 17 shrunken scales the one of
    least squared rounding error is taken, group by group. A group of zeros has scale 0, as has one too small for
    float16.

    Raises:
        ValueError: the width does not divide into groups.
        UserError: the weights are not finite, or larger than 8 times float16's largest number, 65,504.
    """
    weight_OI = weight_OI.detach()
    outputs, inputs = weight_OI.shape
    if inputs % group:
        raise ValueError(f"a width of {inputs} does not divide into groups of {group}; keep this layer at full precision")
    if not torch.isfinite(weight_OI).all():
        raise UserError("the weights hold NaN or infinity; quantise a checkpoint from before the training diverged")
    weight_OGK = weight_OI.double().reshape(outputs, inputs // group, group)
    peak_OG = weight_OGK.gather(-1, weight_OGK.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_OG = (peak_OG / LOWEST).to(torch.float16)
    if best_OG.isinf().any():
        raise UserError(
            f"a weight of {float(peak_OG.abs().max()):,.0f} needs a scale that float16 cannot hold; four bits reach 524,032 "
            "at most: leave this model unquantised"
        )
    if not clip_search:
        return best_OG
    least_OG = torch.full_like(peak_OG, torch.inf)
    for factor in CLIP_FACTORS:
        scale_OG = (factor * peak_OG / LOWEST).to(torch.float16)
        scale_OGK = scale_OG.double()[..., None]
        error_OG = (weight_OGK - scale_OGK * _round(weight_OGK, scale_OGK)).square().sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def round_to_nearest(weight_OI: Tensor, group: int = 32, *, clip_search: bool = False) -> Packed:
    """The control: GPTQ's scales, every weight rounded alone, code = clamp(round(w / scale), −8, 7).

    Raises:
        ValueError, UserError: as `group_scales`.
    """
    scales_OG = group_scales(weight_OI, group, clip_search=clip_search)
    codes_OI = _round(weight_OI.detach().double(), _spread(scales_OG, group))
    return Packed(codes_OI.to(torch.int8), scales_OG, group)


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


def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    group: int = 32,
    damping: float = 0.01,
    block: int = 128,
    clip_search: bool = False,
) -> Packed:
    """The codes of `solve`, whose arguments and errors it has."""
    return solve(weight_OI, hessian_II, group=group, damping=damping, block=block, clip_search=clip_search).packed


def solve(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    group: int = 32,
    damping: float = 0.01,
    block: int = 128,
    clip_search: bool = False,
) -> Solved:
    """Codes that nearly minimise tr((W − Q) H (W − Q)ᵀ), column by column, and no row worse than rounding to nearest.

    With U the upper Cholesky factor of (H + λ·mean(diag H)·1)⁻¹, so that UᵀU is that inverse, each column i is
    rounded and its error is spread over the columns still to come:

        e = (w_i − q_i) / U_ii,    w_j ← w_j − e·U_ij  for j > i

    Columns beyond the present block of `block` receive their share in one product at its end, which changes speed
    and nothing else. Unlike the paper, scales are fixed in float16 before the solve, so that the file holds exactly
    what was solved for; columns are taken in their stored order; and because the method is greedy, each output row whose
    error on the calibration rows (H undamped) is not smaller than that of rounding to nearest is rounded to nearest.

    Args:
        weight_OI: the layer's matrix, any float type; solved in float64 on the Hessian's device.
        hessian_II: `Hessian.sum_II`; its scale does not matter.
        group: columns that share a scale.
        damping: λ, as a share of the mean of H's diagonal.
        clip_search: see `group_scales`.

    Raises:
        ValueError: the width does not divide into groups.
        UserError: weights or Hessian are not finite, weights too large, or no damping up to 10⁴·λ makes H positive definite.
    """
    assert hessian_II.shape == (weight_OI.shape[1], weight_OI.shape[1])
    weight_OI = weight_OI.detach().to(hessian_II.device, torch.float64)
    scales_OG = group_scales(weight_OI, group, clip_search=clip_search)
    scales_OI = _spread(scales_OG, group)
    upper_II, damped = _inverse_cholesky(hessian_II, damping)
    solved_OI = _column_by_column(weight_OI.clone(), scales_OI, upper_II, block)
    nearest_OI = _round(weight_OI, scales_OI)
    better_O = _surely_better(weight_OI - scales_OI * solved_OI, weight_OI - scales_OI * nearest_OI, hessian_II)
    codes_OI = torch.where(better_O[:, None], solved_OI, nearest_OI)
    return Solved(
        packed=Packed(codes_OI.to(torch.int8), scales_OG, group),
        damping=damped,
        dead_columns=int((hessian_II.diagonal() == 0).sum()),
        rounded_rows=int((~better_O & (solved_OI != nearest_OI).any(1)).sum()),
    )


def _column_by_column(weight_OI: Tensor, scales_OI: Tensor, upper_II: Tensor, block: int) -> Tensor:
    """Codes, as float64; the weights are used up."""
    codes_OI = torch.zeros_like(weight_OI)
    for start in range(0, weight_OI.shape[1], block):
        here = slice(start, start + block)
        work_OB, upper_BB = weight_OI[:, here], upper_II[here, here]  # a view: updates below land in weight_OI
        errors_OB = torch.zeros_like(work_OB)
        for i in range(work_OB.shape[1]):
            scale_O = scales_OI[:, start + i]
            code_O = _round(work_OB[:, i], scale_O)
            codes_OI[:, start + i] = code_O
            errors_OB[:, i] = (work_OB[:, i] - scale_O * code_O) / upper_BB[i, i]
            work_OB[:, i + 1 :].addr_(errors_OB[:, i], upper_BB[i, i + 1 :], alpha=-1)
        weight_OI[:, start + block :] -= errors_OB @ upper_II[here, start + block :]
    return codes_OI


def _surely_better(one_OI: Tensor, other_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Rows of which E H Eᵀ is smaller for `one` than for `other` by more than float64 can have got wrong."""
    unsure_O = 0.0
    for error_OI in (one_OI, other_OI):
        size_O = ((error_OI.abs() @ hessian_II.abs()) * error_OI.abs()).sum(1)
        unsure_O = unsure_O + len(hessian_II) * torch.finfo(torch.float64).eps * size_O
    return row_errors(one_OI, hessian_II) + unsure_O < row_errors(other_OI, hessian_II)


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


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    steps = torch.where(scale == 0, 0.0, weight / torch.where(scale == 0, 1.0, scale))
    return steps.round().clamp(LOWEST, HIGHEST)


def _inverse_cholesky(hessian_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper U with UᵀU = (H + λ·mean(diag H)·1)⁻¹, and λ: the damping, raised tenfold while H stays indefinite."""
    if not torch.isfinite(hessian_II).all():
        raise UserError("GPTQ: the layer's calibration inputs hold NaN or infinity; check that the model's loss is finite")
    hessian_II = hessian_II.to(torch.float64, copy=True)
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean() if not dead_I.all() else 1.0
    # H is positive semidefinite, so the rest of a dead column is zero too: any positive entry leaves it on its own.
    diagonal_I[dead_I] = mean
    for raised in (damping * 10**attempt for attempt in range(5)):
        damped_II = hessian_II + torch.eye(len(hessian_II)).to(hessian_II) * (raised * mean)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if failed:
            continue
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed:
            return upper_II, raised
    raise UserError(
        f"GPTQ: the Hessian of {len(hessian_II)} inputs is not positive definite, even with damping {damping * 10**4:g}; "
        "calibrate on more rows, raise the damping, or use the method 'rtn'"
    )
