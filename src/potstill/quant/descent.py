"""Codes and scales improved in turn, each to its best value while all others stay."""

import torch
from torch import Tensor

from potstill.quant.packed import Packed, code_range

SPAN = 128  # columns whose changes reach all other columns in one product


def descend(weight_OI: Tensor, packed: Packed, hessian_II: Tensor, sweeps: int) -> Packed:
    """Coordinate descent on tr(E H Eᵀ), E = W − dequantised, from codes that are there; in exact arithmetic no output
    row becomes worse.

    The error is a parabola in each scale and in each code, so the best float16, and the best code of those that there are, are
    the ones nearest to its lowest point. With S = E H, for the scale s of a group with codes c, and for the code of column i:

        s ← s + c · S / (c H c),    code ← code + S_i / (s · H_ii)

    A sweep visits every group once: its scale, then its columns. Output rows do not touch one another, and those in which a
    sweep changed nothing are done.

    Args:
        weight_OI, hessian_II: of one float type, which is computed in; in float32 a row can become worse by its rounding.
        sweeps: most passes over all columns.
    """
    codes_IO, scales_GO = packed.codes_OI.T.to(weight_OI).contiguous(), packed.scales_OG.T.to(weight_OI).contiguous()
    codes_IN, scales_GN = codes_IO.clone(), scales_GO.clone()
    slope_IN = hessian_II.T @ (weight_OI - packed.dequantise()).T
    left_N = torch.arange(len(weight_OI), device=weight_OI.device)
    for _ in range(sweeps):
        changed_N = _sweep(codes_IN, scales_GN, slope_IN, hessian_II, packed)
        if not changed_N.all():
            codes_IO[:, left_N], scales_GO[:, left_N] = codes_IN, scales_GN
            left_N, codes_IN, scales_GN, slope_IN = (x[..., changed_N] for x in (left_N, codes_IN, scales_GN, slope_IN))
        if not len(left_N):
            break
    codes_IO[:, left_N], scales_GO[:, left_N] = codes_IN, scales_GN
    codes_OI, scales_OG = codes_IO.T.to(torch.int8), scales_GO.T.to(torch.float16)
    return Packed(codes_OI.contiguous(), scales_OG.contiguous(), packed.group, packed.bits)


def _sweep(codes_IN: Tensor, scales_GN: Tensor, slope_IN: Tensor, hessian_II: Tensor, packed: Packed) -> Tensor:
    """One visit of every group, in place; rows in which something changed.

    Slopes are kept up inside a span of groups as it is visited, and beyond it in one product at its end.
    """
    changed_N = torch.zeros_like(slope_IN[0], dtype=torch.bool)
    span = max(1, SPAN // packed.group) * packed.group
    for start in range(0, len(codes_IN), span):
        inside = slice(start, min(start + span, len(codes_IN)))
        codes_SN, slope_SN, hessian_SS = codes_IN[inside], slope_IN[inside].clone(), hessian_II[inside, inside]
        moved_SN = torch.empty_like(slope_SN)
        for first in range(0, len(codes_SN), packed.group):
            here, after = slice(first, first + packed.group), slice(first + packed.group, None)
            scale_N = scales_GN[(start + first) // packed.group]  # a view, as the codes are
            moved_SN[here] = _improve_group(codes_SN[here], scale_N, slope_SN[here], hessian_SS[here, here], packed.bits)
            slope_SN[after].addmm_(hessian_SS[here, after].T, moved_SN[here], alpha=-1)
        slope_IN.addmm_(hessian_II[inside].T, moved_SN, alpha=-1)
        changed_N |= (moved_SN != 0).any(0)
    return changed_N


def _improve_group(codes_KN: Tensor, scale_N: Tensor, slope_KN: Tensor, hessian_KK: Tensor, bits: int) -> Tensor:
    """One visit of a group, in place; by how much the weights that it stands for moved. The slopes are used up."""
    before_KN, best_N = scale_N * codes_KN, _best_scale(scale_N, codes_KN, slope_KN, hessian_KK)
    slope_KN.addmm_(hessian_KK, (best_N - scale_N) * codes_KN, alpha=-1)
    scale_N.copy_(best_N)
    diagonal_K1 = hessian_KK.diagonal()[:, None]
    diagonal_K1 = torch.where(diagonal_K1 == 0, torch.inf, diagonal_K1)  # of a dead column: no step, and none into it
    divisor_KN = diagonal_K1 * torch.where(scale_N == 0, torch.inf, scale_N)
    wanted_KN, spread_KK, made_KN = codes_KN + slope_KN / divisor_KN, (hessian_KK / diagonal_K1).T, torch.empty_like(codes_KN)
    for i, (code_N, was_N, wanted_N) in enumerate(zip(made_KN, codes_KN, wanted_KN, strict=True)):
        torch.round(wanted_N, out=code_N).clamp_(*code_range(bits))
        wanted_KN[i + 1 :].addr_(spread_KK[i, i + 1 :], code_N - was_N, alpha=-1)
    codes_KN.copy_(made_KN)
    return scale_N * codes_KN - before_KN


def _best_scale(scale_N: Tensor, codes_KN: Tensor, slope_KN: Tensor, hessian_KK: Tensor) -> Tensor:
    """The float16 nearest to the lowest point of the error's parabola; never zero, which codes could not leave."""
    curvature_N = ((hessian_KK @ codes_KN) * codes_KN).sum(0)
    step_N = torch.where(curvature_N > 0, (codes_KN * slope_KN).sum(0) / curvature_N, 0.0)
    best_N = (scale_N + step_N).to(torch.float16).to(scale_N)
    return torch.where(best_N.isfinite() & (best_N != 0), best_N, scale_N)
