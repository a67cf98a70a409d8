"""KL to the teacher."""

from typing import ClassVar

from torch import Tensor

from potstill.metrics import TokenMetric


class KLToTeacher(TokenMetric, kind="kl_to_teacher"):
    """KL(p ‖ q) in nats per response token; p teacher, q the model, over the token ids that both share."""

    unit: ClassVar[str] = "nats/token"
    higher_is_better: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    title: ClassVar[str] = "KL to teacher"

    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        assert logp_NV is not None
        logp_NV, logq_NV = logp_NV.clamp_min(-1e4), logq_NV.clamp_min(-1e4)
        return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)
