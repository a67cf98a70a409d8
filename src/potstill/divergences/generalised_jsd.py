"""Generalised Jensen-Shannon divergence."""

from pydantic import Field
from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences._safe import expectation, mixture


class GeneralisedJSD(Divergence, kind="generalised_jsd"):
    """β·KL(p ‖ m) + (1−β)·KL(q ‖ m) with m = βp + (1−β)q, in nats per token; p teacher, q student.

    GKD, arXiv:2306.13649. Bounded by the entropy of (β, 1−β). The ends β = 0 and 1 are refused, where the
    value is 0 for all p and q: name `forward_kl` or `reverse_kl` instead of letting the value jump there.
    """

    beta: float = Field(default=0.5, gt=0, lt=1, description="weight of the teacher in the mixture")

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        logm_NV = mixture(self.beta, logp_NV, logq_NV)
        return self.beta * expectation(logp_NV, logp_NV, logm_NV) + (1 - self.beta) * expectation(logq_NV, logq_NV, logm_NV)
