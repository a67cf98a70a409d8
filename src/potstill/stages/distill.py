"""White-box distillation."""

from typing import Any

from pydantic import Field

from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.models import check_vocabulary, load_tokenizer, shared_vocabulary
from potstill.inits import Init
from potstill.stages.base import Context, DataStage, ModelRef
from potstill.stages.start import Adapter, TeacherPrecision, check_start, load_student, load_teacher
from potstill.stages.training import Validation, train
from potstill.train.loop import Optim, in_bf16
from potstill.train.objectives import Distillation


class Distill(DataStage, kind="distill"):
    """Teach a student the teacher's distribution at every response token, the teacher running beside it.

    Loss: (1−ratio)·CE + ratio·T²·divergence; Hinton et al., arXiv:1503.02531. Rows, order and steps are those that SFT
    with the same data, `optim` and `seed` sees.
    """

    student: ModelRef = Field(description="what is trained")
    init: Init | None = Field(default=None, description="how the student is cut out of that; default: not at all")
    adapter: Adapter | None = Field(default=None, description="train low-rank adapters only; default: every weight")
    teacher: ModelRef = Field(description="what it learns from; tune it on the task first")
    teacher_precision: TeacherPrecision = Field(
        default="auto",
        description="of its weights; auto: bf16 when training in bf16, else fp32; int8: body in a quarter of fp32",
    )
    divergence: Divergence = ForwardKL()
    ratio: float = Field(default=0.5, ge=0, le=1, description="weight of the divergence; the rest is cross-entropy")
    temperature: float = Field(default=1.0, gt=0, le=100, description="softens both distributions")
    optim: Optim = Optim()
    validation: Validation = Validation()

    def preflight(self) -> None:
        super().preflight()
        check_start(self.name or "distill", self.student, self.init, self.adapter)

    def run(self, context: Context) -> dict[str, Any]:
        where, teacher_where = context.where(self.student), context.where(self.teacher)
        tokenizer = load_tokenizer(where)
        vocab = shared_vocabulary(load_tokenizer(teacher_where), tokenizer, str(self.teacher), str(self.student))
        teacher = load_teacher(teacher_where, self.teacher_precision, in_bf16(self.optim.precision))
        check_vocabulary(teacher, tokenizer, str(self.teacher))
        objective = Distillation(teacher, self.divergence, self.ratio, self.temperature, vocab)
        student, merge = load_student(context.work.name, where, self.init, self.adapter, self.seed)
        common = (self.data, self.prompts, self.optim, self.validation, objective, self.seed)
        return train(context, student, tokenizer, *common, finish=merge)
