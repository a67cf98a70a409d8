"""Scales in float16 for groups of weights, and each weight rounded alone.

Shape suffixes: O outputs, I inputs, G groups of inputs, K inputs of a group.
"""

import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.quant.packed import Packed, code_range

CLIP_FACTORS = [1 - step / 40 for step in range(17)]  # the first is no clipping at all, so that a search never loses to none
WORDS = {4: "four", 8: "eight"}


class NotDivisible(ValueError):
    """A width that does not divide into groups."""


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
    weight_OI = as_float64(weight_OI)
    refuse(weight_OI, group, bits)
    lowest, _ = code_range(bits)
    weight_OGK = weight_OI.unflatten(1, (-1, group))
    peak_OG = weight_OGK.gather(-1, weight_OGK.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_OG = (peak_OG / lowest).to(torch.float16)
    if not clip_search:
        return best_OG
    importance_GK = 1.0 if importance_I is None else importance_I.to(weight_OGK).reshape(-1, group)
    least_OG = torch.full_like(peak_OG, torch.inf)
    for factor in CLIP_FACTORS:
        scale_OG = (factor * peak_OG / lowest).to(torch.float16)
        codes_OGK = nearest_codes(weight_OGK, scale_OG[..., None], bits)
        error_OG = ((weight_OGK - scale_OG[..., None] * codes_OGK).square() * importance_GK).sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def refuse(weight_OI: Tensor, group: int, bits: int) -> None:
    """Nothing of a matrix that has scales.

    Raises:
        NotDivisible, UserError: as `group_scales`.
    """
    width = weight_OI.shape[1]
    if width % group:
        raise NotDivisible(f"a width of {width} does not divide into groups of {group}; keep this layer at full precision")
    if not torch.isfinite(weight_OI).all():
        raise UserError("the weights hold NaN or infinity; quantise a checkpoint from before the training diverged")
    largest, (lowest, _) = float(weight_OI.abs().max()), code_range(bits)
    if torch.tensor(largest / lowest, dtype=torch.float64).to(torch.float16).isinf():
        most = int(-lowest * torch.finfo(torch.float16).max)
        raise UserError(
            f"a weight of {largest:,.0f} needs a scale that float16 cannot hold; {WORDS[bits]} bits reach {most:,} at most: "
            "leave this model unquantised"
        )


def round_to_nearest(weight_OI: Tensor, group: int = 32, *, bits: int = 4, clip_search: bool = False) -> Packed:
    """The control: GPTQ's scales, every weight rounded alone, code = clamp(round(w / scale), −8, 7).

    Raises:
        NotDivisible, UserError: as `group_scales`.
    """
    scales_OG = group_scales(weight_OI, group, bits=bits, clip_search=clip_search)
    weight_OGK = as_float64(weight_OI).unflatten(1, (-1, group))
    return Packed(nearest_codes(weight_OGK, scales_OG[..., None], bits).flatten(1).to(torch.int8), scales_OG, group, bits)


def as_float64(weight: Tensor) -> Tensor:
    """In main memory where its device knows no float64, as Apple's GPUs do not."""
    return weight.detach().to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)


def nearest_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """In the weights' own type; 0 where the scale is 0."""
    return (weight / torch.where(scale == 0, torch.inf, scale.to(weight))).round_().clamp_(*code_range(bits))
