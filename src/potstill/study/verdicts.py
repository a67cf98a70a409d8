"""The answer to each question, its words, and the sentence that the report opens with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.core.numbers import amount, decimals, interval, number
from potstill.study.bootstrap import Sample, percentile_interval
from potstill.study.controls import equal_tokens, searched_apart, trained_apart, unequal
from potstill.study.questions import Question
from potstill.study.records import MetricInfo, Study
from potstill.study.words import joined

MIN_CLUSTERS = 6  # below this a verdict is refused: with 5 clusters, all for one side, luck has 2 · 0.5^5 = 6%
Outcome = Literal["helped", "hurt", "not shown", "measured"]


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


def difference_verdict(question: Question, metric: MetricInfo, sample: Sample, replicates_R: np.ndarray) -> Verdict:
    verdict: Outcome = "not shown"
    ci = percentile_interval(replicates_R) if sample.clusters > 1 else None
    if ci is not None and sample.clusters >= MIN_CLUSTERS:
        low, high = _gain(metric, ci)
        verdict = "helped" if low > 0 else "hurt" if high < 0 else "not shown"
    label: str = verdict
    if question.key == "four_bits" and sample.clusters >= MIN_CLUSTERS:
        label = {"helped": "no harm", "hurt": "hurt", "not shown": "no loss shown"}[verdict]
    sentence = _difference_in_words(question, metric, sample, ci, verdict)
    equal = equal_tokens(question.a, question.b) if question.key == "kd_over_sft" else None
    a, b = question.a.name, question.b.name
    about = (question.key, question.question, metric.name, a, b)
    return Verdict(*about, sample.value, ci, verdict, label, sentence, sample.rows, sample.clusters, equal)


_DOING = {"kd_over_sft": "distilling", "sft_over_base": "fine-tuning", "gptq_over_rtn": "GPTQ", "four_bits": "4 bits"}


def _difference_in_words(
    question: Question, metric: MetricInfo, sample: Sample, ci: tuple[float, float] | None, verdict: Outcome
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


def retention_verdict(
    question: Question, metric: MetricInfo, a: Sample, b: Sample, a_R: np.ndarray, b_R: np.ndarray
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


def headline(study: Study, verdicts: Sequence[Verdict]) -> tuple[Outcome, str, str]:
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
    if not unequal(x, y):
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
    unlike = f" This is NOT like against like: {b.name} and {a.name} differ in {joined(found)}." if found else ""
    return unlike + "".join(f" This is NOT equal tuning: {sentence}" for sentence in searched_apart(a, b))


_OF_THE_CONTROL = {
    "data": "training data",
    "prompts": "prompts",
    "start": "the model that training began from",
    "init": "how that model was cut",
    "adapter": "which of its weights trained",
}
