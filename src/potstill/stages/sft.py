"""Supervised fine-tuning."""

from typing import Any, ClassVar

from pydantic import Field

from potstill.edges.models import load_model, load_tokenizer
from potstill.stages.base import Context, DataStage, ModelRef
from potstill.stages.training import Validation, train, unfreeze
from potstill.train.loop import Optim
from potstill.train.objectives import CrossEntropy


class SFT(DataStage, kind="sft"):
    """Tune a model on the responses: cross-entropy over response tokens, end of turn included.

    Tunes a teacher on its task, and makes the control that distillation has to beat.
    """

    shared: ClassVar[bool] = True

    model: ModelRef = Field(description="what is tuned")
    optim: Optim = Optim()
    validation: Validation = Validation()

    def run(self, context: Context) -> dict[str, Any]:
        where = context.where(self.model)
        model, tokenizer = unfreeze(load_model(where)), load_tokenizer(where)
        return train(context, model, tokenizer, self.data, self.prompts, self.optim, self.validation, CrossEntropy(), self.seed)
