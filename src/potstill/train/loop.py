"""The only optimiser loop: SFT, distillation and pretraining all run through `fit`."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import Interrupted, UserError
from potstill.data.batches import Order, StepRow
from potstill.data.store import TokenStore
from potstill.edges import ranks
from potstill.edges.machine import Heap
from potstill.edges.models import device, recomputed
from potstill.losses.objective import Objective
from potstill.train.checkpoint import Checkpoints
from potstill.train.lessons import Data, Lessons
from potstill.train.rounding import Rounded
from potstill.train.team import IDLE, Asked, full_model, team_of
from potstill.train.work import Work

T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16"]
MOST_TOKENS, LEAST_TOKENS = 8192, 256  # in one forward pass
CACHED_VALUES = 1 << 19  # in the hidden states of a pass on a CPU; what a layer makes of them is some ten times as much


class Optim(Settings):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-4, gt=0, le=1, description="peak learning rate")
    weight_decay: float = Field(default=0.01, ge=0, description="on matrices only; norms and biases are spared")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's averages")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the steps with a rising learning rate")
    epochs: float = Field(default=3.0, gt=0, description="passes over the rows")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps; replaces epochs")
    batch_size: int = Field(default=32, ge=1, description="rows per optimiser step")
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens in one forward pass; changes memory and rounding, and with dropout which values are dropped; "
        "default: 8192 on a GPU; on a CPU as many as let a layer's values stay in its caches",
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute each layer again on the way back: exact, less memory, about a third more time"
    )
    precision: Precision = Field(
        default="auto", description="bf16: products in bfloat16 of fp32 weights, rounded by chance; auto: on a GPU that has it"
    )

    @model_validator(mode="after")
    def _betas_in_range(self) -> "Optim":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must each be at least 0 and less than 1")
        return self

    def total_steps(self, rows: int, per_step: int | None = None) -> int:
        """Optimiser steps over so many rows, of which each takes `per_step`, default `batch_size`; the last may be short."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(round(rows * self.epochs) / (per_step or self.batch_size)))

    def pass_tokens(self, hidden: int) -> int:
        """Tokens in one forward pass of a model of that width."""
        return pass_tokens(self.micro_batch_tokens, hidden)

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of the step, counted from 0: linear warm-up, then constant or half a cosine to zero."""
        warm = self.warmup * total
        if step < warm:
            return self.lr * (step + 1) / (math.ceil(warm) + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def pass_tokens(micro_batch_tokens: int | None, hidden: int) -> int:
    """`micro_batch_tokens` as given, or what suits the machine.

    On a CPU more tokens at once make products no faster, and what lies between them slower. A step of SmolLM2 in
    bfloat16 over some 3,300 tokens, a teacher beside it, took 8.5 and 9.5 s in one pass, 6.9 and 7.0 s in passes of 1,024.
    """
    if micro_batch_tokens is not None:
        return micro_batch_tokens
    return MOST_TOKENS if device().type == "cuda" else max(LEAST_TOKENS, min(CACHED_VALUES // hidden, MOST_TOKENS))


def autocast(precision: str) -> Any:
    """The context that forward passes run in."""
    return torch.autocast(device().type, dtype=torch.bfloat16) if in_bf16(precision) else nullcontext()


def in_bf16(precision: str) -> bool:
    """Whether forward passes run in bfloat16: on request, else where a GPU has it in hardware."""
    if precision == "auto":
        return device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def optimizer_for(model: Any, optim: Optim) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, fused=True)


@dataclass(frozen=True)
class Totals:
    """What training amounted to, over all epochs and processes.

    Attributes:
        rows: rows seen, each counted every time.
        response_tokens: tokens that entered the loss.
        tokens: tokens read, every one of them real; a prompt counts once in each forward pass that reads it for several rows.
        padded_tokens: what each step's rows would be if they were padded to its longest.
        sampled_tokens: of the response tokens, those that the student wrote itself, each time that they were learned.
        generated_tokens: those that were drawn, learned or not.
        training_seconds: of this process, since it began or went on.
    """

    steps: int
    rows: int
    response_tokens: int
    tokens: int
    padded_tokens: int
    epochs: float
    training_seconds: float
    sampled_tokens: int = 0
    generated_tokens: int = 0


Validate = Callable[[Any], dict[str, float]]
COUNTED = ("rows", "response_tokens", "tokens", "padded_tokens", "sampled_tokens")  # of all steps
READ = "tokens read"  # beside the sums of a step's loss and its parts
SAMPLED = "samples_"  # before the name of a figure that is a mean over the tokens that the student wrote


def fit(
    model: Any,
    store: TokenStore,
    objective: Objective,
    optim: Optim,
    work: Work,
    *,
    seed: int,
    validate: Validate | None = None,
    validations: int = 0,
    lessons: Lessons | None = None,
    dropout: bool = True,
) -> Totals:
    """Minimise the objective; continue from the work folder's last checkpoint when there is one.

    The loss of a step is the sum over its micro-batches divided by the step's response tokens, each counted by its row's
    weight, so that how the step is cut, and among how many processes, changes nothing but rounding, unless the model has
    dropout (GPT-2's default is 0.1): its random masks depend on how a step is cut, and rows that share a prompt's reading
    share its masks. On a CPU a run ends bit-identical whether
    or not it was interrupted. `validate` is given a model with all its weights, in the first process
    only.

    Args:
        lessons: what each step reads; default: the store's rows.
        dropout: whether the model is in training mode while it learns; else in that of evaluation.

    Raises:
        UserError: a loss or gradient that is not finite; the last good checkpoint stays.
        Interrupted: asked to stop; a checkpoint was written.
    """
    lessons = lessons or data_of(store, optim, seed)
    return _Fit(model, store, objective, optim, work, seed, validate, validations, lessons, dropout).run()


def tokens_of(rows: Iterable[StepRow]) -> float:
    """Response tokens, each counted by its row's weight."""
    return math.fsum(row.weight * len(row.response) for row in rows)


def data_of(store: TokenStore, optim: Optim, seed: int, per_step: int | None = None) -> Data:
    """A store's rows as `optim` asks for them."""
    per_step = per_step or optim.batch_size
    last = None if optim.steps is not None else max(1, round(len(store) * optim.epochs))
    return Data(store, Order(len(store), per_step, seed), optim.total_steps(len(store), per_step), last)


class _Fit:
    """One training, from its last checkpoint to its end."""

    def __init__(
        self,
        model: Any,
        store: TokenStore,
        objective: Objective,
        optim: Optim,
        work: Work,
        seed: int,
        validate: Validate | None,
        validations: int,
        lessons: Lessons,
        dropout: bool,
    ) -> None:
        self.model, self.store, self.optim, self.work, self.validate = model, store, optim, work, validate
        self.lessons, self.total, self.dropout = lessons, lessons.total, dropout
        self.team = team_of(model, objective, in_bf16(optim.precision))
        self.rounded = Rounded(model, f"{seed} {ranks.rank()}") if in_bf16(optim.precision) else None
        self.optimizer = optimizer_for(model, optim)
        self.pass_tokens = optim.pass_tokens(model.config.hidden_size)
        self.checkpoints = Checkpoints(work, model, self.optimizer)
        torch.manual_seed(seed + 2**31 * ranks.rank())
        self.state: dict[str, Any] = {"step": 0, **dict.fromkeys(COUNTED, 0)} | (self.checkpoints.restore() or {})
        lessons.restore(self.state.get("lessons", {}))
        self.start: int = self.state["step"]
        evenly = (round(self.total * n / validations) for n in range(validations + 1)) if validations else ()
        self.when = set(evenly) if validate is not None else set()

    def run(self) -> Totals:
        work, state = self.work, self.state
        work.metrics.rewind(self.start)
        if self.start:
            work.progress.note(f"{work.name:<14} continues from step {self.start} of {self.total}")
        work.hold()
        if not self._validated_at_start():  # at the very beginning, or stopped in the middle of it
            self._report_validation(self.start)
        self.model.train(self.dropout)
        self.begun, self.seen = time.monotonic(), 0
        heap = Heap()
        with recomputed(self.model, self.optim.activation_checkpointing):
            for step in range(self.start, self.total):
                self._step(step)
                heap.look()
        self.model.eval()
        counted = {name: state[name] for name in COUNTED}
        return Totals(
            self.total,
            **counted,
            generated_tokens=self.lessons.generated,
            epochs=self._epoch(),
            training_seconds=time.monotonic() - self.begun,
        )

    def _step(self, step: int) -> None:
        """One optimiser step, its figures, and what is due after it."""
        state, rows = self.state, self._read(step)
        lr = self.optim.lr_at(step, self.total)
        read, means, asked = self._update(step, rows, lr)
        state["step"], state["rows"] = step + 1, state["rows"] + len(self.lessons.rows(step))
        state["response_tokens"] += sum(len(row.response) for row in rows)
        state["sampled_tokens"] += sum(len(row.response) for row in rows if row.sampled)
        state["tokens"] += read
        state["padded_tokens"] += len(rows) * max(map(len, rows), default=0)
        self.seen += read
        self.work.metrics.write(step + 1, epoch=self._epoch(), lr=lr, **means, **self.lessons.figures())
        rate = self.seen / max(time.monotonic() - self.begun, 1e-9)
        figures = {"loss": f"{means['loss']:.4f}"} if means else {}
        self.work.progress.update(step + 1, self.total, start=self.start, **figures, tokens=f"{rate:,.0f}/s")
        self._report_validation(step + 1)
        stop, due = asked()
        if stop or due:
            self._save()
        if stop:
            raise self._stopped(step + 1)

    def _update(self, step: int, rows: list[StepRow], lr: float) -> tuple[int, dict[str, float], Asked]:
        """Gradients and update; tokens read, and means of the loss and its parts, none where no row is left to learn from."""
        told, wrote = (tokens_of(row for row in rows if row.sampled == sampled) for sampled in (False, True))
        with self._rounded(step):
            sums = self._gradients(rows, told + wrote)
        sums, asked = self.team.agree(sums, lambda: (self.work.stop_requested(), self.checkpoints.due(step + 1)))
        read = round(sums.pop(READ, 0))
        if not rows:
            return read, {}, asked
        norm = self.team.clip(self.optim.clip)
        loss = sums.pop("loss") / (told + wrote)
        means = {"loss": loss, **{name: value / (wrote if name.startswith(SAMPLED) else told) for name, value in sums.items()}}
        self._refuse_not_finite(step, loss, norm, lr)
        self.lessons.check(step, means)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return read, {"grad_norm": norm, **means}, asked

    def _read(self, step: int) -> list[StepRow]:
        """The rows of a step; a student that writes some of them can be interrupted, and writes them again later."""
        if not self.lessons.writes:
            return self.lessons(step)

        with self._rounded(step):  # it writes as it is trained; Ctrl-C must find the weights rounded as a whole or not at all
            read = self._tried(lambda: self.lessons(step))
        return self._or_stopped(step, read)

    def _rounded(self, step: int) -> AbstractContextManager[None]:
        """While inside, the model is as products in the step's precision see it."""
        return self.rounded.at(step) if self.rounded is not None else nullcontext()

    def _tried(self, do: Callable[[], T]) -> tuple[T] | None:
        """What takes long and changes nothing; None where Ctrl-C ended it, which it does at once."""
        try:
            with self.work.interruptible():
                return (do(),)
        except KeyboardInterrupt:
            if not self.work.stop_requested() or ranks.several():
                raise
            return None

    def _or_stopped(self, step: int, done: tuple[T] | None) -> T:
        """What was tried; where it was ended, training stops, and does it again when the stage goes on."""
        if done is not None:
            return done[0]
        if step > self.start:
            self._save()
        raise self._stopped(step)

    def _save(self) -> None:
        self.checkpoints.save({**self.state, "lessons": self.lessons.state()})

    def _gradients(self, rows: list[StepRow], weight: float) -> dict[str, float]:
        """Backward passes over a step's micro-batches; the sums of the loss and of its parts, and the tokens read."""
        sums: dict[str, float] = {}
        for batch in self.team.batches(rows, self.pass_tokens):
            with autocast(self.optim.precision):
                loss = self.team.loss(batch)
            (loss.total / weight).backward()
            parts = {f"{SAMPLED if batch.sampled else ''}{name}": value for name, value in loss.parts.items()}
            read = 0 if batch is IDLE else len(batch.ids_T)
            for name, value in {"loss": loss.total.detach(), **parts, READ: read}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _refuse_not_finite(self, step: int, loss: float, norm: float, lr: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "gradient" if math.isfinite(loss) else "loss"
        kept = self.checkpoints.latest_step()
        rows = self.lessons.rows(step)
        epoch = (self.state["rows"] + len(rows)) / len(self.store)
        raise UserError(
            f"{self.work.name}: the {what} is not finite at step {step + 1} of {self.total} "
            f"(epoch {epoch:.2f}, lr {lr:.3g}, data rows {rows[:4]}…); "
            f"{f'the checkpoint of step {kept} is kept' if kept else 'no checkpoint was due yet'}; "
            "lower optim.lr, add optim.warmup, or look at those rows"
        )

    def _validated_at_start(self) -> bool:
        """Whether the validation of the step that training goes on from was written before it stopped."""
        lines = self.work.metrics.read
        # a step's own line has the learning rate; a loss it has only where a row was left to learn
        return ranks.on_first(lambda: any(line["step"] == self.start and "lr" not in line for line in lines()))

    def _report_validation(self, step: int) -> None:
        if step not in self.when or self.validate is None:
            return
        self.model.eval()
        self._or_stopped(step, self._tried(self._validate))
        self.model.train(self.dropout)

    def _validate(self) -> None:
        with full_model(self.model) as plain:
            if plain is not None and self.validate is not None:
                self.work.metrics.write(self.state["step"], epoch=self._epoch(), **self._spent(), **self.validate(plain))

    def _spent(self) -> dict[str, int]:
        """Tokens up to now, for comparing models at equal tokens."""
        counted = {name: self.state[name] for name in ("tokens", "response_tokens", "sampled_tokens")}
        return {**counted, "generated_tokens": self.lessons.generated}

    def _epoch(self) -> float:
        return self.state["rows"] / len(self.store)

    def _stopped(self, step: int) -> Interrupted:
        saved = "saved, " if step else ""
        where = f"stopped at step {step} of {self.total}"
        return Interrupted(f"{self.work.name}: {where}; {saved}run the same command again to go on")
