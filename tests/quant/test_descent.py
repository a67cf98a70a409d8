"""Coordinate descent over codes and scales: never worse, and nowhere left to go."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from potstill.quant.descent import descend
from potstill.quant.gptq import gptq
from potstill.quant.packed import Packed, code_range
from potstill.quant.rounding import round_to_nearest


def layer(seed: int, outputs: int = 12, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A matrix, and the Hessian of inputs that a few directions dominate."""
    random = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(300, 5, generator=random) @ torch.randn(5, inputs, generator=random)
    x_NI = (x_NI + 0.3 * torch.randn(300, inputs, generator=random)).double()
    return torch.randn(outputs, inputs, generator=random).double() * 0.05, x_NI.T @ x_NI


def row_errors(weight_OI: Tensor, packed: Packed, hessian_II: Tensor) -> Tensor:
    error_OI = weight_OI - packed.dequantise().double()
    return torch.einsum("oi,ij,oj->o", error_OI, hessian_II, error_OI)


Improves = Callable[[Tensor, Packed, Tensor, int], Packed]


def never_worse(improve: Improves) -> bool:
    """The law: from whatever codes it begins, and however short it is cut, no output row ends with a larger error."""
    for seed in range(4):
        weight, hessian = layer(seed)
        for bits in (4, 8):
            starts = (round_to_nearest(weight, 32, bits=bits), gptq(weight, hessian, bits=bits, sweeps=0))
            for start in starts:
                before = row_errors(weight, start, hessian)
                for sweeps in (1, 2, 8):
                    after = row_errors(weight, improve(weight, start, hessian, sweeps), hessian)
                    if (after > before * (1 + 1e-9)).any():
                        return False
    return True


def with_scales_rounded_at_the_end(weight_OI: Tensor, packed: Packed, hessian_II: Tensor, sweeps: int) -> Packed:
    """Broken: scales that three digits hold, after the codes were fitted to others."""
    made = descend(weight_OI, packed, hessian_II, sweeps)
    return Packed(made.codes_OI, made.scales_OG.to(torch.float8_e4m3fn).to(torch.float16), made.group, made.bits)


def test_no_row_becomes_worse_and_careless_rounding_makes_some() -> None:
    assert never_worse(descend)
    assert not never_worse(with_scales_rounded_at_the_end)


@pytest.mark.parametrize("bits", [4, 8])
def test_where_it_ends_no_single_code_or_scale_could_be_better(bits: int) -> None:
    """By trying every other code of every column, and both neighbours of every scale."""
    weight, hessian = layer(5, outputs=3)
    packed = descend(weight, round_to_nearest(weight, 32, bits=bits), hessian, 100)
    best = row_errors(weight, packed, hessian)
    lowest, highest = code_range(bits)
    for i in range(64):
        for code in range(max(lowest, -20), min(highest, 20) + 1):
            codes = packed.codes_OI.clone()
            codes[:, i] = code
            assert (row_errors(weight, Packed(codes, packed.scales_OG, 32, bits), hessian) >= best * (1 - 1e-9)).all()
    for g in range(2):
        for way in (-torch.inf, torch.inf):
            scales = packed.scales_OG.clone()
            scales[:, g] = scales[:, g].nextafter(torch.full_like(scales[:, g], way))
            assert (row_errors(weight, Packed(packed.codes_OI, scales, 32, bits), hessian) >= best * (1 - 1e-9)).all()


def test_it_gains_on_what_column_by_column_finds() -> None:
    for seed in range(4):
        weight, hessian = layer(seed)
        start = gptq(weight, hessian, sweeps=0)
        gained = (
            row_errors(weight, descend(weight, start, hessian, 8), hessian).sum() / row_errors(weight, start, hessian).sum()
        )
        assert gained < 0.9, seed


def test_rows_do_not_touch_one_another() -> None:
    weight, hessian = layer(6)
    start = round_to_nearest(weight, 32)
    whole = descend(weight, start, hessian, 3)
    part = descend(weight[4:7], Packed(start.codes_OI[4:7], start.scales_OG[4:7], 32), hessian, 3)
    assert torch.equal(whole.codes_OI[4:7], part.codes_OI)
    assert torch.equal(whole.scales_OG[4:7], part.scales_OG)


def test_inputs_never_seen_and_groups_of_zeros_stay_as_they_were() -> None:
    weight, hessian = layer(7)
    hessian[:, 3] = hessian[3] = 0
    weight[2, 32:] = 0
    start = round_to_nearest(weight, 32)
    made = descend(weight, start, hessian, 4)
    assert torch.equal(made.codes_OI[:, 3], start.codes_OI[:, 3])
    assert not made.dequantise()[2, 32:].any()
    assert made.scales_OG.isfinite().all()
