"""From all scores of a study to all that they allow to be said."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.study.bootstrap import Sample, percentile_interval, resample, scored, unseen
from potstill.study.caveats import caveats
from potstill.study.doubts import doubts
from potstill.study.estimate import Estimate
from potstill.study.questions import COMPARED, Question, about_teacher, questions
from potstill.study.records import MetricInfo, ModelRow, Study
from potstill.study.ship import Advice, advice
from potstill.study.verdicts import Headline, Verdict, difference_verdict, headline, of_form, retention_verdict


@dataclass(frozen=True)
class Analysis:
    """All that the numbers allow to be said.

    Attributes:
        estimates: model name -> metric -> estimate.
        verdicts: by the primary metric first, the headline's own before all.
        headline: what the report opens with.
        caveats: what a reader must know before believing the verdicts.
        ship: which model to ship, and why.
    """

    estimates: dict[str, dict[str, Estimate]]
    verdicts: tuple[Verdict, ...]
    headline: Headline
    caveats: tuple[str, ...]
    ship: Advice


@dataclass(frozen=True)
class _Comparison:
    """Two models on the rows that both have a score on."""

    question: Question
    metric: MetricInfo
    a: Sample
    b: Sample


def analyse(study: Study, resamples: int = 10_000, seed: int = 0) -> Analysis:
    """Every model's values with intervals, the verdicts on every metric, and the caveats, in words.

    Time and memory: about 0.1 s per million (resamples × clusters); the resampling matrix is held 32 MB at a time.
    """
    measured, compared = _samples(study)
    singles = [sample for *_, sample in measured]
    differences = [pair.a.minus(pair.b) for pair in compared]
    ratios = [sample for pair in compared if pair.question.key == "retention" for sample in (pair.a, pair.b)]
    replicates = resample([*singles, *differences, *ratios], resamples=resamples, seed=seed)
    of_singles, of_differences, of_ratios = np.split(replicates, [len(singles), len(singles) + len(differences)])
    estimates: dict[str, dict[str, Estimate]] = {row.name: {} for row in study.rows}
    for (row, metric, sample), values_R in zip(measured, of_singles, strict=True):
        estimates[row.name][metric.name] = _estimate(row, metric, sample, values_R)
    found = [of_form(study, verdict) for verdict in _verdicts(compared, differences, of_differences, of_ratios)]
    verdicts = tuple(verdict.doubted(tuple(doubts(study, verdict, found, estimates))) for verdict in found)
    limits = tuple(caveats(study, estimates, verdicts))
    return Analysis(estimates, verdicts, headline(study, verdicts), limits, advice(study, verdicts, estimates))


def _samples(study: Study) -> tuple[list[tuple[ModelRow, MetricInfo, Sample]], list[_Comparison]]:
    """Every model by every metric, and every comparison that has scores, the primary metric first."""
    measured: list[tuple[ModelRow, MetricInfo, Sample]] = []
    compared: list[_Comparison] = []
    clusters_N = study.clusters_N()
    for metric in sorted(study.metrics, key=lambda metric: metric.name != study.primary):
        scores_of = {row.name: kept for row in study.rows if (kept := scored(row, metric)) is not None}
        for row in study.rows:
            if row.name in scores_of:
                measured.append(
                    (row, metric, Sample.of(row, metric, study.weights_N(row, metric), clusters_N, scores_of[row.name]))
                )
        for question in questions(study):
            a, b = question.a, question.b
            if (metric.against_teacher and about_teacher(question)) or not study.comparable(a, b, metric):
                continue
            of_ratios = metric.name in (study.primary, "exact_match")
            if a.name in scores_of and b.name in scores_of and (of_ratios or question.key != "retention"):
                keep_N = scores_of[a.name] & scores_of[b.name]
                pair = [Sample.of(row, metric, study.weights_N(row, metric), clusters_N, keep_N) for row in (a, b)]
                compared.append(_Comparison(question, metric, *pair))
    return measured, compared


def _estimate(row: ModelRow, metric: MetricInfo, sample: Sample, values_R: np.ndarray) -> Estimate:
    ci = percentile_interval(values_R) if sample.clusters > 1 else None
    if ci is not None:  # the seeds' part knows nothing of the scale's ends
        low, high = metric.scale
        ci = min(max(low, ci[0]), high), max(min(high, ci[1]), low)
        reach = unseen(metric, sample.clusters)
        if reach is not None:  # near an end of the scale resamples know nothing of rows that are not among these
            ci = min(ci[0], high - reach), max(ci[1], low + reach)
    scores_SN = row.scores_SN(metric.name)
    abstained = 0 if scores_SN is None else int(np.isnan(scores_SN).sum())
    return Estimate(sample.value, ci, sample.rows, abstained, sample.by_seed)


def _verdicts(
    compared: list[_Comparison], differences: list[Sample], of_differences: np.ndarray, of_ratios: np.ndarray
) -> list[Verdict]:
    """One verdict per comparison; a share of the teacher knows whether the teacher is ahead of the controls."""
    verdicts: list[Verdict] = []
    behind: dict[tuple[str, str], list[str]] = {}  # metric and teacher -> controls that it is not shown better than
    ratio_pairs = iter(zip(of_ratios[0::2], of_ratios[1::2], strict=True))
    for pair, difference, values_R in zip(compared, differences, of_differences, strict=True):
        question, metric = pair.question, pair.metric
        if question.key == "retention":
            level = behind.get((metric.name, question.b.name), [])
            verdict = retention_verdict(question, metric, pair.a, pair.b, *next(ratio_pairs), level_with=level)
        else:
            verdict = difference_verdict(question, metric, difference, values_R, (pair.a.value, pair.b.value))
            if _asks_for_lead(question) and not verdict.ahead:
                behind.setdefault((metric.name, question.a.name), []).append(question.b.name)
        if verdict is not None:
            verdicts.append(verdict)
    return verdicts


def _asks_for_lead(question: Question) -> bool:
    """Whether a question asks if a teacher is better than a model that it did not teach."""
    compared = question.key == COMPARED and (question.a.role, question.b.role) == ("teacher", "base")
    return compared or question.key == "teacher_over_sft"


def breakdown(study: Study, by: Literal["tag", "language"]) -> list[dict]:
    """The primary metric within each group of test rows, largest groups first: group, rows, value of each model.

    Tags that differ before their first slash are grouped by what stands there: "new family/clip" with "new family/sum over".
    """
    metric = study.metric(study.primary)
    groups: dict[str, list[int]] = {}
    names = [getattr(example, by) for example in study.examples]
    heads = [name.partition("/")[0] for name in names]
    for n, name in enumerate(heads if len(set(heads)) > 1 else names):
        groups.setdefault(name, []).append(n)
    table = []
    clusters_N = study.clusters_N()
    for group, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        values = {}
        for row in study.rows:
            kept = scored(row, metric)
            if kept is not None:
                keep_N = np.isin(np.arange(len(study.examples)), members) & kept
                values[row.name] = Sample.of(row, metric, study.weights_N(row, metric), clusters_N, keep_N).value
        table.append({"group": group, "rows": len(members), "values": values})
    return table
