"""White-box distillation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.artifact import MANIFEST, Artifact, fingerprint
from potstill.core.component import Settings
from potstill.core.errors import Problem, UserError
from potstill.data.prompts import Renderer
from potstill.data.store import TokenStore
from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.models import config_of
from potstill.edges.vocabulary import Tokenizer, shared_vocabulary
from potstill.losses.distillation import Distillation, OnPolicy
from potstill.losses.hidden_states import HiddenStates, layers_to_learn
from potstill.losses.objective import Objective
from potstill.losses.targets import Signal
from potstill.rollouts.local import Local
from potstill.stages.base import Context, DataStage, Stage
from potstill.stages.cache import width
from potstill.stages.cost import FLOAT, head_memory, reading_flops, teacher_bytes
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.refs import CacheRef
from potstill.stages.spent import Basis, Tally, own_tokens
from potstill.stages.start import Student, started
from potstill.stages.taught import Taught
from potstill.teachers.signals import Live
from potstill.teachers.teacher import SHARED, Teacher, about, built_signal, facts_of, kept_signal
from potstill.train.lessons import Lessons
from potstill.train.loop import data_of, in_bf16
from potstill.train.practice import Practice, Samples


class LayerMatch(Settings):
    """What the student's layers learn of the teacher's beside the logits; see `losses/hidden_states.py`."""

    weight: float = Field(default=1.0, gt=0, description="of the relative squared error, averaged over tokens and layers")
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="the teacher's layer, counted from 0, that each of the student's learns; default: where the student was "
        "cut by layers, the one before its next; else spread evenly",
    )


class Distill(Taught, kind="distill"):
    """Teach a student the teacher's distribution at every response token.

    Loss: (1−ratio)·CE + ratio·T²·divergence; Hinton et al., arXiv:1503.02531. Rows, order and steps are those that SFT
    with the same data, `optim` and `seed` sees. The teacher reads each row once: what it says is kept in the run's folder
    while the first epoch runs, and every later epoch, seed and student with the same rows reads it back.

    The summary's `teacher_reads`: how the form that the teacher was made to read differs from its own; None where it does not.
    """

    version: ClassVar[int] = 2  # 2: the teacher's hidden states pass through bfloat16
    ignored: ClassVar[tuple[str, ...]] = (*DataStage.ignored, "shard_teacher")

    divergence: Divergence = ForwardKL()
    ratio: float = Field(default=0.5, ge=0, le=1, description="weight of the divergence; the rest is cross-entropy")
    temperature: float = Field(default=1.0, gt=0, le=100, description="softens both distributions")
    signal: Literal["hidden", "topk", "live"] = Field(
        default="hidden",
        description="what is kept of the teacher: hidden states (the whole distribution), top_k probabilities, or nothing",
    )
    top_k: int = Field(default=64, ge=1, description="tokens that `topk` keeps; all others count together")
    cache: CacheRef | None = Field(default=None, description="read what a `cache` stage built; `signal` is then its own")
    hidden_states: LayerMatch | None = Field(
        default=None, description="learn the teacher's layers too: equal hidden width, and the teacher runs beside the student"
    )
    samples: Samples | None = Field(
        default=None,
        description="on-policy: answers that the student writes itself are learned too, or instead; default: none",
    )
    shard_teacher: bool = Field(
        default=False, description="of several processes each holds a part of the teacher; slower, for teachers that do not fit"
    )

    @model_validator(mode="before")
    @classmethod
    def _beside_the_student(cls, given: Any) -> Any:
        """A teacher whose layers are learned runs in every step, as does one that reads only what the student writes."""
        if not isinstance(given, dict):
            return given
        samples = given.get("samples")
        share = samples.get("share", 1.0) if isinstance(samples, dict) else getattr(samples, "share", 0.0)
        return {"signal": "live"} | given if given.get("hidden_states") is not None or share == 1 else given

    @model_validator(mode="after")
    def _layers_are_not_kept(self) -> "Distill":
        if self.hidden_states is not None and (self.cache is not None or self.signal != "live"):
            raise ValueError("hidden_states needs the teacher beside the student; leave out signal and cache")
        if self.hidden_states is not None and self.adapter is not None:
            raise ValueError("hidden_states changes whole layers; leave out adapter")
        return self

    @model_validator(mode="after")
    def _steps_divide(self) -> "Distill":
        if self.samples is None:
            return self
        if problem := self.samples.problem(self.optim.batch_size):
            raise ValueError(f"samples: {problem}")
        if self.samples.share == 1 and (self.cache is not None or self.signal != "live"):
            raise ValueError("with samples.share = 1 the teacher reads no row of data; leave out signal and cache")
        return self

    @model_validator(mode="after")
    def _one_signal(self) -> "Distill":
        fields = type(self).model_fields
        if self.cache is not None and any(getattr(self, name) != fields[name].default for name in ("signal", "top_k")):
            raise ValueError("the cache brings its own signal and top_k; set them there and leave them out here")
        if self.cache is not None and self.teacher_reads == "student":
            raise ValueError("a cache holds rows in the teacher's own form; leave out cache, or teacher_reads = 'student'")
        if self.signal != "topk" and self.top_k != fields["top_k"].default:
            raise ValueError("top_k is for signal = 'topk'; set that too, or leave top_k out")
        return self

    def mismatches(self, earlier: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        cache: Any = earlier.get(self.cache.target) if self.cache is not None and self.cache.scheme == "stage" else None
        if cache is None or cache.makes != "cache":
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

    def pace(self, rows: int) -> tuple[int, int] | None:
        if self.samples is None:
            return None
        steps = self.optim.total_steps(rows, self.samples.takes(self.optim.batch_size))
        return steps, steps * self.optim.batch_size

    def read(self, model: Prospect, rows: RowsOf) -> float | None:
        pace = self.pace(rows.kept)
        if pace is None or self.samples is None:
            return None
        (steps, _), others = pace, self.optim.batch_size - self.samples.written(self.optim.batch_size)
        return steps * (self._own_read(model, rows) + others * rows.tokens)

    def learned(self, rows: RowsOf) -> float | None:
        pace = self.pace(rows.kept)
        if pace is None or self.samples is None:
            return None
        (steps, _), own = pace, self.samples.written(self.optim.batch_size)
        return steps * (own * self.own_answer(rows) + (self.optim.batch_size - own) * rows.response)

    def _own_read(self, model: Prospect, rows: RowsOf) -> float:
        """Tokens that a step reads of what the student wrote."""
        if self.samples is None:
            return 0.0
        groups = self.samples.written(self.optim.batch_size) // self.samples.per_prompt
        return self.answers_read(model, rows, groups, self.samples.per_prompt)

    def new_tokens(self) -> int | None:
        return self.samples.max_new_tokens if self.samples is not None else None

    def teacher_stays(self) -> bool:
        return self._asks_live() and not self.shard_teacher

    def _asks_live(self) -> bool:
        return self.samples is not None or (self.signal == "live" and self.cache is None)

    def beside(self, objective: Objective) -> tuple[Any, int] | None:
        logits = _of_logits(objective)
        on_samples = logits.samples if isinstance(logits, OnPolicy) else logits
        if not self.teacher_stays() or not isinstance(on_samples.signal, Live):
            return None
        return on_samples.signal.teacher, on_samples.vocab

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        with suppress(UserError):  # the teacher's own problem
            teacher = outlook.model(self.teacher)
            if teacher is not None:
                yield from self._layer_problems(outlook, teacher)
        if self.cache is not None and self.cache.scheme == "path":
            folder = Path(self.cache.target).expanduser()
            made = Artifact.load(folder).makes if (folder / MANIFEST).is_file() else "no artifact"
            if made != "cache":
                rule = f"{folder} holds {made}; name the artifact folder that a cache stage made"
                yield Problem("cache", rule, repr(str(self.cache)))

    def pair_problems(self, rows: int, theirs: Tokenizer, ours: Tokenizer) -> Iterator[Problem]:
        yield from super().pair_problems(rows, theirs, ours)
        if self.signal == "topk":
            with suppress(UserError):  # said above
                vocab = shared_vocabulary(theirs, ours, str(self.teacher), str(self.student))
                if self.top_k > vocab:
                    yield Problem("top_k", f"is more than the {vocab:,} tokens of the vocabulary; lower it", str(self.top_k))

    def _layer_problems(self, outlook: Outlook, teacher: Prospect) -> Iterator[Problem]:
        try:
            student = started(outlook.model(self.student), self.init)
            if student is not None:
                self._layers(student.config, teacher.config, None)
        except UserError as error:
            yield Problem("hidden_states", str(error))

    def _layers(self, student: Any, teacher: Any, keep: Sequence[int] | None) -> tuple[int, ...]:
        """The teacher's layer that each of the student's learns, given both configs; empty without `hidden_states`.

        Raises:
            UserError: the two do not fit together so.
        """
        if self.hidden_states is None:
            return ()
        ours, theirs = student.hidden_size, teacher.hidden_size
        if ours != theirs:
            raise UserError(
                f"the student's states are {ours} wide and the teacher's {theirs}; cut the student by layers, or leave this out"
            )
        few, many = student.num_hidden_layers, teacher.num_hidden_layers
        layers = self.hidden_states.layers
        if layers is None:
            return layers_to_learn(few, many, keep)
        if len(layers) != few or not all(0 <= layer < many for layer in layers):
            raise UserError(f"layers = {list(layers)}: needs {few} of the teacher's layers, each from 0 to {many - 1}")
        return layers

    def cost(self, outlook: Outlook) -> Cost:
        cost = super().cost(outlook)
        teacher = outlook.model(self.teacher)
        if teacher is None or cost.step is None or cost.steps is None or cost.memory_bytes is None:
            return cost
        size, rows, flops, seconds = teacher.size, cost.rows[0], cost.flops or 0.0, cost.seconds
        signal, kept = self._kept(outlook)
        writer = self.prospect(outlook)
        own = cost.steps * self._own_read(writer, rows) if writer is not None else 0.0  # the teacher is live there
        seen = (cost.tokens or 0) - own
        if signal != "live":
            seen = 0 if kept else min(seen, rows.kept * rows.tokens)
        learned = cost.response_tokens or 0
        flops += 2 * size.active * (own + seen) + (0 if signal == "topk" else 2 * size.hidden * size.vocab * learned)
        probe = outlook.probe(teacher.config, rows, self.optim.precision)
        if seconds is not None and probe is not None:
            seconds += probe.forward_seconds(own + seen)
        if seconds is not None and probe is not None and signal != "topk":
            seconds += probe.forward_seconds(probe.head * learned)  # the teacher's logits, from its hidden states
        precision = self.optim.precision
        memory = cost.memory_bytes + head_memory(size, cost.step.row_tokens * self.optim.batch_size, teacher=True)
        memory += 0 if kept and self.samples is None else teacher_bytes(size, self.teacher_precision, precision)
        if self.hidden_states is not None and (student := started(outlook.model(self.student), self.init)) is not None:
            layers = student.config.num_hidden_layers
            learned_from = len(set(self.hidden_states.layers or range(layers)))
            tokens = min(max(self.optim.pass_tokens(student.size.hidden), rows.longest), self.optim.batch_size * rows.tokens)
            memory += FLOAT * tokens * size.hidden * (layers + learned_from)
        if self.samples is not None and writer is not None:
            every = self.samples.every
            asked = self.samples.written(self.optim.batch_size) // self.samples.per_prompt * every
            written = self.written(outlook, [writer], rows, asked, self.samples.per_prompt)
            flops, memory = flops + cost.steps / every * written.flops, memory + written.memory_bytes
            seconds = seconds + cost.steps / every * written.seconds if seconds is not None else None
        fresh = not kept and signal != "live"
        return replace(
            cost,
            flops=flops,
            seconds=seconds,
            memory_bytes=round(memory),
            cache_bytes=round(width(signal, self.top_k, size) * rows.kept * rows.response) if fresh else None,
            step=replace(cost.step, teacher=size, flops=flops / cost.steps, shard_teacher=self.shard_teacher),
        )

    def flops(self, tally: Tally, basis: Basis) -> float | None:
        learning, teacher = super().flops(tally, basis), basis.teacher
        if learning is None or teacher is None:
            return None
        asked = self._asked(tally.rows)
        own = own_tokens(tally, basis, asked) if self.samples is not None else 0.0
        read, learned = tally.tokens - own, tally.response_tokens - tally.sampled_tokens  # of data
        if basis.kept != "live":  # each row once, as if nobody had kept it yet
            read = min(read, basis.data_tokens)
        if basis.kept == "topk":
            learned = min(learned, basis.rows * basis.response)
        teaching = reading_flops(teacher, read + own, learned + tally.sampled_tokens)
        drawn = tally.generated_tokens
        writing = reading_flops(basis.student, asked * basis.prompt + drawn, drawn)
        return learning + teaching + writing

    def _asked(self, rows: float) -> float:
        """Of so many rows of data, those whose prompts the student answers."""
        if self.samples is None:
            return 0.0
        batch = self.optim.batch_size
        return rows * (self.samples.written(batch) // self.samples.per_prompt) / self.samples.takes(batch)

    def could_adapt(self) -> bool:
        return super().could_adapt() and self.hidden_states is None

    def _kept(self, outlook: Outlook) -> tuple[str, bool]:
        """What is kept of the teacher, and whether an earlier stage will have kept it; from now on it is."""
        if self.samples is not None and self.samples.share == 1:  # no row of data is read
            return "live", False
        if self.cache is not None:
            built = outlook.stages.get(self.cache.target)
            return (built.signal if built is not None and built.makes == "cache" else "hidden"), True
        if self.signal == "live":
            return "live", False
        more = [self.top_k, self.temperature] if self.signal == "topk" else []
        read = [str(self.teacher), self.teacher_precision, self.optim.precision, self.data.spec(), self.prompts.model_dump()]
        key = fingerprint([*read, self.signal, *more])
        kept = key in outlook.kept
        outlook.kept.add(key)
        return self.signal, kept

    def objective(self, context: Context, tokenizer: Tokenizer, store: TokenStore, student: Student) -> Objective:
        teacher = self.teacher_of(context, tokenizer, store, self.shard_teacher)
        live = teacher.live() if self._asks_live() else None
        signal, vocab = self._targets(context, teacher, store, live), teacher.vocab
        logits: Distillation | OnPolicy = Distillation(signal, self.divergence, self.ratio, self.temperature, vocab)
        if self.samples is not None:
            assert live is not None
            logits = OnPolicy(logits, Distillation(live, self.divergence, 1.0, self.temperature, vocab))
        if self.hidden_states is None:
            return logits
        assert isinstance(signal, Live)
        taught, has = config_of(context.where(self.teacher)), student.layers
        keep = has["keep"] if has["of"] == taught.num_hidden_layers else None
        layers = self._layers(student.model.config, taught, keep)
        return HiddenStates(logits, signal.teacher, layers, self.hidden_states.weight)

    def _targets(self, context: Context, teacher: Teacher, store: TokenStore, live: Live | None) -> Signal:
        """What the teacher says of these rows: live, from a cache stage, or kept in the run's folder as it is first said."""
        rows = about(self.data, self.prompts)
        if self.cache is not None:
            return built_signal(context.artifacts(self.cache)[0], teacher, self.temperature, rows, store)
        if self.signal == "live":
            assert live is not None
            return live
        folder = (context.shared or context.work.folder.parent) / SHARED
        return kept_signal(teacher, self.signal, self.top_k, self.temperature, folder, rows, store)

    def lessons(
        self, context: Context, renderer: Renderer, store: TokenStore, student: Student, objective: Objective
    ) -> Lessons | None:
        if self.samples is None:
            return None
        logits = _of_logits(objective)
        assert isinstance(logits, OnPolicy)
        engine = Local(
            student.model,
            renderer.tokenizer,
            renderer.stop_ids,
            precision="bf16" if in_bf16(self.optim.precision) else "fp32",
            vocab=logits.samples.vocab,
        )
        batch = self.optim.batch_size
        data = data_of(store, self.optim, self.seed, self.samples.takes(batch))
        return Practice(data, self.samples, engine, batch, self.seed, self.watch(context))

    def facts(self, context: Context, tokenizer: Tokenizer, objective: Objective) -> dict[str, Any]:
        layers = {"hidden_states": {"layers": list(objective.layers)}} if isinstance(objective, HiddenStates) else {}
        logits = _of_logits(objective)
        signal = (logits.data if isinstance(logits, OnPolicy) else logits).signal
        return {"signal": facts_of(signal), **super().facts(context, tokenizer, objective), **layers}


def _of_logits(objective: Objective) -> Distillation | OnPolicy:
    logits = objective.objective if isinstance(objective, HiddenStates) else objective
    assert isinstance(logits, Distillation | OnPolicy)
    return logits
