"""How much faster the teacher answers with the model as its draft model."""

from collections.abc import Sequence
from typing import ClassVar

from potstill.core.types import Abstain
from potstill.edges.assisted import Drafting
from potstill.metrics import DraftMetric, pooled


class Speculative(DraftMetric, kind="speculative"):
    """The teacher's seconds per token without drafts, divided by those with the model's, in transformers' assisted generation.

    Above 1 it is faster. Over all answers together, one at a time, every other one with drafts first, after a short one that is
    not measured; in PyTorch and in the precision of the evaluation. On a machine whose matrix products are as slow for many
    tokens as one by one, checking a draft in one pass gains nothing.
    """

    unit: ClassVar[str] = "×"
    title: ClassVar[str] = "Speed-up as draft"

    def scores(self, draftings: Sequence[Drafting]) -> list[float | Abstain]:
        if not draftings:
            return []
        alone, alone_tokens = [one.alone_seconds for one in draftings], [one.alone_tokens for one in draftings]
        drafted, tokens = [one.seconds for one in draftings], [one.tokens for one in draftings]
        return [*pooled([alone, tokens], [alone_tokens, drafted])]
