"""The only optimiser loop: SFT, distillation and pretraining all run through `fit`."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import Interrupted, UserError
from potstill.data.batches import Order
from potstill.data.store import TokenStore
from potstill.edges import ranks
from potstill.edges.machine import Heap
from potstill.edges.models import device, recomputed
from potstill.losses.objective import Objective
from potstill.train.checkpoint import Checkpoints
from potstill.train.rounding import Rounded
from potstill.train.team import full_model, team_of
from potstill.train.work import Work

Precision = Literal["auto", "fp32", "bf16"]


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
    micro_batch_tokens: int = Field(
        default=8192,
        ge=1,
        description="tokens in one forward pass; changes memory and rounding, and with dropout which values are dropped",
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

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over so many rows; the last one may be short."""
        return self.steps if self.steps is not None else max(1, math.ceil(round(rows * self.epochs) / self.batch_size))

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of the step, counted from 0: linear warm-up, then constant or half a cosine to zero."""
        warm = self.warmup * total
        if step < warm:
            return self.lr * (step + 1) / (math.ceil(warm) + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


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
        tokens: tokens read, every one of them real.
        padded_tokens: what each step's rows would be if they were padded to its longest.
        training_seconds: of this process, since it began or went on.
    """

    steps: int
    rows: int
    response_tokens: int
    tokens: int
    padded_tokens: int
    epochs: float
    training_seconds: float


Validate = Callable[[Any], dict[str, float]]


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
) -> Totals:
    """Minimise the objective; continue from the work folder's last checkpoint when there is one.

    The loss of a step is the sum over its micro-batches divided by the step's response tokens, each counted by its row's
    weight, so that how the step is cut, and among how many processes, changes nothing but rounding, unless the model has
    dropout (GPT-2's default is 0.1): its random masks depend on how a step is cut. On a CPU a run ends bit-identical whether
    or not it was interrupted. `validate` is given a model with all its weights, in the first process
    only.

    Raises:
        UserError: a loss or gradient that is not finite; the last good checkpoint stays.
        Interrupted: asked to stop; a checkpoint was written.
    """
    return _Fit(model, store, objective, optim, work, seed, validate, validations).run()


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
    ) -> None:
        self.model, self.store, self.optim, self.work, self.validate = model, store, optim, work, validate
        self.total = optim.total_steps(len(store))
        self.last_row = None if optim.steps is not None else max(1, round(len(store) * optim.epochs))
        self.order = Order(len(store), optim.batch_size, seed)
        self.team = team_of(model, objective, in_bf16(optim.precision))
        self.rounded = Rounded(model, f"{seed} {ranks.rank()}") if in_bf16(optim.precision) else None
        self.optimizer = optimizer_for(model, optim)
        self.checkpoints = Checkpoints(work, model, self.optimizer)
        torch.manual_seed(seed + 2**31 * ranks.rank())
        fresh = {"step": 0, "rows": 0, "response_tokens": 0, "tokens": 0, "padded_tokens": 0}
        self.state: dict[str, Any] = self.checkpoints.restore() or fresh
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
        self.model.train()
        self.begun, self.seen = time.monotonic(), 0
        heap = Heap()
        with recomputed(self.model, self.optim.activation_checkpointing):
            for step in range(self.start, self.total):
                self._step(step)
                heap.look()
        self.model.eval()
        counted = {name: state[name] for name in ("rows", "response_tokens", "tokens", "padded_tokens")}
        return Totals(self.total, **counted, epochs=self._epoch(), training_seconds=time.monotonic() - self.begun)

    def _step(self, step: int) -> None:
        """One optimiser step, its figures, and what is due after it."""
        store, state = self.store, self.state
        rows = self.order.step(step, self.last_row)
        lr = self.optim.lr_at(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        weight = math.fsum(store.weight(row) * store.response_length(row) for row in rows)
        with self.rounded.at(step) if self.rounded is not None else nullcontext():
            sums = self._gradients(rows, weight)
        sums, asked = self.team.agree(sums, lambda: (self.work.stop_requested(), self.checkpoints.due(step + 1)))
        norm = self.team.clip(self.optim.clip)
        means = {name: value / weight for name, value in sums.items()}
        self._refuse_not_finite(step, rows, means["loss"], norm, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        length = sum(store.length(row) for row in rows)
        state["step"], state["rows"] = step + 1, state["rows"] + len(rows)
        state["response_tokens"] += sum(store.response_length(row) for row in rows)
        state["tokens"] += length
        state["padded_tokens"] += len(rows) * max(store.length(row) for row in rows)
        self.seen += length
        self.work.metrics.write(step + 1, epoch=self._epoch(), lr=lr, grad_norm=norm, **means)
        rate = self.seen / max(time.monotonic() - self.begun, 1e-9)
        figures = {"loss": f"{means['loss']:.4f}", "tokens": f"{rate:,.0f}/s"}
        self.work.progress.update(step + 1, self.total, start=self.start, **figures)
        self._report_validation(step + 1)
        stop, due = asked()
        if stop or due:
            self.checkpoints.save(state)
        if stop:
            raise self._stopped(step + 1)

    def _gradients(self, rows: list[int], weight: float) -> dict[str, float]:
        """Backward passes over a step's micro-batches; the sums of the loss and of its parts."""
        sums: dict[str, float] = {}
        for batch in self.team.batches(self.store, rows, self.optim.micro_batch_tokens):
            with autocast(self.optim.precision):
                loss = self.team.loss(batch)
            (loss.total / weight).backward()
            for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _refuse_not_finite(self, step: int, rows: list[int], loss: float, norm: float, lr: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "gradient" if math.isfinite(loss) else "loss"
        kept = self.checkpoints.latest_step()
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
        return ranks.on_first(lambda: any(line["step"] == self.start and "loss" not in line for line in lines()))

    def _report_validation(self, step: int) -> None:
        if step not in self.when or self.validate is None:
            return
        self.model.eval()
        try:
            with self.work.interruptible(), full_model(self.model) as plain:
                if plain is not None:
                    self.work.metrics.write(step, epoch=self._epoch(), **self.validate(plain))
        except KeyboardInterrupt:  # the validation is measured when the stage goes on
            if not self.work.stop_requested() or ranks.several():
                raise
            if step > self.start:
                self.checkpoints.save(self.state)
            raise self._stopped(step) from None
        self.model.train()

    def _epoch(self) -> float:
        return self.state["rows"] / len(self.store)

    def _stopped(self, step: int) -> Interrupted:
        saved = "saved, " if step else ""
        where = f"stopped at step {step} of {self.total}"
        return Interrupted(f"{self.work.name}: {where}; {saved}run the same command again to go on")
