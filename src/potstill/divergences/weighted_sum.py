"""A weighted sum of divergences."""

from pydantic import Field
from torch import Tensor

from potstill.core.component import Settings
from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.divergences.reverse_kl import ReverseKL


class Weighted(Settings):
    """One divergence and its weight."""

    divergence: Divergence
    weight: float = Field(default=1.0, gt=0, description="factor of this divergence")


class WeightedSum(Divergence, kind="weighted_sum"):
    """Σ wᵢ·Dᵢ(p, q) of any divergences; by default the mean of forward and reverse KL (half of Jeffreys' divergence)."""

    parts: tuple[Weighted, ...] = Field(
        default=(Weighted(divergence=ForwardKL(), weight=0.5), Weighted(divergence=ReverseKL(), weight=0.5)),
        min_length=1,
        description="divergences with their weights",
    )

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        first, *rest = (part.weight * part.divergence(logp_NV, logq_NV) for part in self.parts)
        return sum(rest, start=first)
