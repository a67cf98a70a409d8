"""Codes and scales improved in turn, each to its best value while all others stay."""

import torch
from torch import Tensor

from potstill.quant.packed import Packed, code_range


def descend(weight_OI: Tensor, packed: Packed, hessian_II: Tensor, sweeps: int) -> Packed:
    """Coordinate descent on tr(E H Eᵀ), E = W − dequantised, from codes that are there; no output row becomes worse.

    The error is a parabola in each scale and in each code, so the best float16, and the best code of those that there are, are
    the ones nearest to its lowest point. With S = E H, for the scale s of a group with codes c, and for the code of column i:

        s ← s + c · S / (c H c),    code ← code + S_i / (s · H_ii)

    A sweep visits every group once: its scale, then its columns. Output rows do not touch one another, and those in which a
    sweep changed nothing are done.

    Args:
        weight_OI, hessian_II: float64.
        sweeps: most passes over all columns.
    """
    codes_OI, scales_OG = packed.codes_OI.double(), packed.scales_OG.double()
    slope_OI = (weight_OI - packed.dequantise().double()) @ hessian_II
    active_N = torch.arange(len(weight_OI), device=weight_OI.device)
    for _ in range(sweeps):
        codes_NI, scales_NG = codes_OI[active_N], scales_OG[active_N]
        slope_NI = slope_OI[active_N]
        for g in range(scales_NG.shape[1]):
            _improve_group(codes_NI, scales_NG, slope_NI, hessian_II, g, packed)
        changed_N = (codes_NI != codes_OI[active_N]).any(1) | (scales_NG != scales_OG[active_N]).any(1)
        codes_OI[active_N], scales_OG[active_N], slope_OI[active_N] = codes_NI, scales_NG, slope_NI
        active_N = active_N[changed_N]
        if not len(active_N):
            break
    return Packed(codes_OI.to(torch.int8), scales_OG.to(torch.float16), packed.group, packed.bits)


def _improve_group(codes_NI: Tensor, scales_NG: Tensor, slope_NI: Tensor, hessian_II: Tensor, g: int, packed: Packed) -> None:
    """One visit of a group, in place."""
    here = slice(g * packed.group, (g + 1) * packed.group)
    hessian_KK, codes_NK, slope_NK = hessian_II[here, here], codes_NI[:, here], slope_NI[:, here].clone()
    before_NK = scales_NG[:, g, None] * codes_NK
    scale_N = _best_scale(scales_NG[:, g], codes_NK, slope_NK, hessian_KK)
    slope_NK -= ((scale_N - scales_NG[:, g])[:, None] * codes_NK) @ hessian_KK
    lowest, highest = code_range(packed.bits)
    for i in range(packed.group):
        curvature_N = scale_N * hessian_KK[i, i]
        step_N = torch.where(curvature_N == 0, 0.0, slope_NK[:, i] / curvature_N)
        code_N = (codes_NK[:, i] + step_N.round()).clamp(lowest, highest)
        slope_NK.addr_(scale_N * (code_N - codes_NK[:, i]), hessian_KK[i], alpha=-1)
        codes_NK[:, i] = code_N  # a view: lands in codes_NI
    scales_NG[:, g] = scale_N
    slope_NI -= (scale_N[:, None] * codes_NK - before_NK) @ hessian_II[here]


def _best_scale(scale_N: Tensor, codes_NK: Tensor, slope_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """The float16 nearest to the lowest point of the error's parabola; never zero, which codes could not leave."""
    curvature_N = ((codes_NK @ hessian_KK) * codes_NK).sum(1)
    step_N = torch.where(curvature_N > 0, (codes_NK * slope_NK).sum(1) / curvature_N, 0.0)
    best_N = (scale_N + step_N).to(torch.float16).double()
    return torch.where(best_N.isfinite() & (best_N != 0), best_N, scale_N)
