"""What training minimises: sums over response tokens, divided by the global count elsewhere."""

from typing import Any, Protocol

from torch import Tensor

from potstill.data.batches import Batch
from potstill.losses.head import Loss


class Objective(Protocol):
    """`(student, batch) -> Loss`; methods differ only in their objective and their batches."""

    def __call__(self, model: Any, batch: Batch) -> Loss: ...


def weighted_sum(per_token_B: Tensor, batch: Batch, tokens: slice) -> Tensor:
    """Σ over tokens, each counted by its row's weight."""
    if batch.weight_N is None:
        return per_token_B.sum()
    return (per_token_B * batch.weight_N[tokens].to(per_token_B.dtype)).sum()
