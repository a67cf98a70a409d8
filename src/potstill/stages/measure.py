"""One model of a study: what it answers, and what its answers and its probabilities score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from potstill.core.component import Settings
from potstill.core.types import Example
from potstill.edges.models import check_vocabulary, load_model
from potstill.edges.sampling import generate
from potstill.losses.scoring import States, token_sums
from potstill.metrics import Metric, ModelMetric, TokenMetric
from potstill.quant.packed import packed_of
from potstill.scorers.programs import judged_by
from potstill.stages.lineage import Place
from potstill.stages.readers import Rendered
from potstill.stages.scores import add_drafted, add_sampled, answer_scores, spoken, text_scores


class Decoding(Settings):
    """How answers are generated."""

    method: Literal["greedy", "sample"] = Field(
        default="greedy", description="sample: the paper's way, over the whole vocabulary"
    )
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer, in tokens")
    seed: int = Field(default=10, ge=0, description="of sampling; the paper's is 10")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of the weights that answer, decode_speed included; log-probabilities of references are in fp32",
    )


@dataclass(frozen=True)
class Beside:
    """A teacher, and what it said of rows that another model read before."""

    model: Any = None
    states: States = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What every model of a study is asked.

    Attributes:
        own: prompts of the user's own, which nothing scores.
    """

    examples: list[Example]
    own: tuple[str, ...]
    decoding: Decoding


@dataclass(frozen=True)
class Measured:
    """One model at one seed; JSON's own types, because a study that was stopped reads it back.

    Attributes:
        answers: to the rows.
        asked: answers to the prompts of the user's own.
        cut: answers to the rows that reached the limit of tokens.
        scores: by metric, of each row; None where the metric abstains.
        abstentions: by metric, how many for which reason.
        outcomes: by metric that runs programs, of each row how they ended.
        samples: by metric that draws answers of its own, those of each row.
        judged_by: what judged programs, see `scorers.programs.judged_by`; None where none was run.
        of_model: by metric, of the model as a whole.
        bytes: on disk; of a hub model, as it lies in memory.
    """

    answers: list[str]
    asked: list[str]
    cut: int
    scores: dict[str, Sequence[float | None]]
    abstentions: dict[str, dict[str, int]]
    outcomes: dict[str, Sequence[tuple[str, ...]]]
    samples: dict[str, list[list[str]]]
    judged_by: dict[str, str] | None
    of_model: dict[str, float]
    parameters: int
    bytes: int


def measure(
    place: Place,
    metrics: Sequence[Metric],
    asked: Asked,
    read: Rendered,
    teacher: Beside,
    vocab: int,
    watch: Callable[[int, int], None],
) -> Measured:
    """Answers and scores of one model, asked in its own form and stopped at its own ends.

    Args:
        read: the rows as this model reads them.
        teacher: what metrics against a teacher compare with.
        vocab: leading token ids that scores are over.
        watch: gets the number of finished answers, and of all, after every token.

    Raises:
        UserError: the model cannot be loaded, or its four-bit codes no longer stand for its weights.
    """
    model, renderer = load_model(place.where), read.renderer
    packed_of(model, place.where)  # refuses codes that no longer stand for the weights: its size counts them
    check_vocabulary(model, renderer.tokenizer, place.where)
    decoding, rows = asked.decoding, len(asked.examples)
    own = [renderer.prompt(asking(prompt)).ids or [] for prompt in asked.own]
    speaker = load_model(place.where, torch.bfloat16) if decoding.precision == "bf16" else model
    given = generate(
        speaker,
        renderer.tokenizer,
        [*(prompt for prompt, _ in read.pairs), *own],
        stop_ids=renderer.stop_ids,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature if decoding.method == "sample" else 0.0,
        seed=decoding.seed,
        on_rows=watch,
    )
    said = spoken(renderer, given.texts)
    accepted = [renderer.scored(example) for example in asked.examples]
    scored = text_scores(metrics, said[:rows], accepted)
    prompts = [prompt for prompt, _ in read.pairs]
    samples = add_sampled(scored, metrics, speaker, renderer, prompts, accepted, decoding.max_new_tokens, watch)
    add_drafted(scored, metrics, speaker, teacher.model, prompts, renderer.stop_ids, watch)
    scores = scored.scores
    measures = {str(m.kind): m for m in metrics if isinstance(m, TokenMetric)}
    if measures:
        beside = teacher if any(metric.needs_teacher for metric in metrics) else Beside()
        scores |= token_sums(model, beside.model, read.pairs, vocab, measures, beside.states)
    wrote = [(prompt, ids) for (prompt, _), ids in zip(read.pairs, given.ids, strict=False)]
    found, unknown = answer_scores(model, teacher.model, wrote, vocab, metrics)
    return Measured(
        answers=said[:rows],
        asked=said[rows:],
        cut=sum(given.cut[:rows]),
        scores=scores | found,
        abstentions=scored.abstentions | unknown,
        outcomes=scored.outcomes,
        samples=samples,
        judged_by=judged_by() if any(metric.runs_programs for metric in metrics) else None,
        of_model={str(m.kind): m(speaker, renderer.tokenizer) for m in metrics if isinstance(m, ModelMetric)},
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=place.bytes(model),
    )


def asking(prompt: str) -> Example:
    """A prompt of the user's own, as a row without an answer."""
    return Example(key="", instruction=prompt, response="")
