"""How much of the model's draft its teacher accepts, measured."""

from typing import ClassVar

from potstill.core.types import Abstain
from potstill.edges.assisted import Drafting
from potstill.metrics import DraftMetric


class DraftAcceptance(DraftMetric, kind="draft_acceptance"):
    """Per cent of the drafted tokens that the teacher looked at and kept, in transformers' assisted generation, by sampling.

    `acceptance` predicts it from the distributions.
    """

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Drafts accepted"

    def of(self, drafting: Drafting) -> float | Abstain:
        looked_at = drafting.accepted + drafting.refused
        return 100 * drafting.accepted / looked_at if looked_at else Abstain("the answer ended before a draft")
