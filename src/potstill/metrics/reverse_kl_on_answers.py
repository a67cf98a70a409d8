"""Reverse KL to the teacher where the model has led itself."""

from typing import ClassVar

from torch import Tensor

from potstill.metrics import AnswerMetric
from potstill.metrics.kl_to_teacher import KLToTeacher


class ReverseKLOnAnswers(AnswerMetric, kind="reverse_kl_on_answers"):
    """KL(q ‖ p) in nats per token of the model's own answers; p teacher, q the model, over the token ids that both share.

    On sampled answers its sum over an answer's tokens is in expectation the reverse KL of whole answers, which on-policy
    distillation by `reverse_kl` lowers (Gu et al., MiniLLM, arXiv:2306.08543).
    """

    unit: ClassVar[str] = "nats/token"
    higher_is_better: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    title: ClassVar[str] = "Reverse KL on own answers"

    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        assert logp_NV is not None
        return KLToTeacher()(logp_NV, target_N, logq_NV)
