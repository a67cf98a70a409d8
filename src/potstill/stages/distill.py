"""White-box distillation."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.artifact import MANIFEST, Artifact
from potstill.core.errors import UserError
from potstill.data.store import TokenStore
from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.models import check_rows, config_of, load_tokenizer, shared_vocabulary
from potstill.inits import Init
from potstill.losses.distillation import Distillation
from potstill.losses.targets import Signal
from potstill.stages.base import CacheRef, Context, DataStage, ModelRef, Stage
from potstill.stages.cache import Cache
from potstill.stages.start import Adapter, check_start, load_student
from potstill.stages.training import Validation, train
from potstill.teachers.teacher import SHARED, Teacher, TeacherPrecision, about, built_signal, facts_of, kept_signal
from potstill.train.loop import Optim, in_bf16


class Distill(DataStage, kind="distill"):
    """Teach a student the teacher's distribution at every response token.

    Loss: (1−ratio)·CE + ratio·T²·divergence; Hinton et al., arXiv:1503.02531. Rows, order and steps are those that SFT
    with the same data, `optim` and `seed` sees. The teacher reads each row once: what it says is kept in the run's folder
    while the first epoch runs, and every later epoch, seed and student with the same rows reads it back.
    """

    version: ClassVar[int] = 2  # 2: the teacher's hidden states pass through bfloat16
    shared: ClassVar[bool] = True
    validated: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = (*DataStage.ignored, "shard_teacher")

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
    signal: Literal["hidden", "topk", "live"] = Field(
        default="hidden",
        description="what is kept of the teacher: hidden states (the whole distribution), top_k probabilities, or nothing",
    )
    top_k: int = Field(default=64, ge=1, description="tokens that `topk` keeps; all others count together")
    cache: CacheRef | None = Field(default=None, description="read what a `cache` stage built; `signal` is then its own")
    optim: Optim = Optim()
    validation: Validation = Validation()
    shard_teacher: bool = Field(
        default=False, description="of several processes each holds a part of the teacher; slower, for teachers that do not fit"
    )

    @model_validator(mode="after")
    def _one_signal(self) -> "Distill":
        fields = type(self).model_fields
        if self.cache is not None and any(getattr(self, name) != fields[name].default for name in ("signal", "top_k")):
            raise ValueError("the cache brings its own signal and top_k; set them there and leave them out here")
        if self.signal != "topk" and self.top_k != fields["top_k"].default:
            raise ValueError("top_k is for signal = 'topk'; set that too, or leave top_k out")
        return self

    def mismatches(self, earlier: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        cache = earlier.get(self.cache.target) if self.cache is not None and self.cache.scheme == "stage" else None
        if not isinstance(cache, Cache):
            return
        if cache.teacher != self.teacher:
            yield "teacher", f"the cache '{cache.name}' holds what '{cache.teacher}' said; name the same teacher in both"
        if cache.signal == "topk" and cache.temperature != self.temperature:
            yield "temperature", f"the cache '{cache.name}' was made for {cache.temperature:g}; give both the same"
        if cache.teacher_precision != self.teacher_precision:
            yield "teacher_precision", f"the cache '{cache.name}' has '{cache.teacher_precision}'; give both the same"
        if cache.precision != self.optim.precision:
            yield "optim.precision", f"the cache '{cache.name}' has precision = '{cache.precision}'; give both the same"
        if cache.prompts != self.prompts:
            yield "prompts", f"the cache '{cache.name}' has other prompts, and so other rows; give both the same"

    def preflight(self) -> None:
        super().preflight()
        check_start(self.name or "distill", self.student, self.init, self.adapter)
        if self.cache is not None and self.cache.scheme == "path":
            folder = Path(self.cache.target).expanduser()
            made = Artifact.load(folder).kind if (folder / MANIFEST).is_file() else "no artifact"
            if made != "cache":
                raise UserError(
                    f"{self.name or 'distill'}: cache {folder} holds {made}; name the artifact folder that a cache stage made"
                )

    def run(self, context: Context) -> dict[str, Any]:
        where, teacher_where = context.where(self.student), context.where(self.teacher)
        tokenizer = load_tokenizer(where)
        vocab = shared_vocabulary(load_tokenizer(teacher_where), tokenizer, str(self.teacher), str(self.student))
        check_rows(config_of(teacher_where).vocab_size, tokenizer, str(self.teacher))
        work, rows = context.work, about(self.data, self.prompts)
        teacher = Teacher(
            teacher_where, self.teacher_precision, in_bf16(self.optim.precision), vocab, work.note, self.shard_teacher
        )
        built = context.artifacts(self.cache)[0] if self.cache is not None else None
        signals: list[Signal] = []

        def objective(store: TokenStore) -> Distillation:
            if built is not None:
                signals.append(built_signal(built, teacher, self.temperature, rows, store))
            elif self.signal == "live":
                signals.append(teacher.live())
            else:
                folder = (context.shared or work.folder.parent) / SHARED
                signals.append(kept_signal(teacher, self.signal, self.top_k, self.temperature, folder, rows, store))
            return Distillation(signals[0], self.divergence, self.ratio, self.temperature, vocab)

        student, merge = load_student(work.name, where, self.init, self.adapter, self.seed)
        common = (self.data, self.prompts, self.optim, self.validation, objective, self.seed)
        summary = train(context, student, tokenizer, *common, finish=merge)
        return {**summary, "signal": facts_of(signals[0])}
