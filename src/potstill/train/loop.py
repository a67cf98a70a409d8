"""The only optimiser loop: SFT, distillation and pretraining all run through `fit`."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import Interrupted, UserError
from potstill.data.batches import Order
from potstill.data.store import TokenStore
from potstill.edges import ranks
from potstill.edges.models import device
from potstill.losses.objective import Objective
from potstill.train.checkpoint import Checkpoints
from potstill.train.team import team_of, whole
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
        default=8192, ge=1, description="tokens in one forward pass; changes memory, not the result"
    )
    precision: Precision = Field(default="auto", description="bf16 autocast over fp32 weights; auto: on a GPU that has it")

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


def fit(
    model: Any,
    store: TokenStore,
    objective: Objective,
    optim: Optim,
    work: Work,
    *,
    seed: int,
    validate: Callable[[Any], dict[str, float]] | None = None,
    validations: int = 0,
) -> dict[str, Any]:
    """Minimise the objective; continue from the work folder's last checkpoint when there is one.

    The loss of a step is the sum over its micro-batches divided by the step's response tokens, each counted by its row's
    weight, so that how the step is cut, and among how many processes, changes nothing but rounding. On a CPU it ends
    bit-identical whether or not it was interrupted. `validate` is given a model with all its weights, in the first process
    only.

    Returns:
        Totals: steps, rows, response_tokens, tokens (every one of them real), padded_tokens (what each step's rows would be
        if they were padded to its longest), epochs, seconds of this process.

    Raises:
        UserError: a loss or gradient that is not finite; the last good checkpoint stays.
        Interrupted: asked to stop; a checkpoint was written.
    """
    total = optim.total_steps(len(store))
    last_row = None if optim.steps is not None else max(1, round(len(store) * optim.epochs))
    order = Order(len(store), optim.batch_size, seed)
    team = team_of(model, objective, in_bf16(optim.precision))
    optimizer = optimizer_for(model, optim)
    checkpoints = Checkpoints(work, model, optimizer)
    torch.manual_seed(seed + 2**31 * ranks.rank())
    state = checkpoints.restore() or {"step": 0, "rows": 0, "response_tokens": 0, "tokens": 0, "padded_tokens": 0}
    start = state["step"]
    work.metrics.rewind(start)
    if start:
        work.progress.note(f"{work.name:<14} continues from step {start} of {total}")
    when = {round(total * n / validations) for n in range(validations + 1)} if validate is not None and validations else set()
    measured = ranks.on_first(lambda: any(line["step"] == start and "loss" not in line for line in work.metrics.read()))

    def stopped(step: int) -> Interrupted:
        saved = "saved, " if step else ""
        return Interrupted(f"{work.name}: stopped at step {step} of {total}; {saved}run the same command again to go on")

    def report_validation(step: int) -> None:
        if step not in when or validate is None:
            return
        model.eval()
        try:
            with work.interruptible(), whole(model) as plain:
                if plain is not None:
                    work.metrics.write(step, epoch=state["rows"] / len(store), **validate(plain))
        except KeyboardInterrupt:  # the validation is measured when the stage goes on
            if not work.stop_requested() or ranks.several():
                raise
            if step > start:
                checkpoints.save(state)
            raise stopped(step) from None
        model.train()

    work.hold()
    if not measured:  # at the very beginning, or stopped in the middle of it
        report_validation(start)
    model.train()
    begun = time.monotonic()
    seen = 0
    for step in range(start, total):
        rows = order.step(step, last_row)
        tokens = sum(store.response_length(row) for row in rows)
        weight = math.fsum(store.weight(row) * store.response_length(row) for row in rows)
        lr = optim.lr_at(step, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, float] = {}
        for batch in team.batches(store, rows, optim.micro_batch_tokens):
            with autocast(optim.precision):
                loss = team.loss(batch)
            (loss.total / weight).backward()
            for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        length = sum(store.length(row) for row in rows)
        state["tokens"] += length
        state["padded_tokens"] += len(rows) * max(store.length(row) for row in rows)
        seen += length
        sums, asked = team.agree(sums, lambda done=step + 1: (work.stop_requested(), checkpoints.due(done)))
        norm = team.clip(optim.clip)
        means = {name: value / weight for name, value in sums.items()}
        epoch = (state["rows"] + len(rows)) / len(store)
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            what = "gradient" if math.isfinite(means["loss"]) else "loss"
            kept = checkpoints.latest_step()
            raise UserError(
                f"{work.name}: the {what} is not finite at step {step + 1} of {total} "
                f"(epoch {epoch:.2f}, lr {lr:.3g}, data rows {rows[:4]}…); "
                f"{f'the checkpoint of step {kept} is kept' if kept else 'no checkpoint was due yet'}; "
                "lower optim.lr, add optim.warmup, or look at those rows"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"], state["rows"] = step + 1, state["rows"] + len(rows)
        state["response_tokens"] += tokens
        work.metrics.write(step + 1, epoch=epoch, lr=lr, grad_norm=norm, **means)
        rate = seen / max(time.monotonic() - begun, 1e-9)
        work.progress.update(step + 1, total, start=start, loss=f"{means['loss']:.4f}", tokens=f"{rate:,.0f}/s")
        report_validation(step + 1)
        stop, due = asked()
        if stop or due:
            checkpoints.save(state)
        if stop:
            raise stopped(step + 1)
    model.eval()
    return {
        "steps": total,
        "rows": state["rows"],
        "response_tokens": state["response_tokens"],
        "tokens": state["tokens"],
        "padded_tokens": state["padded_tokens"],
        "epochs": state["rows"] / len(store),
        "training_seconds": time.monotonic() - begun,
    }
