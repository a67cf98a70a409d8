"""What a layer reads, and how much of what the layers before it did wrong it can make up for.

Shape suffixes: I inputs, O outputs, N rows of calibration data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.quant.gptq import row_errors
from potstill.quant.hessian import Curvature, Products, curvature

OUTPUTS = 64  # of those that read the same, by which the share is found


@dataclass(frozen=True)
class Read:
    """What a layer read in all.

    Attributes:
        hessian_II: H = Σ x xᵀ, x behind rounded layers.
        drift_II: D = Σ x (x' − x)ᵀ, x' in the model of full precision; None where that did not run beside.
        share: of the difference that is made up for; 0 without it.
    """

    hessian_II: Tensor
    drift_II: Tensor | None = None
    share: float = 0.0

    def wanted(self, weight_OI: Tensor, curved: Curvature) -> Tensor | None:
        """Weights that codes are to be solved for, float64 [out, in]; None: the matrix itself."""
        if self.drift_II is None or not self.share:
            return None
        weight_OI = weight_OI.detach().to(self.drift_II)
        return weight_OI + self.share * differences(weight_OI, curved, self.drift_II)


class Reads:
    """What a layer reads, as it is summed; beside the model of full precision by halves of the rows."""

    def __init__(self, width: int, drifts: bool) -> None:
        self.halves = [slice(half, None, 2) for half in range(2)] if drifts else [slice(None)]
        self._hessians = [Products(width) for _ in self.halves]
        self._drifts = [Products(width, symmetric=False) for _ in self.halves if drifts]

    def add(self, half: int, x_NI: Tensor, weights_N: Tensor | None, exact_NI: Tensor | None) -> None:
        """Add inputs of one of the halves.

        Args:
            weights_N: how often each counts; default: once.
            exact_NI: what they are in the model of full precision.
        """
        self._hessians[half].add(x_NI, weights_N)
        if exact_NI is not None:
            self._drifts[half].add(x_NI, weights_N, exact_NI - x_NI)

    def all(self, weight_OI: Tensor, damping: float) -> Read:
        """The halves together, which are used up.

        Args:
            weight_OI: all matrices that read it, one below the other.
            damping: of `curvature`.

        Raises:
            UserError: an input is not finite.
        """
        hessians, drifts = ([products.sum_II for products in kind] for kind in (self._hessians, self._drifts))
        del self._hessians, self._drifts
        if not all(torch.isfinite(hessian_II).all() for hessian_II in hessians):
            raise UserError("its calibration inputs hold NaN or infinity; check that the model's loss is finite")
        if not drifts:
            return Read(hessians[0])
        drawn = torch.randperm(len(weight_OI), generator=torch.Generator().manual_seed(0))[
            :OUTPUTS
        ]  # a step would miss rotations
        share = _share(weight_OI[drawn.to(weight_OI.device)], hessians, drifts, damping)
        return Read(hessians[0].add_(hessians[1]), drifts[0].add_(drifts[1]), share)


def differences(weight_OI: Tensor, curved: Curvature, drift_II: Tensor) -> Tensor:
    """W Dᵀ H⁻¹: added to W, the outputs on the inputs there are become those that the inputs of full precision had.

    With X̃ the inputs behind rounded layers and X those of full precision, the least squares of X̃ W'ᵀ = X Wᵀ are
    W' = W + W Dᵀ H⁻¹, D = X̃ᵀ(X − X̃). The idea is that of GPTAQ (Li et al., arXiv:2504.02692), which spreads the same difference
    column by column.
    """
    return curved.solve(drift_II @ weight_OI.T).T


def _share(weight_OI: Tensor, hessians: list[Tensor], drifts: list[Tensor], damping: float) -> float:
    """How much of the differences holds on rows that they were not found on.

    Δ of one half is an estimate; on the other, of H and D, the outputs are nearest to those of full precision at
    α = ⟨Δ, W Dᵀ⟩ / ⟨Δ, Δ H⟩. Of twice as many rows, noise is half as large: 2α / (1 + α), the formula of Spearman and Brown.
    Where rows are fewer than inputs it says too little rather than too much.
    """
    weight_OI = weight_OI.detach().to(hessians[0])
    gained, possible = torch.zeros_like(weight_OI[0, 0]), torch.zeros_like(weight_OI[0, 0])
    for here, there in ((0, 1), (1, 0)):
        found_OI = differences(weight_OI, curvature(hessians[here], damping), drifts[here])
        gained += (found_OI * (weight_OI @ drifts[there].T)).sum()
        possible += row_errors(found_OI, hessians[there]).sum()
    share = float((gained / possible).clamp(0, 1)) if possible > 0 else 0.0
    return 2 * share / (1 + share)
