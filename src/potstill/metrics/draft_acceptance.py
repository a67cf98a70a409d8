"""How much of the model's draft its teacher accepts, measured."""

from collections.abc import Sequence
from typing import ClassVar

from potstill.core.types import Abstain
from potstill.edges.assisted import Drafting
from potstill.metrics import DraftMetric, pooled


class DraftAcceptance(DraftMetric, kind="draft_acceptance"):
    """Per cent of the drafted tokens that the teacher looked at and kept, in transformers' assisted generation, by sampling.

    Of all answers together. `acceptance` predicts it from the distributions.
    """

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Drafts accepted"

    def scores(self, draftings: Sequence[Drafting]) -> list[float | Abstain]:
        looked_at = [one.accepted + one.refused for one in draftings]
        met = [(one.accepted, looks) for one, looks in zip(draftings, looked_at, strict=True) if looks]
        shares = iter(pooled([[accepted for accepted, _ in met]], [[looks for _, looks in met]]) if met else ())
        return [100 * next(shares) if looks else Abstain("the answer ended before a draft") for looks in looked_at]
