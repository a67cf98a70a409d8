"""Supervised fine-tuning."""

from typing import Any, ClassVar

from pydantic import Field

from potstill.edges.models import load_tokenizer
from potstill.inits import Init
from potstill.losses.cross_entropy import CrossEntropy
from potstill.stages.base import Context, DataStage, ModelRef
from potstill.stages.start import Adapter, check_start, load_student
from potstill.stages.training import Validation, train
from potstill.train.loop import Optim


class SFT(DataStage, kind="sft"):
    """Tune a model on the responses: cross-entropy over response tokens, end of turn included.

    Tunes a teacher on its task, and makes the control that distillation has to beat.
    """

    shared: ClassVar[bool] = True
    validated: ClassVar[bool] = True

    model: ModelRef = Field(description="what is tuned")
    init: Init | None = Field(default=None, description="how it is cut first; default: not at all")
    adapter: Adapter | None = Field(default=None, description="train low-rank adapters only; default: every weight")
    optim: Optim = Optim()
    validation: Validation = Validation()

    def preflight(self) -> None:
        super().preflight()
        check_start(self.name or "sft", self.model, self.init, self.adapter)

    def run(self, context: Context) -> dict[str, Any]:
        where = context.where(self.model)
        tokenizer = load_tokenizer(where)
        model, merge = load_student(context.work.name, where, self.init, self.adapter, self.seed)
        common = (self.data, self.prompts, self.optim, self.validation, lambda _: CrossEntropy(), self.seed)
        return train(context, model, tokenizer, *common, finish=merge)
