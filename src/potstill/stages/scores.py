"""Scores of answers, as text and as tokens: in an evaluation, and on validation rows while training."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from potstill.core.types import Abstain, Example
from potstill.data.prompts import Renderer
from potstill.edges.sampling import generate
from potstill.losses.scoring import token_sums
from potstill.metrics import AnswerMetric, Metric, SampledMetric, TextMetric
from potstill.scorers.text import nfc


def answer_scores(
    model: Any, teacher: Any, wrote: Sequence[tuple[Sequence[int], Sequence[int]]], vocab: int, metrics: Sequence[Metric]
) -> tuple[dict[str, Sequence[float | None]], dict[str, dict[str, int]]]:
    """Scores of answers as tokens, by metric, and why which metric abstained how often.

    Args:
        wrote: prompt and answer, the token that ends it included.
        vocab: leading token ids that model and teacher share.
    """
    measures = {str(m.kind): m for m in metrics if isinstance(m, AnswerMetric)}
    known = [i for i, (_, ids) in enumerate(wrote) if max(ids) < vocab]
    if not measures or not known:
        return {name: [None] * len(wrote) for name in measures}, {}
    sums = token_sums(model, teacher, [wrote[i] for i in known], vocab, measures)
    scores: dict[str, Sequence[float | None]] = {}
    for name, values in sums.items():
        means = dict(zip(known, (value / len(wrote[i][1]) for i, value in zip(known, values, strict=True)), strict=True))
        scores[name] = [means.get(i) for i in range(len(wrote))]
    lost = len(wrote) - len(known)
    reason = {"the answer has a token that the teacher does not know": lost} if lost else {}
    return scores, dict.fromkeys(scores, reason) if lost else {}


def text_scores(
    metrics: Sequence[Metric], answers: Sequence[str], accepted: Sequence[Example]
) -> tuple[dict[str, Sequence[float | None]], dict[str, dict[str, int]]]:
    """Scores of answers by metric, and why which metric abstained how often."""
    scores: dict[str, Sequence[float | None]] = {}
    abstentions: dict[str, dict[str, int]] = {}
    for metric in metrics:
        if not isinstance(metric, TextMetric):
            continue
        values = metric.scores(answers, accepted)
        scores[str(metric.kind)], why = parted(values)
        abstentions |= {str(metric.kind): why} if why else {}
    return scores, abstentions


def sampled_scores(
    metrics: Sequence[Metric],
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    accepted: Sequence[Example],
    max_new_tokens: int,
    watch: Callable[[int, int], None],
) -> tuple[dict[str, Sequence[float | None]], dict[str, dict[str, int]]]:
    """Scores by metrics that draw answers of their own, and why which metric abstained how often.

    Args:
        prompts, accepted: token ids of each row's prompt, and the row.
        watch: gets the number of finished answers, and of all, after every token.
    """
    scores: dict[str, Sequence[float | None]] = {}
    abstentions: dict[str, dict[str, int]] = {}
    for metric in metrics:
        if not isinstance(metric, SampledMetric):
            continue
        given = generate(
            model,
            renderer.tokenizer,
            [prompt for prompt in prompts for _ in range(metric.samples)],
            stop_ids=renderer.stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=metric.temperature,
            seed=metric.seed,
            on_rows=watch,
        )
        said = [nfc(renderer.said(answer)) for answer in given.texts]
        drawn = [said[start : start + metric.samples] for start in range(0, len(said), metric.samples)]
        scores[str(metric.kind)], why = parted(metric(drawn, accepted))
        abstentions |= {str(metric.kind): why} if why else {}
    return scores, abstentions


def parted(values: Sequence[float | Abstain]) -> tuple[list[float | None], dict[str, int]]:
    """Scores with None where there is none, and how often which reason was given."""
    whys = Counter(value.reason for value in values if isinstance(value, Abstain))
    return [None if isinstance(value, Abstain) else value for value in values], dict(whys)
