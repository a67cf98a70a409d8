"""Distillation into a quantised student."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.errors import Problem, UserError
from potstill.edges import ranks
from potstill.edges.models import PACKED, Model, load_model, save_dequantised, stored_dtype
from potstill.edges.vocabulary import Tokenizer
from potstill.losses.objective import Objective
from potstill.metrics.kl_to_teacher import KLToTeacher
from potstill.metrics.nll import NLL
from potstill.quant.grid import Trains, put_on_grid
from potstill.quant.packed import Packed, packed_of, save_packed
from potstill.stages.base import Context
from potstill.stages.distill import Distill
from potstill.stages.outlook import Outlook, Prospect, made_from
from potstill.stages.start import Student
from potstill.stages.training import FIGURE, Validation, summary_of
from potstill.study.healing import healing_in_words
from potstill.study.records import Healing
from potstill.train.loop import Optim

_QUANTISED = "is not quantised; name a `quantize` stage, or the folder of one"


class Heal(Distill, kind="heal"):
    """Win back what quantising cost: distil into the quantised student while its weights stay on the grid.

    The teacher is the student's full-precision self, or that one's own teacher. What trains is the scales, rounded to float16
    at every step, with norms and biases; or the codes; or both, by straight-through estimators. The artifact is like that of
    `quantize`: codes, scales and the weights that they stand for, which agree bit for bit.

    Where the divergence from the teacher on validation rows is larger at the end than it was at the start, the model is kept as
    it was. The closing line and the report say so, and take the model for its student; else they say by how much it fell.
    """

    version: ClassVar[int] = 3  # 3: of what was not kept, the errors of its layers; 2: what became worse is not kept

    trains: Trains = Field(
        default="scales", description="scales: of the groups, with norms and biases; codes: these alone; both"
    )
    signal: Literal["hidden", "topk", "live"] = Field(
        default="live", description="what is kept of the teacher, see `distill`; of a part of an epoch nothing is worth keeping"
    )
    ratio: float = Field(default=1.0, ge=0, le=1, description="weight of the divergence; the rest is cross-entropy")
    optim: Optim = Optim(lr=1e-3, epochs=0.15, warmup=0.1)
    validation: Validation = Field(
        default=Validation(times=1, metrics=(KLToTeacher(), NLL())), description="without kl_to_teacher nobody sees what it did"
    )

    @model_validator(mode="before")
    @classmethod
    def _measured_as_it_can_be(cls, given: Any) -> Any:
        """Without a teacher beside the student nothing measures the distance to it."""
        if not isinstance(given, dict) or (given.get("cache") is None and given.get("signal", "live") == "live"):
            return given
        return {"validation": Validation(times=1, metrics=(NLL(),))} | given

    @model_validator(mode="after")
    def _stays_on_the_grid(self) -> "Heal":
        for field in ("init", "adapter", "hidden_states"):
            if getattr(self, field) is not None:
                raise ValueError(f"{field} would take the weights off the grid; leave it out")
        if self.save_dtype != "auto":
            raise ValueError(f"save_dtype = '{self.save_dtype}' cannot hold quantised weights exactly; leave it out")
        return self

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        if ranks.several():
            yield Problem("trains", "a quantised model is healed in one process alone; leave out --processes")
        try:
            student = outlook.model(self.student)
        except UserError:  # said at its own field
            return
        if student is not None and not student.bits:
            yield Problem("student", _QUANTISED, repr(str(self.student)))

    def prospect(self, outlook: Outlook) -> Prospect | None:
        found = outlook.model(self.student)
        return made_from(found, bits=found.bits) if found is not None else None

    def dropout(self) -> bool:
        return False  # what is to be won back is smaller than its noise

    def begun(self, context: Context, student: Student) -> Student:
        where = context.where(self.student)
        if ranks.several():
            raise UserError(f"{context.work.name}: a quantised model is healed in one process alone")
        packed = packed_of(student.model, where)
        if not packed:
            raise UserError(f"{context.work.name}: student {self.student} {_QUANTISED}")
        return replace(student, merge=put_on_grid(student.model, packed, self.trains))

    def write(self, context: Context, model: Model, merged: Any, tokenizer: Tokenizer, stop_ids: list[int]) -> None:
        import torch

        packed: dict[str, Packed] = merged
        healing = self._healing(context)
        if not healing.get("kept", True):
            model = load_model(context.where(self.student))
            packed = packed_of(model, context.where(self.student))
            context.work.note(
                f"healing made it worse: KL to the teacher on validation rows {healing['kl_before']:.3g} -> "
                f"{healing['kl_after']:.3g}; the model is kept as it was: lower optim.lr, or give it more steps"
            )
        stored = stored_dtype(context.where(self.student), rest=True)
        rest = torch.bfloat16 if stored in (None, torch.float32) else stored
        quantised = {f"{name}.weight" for name in packed}
        save_dequantised(model, tokenizer, context.work.folder, stop_ids, quantised, rest, exact=True)
        save_packed(packed, context.work.folder / PACKED)

    def _healing(self, context: Context) -> dict[str, Any]:
        """The divergence from the teacher on validation rows before and after, and whether the result is kept; empty where it
        was not measured."""
        figure = f"{FIGURE}{KLToTeacher.kind}"
        found = [line[figure] for line in context.work.metrics.read() if figure in line]
        if len(found) < 2:
            return {}
        return {"kl_before": found[0], "kl_after": found[-1], "kept": found[-1] <= found[0]}

    def facts(self, context: Context, tokenizer: Tokenizer, objective: Objective) -> dict[str, Any]:
        before, healing = summary_of(context, self.student), self._healing(context)
        same = ("made_from", "kept", "bits_per_weight", "quantised_parameters", "calibration_tokens")
        facts = {
            **super().facts(context, tokenizer, objective),
            **{key: before[key] for key in same if key in before},
            "healing": healing,
        }
        method = before.get("method", "packed")
        if not healing.get("kept", True):
            return {**facts, "method": method, "layers": before.get("layers", [])}
        # the layers' errors are not what was minimised
        return {**facts, "method": f"{method}, healed", "layers": [], "healed": str(self.student)}

    def closing(self, summary: dict[str, Any]) -> str:
        trained, healing = super().closing(summary), summary["healing"]
        if not healing:
            return trained
        words = healing_in_words([Healing(student=str(self.student), **healing)])
        return f"{trained}; {words}" + ("" if healing["kept"] else f"; the model equals {self.student}")
