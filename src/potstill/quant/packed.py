"""The one form of a quantised matrix, which every writer packs from and never re-quantises."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A symmetric group-wise quantised matrix: weight[o, i] = scale[o, i // group] · code[o, i].

    Attributes:
        codes_OI: int8 in −8 … 7, shape [out, in].
        scales_OG: float16, shape [out, in / group]; fixed in float16 before the codes were solved for.
        group: columns that share a scale.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    group: int

    def dequantise(self) -> Tensor:
        """float32 [out, in], exact: a float16 times a 4-bit integer fits in a float32."""
        return self.codes_OI.to(torch.float32) * self.scales_OG.to(torch.float32).repeat_interleave(self.group, dim=1)
