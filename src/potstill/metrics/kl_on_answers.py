"""KL to the teacher where the model has led itself."""

from typing import ClassVar

from torch import Tensor

from potstill.metrics import AnswerMetric
from potstill.metrics.kl_to_teacher import KLToTeacher


class KLOnAnswers(AnswerMetric, kind="kl_on_answers"):
    """KL(p ‖ q) in nats per token of the model's own answers; p teacher, q the model, over the token ids that both share.

    `kl_to_teacher` is the same on references; what this is more is the exposure gap: how much worse the model follows its
    teacher on prefixes of its own making (Agarwal et al., arXiv:2306.13649). It is the gap of answers as `decoding` draws them.
    """

    unit: ClassVar[str] = "nats/token"
    higher_is_better: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    title: ClassVar[str] = "KL on own answers"

    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        return KLToTeacher()(logq_NV, target_N, logp_NV)
