"""Scores of answers, as text and as tokens: in an evaluation, and on validation rows while training."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from potstill.core.types import Abstain, Example
from potstill.data.prompts import Renderer
from potstill.edges.assisted import Drafting, draft_answers
from potstill.edges.sampling import generate
from potstill.losses.scoring import token_sums
from potstill.metrics import AnswerMetric, DraftMetric, Judged, Metric, SampledMetric, TextMetric


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


@dataclass
class Scored:
    """What metrics say of the rows, by metric.

    Attributes:
        scores: of each row; None where the metric abstains.
        abstentions: how many rows, by reason; metrics that never abstain are left out.
        outcomes: of each row, how the programs ended that the score rests on; of metrics that run programs alone.
    """

    scores: dict[str, Sequence[float | None]] = field(default_factory=dict)
    abstentions: dict[str, dict[str, int]] = field(default_factory=dict)
    outcomes: dict[str, Sequence[tuple[str, ...]]] = field(default_factory=dict)

    def add(self, metric: Metric, found: Sequence[Judged]) -> None:
        """Of one more metric."""
        name = str(metric.kind)
        self.scores[name] = [None if isinstance(one.score, Abstain) else one.score for one in found]
        whys = Counter(one.score.reason for one in found if isinstance(one.score, Abstain))
        self.abstentions |= {name: dict(whys)} if whys else {}
        self.outcomes |= {name: [one.outcomes for one in found]} if metric.runs_programs else {}


def text_scores(metrics: Sequence[Metric], answers: Sequence[str], accepted: Sequence[Example]) -> Scored:
    """What the text metrics among these say of answers."""
    scored = Scored()
    for metric in metrics:
        if isinstance(metric, TextMetric):
            scored.add(metric, metric.judged(answers, accepted))
    return scored


def spoken(renderer: Renderer, texts: Sequence[str]) -> list[str]:
    """Answers in one form: llama.cpp does not normalise, Qwen2's tokenizer does."""
    return [unicodedata.normalize("NFC", renderer.said(text)) for text in texts]


def add_drafted(
    scored: Scored,
    metrics: Sequence[Metric],
    model: Any,
    teacher: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    watch: Callable[[int, int], None],
) -> None:
    """Add to `scored` how the model does as its teacher's draft model, on the first rows; the others are abstained from.

    Raises:
        UserError: the two have other vocabularies, or too few positions.
    """
    made: dict[tuple[int, ...], list[Drafting]] = {}
    for metric in metrics:
        if not isinstance(metric, DraftMetric):
            continue
        asked = prompts[: metric.rows]
        if metric.settings() not in made:
            made[metric.settings()] = draft_answers(
                model,
                teacher,
                asked,
                drafts=metric.drafts,
                new_tokens=metric.new_tokens,
                seed=metric.seed,
                stop_ids=stop_ids,
                watch=watch,
            )
        rest = [Judged(Abstain("not among the rows that are drafted"))] * (len(prompts) - len(asked))
        scored.add(metric, [*map(Judged, metric.scores(made[metric.settings()])), *rest])


def add_sampled(
    scored: Scored,
    metrics: Sequence[Metric],
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    accepted: Sequence[Example],
    max_new_tokens: int,
    watch: Callable[[int, int], None],
) -> dict[str, list[list[str]]]:
    """Add to `scored` what metrics say that draw answers of their own; the answers drawn for each row, by metric.

    Args:
        prompts, accepted: token ids of each row's prompt, and the row.
        watch: gets the number of finished answers, and of all, after every token.
    """
    samples: dict[str, list[list[str]]] = {}
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
        said = spoken(renderer, given.texts)
        drawn = [said[start : start + metric.samples] for start in range(0, len(said), metric.samples)]
        samples[str(metric.kind)] = drawn
        scored.add(metric, metric.judged(drawn, accepted))
    return samples
