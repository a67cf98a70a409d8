"""What a distillation loss gets of the teacher, token by token."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from potstill.data.batches import Batch
from potstill.edges.families import PLAIN, Logits


@dataclass(frozen=True)
class Dense:
    """The whole distribution, through the teacher's head.

    Attributes:
        hidden_ND: final hidden states at response positions.
        head: the teacher's output layer.
        form: what the teacher does to the head's products.
    """

    hidden_ND: Tensor
    head: nn.Linear
    form: Logits = PLAIN


@dataclass(frozen=True)
class Buckets:
    """The k most probable tokens, and all others as one more outcome.

    Attributes:
        ids_NK: token ids.
        logp_NK1: their log-probabilities at the signal's temperature, and last that of all others together.
    """

    ids_NK: Tensor
    logp_NK1: Tensor


class Signal(Protocol):
    """`(batch) -> Dense | Buckets` for the batch's response tokens, in its order."""

    def __call__(self, batch: Batch) -> Dense | Buckets: ...

    def facts(self) -> dict[str, Any]:
        """For a stage's summary."""
        ...
