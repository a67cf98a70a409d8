"""How far a student's distribution is from its teacher's. One file per divergence."""

from abc import abstractmethod

from torch import Tensor

from potstill.core.component import Component, discover


class Divergence(Component):
    """A pure function of two log-distributions, unreduced: masking, weighting and summing happen elsewhere, once."""

    @abstractmethod
    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """Nats per token.

        Args:
            logp_NV: the teacher's log-probabilities, normalised over the last axis; -inf allowed.
            logq_NV: the student's, likewise.

        Returns:
            One value per token, shape [N], finite and differentiable in `logq_NV`.
        """


discover(__name__, __path__)
