"""What is minimised: sums over response tokens, divided by the global count elsewhere."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.divergences import Divergence
from potstill.edges.models import body_and_head
from potstill.train.batches import Batch


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's response tokens, in nats: `total` is differentiated, `parts` are shown."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """`(student, batch) -> Loss`; methods differ only in their objective and their batches."""

    def __call__(self, model: Any, batch: Batch) -> Loss: ...


def response_logits(model: Any, batch: Batch, vocab: int | None = None) -> Tensor:
    """Logits at response positions only, [N, V], in float32 at least; prompts never reach the head."""
    body, head = body_and_head(model)
    hidden_BTD = body(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    logits_NV = head(hidden_BTD[batch.row_N, batch.time_N])[:, :vocab]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


class CrossEntropy:
    """SFT: −Σ log q(target), the paper's eq. (2) over response tokens."""

    def __call__(self, model: Any, batch: Batch) -> Loss:
        ce = F.cross_entropy(response_logits(model, batch), batch.target_N, reduction="sum")
        return Loss(ce, {"ce": ce.detach()})


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
        with torch.no_grad():
            logp_NV = F.log_softmax(response_logits(self.teacher, batch, self.vocab) / self.temperature, dim=-1)
        logits_NV = response_logits(model, batch)
        ce = F.cross_entropy(logits_NV, batch.target_N, reduction="sum")
        logq_NV = F.log_softmax(logits_NV[:, : self.vocab] / self.temperature, dim=-1)
        divergence = self.divergence(logp_NV, logq_NV).sum()
        total = (1 - self.ratio) * ce + self.ratio * self.temperature**2 * divergence
        return Loss(total, {"ce": ce.detach(), "divergence": divergence.detach()})
