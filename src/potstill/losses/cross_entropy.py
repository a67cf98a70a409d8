"""Cross-entropy over response tokens."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from potstill.data.batches import Batch
from potstill.edges.families import logits_of
from potstill.edges.packed import tie_of
from potstill.losses.head import Loss, fused_head, response_hidden
from potstill.losses.objective import weighted_sum


class CrossEntropy:
    """SFT: −Σ w·log q(target), the paper's eq. (2) over response tokens; w is the weight of a token's row."""

    def __call__(self, model: Any, batch: Batch) -> Loss:
        def terms(logits_BV: Tensor, _: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            ce = weighted_sum(F.cross_entropy(logits_BV, batch.target_N[tokens], reduction="none"), batch, tokens)
            return ce, {"ce": ce.detach()}

        tie = tie_of(model)
        hidden_ND = response_hidden(model, batch, tie)
        return fused_head(hidden_ND, model.get_output_embeddings(), terms, form=logits_of(model.config), tie=tie)
