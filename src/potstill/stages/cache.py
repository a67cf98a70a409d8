"""What a teacher says, kept ahead of distillation."""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, model_validator

from potstill.core.artifact import Makes
from potstill.core.errors import Interrupted, Problem, UserError
from potstill.core.numbers import size as bytes_in_words
from potstill.data.batches import micro_batches, pack
from potstill.data.prompts import Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges import ranks
from potstill.edges.machine import resting_memory
from potstill.edges.models import Size, check_positions, check_rows, config_of, device, load_tokenizer
from potstill.quant.int8 import int8_problems
from potstill.stages.base import Context, DataStage, position_problems
from potstill.stages.cost import left_over, teacher_bytes
from potstill.stages.outlook import Cost, Outlook
from potstill.stages.refs import ModelRef
from potstill.stages.training import tidy, tokenised
from potstill.study.words import reasons
from potstill.teachers.teacher import SHARED, Kept, Teacher, TeacherPrecision, about, facts_of, kept_signal, longest
from potstill.train.loop import Precision, autocast, in_bf16, pass_tokens


class Cache(DataStage, kind="cache"):
    """Let a teacher read the training rows once and keep what it says, for any number of `distill` stages.

    `distill` keeps it by itself as its first epoch runs; this stage is for building it ahead: on another machine, or where
    the students' machine has no room for the teacher. Row by row checksummed; an interrupted or damaged cache computes only
    what it lacks.
    """

    makes: ClassVar[Makes] = "cache"
    shared: ClassVar[bool] = True

    teacher: ModelRef = Field(description="who reads the rows")
    signal: Kept = Field(default="hidden", description="hidden states (the whole distribution), or top_k probabilities")
    top_k: int = Field(default=64, ge=1, description="tokens that `topk` keeps; all others count together")
    temperature: float = Field(default=1.0, gt=0, le=100, description="of `topk`; hidden states serve every temperature")
    teacher_precision: TeacherPrecision = Field(
        default="auto",
        description="of its weights; auto: bf16 when computing in bf16, else fp32; int8: body in a quarter of fp32",
    )
    precision: Precision = Field(default="auto", description="of its products: the students' optim.precision")
    micro_batch_tokens: int | None = Field(default=None, ge=1, description="tokens in one forward pass; default: as in optim")

    @model_validator(mode="after")
    def _k_of_topk(self) -> "Cache":
        if self.signal != "topk" and self.top_k != type(self).model_fields["top_k"].default:
            raise ValueError("top_k is for signal = 'topk'; set that too, or leave top_k out")
        return self

    def reader(self) -> ModelRef:
        return self.teacher

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        try:
            teacher = outlook.model(self.teacher)
            tokenizer = teacher.tokenizer() if teacher is not None else None
            if teacher is not None and tokenizer is not None:
                check_rows(teacher.size.vocab, tokenizer, str(self.teacher))
        except UserError as error:
            yield Problem("teacher", str(error), repr(str(self.teacher)))
            return
        if teacher is not None:
            yield from position_problems(outlook, self, teacher.config, str(self.teacher))
        if teacher is not None and self.teacher_precision == "int8":
            yield from (Problem("teacher_precision", rule, "'int8'") for rule in int8_problems(teacher.config))
        if self.signal == "topk" and tokenizer is not None and self.top_k > max(tokenizer.get_vocab().values()) + 1:
            yield Problem("top_k", f"is more than the {len(tokenizer):,} tokens of the vocabulary; lower it", str(self.top_k))

    def cost(self, outlook: Outlook) -> Cost:
        teacher = outlook.model(self.teacher)
        if teacher is None:
            return Cost()
        rows, size = outlook.rows(self.data, self.prompts, self.teacher, "train"), teacher.size
        tokens, learned = rows.kept * rows.tokens, rows.kept * rows.response
        head = 2 * size.hidden * size.vocab * learned if self.signal == "topk" else 0
        probe = outlook.probe(teacher.config, rows, self.precision)
        held = teacher_bytes(size, self.teacher_precision, self.precision)
        return Cost(
            tokens=round(tokens),
            response_tokens=round(learned),
            flops=2 * size.active * tokens + head,
            seconds=probe.forward_seconds(tokens) if probe is not None else None,
            memory_bytes=round(resting_memory() + left_over(size) + held),
            cache_bytes=round(width(self.signal, self.top_k, size) * learned),
            less_memory="lower micro_batch_tokens"
            if size.idle
            else "lower micro_batch_tokens, or set teacher_precision = 'int8'",
            rows=(rows,),
        )

    def closing(self, summary: dict[str, Any]) -> str:
        left = f", {reasons(summary['dropped'])} left out" if any(summary["dropped"].values()) else ""
        return f"{summary['rows']:,} rows{left}, {bytes_in_words(summary['bytes'])}"

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        work, where = context.work, context.where(self.teacher)
        tokenizer = load_tokenizer(where)
        check_rows(config_of(where).vocab_size, tokenizer, str(self.teacher))
        counts = Counts()
        pairs = instruction_pairs(self.data.examples("train", counts.dropped), Renderer(tokenizer, self.prompts), counts)
        store = tokenised(work.folder / "tokens", pairs, counts, f"{work.name}: training rows of {self.data.kind}")
        counts = store.counts
        check_positions(config_of(where), longest(store), f"{work.name}: teacher")
        vocab = max(tokenizer.get_vocab().values()) + 1
        teacher = Teacher(where, self.teacher_precision, in_bf16(self.precision), vocab, work.note, code=context.code)
        rows = about(self.data, self.prompts)
        signal = kept_signal(teacher, self.signal, self.top_k, self.temperature, work.folder / SHARED, rows, store)
        tokens = pass_tokens(self.micro_batch_tokens, config_of(where).hidden_size)
        done, mine = 0, range(ranks.rank(), len(store), ranks.world())
        for group in micro_batches([store.length(i) for i in mine], tokens) if mine else ():
            with torch.inference_mode(), autocast(self.precision):
                signal(pack([store[mine[i]] for i in group]).to(device()))
            done += len(group)
            work.progress.update(done, len(mine), "row", computed=f"{signal.computed:,}")
            if work.stop_requested():
                message = f"{work.name}: stopped after {done:,} of {len(mine):,} rows"
                raise Interrupted(f"{message}; run the same command again to go on")
        facts = facts_of(signal)  # once all are done
        tidy(context)
        signal.cache.close()
        return {
            "rows": counts.rows,
            "response_tokens": counts.response_tokens,
            "dropped": dict(counts.dropped),
            "rows_of": rows,
            **facts,
        }


def width(signal: str, k: int, teacher: Size) -> int:
    """Bytes kept of a response token."""
    return 8 * k + 4 if signal == "topk" else 2 * teacher.hidden
