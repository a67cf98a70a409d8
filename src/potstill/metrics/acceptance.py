"""How much of the model's draft its teacher would accept, from the two distributions."""

from typing import ClassVar

from torch import Tensor

from potstill.metrics import TokenMetric


class Acceptance(TokenMetric, kind="acceptance"):
    """100 · Σ min(p, q) per response token: the chance that speculative decoding accepts the model's draft for its teacher.

    p teacher, q the model, over the token ids that both share; it is 100 · (1 − total variation). Leviathan et al.,
    arXiv:2211.17192, corollary 3.6. On references it is a prediction for text like these; `draft_acceptance` measures it on
    text of the teacher's.
    """

    unit: ClassVar[str] = "%"
    needs_teacher: ClassVar[bool] = True
    title: ClassVar[str] = "Acceptance"

    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        assert logp_NV is not None
        return 100 * logp_NV.exp().minimum(logq_NV.exp()).sum(-1)


def tokens_per_pass(acceptance: float, drafts: int) -> float:
    """Tokens that a pass of the teacher gives on average: (1 − αᵏ⁺¹) / (1 − α), Leviathan et al., arXiv:2211.17192, eq. 1.

    Args:
        acceptance: α, 0 to 1, taken as the same at every token.
        drafts: k, tokens that are drafted before the teacher looks.
    """
    return sum(acceptance**i for i in range(drafts + 1))
