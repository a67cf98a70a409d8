"""From all scores of a study to all that they allow to be said."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.study.bootstrap import Sample, percentile_interval, resample, scored
from potstill.study.caveats import caveats
from potstill.study.estimate import Estimate
from potstill.study.questions import Question, questions
from potstill.study.records import MetricInfo, ModelRow, Study
from potstill.study.verdicts import Outcome, Verdict, difference_verdict, headline, retention_verdict


@dataclass(frozen=True)
class Analysis:
    """All that the numbers allow to be said.

    Attributes:
        estimates: model name -> metric -> estimate.
        verdicts: by the primary metric first, the headline's own before all.
        headline: the sentence that the report opens with, and its badge.
        caveats: what a reader must know before believing the verdicts.
    """

    estimates: dict[str, dict[str, Estimate]]
    verdicts: tuple[Verdict, ...]
    headline: tuple[Outcome, str, str]
    caveats: tuple[str, ...]


def analyse(study: Study, resamples: int = 10_000, seed: int = 0) -> Analysis:
    """Every model's values with intervals, the verdicts on every metric, and the caveats, in words.

    Time and memory: about 0.1 s per million (resamples × clusters); the resampling matrix is held 32 MB at a time.
    """
    measured: list[tuple[ModelRow, MetricInfo, Sample]] = []
    compared: list[tuple[Question, MetricInfo, Sample, Sample]] = []
    clusters_N = study.clusters_N()
    for metric in sorted(study.metrics, key=lambda metric: metric.name != study.primary):
        scores_of = {row.name: kept for row in study.rows if (kept := scored(row, metric)) is not None}
        for row in study.rows:
            if row.name in scores_of:
                measured.append((row, metric, Sample.of(row, metric, study.tokens, clusters_N, scores_of[row.name])))
        for question in questions(study):
            a, b = question.a, question.b
            if (
                a.name not in scores_of
                or b.name not in scores_of
                or (question.key == "retention" and metric.name not in (study.primary, "exact_match"))
            ):
                continue
            keep_N = scores_of[a.name] & scores_of[b.name]
            pair = [Sample.of(row, metric, study.tokens, clusters_N, keep_N) for row in (a, b)]
            compared.append((question, metric, pair[0], pair[1]))

    singles = [sample for *_, sample in measured]
    differences = [a.minus(b) for _, _, a, b in compared]
    ratios = [sample for question, _, a, b in compared if question.key == "retention" for sample in (a, b)]
    replicates = resample([*singles, *differences, *ratios], resamples=resamples, seed=seed)
    single_replicates, difference_replicates, ratio_replicates = np.split(
        replicates, [len(singles), len(singles) + len(differences)]
    )

    estimates: dict[str, dict[str, Estimate]] = {row.name: {} for row in study.rows}
    for (row, metric, sample), values_R in zip(measured, single_replicates, strict=True):
        ci = percentile_interval(values_R) if sample.clusters > 1 else None
        if ci is not None and metric.unit in ("0–100", "%"):
            ci = max(0.0, ci[0]), min(100.0, ci[1])  # the seeds' term knows nothing of the scale's ends
        abstained = int(np.isnan(row.scores_SN(metric.name)).sum())  # type: ignore[arg-type]
        estimates[row.name][metric.name] = Estimate(sample.value, ci, sample.rows, abstained, sample.by_seed)

    verdicts = []
    ratio_pairs = iter(zip(ratio_replicates[0::2], ratio_replicates[1::2], strict=True))
    for (question, metric, a, b), difference, values_R in zip(compared, differences, difference_replicates, strict=True):
        if question.key == "retention":
            verdict = retention_verdict(question, metric, a, b, *next(ratio_pairs))
        else:
            verdict = difference_verdict(question, metric, difference, values_R)
        if verdict is not None:
            verdicts.append(verdict)
    return Analysis(estimates, tuple(verdicts), headline(study, verdicts), tuple(caveats(study, estimates)))


def breakdown(study: Study, by: Literal["tag", "language"]) -> list[dict]:
    """The primary metric within each group of test rows, largest groups first: group, rows, value of each model."""
    metric = study.metric(study.primary)
    groups: dict[str, list[int]] = {}
    for n, example in enumerate(study.examples):
        groups.setdefault(getattr(example, by), []).append(n)
    table = []
    clusters_N = study.clusters_N()
    for group, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        values = {}
        for row in study.rows:
            kept = scored(row, metric)
            if kept is not None:
                keep_N = np.isin(np.arange(len(study.examples)), members) & kept
                values[row.name] = Sample.of(row, metric, study.tokens, clusters_N, keep_N).value
        table.append({"group": group, "rows": len(members), "values": values})
    return table
