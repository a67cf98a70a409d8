"""Total variation distance."""

from torch import Tensor

from potstill.divergences import Divergence


class TotalVariation(Divergence, kind="total_variation"):
    """½ Σ|p − q|, 0 to 1 per token, no unit; p teacher, q student.

    1 − TV = Σ min(p, q) is the share of the student's draft tokens that speculative decoding would accept,
    Leviathan et al., arXiv:2211.17192. Its gradient vanishes where the two do not overlap: mix it with a KL.
    """

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        return 0.5 * (logp_NV.exp() - logq_NV.exp()).abs().sum(-1)
