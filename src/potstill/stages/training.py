"""What the training stages have in common: rows to tokens, validation by epoch, saving."""

import heapq
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from potstill.core.artifact import fingerprint
from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.core.types import Abstain, Example, Split
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, Pair, TokenStore, WeightedPair, instruction_pairs, mask_preview, weighted_pairs
from potstill.edges import ranks
from potstill.edges.models import Model, Tokenizer, check_vocabulary, save_model
from potstill.edges.sampling import generate
from potstill.losses.objectives import Objective
from potstill.losses.scoring import mean_nll
from potstill.metrics.rouge_l import RougeL
from potstill.sources import Source
from potstill.stages.base import Context
from potstill.train.loop import Optim, fit
from potstill.train.team import whole


class Validation(Settings):
    """What is measured while training, on validation rows only; for curves, never for choosing test results."""

    times: int = Field(default=5, ge=0, description="evenly spaced, the last at the end, and once at the start; 0: none")
    rows: int = Field(default=64, ge=1, description="validation rows used")
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer generated for Rouge-L, in tokens")


def train(
    context: Context,
    model: Model,
    tokenizer: Tokenizer,
    source: Source,
    prompts: Prompts,
    optim: Optim,
    validation: Validation,
    objective: Callable[[TokenStore], Objective],
    seed: int,
    finish: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Tokenise, fit, save; return the summary that reports read.

    Args:
        objective: gives what is minimised, told the rows that will be seen.
        finish: called between fitting and saving; makes the model plain.
    """
    work = context.work
    renderer = Renderer(tokenizer, prompts)
    check_length(model, prompts)
    check_vocabulary(model, tokenizer, work.name)
    counts = Counts()
    dropped: Counter[str] = counts.dropped
    store = tokenised(
        work.folder / "tokens",
        weighted_pairs(source.examples("train", dropped), renderer, counts),
        counts,
        f"{work.name}: training rows of {source.kind}",
    )
    counts = store.counts
    held_out = ranks.on_first(lambda: drawn(source, "validation", validation.rows)) if validation.times else []
    validate: Callable[[Model], dict[str, float]] | None = None
    if held_out:
        kept = [(example, prompt.ids) for example in held_out if (prompt := renderer.prompt(example)).ids is not None]
        pairs = list(instruction_pairs((example for example, _ in kept), renderer, Counts()))
        rouge = RougeL()

        def measured(model: Model) -> dict[str, float]:
            answers = generate(
                model,
                tokenizer,
                [ids for _, ids in kept],
                stop_ids=renderer.stop_ids,
                max_new_tokens=validation.max_new_tokens,
            )
            given = [rouge(answer, example) for answer, (example, _) in zip(answers, kept, strict=True)]
            scores = [score for score in given if not isinstance(score, Abstain)]
            figures = {"validation_rouge_l": sum(scores) / len(scores)} if scores else {}
            return {**figures, "validation_nll": mean_nll(model, pairs)} if pairs else figures

        validate = measured if kept else None
    summary = fit(model, store, objective(store), optim, work, seed=seed, validate=validate, validations=validation.times)
    summary["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    finish()
    with whole(model) as plain:
        if plain is not None:
            save_model(plain, tokenizer, work.folder, renderer.stop_ids)
    summary["data"] = {
        "rows": counts.rows,
        "prompt_tokens": counts.prompt_tokens,
        "response_tokens": counts.response_tokens,
        "context_shortened": counts.context_shortened,
        "dropped": dict(counts.dropped),
        "end_of_turn": tokenizer.convert_ids_to_tokens(renderer.end_of_turn_id),
        "mask_preview": mask_preview(store, tokenizer),
    }
    summary["parameters"] = sum(p.numel() for p in model.parameters())
    tidy(context)
    return summary


def tokenised(folder: Path, pairs: Iterable[Pair | WeightedPair], counts: Counts, what: str) -> TokenStore:
    """Rows as tokens, written by the first process and read by all."""
    return TokenStore(folder, ranks.on_first(lambda: TokenStore.write(folder, pairs, counts, what).counts))


def tidy(context: Context) -> None:
    """Training state and token files are not part of the artifact."""
    context.work.metrics.close()
    for name in ("checkpoints", "tokens") if ranks.first() else ():
        shutil.rmtree(context.work.folder / name, ignore_errors=True)


def hash_order(example: Example) -> str:
    """Where a row stands when rows are drawn by a hash, so that a part of a split is no more of one kind than the whole."""
    return fingerprint([example.key, example.instruction, example.response])


def drawn(source: Source, split: Split, count: int) -> list[Example]:
    """So many rows of a split, or all, drawn and ordered by `hash_order`."""
    return heapq.nsmallest(count, source.examples(split), key=hash_order)


def check_length(model: Model, prompts: Prompts) -> None:
    """Refuse rows longer than the model has positions."""
    limit = model.config.max_position_embeddings
    if prompts.max_tokens > limit:
        raise UserError(f"prompts.max_tokens = {prompts.max_tokens} is more than the model's {limit} positions; lower it")


def unfreeze(model: Model) -> Model:
    """Every weight trains; dropout follows the model's config."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
