"""Quantised layers that train: what moves is scales and codes, so that the weights never leave the grid."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.edges.codes import weight_of
from potstill.edges.models import linears_in
from potstill.quant.packed import Packed, code_range

Trains = Literal["scales", "codes", "both"]


class GridLinear(nn.Module):
    """y = x Wᵀ + bias, W = scale · code exactly as `Packed` has it, at every step of training.

    Both are trained by straight-through estimators (Bengio et al., arXiv:1308.3432): rounded on the way forward, as if
    they were not on the way back.

        scale = float16(scale₀ · factor),   code = clamp(round(code₀ + span · shift)),   span = 16 at four bits

    Factors begin at 1 and shifts at 0, so that one learning rate suits them and the norms. They lie in one dimension each:
    weight decay and bfloat16 rounding, which are for matrices, would pull them off what they stand for.

    Args:
        layer: the linear layer, whose bias is taken over.
        packed: its weights.
        trains: which of the two moves.
    """

    codes_OI: Tensor
    scales_OG: Tensor

    def __init__(self, layer: Any, packed: Packed, trains: Trains) -> None:
        super().__init__()
        self.layer, self.group, self.bits = [layer], packed.group, packed.bits  # in a list: its weight is no parameter here
        self.bias: Tensor | None = layer.bias
        device = layer.weight.device
        self.register_buffer("codes_OI", packed.codes_OI.to(device), persistent=False)
        self.register_buffer("scales_OG", packed.scales_OG.to(device), persistent=False)
        self.factors = nn.Parameter(torch.ones(packed.scales_OG.numel(), device=device), trains != "codes")
        self.shifts = nn.Parameter(torch.zeros(packed.codes_OI.numel(), device=device)) if trains != "scales" else None
        self._read: tuple[tuple[int, int], Tensor] | None = None

    def packed(self) -> Packed:
        """Codes and scales as they are now."""
        with torch.no_grad():
            codes_OI, scales_OG = _rounded(self.factors, self.shifts, self.codes_OI, self.scales_OG, self.bits)
        return Packed(codes_OI.to(torch.int8), scales_OG.to(torch.float16), self.group, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight(), self.bias)

    def _weight(self) -> Tensor:
        if torch.is_grad_enabled():
            self._read = None
            return _Dequantised.apply(self.factors, self.shifts, self.codes_OI, self.scales_OG, self.bits)
        now = (self.factors._version, self.shifts._version if self.shifts is not None else 0)
        if self._read is None or self._read[0] != now:  # an answer reads the same weights for each of its tokens
            self._read = now, _Dequantised.apply(self.factors, self.shifts, self.codes_OI, self.scales_OG, self.bits)
        return self._read[1]


def _span(bits: int) -> int:
    return 1 << bits


def _rounded(factors: Tensor, shifts: Tensor | None, codes_OI: Tensor, scales_OG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales in the parameters' own type."""
    scales = (scales_OG.to(factors.dtype) * factors.view_as(scales_OG)).to(torch.float16).to(factors.dtype)
    codes = codes_OI.to(factors.dtype)
    if shifts is not None:
        codes = (codes + _span(bits) * shifts.view_as(codes)).round().clamp(*code_range(bits))
    return codes, scales


class _Dequantised(torch.autograd.Function):
    """The weights [out, in]; keeps the parameters for the way back, and nothing of the weights' size but what trains."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, shifts: Tensor | None, codes_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(factors, shifts, codes_OI, scales_OG)
        ctx.bits = bits
        codes, scales = _rounded(factors, shifts, codes_OI, scales_OG, bits)
        return (codes.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        factors, shifts, codes_OI, scales_OG = ctx.saved_tensors
        codes, scales = _rounded(factors, shifts, codes_OI, scales_OG, ctx.bits)
        grad_OGK = grad_outputs[0].to(factors.dtype).unflatten(1, (scales.shape[1], -1))
        of_factors = of_shifts = None
        if ctx.needs_input_grad[0]:
            sums_OG = (grad_OGK * codes.unflatten(1, (scales.shape[1], -1))).sum(-1)
            of_factors = (sums_OG * scales_OG.to(factors.dtype)).flatten()
        if shifts is not None and ctx.needs_input_grad[1]:
            lowest, highest = code_range(ctx.bits)
            wanted_OI = codes_OI + _span(ctx.bits) * shifts.view_as(codes_OI)
            inside_OI = (wanted_OI >= lowest - 0.5) & (wanted_OI <= highest + 0.5)  # beyond, the code does not follow
            of_shifts = (_span(ctx.bits) * (grad_OGK * scales[..., None]).flatten(1) * inside_OI).flatten()
        return of_factors, of_shifts, None, None, None


def put_on_grid(model: Any, packed: Mapping[str, Packed], trains: Trains) -> Callable[[], dict[str, Packed]]:
    """Replace the quantised layers of a model, in place, by ones that train on the grid; nothing else of it trains but,
    with the scales, what is no matrix: norms and biases.

    Args:
        packed: `{linear layer's name: its weights}`, which are the model's.

    Returns:
        What makes the model plain again, with the weights that its layers then stand for, and gives these in their packed form.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(trains != "codes" and parameter.ndim < 2)
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in linears_in(model).items() if layer is not head and name in packed}
    for name, layer in layers.items():
        _put(model, name, GridLinear(layer, packed[name], trains))

    def off() -> dict[str, Packed]:
        made = dict(packed)  # embeddings and head stay as they are
        for name in layers:
            on_grid = model.get_submodule(name)
            layer, made[name] = on_grid.layer[0], on_grid.packed().cpu()
            with torch.no_grad():
                weight_of(layer).copy_(made[name].dequantise())
            _put(model, name, layer)
        return made

    return off


def _put(model: Any, name: str, layer: Any) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)
