"""Layers that train on the grid: straight-through gradients against finite differences, and what they stand for."""

import pytest
import torch
from torch import nn

from potstill.quant.grid import GridLinear, Trains
from potstill.quant.rounding import round_to_nearest


def layer_on_grid(trains: Trains, bits: int = 4) -> GridLinear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 6)
    packed = round_to_nearest(layer.weight, 32, bits=bits)
    return GridLinear(layer, packed, trains).double()


def loss_of(weight_OI: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
    return (x_NI @ weight_OI.T - y_NO).square().mean()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("trains", ["scales", "codes"])
def test_straight_through_gradients_are_those_of_the_unrounded_function(trains: Trains, bits: int) -> None:
    """Independent oracle: central differences of scale₀·factor·(code₀ + span·shift), which nothing rounds."""
    on_grid, x, y = layer_on_grid(trains, bits), torch.randn(9, 64).double(), torch.randn(9, 6).double()
    loss_of(on_grid._weight(), x, y).backward()
    trained = on_grid.factors if trains == "scales" else on_grid.shifts
    assert trained is not None
    assert trained.grad is not None
    codes, scales = on_grid.codes_OI.double(), on_grid.scales_OG.double().repeat_interleave(32, 1)

    def smooth(moved: torch.Tensor) -> float:
        factors = moved.view(6, 2).repeat_interleave(32, 1) if trains == "scales" else 1.0
        shifts = moved.view(6, 64) if trains == "codes" else 0.0
        return float(loss_of(scales * factors * (codes + 2**bits * shifts), x, y))

    at, step = trained.detach().clone(), 1e-6
    for i in range(0, len(at), 5):
        up, down = at.clone(), at.clone()
        up[i] += step
        down[i] -= step
        assert trained.grad[i].item() == pytest.approx((smooth(up) - smooth(down)) / (2 * step), rel=1e-5, abs=1e-9)


def test_a_code_at_the_end_of_its_range_is_pulled_back_and_pushed_no_further() -> None:
    on_grid = layer_on_grid("codes")
    assert on_grid.shifts is not None
    with torch.no_grad():
        on_grid.shifts.fill_(1.0)  # all beyond the highest code
    assert int(on_grid.packed().codes_OI.min()) == 7
    on_grid._weight().sum().backward()
    assert on_grid.shifts.grad is not None
    assert not on_grid.shifts.grad.any()


@pytest.mark.parametrize("trains", ["scales", "codes", "both"])
def test_what_reads_is_what_is_packed_bit_for_bit(trains: Trains) -> None:
    on_grid = layer_on_grid(trains).float()
    with torch.no_grad():
        on_grid.factors.mul_(1 + 0.1 * torch.randn_like(on_grid.factors))
        if on_grid.shifts is not None:
            on_grid.shifts.normal_(std=0.2)
    packed = on_grid.packed()
    assert torch.equal(on_grid._weight(), packed.dequantise())
    assert packed.scales_OG.dtype == torch.float16
    assert not torch.equal(on_grid.scales_OG, packed.scales_OG)
    assert torch.equal(packed.codes_OI, on_grid.codes_OI) is (trains == "scales")


def test_an_answer_reads_the_weights_of_the_last_step() -> None:
    """Weights are kept while nothing trains, and every update is seen."""
    on_grid, x = layer_on_grid("both").float(), torch.randn(3, 64)
    optimizer = torch.optim.AdamW(on_grid.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(on_grid(x), nn.functional.linear(x, on_grid.packed().dequantise(), on_grid.bias))
        on_grid(x).sum().backward()
        optimizer.step()
