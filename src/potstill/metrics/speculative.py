"""How much faster the teacher answers with the model as its draft model."""

from typing import ClassVar

from potstill.core.types import Abstain
from potstill.edges.assisted import Drafting
from potstill.metrics import DraftMetric


class Speculative(DraftMetric, kind="speculative"):
    """The teacher's seconds per token without drafts, divided by those with the model's, in transformers' assisted generation.

    Above 1 it is faster. One answer at a time, in PyTorch and in the precision of the evaluation; on a machine whose matrix
    products are as slow for many tokens as one by one, checking a draft in one pass gains nothing.
    """

    unit: ClassVar[str] = "×"
    title: ClassVar[str] = "Speed-up as draft"

    def of(self, drafting: Drafting) -> float | Abstain:
        alone = drafting.alone_seconds / drafting.alone_tokens
        return alone / (drafting.seconds / drafting.tokens)
