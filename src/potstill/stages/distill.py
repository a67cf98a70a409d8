"""White-box distillation."""

from typing import Any, ClassVar

from pydantic import Field

from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.models import check_vocabulary, load_model, load_tokenizer, shared_vocabulary
from potstill.stages.base import Context, DataStage, ModelRef
from potstill.stages.training import Validation, frozen, train, unfreeze
from potstill.train.loop import Optim, in_bf16
from potstill.train.objectives import Distillation
from potstill.train.team import shard_frozen


class Distill(DataStage, kind="distill"):
    """Teach a student the teacher's distribution at every response token, the teacher running beside it.

    Loss: (1−ratio)·CE + ratio·T²·divergence; Hinton et al., arXiv:1503.02531. Rows, order and steps are those that SFT
    with the same data, `optim` and `seed` sees.
    """

    shared: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = (*DataStage.ignored, "shard_teacher")

    student: ModelRef = Field(description="what is trained")
    teacher: ModelRef = Field(description="what it learns from; tune it on the task first")
    divergence: Divergence = ForwardKL()
    ratio: float = Field(default=0.5, ge=0, le=1, description="weight of the divergence; the rest is cross-entropy")
    temperature: float = Field(default=1.0, gt=0, le=100, description="softens both distributions")
    optim: Optim = Optim()
    validation: Validation = Validation()
    shard_teacher: bool = Field(
        default=False, description="of several processes each holds a part of the teacher; slower, for teachers that do not fit"
    )

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        where, teacher_where = context.where(self.student), context.where(self.teacher)
        tokenizer = load_tokenizer(where)
        vocab = shared_vocabulary(load_tokenizer(teacher_where), tokenizer, str(self.teacher), str(self.student))
        teacher = frozen(load_model(teacher_where, torch.bfloat16 if in_bf16(self.optim.precision) else None))
        check_vocabulary(teacher, tokenizer, str(self.teacher))
        teacher = shard_frozen(teacher) if self.shard_teacher else teacher
        objective = Distillation(teacher, self.divergence, self.ratio, self.temperature, vocab)
        student = unfreeze(load_model(where))
        return train(context, student, tokenizer, self.data, self.prompts, self.optim, self.validation, objective, self.seed)
