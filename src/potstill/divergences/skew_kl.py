"""Skew Kullback-Leibler divergence."""

from pydantic import Field
from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences._safe import expectation, mixture


class SkewKL(Divergence, kind="skew_kl"):
    """KL(p ‖ αp + (1−α)q) in nats per token; p teacher, q student. DistiLLM, arXiv:2402.03898.

    The mixture keeps the ratio, and so the gradient, bounded by 1/α; α = 0 is the forward KL.
    """

    alpha: float = Field(default=0.1, ge=0, lt=1, description="share of the teacher in the mixture")

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        return expectation(logp_NV, logp_NV, mixture(self.alpha, logp_NV, logq_NV))
