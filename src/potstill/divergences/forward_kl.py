"""Forward Kullback-Leibler divergence."""

from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences._safe import expectation


class ForwardKL(Divergence, kind="forward_kl"):
    """KL(p ‖ q) = Σ p·(log p − log q) in nats per token; p teacher, q student. Mode-covering.

    The paper's eq. (4). Its eq. (3) is the teacher's cross-entropy: the same gradient, but a value that includes the
    teacher's entropy; here 0 means equal.
    """

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        return expectation(logp_NV, logp_NV, logq_NV)
