"""Reverse Kullback-Leibler divergence."""

from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences._safe import expectation


class ReverseKL(Divergence, kind="reverse_kl"):
    """KL(q ‖ p) = Σ q·(log q − log p) in nats per token; p teacher, q student. Mode-seeking.

    MiniLLM's token-level form, arXiv:2306.08543. Where the teacher gives no mass the value is capped by the floor
    of `_safe.FLOOR` nats instead of being infinite.
    """

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        return expectation(logq_NV, logq_NV, logp_NV)
