"""Skew reverse Kullback-Leibler divergence."""

from pydantic import Field
from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences._safe import expectation, mixture


class SkewReverseKL(Divergence, kind="skew_reverse_kl"):
    """KL(q ‖ (1−α)p + αq) in nats per token; p teacher, q student. DistiLLM, arXiv:2402.03898.

    Bounded by −log α where the teacher gives no mass; α = 0 is the reverse KL.
    """

    alpha: float = Field(default=0.1, ge=0, lt=1, description="share of the student in the mixture")

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        return expectation(logq_NV, logq_NV, mixture(self.alpha, logq_NV, logp_NV))
