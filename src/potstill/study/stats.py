"""Whether a difference is more than luck: a paired bootstrap over clusters of test rows and training seeds, and its verdicts.

For a model with scores x[s, n] (seed s, test row n) and weights w[n] (1, or the response tokens of the row) the value is

    mean over s of  Σ_n x[s, n] / Σ_n w[n]

Test rows with equal keys (questions on one paragraph, functions of one module) form one cluster: they rise and fall
together, so that drawing them one by one makes intervals too narrow (20 clusters of 10 rows, of whose variance 30% is
the cluster's: 95% intervals cover 67%; Cameron, Gelbach and Miller, Bootstrap-based improvements for inference with
clustered errors, 2008). One resample draws K of the K clusters with replacement, each with all its rows, *the same ones
for every model*, and S seeds with replacement, the same ones for models with equal lists of seeds. The value remains a
ratio of sums over all rows drawn. It is computed as (resampled clusters, all seeds) + √(S/(S−1)) · (mean deviation
of the drawn seeds from their average). A plain bootstrap over S seeds has only (S−1)/S of the variance, half of it
with two seeds; the factor mends that. What it cannot mend is that two or three seeds say little about their own spread:
such intervals remain too narrow, and a caveat says so (simulated with luck of the seeds twice that of the rows:
95% intervals cover 87% with two seeds, 93% with three). Luck that is particular to a row *and* a seed enters both
terms, which widens the interval a little (compare Owen, The pigeonhole bootstrap, 2007).

Intervals are percentile intervals (Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 13).
A comparison uses the rows on which both models have a score from all of their seeds; a row on which a metric abstained
is left out on both sides, never set to 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from potstill.core.numbers import amount, decimals, interval, number
from potstill.study.records import MetricInfo, ModelRow, Study

LEVEL = 0.95
MIN_CLUSTERS = 6  # below this a verdict is refused: with 5 clusters, all for one side, luck has 2 · 0.5^5 = 6%
FEW_CLUSTERS = 30
FEW_SEEDS = 4
EQUAL_WITHIN = 0.01  # relative; a last, smaller batch makes counts differ by less
_CELLS = 4_000_000  # entries of the resampling matrix held at once: 32 MB

Outcome = Literal["helped", "hurt", "not shown", "measured"]


@dataclass(frozen=True)
class Estimate:
    """A model's value of one metric.

    Attributes:
        value: None when no row was scored by every seed.
        ci: 95% interval over clusters of test rows and seeds; None with fewer than two clusters.
        rows: test rows that entered.
        abstained: answers, over all seeds, that the metric gave no score.
        by_seed: the value of each seed.
    """

    value: float | None
    ci: tuple[float, float] | None
    rows: int
    abstained: int
    by_seed: tuple[float | None, ...]


@dataclass(frozen=True)
class Verdict:
    """The answer to one question by one metric.

    Attributes:
        key: kd_over_sft, four_bits, gptq_over_rtn, sft_over_base or retention.
        a, b: names of the models compared.
        difference: a − b in the metric's unit; for retention a ÷ b in percent.
        ci: 95% interval of the difference (or ratio); None with fewer than two shared clusters.
        verdict: "helped" and "hurt" mean that the interval excludes 0 on that side; "measured" is retention's, which
            has no yes or no.
        label: the badge's words, such as "no loss shown".
        rows, clusters: test rows scored for both, and the clusters that they fall into.
        equal_tokens: whether both saw the same response tokens and steps, within 1%; None where unknown or beside the point.
    """

    key: str
    question: str
    metric: str
    a: str
    b: str
    difference: float | None
    ci: tuple[float, float] | None
    verdict: Outcome
    label: str
    sentence: str
    rows: int
    clusters: int
    equal_tokens: bool | None = None


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


@dataclass(frozen=True)
class Sample:
    """A statistic ready to be resampled: sums of seed-averaged scores and of weights per cluster, and the seeds' deviations.

    Attributes:
        deviations: for each list of seeds, how far the value of each lies from their average.
        rows, clusters: how many were scored.
    """

    scores_K: np.ndarray
    weights_K: np.ndarray
    deviations: dict[tuple[int | None, ...], np.ndarray]
    by_seed: tuple[float | None, ...]
    rows: int
    clusters: int

    @property
    def value(self) -> float | None:
        weight = self.weights_K.sum()
        return float(self.scores_K.sum() / weight) if self.rows and weight > 0 else None

    @classmethod
    def of(
        cls, row: ModelRow, metric: MetricInfo, tokens: Sequence[int], clusters_N: np.ndarray, keep_N: np.ndarray
    ) -> "Sample":
        """The statistic of one model over the rows to keep; the model must have scores there."""
        scores_SN = row.scores_SN(metric.name)
        assert scores_SN is not None
        scores_SN = np.where(keep_N, scores_SN, 0.0)
        weights_N = keep_N * (np.asarray(tokens, dtype=float) if metric.over == "tokens" else 1.0)
        K = int(clusters_N.max(initial=-1)) + 1
        scores_K = np.bincount(clusters_N, scores_SN.mean(0), minlength=K)
        weights_K = np.bincount(clusters_N, weights_N, minlength=K)
        if weights_N.sum() == 0:
            return cls(scores_K, weights_K, {}, (None,) * len(scores_SN), 0, 0)
        by_seed = scores_SN.sum(1) / weights_N.sum()
        deviations = {row.seeds: by_seed - by_seed.mean()} if len(by_seed) > 1 else {}
        kept = len(np.unique(clusters_N[keep_N]))
        return cls(scores_K, weights_K, deviations, tuple(map(float, by_seed)), int(keep_N.sum()), kept)

    def minus(self, other: "Sample") -> "Sample":
        """The difference on the same rows, taken before resampling so that equal scores give exactly 0."""
        deviations = dict(self.deviations)
        for seeds, deviation in other.deviations.items():
            deviations[seeds] = deviations[seeds] - deviation if seeds in deviations else -deviation
        return Sample(self.scores_K - other.scores_K, self.weights_K, deviations, (), self.rows, self.clusters)


def resample(samples: Sequence[Sample], *, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap every sample with the same draws of clusters, and of seeds where the lists of seeds are equal.

    Returns:
        [samples, resamples]; NaN where a resample drew no scored row.
    """
    if not samples:
        return np.empty((0, resamples))
    K = len(samples[0].scores_K)
    columns_KM = np.stack([column for sample in samples for column in (sample.scores_K, sample.weights_K)], axis=1)
    sums_RM = np.concatenate([counts_RK @ columns_KM for counts_RK in _cluster_counts(K, resamples, seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        values_MR = (sums_RM[:, 0::2] / sums_RM[:, 1::2]).T
    shares: dict[tuple[int | None, ...], np.ndarray] = {}
    for sample, values_R in zip(samples, values_MR, strict=True):
        for seeds, deviation_S in sample.deviations.items():
            S = len(seeds)
            if seeds not in shares:
                rng = np.random.default_rng([seed, 1, len(shares)])
                shares[seeds] = rng.multinomial(S, [1 / S] * S, size=resamples) / S
            values_R += np.sqrt(S / (S - 1)) * (shares[seeds] @ deviation_S)
    return values_MR


def percentile_interval(replicates: np.ndarray) -> tuple[float, float] | None:
    """The middle 95% of the replicates that are finite; None when none is."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) == 0:
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap(study: Study, resamples: int = 10_000, seed: int = 0) -> Analysis:
    """Every model's values with intervals, the verdicts on every metric, and the caveats, in words.

    Time and memory: about 0.1 s per million (resamples × clusters); the resampling matrix is held 32 MB at a time.
    """
    measured: list[tuple[ModelRow, MetricInfo, Sample]] = []
    compared: list[tuple[_Question, MetricInfo, Sample, Sample]] = []
    clusters_N = study.clusters_N()
    for metric in sorted(study.metrics, key=lambda metric: metric.name != study.primary):
        scored = {row.name: kept for row in study.rows if (kept := _scored(row, metric)) is not None}
        for row in study.rows:
            if row.name in scored:
                measured.append((row, metric, Sample.of(row, metric, study.tokens, clusters_N, scored[row.name])))
        for question in _questions(study):
            a, b = question.a, question.b
            if (
                a.name not in scored
                or b.name not in scored
                or (question.key == "retention" and metric.name not in (study.primary, "exact_match"))
            ):
                continue
            keep_N = scored[a.name] & scored[b.name]
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
            verdict = _retention(question, metric, a, b, *next(ratio_pairs))
        else:
            verdict = _difference(question, metric, difference, values_R)
        if verdict is not None:
            verdicts.append(verdict)
    return Analysis(estimates, tuple(verdicts), _headline(study, verdicts), tuple(_caveats(study, estimates)))


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
            kept = _scored(row, metric)
            if kept is not None:
                keep_N = np.isin(np.arange(len(study.examples)), members) & kept
                values[row.name] = Sample.of(row, metric, study.tokens, clusters_N, keep_N).value
        table.append({"group": group, "rows": len(members), "values": values})
    return table


def _scored(row: ModelRow, metric: MetricInfo) -> np.ndarray | None:
    """[test rows], True where every seed has a score; None when this metric was not taken of this model."""
    scores_SN = row.scores_SN(metric.name)
    return None if scores_SN is None else np.asarray(np.isfinite(scores_SN).all(axis=0))


def _cluster_counts(K: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample drew each cluster: chunks of [resamples, K], the same for the same seed."""
    rng = np.random.default_rng([seed, 0])
    chunk = max(1, _CELLS // max(1, K))
    for start in range(0, resamples, chunk):
        R = min(chunk, resamples - start)
        if K == 0:
            yield np.zeros((R, 0))
            continue
        drawn = rng.integers(0, K, size=(R, K)) + K * np.arange(R)[:, None]
        yield np.bincount(drawn.ravel(), minlength=R * K).reshape(R, K).astype(float)


@dataclass(frozen=True)
class _Question:
    key: str
    question: str
    a: ModelRow
    b: ModelRow


def _questions(study: Study) -> list[_Question]:
    kd, sft, base, teacher = (study.with_role(role) for role in ("kd", "sft", "base", "teacher"))
    quantized, rtn = study.with_role("quantized"), study.with_role("rtn")
    questions = [_Question("kd_over_sft", "KD over SFT", a, b) for a in kd for b in sft]
    for row in quantized:
        source = _source(study, row)
        if source is not None:
            questions.append(_Question("four_bits", "4 bits against full precision", row, source))
    for row in quantized:
        rivals = [other for other in rtn if _source(study, other) is _source(study, row)]
        for other in rivals[:1] or rtn[:1]:
            questions.append(_Question("gptq_over_rtn", "GPTQ against round-to-nearest", row, other))
    questions += [_Question("sft_over_base", "SFT over base", a, b) for a in sft for b in base]
    students = [*kd, *sft, *quantized]
    return questions + [_Question("retention", "Share of the teacher kept", row, teacher[0]) for row in students if teacher]


def _source(study: Study, row: ModelRow) -> ModelRow | None:
    """The model that a quantised row came from: as told, else the longest name that begins its own, else KD, else SFT."""
    full = study.with_role("kd", "sft", "base", "other", "teacher")
    if row.source is not None:
        return next((other for other in study.rows if other.name == row.source), None)
    begun = [other for other in full if row.name.startswith(other.name)]
    if begun:
        return max(begun, key=lambda other: len(other.name))
    return full[0] if full and full[0].role != "teacher" else None


def _difference(question: _Question, metric: MetricInfo, sample: Sample, replicates_R: np.ndarray) -> Verdict:
    verdict: Outcome = "not shown"
    ci = percentile_interval(replicates_R) if sample.clusters > 1 else None
    if ci is not None and sample.clusters >= MIN_CLUSTERS:
        low, high = _gain(metric, ci)
        verdict = "helped" if low > 0 else "hurt" if high < 0 else "not shown"
    label: str = verdict
    if question.key == "four_bits" and sample.clusters >= MIN_CLUSTERS:
        label = {"helped": "no harm", "hurt": "hurt", "not shown": "no loss shown"}[verdict]
    sentence = _difference_in_words(question, metric, sample, ci, verdict)
    equal = _equal_tokens(question.a, question.b) if question.key == "kd_over_sft" else None
    a, b = question.a.name, question.b.name
    about = (question.key, question.question, metric.name, a, b)
    return Verdict(*about, sample.value, ci, verdict, label, sentence, sample.rows, sample.clusters, equal)


_DOING = {"kd_over_sft": "distilling", "sft_over_base": "fine-tuning", "gptq_over_rtn": "GPTQ", "four_bits": "4 bits"}


def _difference_in_words(
    question: _Question, metric: MetricInfo, sample: Sample, ci: tuple[float, float] | None, verdict: Outcome
) -> str:
    a, b, doing, difference = question.a.name, question.b.name, _DOING[question.key], sample.value
    rows = f"{sample.rows} test rows" + (f" in {sample.clusters} clusters" if sample.clusters < sample.rows else "")
    if difference is None or ci is None:
        return f"{a} and {b} share {rows} scored by {metric.title}: nothing can be said."
    digits = decimals(metric.unit, ci)
    found = f"{a} − {b} is {number(difference, digits, signed=True)} {interval(ci, digits, signed=True)} by {metric.title}"
    if sample.clusters < MIN_CLUSTERS:
        return f"{found}, on {rows}: too few for any verdict."
    if verdict == "not shown" and question.key == "four_bits":
        loss = -_gain(metric, ci)[0]
        still = f"a loss of up to {amount(loss, metric, digits)} is still possible" if loss > 0 else "the scores are the same"
        return f"No loss shown at 4 bits: {found}; {still}."
    if verdict == "not shown":
        why = "the scores are the same" if ci == (0, 0) else "the interval includes 0"
        return f"Not shown that {doing} helped: {found}; {why}."
    size = f"{amount(difference, metric, digits)} {interval(sorted((abs(ci[0]), abs(ci[1]))), digits)}"
    than = f"{a} is {'better' if verdict == 'helped' else 'worse'} than {b} by {size}."
    did = "did no harm" if question.key == "four_bits" and verdict == "helped" else verdict
    return f"{doing[0].upper()}{doing[1:]} {did}: {than}"


def _gain(metric: MetricInfo, ci: tuple[float, float]) -> tuple[float, float]:
    """The interval with its sign turned so that more is better."""
    return ci if metric.higher_is_better else (-ci[1], -ci[0])


def _retention(
    question: _Question, metric: MetricInfo, a: Sample, b: Sample, a_R: np.ndarray, b_R: np.ndarray
) -> Verdict | None:
    """The ratio of the means, not the mean of ratios: a row on which the teacher scores 0 must not blow it up."""
    if a.value is None or b.value is None or b.value <= 0:
        return None
    ratio = 100 * a.value / b.value
    with np.errstate(divide="ignore", invalid="ignore"):
        ci = percentile_interval(100 * a_R / b_R) if a.clusters > 1 else None
    digits = decimals("%", ci)
    share, found = f"{number(ratio, digits)}%", interval(ci, digits)
    name, teacher = question.a.name, question.b.name
    if metric.higher_is_better:
        sentence, label = f"{name} keeps {share} {found} of the teacher's {metric.title}.", f"{number(ratio, 0)}% kept"
    else:
        sentence, label = (
            f"{name} has {share} {found} of the teacher's {metric.title}; lower is better.",
            f"{number(ratio, 0)}%",
        )
    about = (question.key, question.question, metric.name, name, teacher)
    return Verdict(*about, ratio, ci, "measured", label, sentence, a.rows, a.clusters)


def _unequal(x: float | None, y: float | None) -> bool:
    return x is not None and y is not None and abs(x - y) > EQUAL_WITHIN * max(x, y)


def _equal_tokens(a: ModelRow, b: ModelRow) -> bool | None:
    if _unequal(a.mean_tokens(), b.mean_tokens()) or _unequal(a.mean_steps(), b.mean_steps()):
        return False
    return None if a.mean_tokens() is None or b.mean_tokens() is None else True


def _headline(study: Study, verdicts: Sequence[Verdict]) -> tuple[Outcome, str, str]:
    """Outcome, badge and sentence of what the report opens with."""
    first = next((v for v in verdicts if v.key == "kd_over_sft" and v.metric == study.primary), None)
    if first is not None:
        return first.verdict, first.label, first.sentence + _tokens_in_words(study, first) + _control_in_words(study, first)
    if study.with_role("kd"):
        missing = "no SFT-only student was measured" if not study.with_role("sft") else "KD and SFT lack scores to compare"
        return (
            "not shown",
            "not shown",
            f"Not shown that distilling helped: {missing}, and a share of the teacher proves nothing.",
        )
    if verdicts:
        return verdicts[0].verdict, verdicts[0].label, verdicts[0].sentence
    return "not shown", "nothing compared", "No two models were measured that could be compared."


def _tokens_in_words(study: Study, verdict: Verdict) -> str:
    if verdict.equal_tokens is not False:
        return "" if verdict.equal_tokens else " Whether both trained on equally many response tokens is not known."
    a, b = (next(row for row in study.rows if row.name == name) for name in (verdict.a, verdict.b))
    unit, x, y = "response tokens", a.mean_tokens(), b.mean_tokens()
    if not _unequal(x, y):
        unit, x, y = "optimizer steps", a.mean_steps(), b.mean_steps()
    assert x is not None
    assert y is not None
    factor = f"{x / y:.2f} times" if y else "more than"
    return f" This is NOT at equal tokens: {a.name} trained on {factor} the {unit} of {b.name}."


def _control_in_words(study: Study, verdict: Verdict) -> str:
    """What the headline adds when the control differs in more than how it was tuned."""
    a, b = (next(row for row in study.rows if row.name == name) for name in (verdict.a, verdict.b))
    differ = trained_apart(a, b)
    found = [words for key, words in _OF_THE_CONTROL.items() if key in differ]
    unlike = f" This is NOT like against like: {b.name} and {a.name} differ in {_and(found)}." if found else ""
    return unlike + "".join(f" This is NOT equal tuning: {sentence}" for sentence in searched_apart(a, b))


_OF_THE_CONTROL = {
    "data": "training data",
    "prompts": "prompts",
    "start": "the model that training began from",
    "init": "how that model was cut",
    "adapter": "which of its weights trained",
}


def trained_apart(a: ModelRow, b: ModelRow) -> dict[str, tuple[Any, Any]]:
    """Each setting of training in which two models differ, with both values; nothing where one's training is unknown."""
    if a.trained_with is None or b.trained_with is None:
        return {}
    keys = dict.fromkeys((*a.trained_with, *b.trained_with))
    values = {key: (a.trained_with.get(key, "unset"), b.trained_with.get(key, "unset")) for key in keys if key != "searched"}
    searched = _searched(a), _searched(b)
    alike = {key for key in searched[0] if _same_values(searched[0][key], searched[1].get(key, ()))}
    picked = {key for key in values for field in alike if key == field or key.startswith(f"{field}.")}
    return {key: (x, y) for key, (x, y) in values.items() if x != y and key not in picked}


def searched_apart(a: ModelRow, b: ModelRow) -> list[str]:
    """A sentence for each setting that was searched for one of two models and not over the same values for the other.

    Values that a search picked may differ: each method has its own best ones. What must be equal is what was tried.
    """
    if a.trained_with is None or b.trained_with is None:
        return []
    told = []
    for key in dict.fromkeys((*_searched(a), *_searched(b))):
        x, y = (_searched(row).get(key, ()) for row in (a, b))
        if _same_values(x, y):
            continue
        more, less, most, least = (a, b, len(x), len(y)) if len(x) >= len(y) else (b, a, len(y), len(x))
        if most == 1:  # one value is no search
            continue
        over = "over other values" if least == most else f"over {_values(least)}"
        theirs = over if least else "was not"
        favours = f": this favours {more.name}" if most > least else ""
        told.append(f"{more.name}'s {key} was searched over {_values(most)}, {less.name}'s {theirs}{favours}.")
    return told


def _searched(row: ModelRow) -> dict[str, Any]:
    return (row.trained_with or {}).get("searched", {})


def _same_values(x: Sequence[Any], y: Sequence[Any]) -> bool:
    """The same ones, in whatever order; they may be tables."""
    return len(x) == len(y) and all(value in y for value in x)


def _values(count: int) -> str:
    return "1 value" if count == 1 else f"{count} values"


def _caveats(study: Study, estimates: dict[str, dict[str, Estimate]]) -> Iterator[str]:
    kd, sft = study.with_role("kd"), study.with_role("sft")
    trained = [*kd, *sft]
    once = [row.name for row in trained if len(row.seeds) == 1]
    few = [f"{row.name}: {len(row.seeds)}" for row in trained if 1 < len(row.seeds) < FEW_SEEDS]
    if once:
        were = "was" if len(once) == 1 else "were"
        yield (
            f"{_and(once)} {were} trained with one seed: the intervals speak of the test rows only, not of training luck. "
            "Another seed could turn the verdict."
        )
    if few:
        yield (
            f"Fewer than {FEW_SEEDS} seeds ({', '.join(few)}): they say little about how much training luck varies, "
            "so the intervals are likely too narrow."
        )
    for a in kd:
        for b in sft:
            if a.seeds != b.seeds and max(len(a.seeds), len(b.seeds)) > 1:
                yield f"{a.name} and {b.name} do not have the same seeds, so their training luck is not paired."
            equal = _equal_tokens(a, b)
            if equal is None:
                yield (
                    f"Whether {a.name} and {b.name} trained on equally many response tokens is not known: "
                    "a gain may come from more training."
                )
            elif not equal:
                tokens = f"{_plain(a.mean_tokens())} against {_plain(b.mean_tokens())} response tokens"
                steps = f"{_plain(a.mean_steps())} against {_plain(b.mean_steps())} optimizer steps"
                yield f"{a.name} and {b.name} are NOT compared at equal tokens: {tokens}, {steps}."
            differ = trained_apart(b, a)
            if differ:
                told = "; ".join(f"{key} {x} against {y}" for key, (x, y) in differ.items())
                yield f"{b.name} and {a.name} were not trained alike: {told}. Part of the difference may come from that."
            for sentence in searched_apart(a, b):
                yield f"{sentence} A search finds better settings, and takes the luckier of equal ones."
    asked = study.prompts
    unlike = [row.name for row in study.rows if (row.trained_with or {}).get("prompts", asked) != asked]
    if asked is not None and unlike:
        yield (
            f"The prompts of this evaluation are not those that {_and(unlike)} trained with: "
            "a model asked in another form than it learned may score lower than it could."
        )
    if kd and not sft:
        yield "There is no SFT-only student: what distilling adds to plain fine-tuning cannot be told from this study."
    if len(kd) > 1 or len(sft) > 1:
        yield (
            "Several KD or SFT models are compared, each at 95% and without correction for it: "
            "where nothing differs, one in twenty such verdicts still claims a difference."
        )
    N = len(study.examples)
    K = study.cluster_count()
    if K < N:
        yield f"{N:,} test rows fall into {K:,} groups that share a key; the bootstrap draws groups."
    if K < FEW_CLUSTERS:
        what, unit = (f"{K} clusters (titles, modules …) of test rows", "clusters") if K < N else (f"{N} test rows", "rows")
        yield f"Only {what}: the intervals are rough, and fewer than {MIN_CLUSTERS} {unit} give no verdict at all."
    for metric in study.metrics:
        found = [
            f"{row.name} {estimate.abstained} of {N * len(row.seeds)}"
            for row in study.rows
            if (estimate := estimates[row.name].get(metric.name)) is not None and estimate.abstained
        ]
        if found:
            yield (
                f"{metric.title} gave no score for some answers ({', '.join(found)}); "
                "these rows are left out of both sides of a comparison, not counted as 0."
            )
    if study.decoding.method == "sample":
        yield (
            f"Answers were sampled at temperature {study.decoding.temperature}, once per row and seed: "
            "the same models would score a little differently on another draw."
        )
    dropped = study.data.get("dropped")
    if isinstance(dropped, dict) and sum(dropped.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        yield f"{sum(dropped.values())} test rows were dropped before scoring ({reasons})."


def _plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
