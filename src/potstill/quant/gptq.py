"""Rounding a matrix to four bits so that its outputs, not its weights, stay close.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*,
arXiv:2210.17323, in the form of Babai's nearest plane, to which it is equal (Chen et al., arXiv:2507.18553).
Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.quant.descent import descend
from potstill.quant.hessian import Curvature, curvature, tiles
from potstill.quant.packed import Packed, code_range
from potstill.quant.rounding import group_scales, round_to_nearest


@dataclass(frozen=True)
class Solved:
    """What was made of matrices that read the same inputs, one below the other.

    Attributes:
        packed: the codes.
        rounded_O: outputs for which rounding to nearest was at least as good as the solver, and was taken.
        error_O: E H Eᵀ of each output, E = W − what the codes stand for: its squared error on the calibration rows.
        nearest_O: the same of rounding to nearest.
        energy_O: W H Wᵀ.
    """

    packed: Packed
    rounded_O: Tensor
    error_O: Tensor
    nearest_O: Tensor
    energy_O: Tensor

    def rows(self, some: slice) -> "Solved":
        """Of these outputs alone."""
        packed = Packed(self.packed.codes_OI[some], self.packed.scales_OG[some], self.packed.group, self.packed.bits)
        return Solved(packed, self.rounded_O[some], self.error_O[some], self.nearest_O[some], self.energy_O[some])

    def share(self, error_O: Tensor) -> float:
        """Of the outputs' squares; 0 where they were all zero."""
        energy = self.energy_O.sum()
        return float(error_O.sum() / energy) if energy > 0 else 0.0


def joined(parts: Sequence[Solved]) -> Solved:
    """One below the other."""
    codes_OI, scales_OG = (torch.cat([getattr(part.packed, name) for part in parts]) for name in ("codes_OI", "scales_OG"))
    figures = (torch.cat([getattr(part, name) for part in parts]) for name in ("rounded_O", "error_O", "nearest_O", "energy_O"))
    return Solved(Packed(codes_OI, scales_OG, parts[0].packed.group, parts[0].packed.bits), *figures)


def rounded(weight_OI: Tensor, hessian_II: Tensor, *, bits: int = 4, group: int = 32) -> Solved:
    """The control, `round_to_nearest`, whose errors it has."""
    weight_OI = weight_OI.detach().to(hessian_II)
    packed = round_to_nearest(weight_OI, group, bits=bits)
    error_O = row_errors(weight_OI - packed.dequantise(), hessian_II)
    return Solved(packed, torch.zeros_like(error_O, dtype=torch.bool), error_O, error_O, row_errors(weight_OI, hessian_II))


def gptq(
    weight_OI: Tensor, hessian_II: Tensor, *, damping: float = 0.01, by_activation: bool = True, **settings: Any
) -> Packed:
    """The codes of `solve` for one matrix; arguments and errors are those of `curvature` and `solve`."""
    return solve(weight_OI, curvature(hessian_II, damping, by_activation), **settings).packed


def solve(
    weight_OI: Tensor,
    curved: Curvature,
    *,
    bits: int = 4,
    group: int = 32,
    block: int = 128,
    clip_search: bool = False,
    sweeps: int = 0,
    wanted_OI: Tensor | None = None,
) -> Solved:
    """Codes that nearly minimise tr((W − Q) H (W − Q)ᵀ), column by column, and no row worse than rounding to nearest.

    With the damped H = S·diag(d)·Sᵀ, S unit lower triangular in the order of `curved`, columns are rounded from the last of
    that order to the first, each to the code nearest to what makes up for the errors e = w − q of those before it:

        w'_i = w_i + Σ e_j S_ji  over j rounded before i

    Columns beyond the present block of `block` receive their share in one product at its end, which changes speed
    and nothing else. Unlike the paper, scales are fixed in float16 before the solve, so that the file holds exactly
    what was solved for; and because the method is greedy, each output row whose error on the calibration rows (H
    undamped) is not smaller than that of `round_to_nearest` is taken from there. Where `sweeps` allow, `descend`
    then improves codes and scales in float32, and of each row what float64 finds better is kept.

    Args:
        weight_OI: matrices that read the same inputs, one below the other, any float type; solved in float64 on the Hessian's
            device.
        bits: 4 or 8.
        group: columns that share a scale.
        clip_search: see `group_scales`; errors count by H's diagonal.
        sweeps: most passes of `descend` over all columns.
        wanted_OI: what is solved for, see `making_up`; default: the matrix itself.

    Raises:
        NotDivisible, UserError: as `group_scales`.
    """
    assert curved.hessian_II.shape == (weight_OI.shape[1], weight_OI.shape[1])
    weight_OI = weight_OI.detach().to(curved.hessian_II)
    wanted_OI = weight_OI if wanted_OI is None else wanted_OI
    importance_I = curved.hessian_II.diagonal()
    scales_OG = group_scales(wanted_OI, group, bits=bits, clip_search=clip_search, importance_I=importance_I)
    solved = Packed(_column_by_column(wanted_OI, scales_OG, curved, group, block, bits), scales_OG, group, bits)
    nearest = _judged(round_to_nearest(weight_OI, group, bits=bits), wanted_OI, curved.hessian_II)
    best, rounded_O = _better_rows(_judged(solved, wanted_OI, curved.hessian_II), nearest)
    if sweeps:
        swept = descend(wanted_OI.float(), best.packed, curved.damped_II, sweeps)
        best, _ = _better_rows(_judged(swept, wanted_OI, curved.hessian_II), best)
    rounded_O &= (solved.codes_OI != nearest.packed.codes_OI).any(1)
    if wanted_OI is not weight_OI:
        best, nearest = (_judged(made.packed, weight_OI, curved.hessian_II) for made in (best, nearest))
    return Solved(best.packed, rounded_O, best.error_O, nearest.error_O, row_errors(weight_OI, curved.hessian_II))


@dataclass(frozen=True)
class _Judged:
    """Codes, E H Eᵀ of each output row, and the most that float64 can have got wrong in it."""

    packed: Packed
    error_O: Tensor
    unsure_O: Tensor


def _judged(packed: Packed, wanted_OI: Tensor, hessian_II: Tensor) -> _Judged:
    """Rounding is at most inputs · ε · |E| |H| |E|ᵀ, and because |H_ij|² ≤ H_ii H_jj, at most inputs · ε · (Σ |e_i| √H_ii)²."""
    off_OI = wanted_OI - packed.dequantise()
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


def _column_by_column(
    wanted_OI: Tensor, scales_OG: Tensor, curved: Curvature, group: int, block: int = 128, bits: int = 4
) -> Tensor:
    """int8 codes. Inside, a column of the matrix is a row, whose outputs lie side by side in memory."""
    wanted_IO, scales_GO = wanted_OI.T[curved.order_I], scales_OG.T.to(wanted_OI).contiguous()
    divisor_GO = torch.where(scales_GO == 0, torch.inf, scales_GO)
    target_IO, codes_IO = wanted_IO.clone(), torch.empty_like(wanted_IO, dtype=torch.int8)
    group_I, spread_II = [i // group for i in curved.order_I.tolist()], curved.spread_II
    for end in range(len(wanted_IO), 0, -block):
        start = max(0, end - block)
        error_BO = torch.empty_like(wanted_IO[start:end])
        for i in reversed(range(start, end)):
            g = group_I[i]
            codes_IO[i] = code_O = (target_IO[i] / divisor_GO[g]).round_().clamp_(*code_range(bits))
            torch.addcmul(wanted_IO[i], scales_GO[g], code_O, value=-1, out=error_BO[i - start])
            target_IO[start:i].addr_(spread_II[i, start:i], error_BO[i - start])
        target_IO[:start].addmm_(spread_II[start:end, :start].T, error_BO)
    codes_OI = torch.empty_like(wanted_OI, dtype=torch.int8)
    codes_OI[:, curved.order_I] = codes_IO.T
    return codes_OI


def row_errors(error_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """E H Eᵀ of each output row: its squared error on the calibration rows, with E = W − dequantised.

    H is symmetric, so that its tiles above the diagonal count twice, and those below are not multiplied.
    """
    sum_O = torch.zeros_like(error_OI[:, 0])
    for tile in tiles(len(hessian_II)):
        product_OJ = error_OI[:, tile] @ hessian_II[tile, tile.start :]
        product_OJ[:, tile.stop - tile.start :] *= 2
        sum_O += product_OJ.mul_(error_OI[:, tile.start :]).sum(1)
    return sum_O


def output_error(weight_OI: Tensor, packed: Packed, hessian_II: Tensor) -> float:
    """Squared error of the layer's outputs on the calibration rows, as a share of the outputs' squares.

    tr(E H Eᵀ) / tr(W H Wᵀ) with E = W − dequantised; 0 where the layer's outputs were all zero.
    """
    weight_OI = weight_OI.detach().to(hessian_II)
    energy = row_errors(weight_OI, hessian_II).sum()
    return float(row_errors(weight_OI - packed.dequantise(), hessian_II).sum() / energy) if energy > 0 else 0.0
