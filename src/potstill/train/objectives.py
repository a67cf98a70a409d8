"""What is minimised: sums over response tokens, divided by the global count elsewhere."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.divergences import Divergence
from potstill.edges.packed import final_hidden
from potstill.train.batches import Batch
from potstill.train.head import Loss, fused_head


class Objective(Protocol):
    """`(student, batch) -> Loss`; methods differ only in their objective and their batches."""

    def __call__(self, model: Any, batch: Batch) -> Loss: ...


def response_hidden(model: Any, batch: Batch) -> Tensor:
    """Final hidden states [N, D] where a response token is predicted; prompts never reach the head."""
    return final_hidden(model, batch.ids_T, batch.position_T, batch.lengths)[batch.place_N]


class CrossEntropy:
    """SFT: −Σ log q(target), the paper's eq. (2) over response tokens."""

    def __call__(self, model: Any, batch: Batch) -> Loss:
        def terms(logits_BV: Tensor, _: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            ce = F.cross_entropy(logits_BV, batch.target_N[tokens], reduction="sum")
            return ce, {"ce": ce.detach()}

        return fused_head(response_hidden(model, batch), model.get_output_embeddings(), terms)


class Distillation:
    """(1−r)·CE + r·T²·Σ D(softmax(z_p/T), softmax(z_q/T)); Hinton et al., arXiv:1503.02531, and the paper's eqs. (3), (4).

    Args:
        teacher: a model in evaluation mode; its gradient is never taken.
        divergence: D, unreduced.
        ratio: r, 0 … 1; the paper uses 0.5.
        temperature: T > 0; T² keeps the gradient's scale.
        vocab: leading token ids that both tokenizers share; the divergence sees no padded logits beyond. The
            cross-entropy does, as in SFT, so that r = 0 is SFT exactly.
    """

    def __init__(self, teacher: Any, divergence: Divergence, ratio: float, temperature: float, vocab: int) -> None:
        self.teacher, self.divergence, self.ratio, self.temperature, self.vocab = teacher, divergence, ratio, temperature, vocab

    def __call__(self, model: Any, batch: Batch) -> Loss:
        T = self.temperature
        with torch.no_grad():
            teacher_hidden_ND = response_hidden(self.teacher, batch)

        def terms(logits_BV: Tensor, teacher_BV: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            assert teacher_BV is not None
            with torch.no_grad():
                logp_BV = F.log_softmax(teacher_BV[:, : self.vocab].to(logits_BV.dtype) / T, dim=-1)
            ce = F.cross_entropy(logits_BV, batch.target_N[tokens], reduction="sum")
            logq_BV = F.log_softmax(logits_BV[:, : self.vocab] / T, dim=-1)
            divergence = self.divergence(logp_BV, logq_BV).sum()
            total = (1 - self.ratio) * ce + self.ratio * T**2 * divergence
            return total, {"ce": ce.detach(), "divergence": divergence.detach()}

        return fused_head(
            response_hidden(model, batch),
            model.get_output_embeddings(),
            terms,
            teacher_hidden_ND=teacher_hidden_ND,
            teacher_head=self.teacher.get_output_embeddings(),
        )
