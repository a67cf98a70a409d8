"""What a recipe would cost, before anything heavy is loaded: parameters, tokens, FLOPs and memory, all rough."""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from potstill.commands.spread import Cluster
from potstill.core.artifact import Artifact, fingerprint
from potstill.core.errors import UserError
from potstill.data.prompts import Prompts
from potstill.edges.models import Size, config_of, device, size_of
from potstill.inits import Init
from potstill.losses.head import CHUNK_BYTES
from potstill.recipe.header import Recipe
from potstill.run.graph import Planned, plan
from potstill.sources import Source
from potstill.stages.base import ModelRef
from potstill.stages.best import Best
from potstill.stages.cache import Cache
from potstill.stages.distill import Distill
from potstill.stages.evaluate import Evaluate
from potstill.stages.export import Export
from potstill.stages.pretrain import Pretrain
from potstill.stages.quantize import Quantize
from potstill.stages.sft import SFT

SAMPLE = 2000  # rows looked at to guess the rest
TEMPLATE = 40  # characters that a prompt's template adds
CHARACTERS_PER_TOKEN = 3.6  # English prose under a vocabulary of 150,000; code and small vocabularies need more tokens


@dataclass(frozen=True)
class Amount:
    """Rows of a training split and their mean lengths in tokens."""

    rows: int
    prompt: float
    response: float

    @property
    def tokens(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True)
class Shaped:
    """A model by its config, and its size."""

    config: Any
    size: Size


def estimate(recipe: Recipe, out: Path, cluster: Cluster | None = None) -> list[dict[str, Any]]:
    """One row per node: state, parameters, training tokens, FLOPs, bytes of memory and disk; None where it cannot be known
    offline. What a teacher says of the same rows is computed and kept once, for the first stage that needs it.

    With a cluster also what one of its GPUs has to do in a training step.
    """
    sizes: dict[str, Shaped | None] = {}
    kept: set[str] = set()
    amounts: dict[str, Amount | str] = {}
    return [_row(item, sizes, amounts, kept, cluster) | _known(item) for item in plan(recipe, out, offline=True)]


def _known(item: Planned) -> dict[str, Any]:
    """Of a stage that is done, what it really took."""
    if not item.done:
        return {}
    artifact = Artifact.load(item.folder)
    found = {key: artifact.summary.get(key) for key in ("parameters", "steps", "tokens", "response_tokens")}
    return {key: value for key, value in found.items() if value is not None} | {"memory_bytes": artifact.peak_memory_bytes}


def _amount(source: Source, prompts: Prompts, cache: dict[str, Amount | str]) -> Amount | str:
    """The training split's amount, or why it cannot be told."""
    key = f"{source.spec()}{prompts}"
    if key not in cache:
        try:
            sample = list(islice(source.examples("train"), SAMPLE))
            rows = len(sample)
            if rows == SAMPLE:
                rows = sum(1 for _ in source.examples("train"))
            asked = [len(e.instruction) + len(e.context) + TEMPLATE for e in sample]
            answered = [len(e.response) for e in sample]
            prompt = sum(min(n / CHARACTERS_PER_TOKEN, prompts.max_prompt_tokens) for n in asked)
            response = sum(min(n / CHARACTERS_PER_TOKEN + 1, prompts.max_tokens) for n in answered)
            mean = Amount(rows, prompt / len(sample), response / len(sample)) if sample else None
            cache[key] = mean or "the training split is empty"
        except UserError as error:
            cache[key] = str(error)
    return cache[key]


def _shaped(ref: ModelRef, init: Init | None, sizes: dict[str, Shaped | None]) -> Shaped | None:
    if ref.scheme == "stage" and init is None:
        return sizes.get(ref.target)
    try:
        if ref.scheme != "stage":
            config = config_of(str(ref), offline_shape=True)
        elif (found := sizes.get(ref.target)) is not None:
            config = found.config
        else:
            return None
        config = init.shape(config) if init is not None else config
        return Shaped(config, size_of(config))
    except UserError:
        return None


def _size(ref: ModelRef | None, sizes: dict[str, Shaped | None]) -> Size | None:
    found = _shaped(ref, None, sizes) if ref is not None else None
    return found.size if found is not None else None


def _row(
    item: Planned,
    sizes: dict[str, Shaped | None],
    amounts: dict[str, Amount | str],
    kept: set[str],
    cluster: Cluster | None,
) -> dict[str, Any]:
    stage = item.node.stage
    shaped: Shaped | None = None
    row: dict[str, Any] = {
        "stage": item.node.id,
        "kind": stage.kind,
        "state": item.state,
        "seed": stage.seed if isinstance(stage, SFT | Distill | Pretrain) else None,
        "parameters": None,
        "steps": None,
        "tokens": None,
        "response_tokens": None,
        "flops": None,
        "memory_bytes": None,
        "output_bytes": None,
        "cache_bytes": None,
        "note": "",
    }
    if isinstance(stage, Cache):
        kept.add(f"{stage.signal}:{stage.name}")
        return row | _read_once(stage, _size(stage.teacher, sizes), _amount(stage.data, stage.prompts, amounts))
    if isinstance(stage, Pretrain):
        theirs = _size(stage.tokenizer, sizes)
        config = stage.shape.config(theirs.vocab if theirs is not None else stage.vocab_size)
        shaped = Shaped(config, size_of(config))
    elif isinstance(stage, Quantize | Export):
        shaped = _shaped(stage.model, None, sizes)
    elif isinstance(stage, SFT):
        shaped = _shaped(stage.model, stage.init, sizes)
    elif isinstance(stage, Distill):
        shaped = _shaped(stage.student, stage.init, sizes)
    elif isinstance(stage, Best):
        shaped = sizes.get(stage.candidates[0].target)
    sizes.setdefault(stage.name, shaped)
    size = shaped.size if shaped is not None else None
    if isinstance(stage, Evaluate):
        measured = [found.parameters for row_ in stage.study if (found := _size(row_.model, sizes)) is not None]
        held = stage.teacher()
        teacher = _size(held.model, sizes) if held is not None else None
        row["memory_bytes"] = 4 * (max(measured, default=0) + (teacher.parameters if teacher else 0)) or None
        return row
    if size is None:
        return row
    row["parameters"] = size.parameters
    if isinstance(stage, SFT | Distill | Pretrain):
        amount = _amount(stage.data, stage.prompts, amounts)
        if not isinstance(amount, str) and isinstance(stage, Pretrain):  # texts end to end, cut into windows
            text = (amount.tokens if stage.text == "rows" else amount.prompt) - TEMPLATE / CHARACTERS_PER_TOKEN
            width = min(stage.prompts.max_tokens, stage.shape.positions) - 1
            amount = Amount(max(1, round(amount.rows * text / width)), 1, width)
        teacher = _size(stage.teacher, sizes) if isinstance(stage, Distill) else None
        row["memory_bytes"] = _training_memory(size, teacher, stage.optim.micro_batch_tokens, stage.prompts.max_tokens)
        if isinstance(stage, SFT | Distill) and stage.adapter is not None:  # no gradients or averages of what is frozen
            row["memory_bytes"] -= 12 * size.parameters + 4 * size.vocab * size.hidden
        row["output_bytes"] = 4 * size.parameters
        if isinstance(amount, str):
            row["note"] = f"rows unknown: {amount}"
            return row
        steps = stage.optim.total_steps(amount.rows)
        rows = min(
            steps * stage.optim.batch_size, round(amount.rows * stage.optim.epochs) if stage.optim.steps is None else 10**12
        )
        tokens, learned = rows * amount.tokens, rows * amount.response
        flops = 6 * size.body * tokens + 6 * size.hidden * size.vocab * learned
        if isinstance(stage, Distill) and teacher is not None:
            form = _form(stage, kept)
            if form != "topk":
                flops += 2 * teacher.hidden * teacher.vocab * learned
            more = [stage.top_k, stage.temperature] if form == "topk" else []
            rows_of = [
                stage.teacher,
                stage.teacher_precision,
                stage.optim.precision,
                stage.data.spec(),
                stage.prompts.model_dump(),
            ]
            once = fingerprint([*rows_of, form, *more])
            if stage.signal == "live" and stage.cache is None:
                flops += 2 * teacher.body * tokens
            elif stage.cache is None and once not in kept:
                kept.add(once)
                seen = min(rows, amount.rows)
                flops += 2 * teacher.body * seen * amount.tokens
                row["cache_bytes"] = round(_width(stage.signal, stage.top_k, teacher) * seen * amount.response)
        row |= {"steps": steps, "tokens": round(tokens), "response_tokens": round(learned), "flops": flops}
        if cluster is not None:
            cut, longest = isinstance(stage, Distill) and stage.shard_teacher, stage.prompts.max_tokens
            row |= cluster.share(size, teacher, stage.optim, amount.tokens, longest, flops / steps, cut)
    elif isinstance(stage, Quantize):
        row["memory_bytes"] = 8 * size.parameters
        row["output_bytes"] = round(size.body * (4 + 16 / stage.group) / 8) + 4 * size.parameters
    return row


def _form(stage: Distill, kept: set[str]) -> str:
    """What is kept for a stage: its own choice, or that of the cache it names."""
    return "topk" if stage.cache is not None and f"topk:{stage.cache.target}" in kept else stage.signal


def _width(signal: str, k: int, teacher: Size) -> int:
    """Bytes kept of a token."""
    return 8 * k + 4 if signal == "topk" else 2 * teacher.hidden


def _read_once(stage: Cache, teacher: Size | None, amount: Amount | str) -> dict[str, Any]:
    """Of a cache stage: one pass of the teacher over the rows."""
    if teacher is None or isinstance(amount, str):
        return {"note": f"rows unknown: {amount}" if isinstance(amount, str) else ""}
    tokens, learned = amount.rows * amount.tokens, amount.rows * amount.response
    head = 2 * teacher.hidden * teacher.vocab * learned if stage.signal == "topk" else 0
    return {
        "tokens": round(tokens),
        "response_tokens": round(learned),
        "flops": 2 * teacher.body * tokens + head,
        "memory_bytes": teacher.parameters * (2 if device().type == "cuda" else 4),
        "cache_bytes": round(_width(stage.signal, stage.top_k, teacher) * learned),
    }


def _training_memory(size: Size, teacher: Size | None, micro_tokens: int, longest: int) -> int:
    """float32 weights, gradients and two Adam averages, activations of a micro-batch, and the fused head's buffers."""
    tokens = max(micro_tokens, longest)
    layers = max(1, size.body // (12 * size.hidden**2))
    activations = tokens * layers * size.hidden * 16 * 4
    head = 4 * size.vocab * size.hidden + CHUNK_BYTES * (1 if teacher is None else 2)
    frozen = teacher.parameters * (2 if device().type == "cuda" else 4) if teacher is not None else 0
    return round(16 * size.parameters + activations + head + frozen)


def print_plan(name: str, rows: list[dict[str, Any]]) -> None:
    """For a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("parameters", "steps", "tokens", "learned", "FLOP", "memory", "writes"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["stage"],
            row["kind"],
            row["state"],
            *(_short(row[key]) for key in ("parameters", "steps", "tokens", "response_tokens")),
            f"{row['flops']:.1e}" if row["flops"] else "?" if row["note"] else "",
            _bytes(row["memory_bytes"]),
            _bytes((row["output_bytes"] or 0) + (row["cache_bytes"] or 0)),
        )
    console = Console(width=None if sys.stdout.isatty() else 110, markup=False)
    console.print(table)
    todo = [row for row in rows if row["state"] != "done"]
    known = sum(row["flops"] or 0 for row in todo)
    peak = max((row["memory_bytes"] or 0 for row in todo), default=0)
    disk = sum((row["output_bytes"] or 0) + (row["cache_bytes"] or 0) for row in todo)
    cached = sum(row["cache_bytes"] or 0 for row in todo)
    told = f"{name}: {len(todo)} of {len(rows)} stages to do"
    if todo:
        flops = f"about {known:.1e} FLOP, " if known else ""
        told += f", {flops}{_bytes(peak)} memory at most, {_bytes(disk)} on disk"
        told += f" (of it {_bytes(cached)} of what teachers say)" if cached else ""
        told += "; rough figures"
    console.print(f"\n{told}", highlight=False)
    for note in sorted({row["note"] for row in rows if row["note"]}):
        console.print(note, highlight=False)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float | None) -> str:
    return f"{_short(value)}B".replace(" B", "B") if value else ""
