"""Supervised fine-tuning."""

from pydantic import Field

from potstill.data.store import TokenStore
from potstill.edges.vocabulary import Tokenizer
from potstill.losses.cross_entropy import CrossEntropy
from potstill.stages.base import Context
from potstill.stages.refs import ModelRef
from potstill.stages.start import Student
from potstill.stages.training import TrainingStage


class SFT(TrainingStage, kind="sft"):
    """Tune a model on the responses: cross-entropy over response tokens, end of turn included.

    Tunes a teacher on its task, and makes the control that distillation has to beat.
    """

    model: ModelRef = Field(description="what is tuned")

    def learner(self) -> tuple[str, ModelRef]:
        return "model", self.model

    def objective(self, context: Context, tokenizer: Tokenizer, store: TokenStore, student: Student) -> CrossEntropy:
        return CrossEntropy()
