"""A smaller model out of a trained one, and nothing trained."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from potstill.core.errors import Problem
from potstill.core.numbers import count
from potstill.data.prompts import Renderer
from potstill.edges.machine import resting_memory
from potstill.edges.models import load_model, load_tokenizer, save_model, stored_dtype
from potstill.inits import Init
from potstill.stages.base import Context, DataStage
from potstill.stages.cost import left_over, scoring_memory
from potstill.stages.outlook import Cost, Outlook, Prospect
from potstill.stages.refs import ModelRef
from potstill.stages.start import cut_in_words, cut_model, start_problems, started
from potstill.stages.training import calibration, choosing_seconds, in_words, layers_of
from potstill.train.loop import Precision


class Cut(DataStage, kind="cut"):
    """Cut a smaller model out of a trained one, and train nothing: the student that SFT and distillation begin with.

    One stage for both, so that rows choose what stays once, and so that a study can measure the student as it begins. The
    rows are training rows, the same for every seed.
    """

    model: ModelRef = Field(description="what is cut; it stays as it is")
    init: Init = Field(description="what stays")
    precision: Precision = Field(
        default="auto", description="of the products by which rows choose; auto: bf16 on a GPU that has it"
    )

    def reader(self) -> ModelRef:
        return self.model

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        yield from start_problems(outlook, "model", self.model, self.init, None)

    def prospect(self, outlook: Outlook) -> Prospect | None:
        return started(outlook.model(self.model), self.init)

    def cost(self, outlook: Outlook) -> Cost:
        full, made = outlook.model(self.model), self.prospect(outlook)
        if full is None or made is None:
            return Cost()
        rows = outlook.rows(self.data, self.prompts, self.model, "train")
        read = self.init.calibration(full.config).rows
        scoring = scoring_memory(full, rows, min(read, rows.kept), teacher=False) if read else 0
        size = full.size.parameters + made.size.parameters
        return Cost(
            parameters=made.size.parameters,
            seconds=choosing_seconds(outlook, self.init, full, rows, self.precision),
            memory_bytes=round(resting_memory() + left_over(full.size) + 4 * size + scoring),
            output_bytes=4 * made.size.parameters,
            less_memory="lower init.rows",
            rows=(rows,),
        )

    def closing(self, summary: dict[str, Any]) -> str:
        return (
            f"{count(summary['parameters'])} of {count(summary['parameters_before'])} parameters{cut_in_words(summary['cut'])}"
        )

    def run(self, context: Context) -> dict[str, Any]:
        work, where = context.work, context.where(self.model)
        model, tokenizer = load_model(where), load_tokenizer(where)
        renderer = Renderer(tokenizer, self.prompts)
        read = calibration(work, self.data, renderer, self.init, model.config, self.precision)
        cut = cut_model(work.name, model, self.init, read)
        save_model(cut.model, tokenizer, work.folder, renderer.stop_ids, dtype=stored_dtype(where))
        return {
            "made_from": str(self.model),
            "init": in_words(self.init),
            "cut": cut.figures,
            "layers": layers_of(context, self.model, cut.keep, model.config),
            "parameters": sum(p.numel() for p in cut.model.parameters()),
            "parameters_before": sum(p.numel() for p in model.parameters()),
        }
