"""The answer to each question, its words, and the sentence that the report opens with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from potstill.core.numbers import amount, decimals, estimate, interval, number
from potstill.study.bootstrap import Sample, percentile_interval, unseen
from potstill.study.controls import (
    amount_in_words,
    control_in_words,
    equal_tokens,
    format_in_words,
    rolled_apart,
    rollouts_in_words,
)
from potstill.study.questions import COMPARED, Question
from potstill.study.records import MetricInfo, Study
from potstill.study.words import bits_in_words, joined

# of all clusters, and of those in which two models differ; below this a verdict is refused: with 5, all for one side, luck has
# 2 · 0.5^5 = 6%, as the sign test has it
MIN_CLUSTERS = 6
Outcome = Literal["helped", "hurt", "better", "worse", "not shown", "measured"]
Shown = Literal["helped", "hurt", "better", "worse", "not shown", "measured", "in doubt"]


@dataclass(frozen=True)
class Verdict:
    """The answer to one question by one metric.

    Attributes:
        key: kd_over_sft, rl_over_start, rl_over_sft, sft_over_start, teacher_over_sft, quantized, gptq_over_rtn, sft_over_base,
            compared or retention.
        a, b: names of the models compared.
        difference: a − b in the metric's unit; None for retention.
        values: of a and of b on the rows that both have a score on; of retention None.
        ratio: for retention, a ÷ b in percent; else None.
        ci: 95% interval of the difference or of the ratio; None with fewer than two shared clusters.
        verdict: "helped" and "hurt" mean that the interval excludes 0 on that side, and so do "better" and "worse" where nobody
            knows what was done to either model; "measured" is retention's, which has no yes or no.
        label: the badge's words, such as "no loss shown".
        sentence: all of it in one sentence, its doubts with it.
        rows, clusters: test rows scored for both, and the clusters that they fall into.
        equal_tokens: whether both saw the same response tokens and steps, within 1%; None where unknown or beside the point.
        doubts: why a claim must not be believed as it stands, in a few words each.
        could_show: for a "not shown" difference, half the width of its interval: about the least difference that these rows
            and seeds could have shown.
    """

    key: str
    question: str
    metric: str
    a: str
    b: str
    difference: float | None
    ratio: float | None
    ci: tuple[float, float] | None
    verdict: Outcome
    label: str
    sentence: str
    rows: int
    clusters: int
    equal_tokens: bool | None = None
    doubts: tuple[str, ...] = ()
    could_show: float | None = None
    values: tuple[float | None, float | None] = (None, None)

    @property
    def shown_as(self) -> Shown:
        """How a page marks it: with doubts neither green nor red."""
        return "in doubt" if self.doubts else self.verdict

    @property
    def ahead(self) -> bool:
        """Whether the interval lies on the side where a is better than b."""
        return self.verdict in ("helped", "better")

    @property
    def claims(self) -> bool:
        """Whether a difference is claimed."""
        return self.verdict in ("helped", "hurt", "better", "worse")

    def doubted(self, doubts: Sequence[str]) -> "Verdict":
        """The same verdict with what speaks against it, where it claims anything."""
        if not doubts or not self.claims:
            return self
        sentence = f"{self.sentence} In doubt: {'; '.join(doubts)}."
        return replace(self, doubts=tuple(doubts), label=f"{self.label}, in doubt", sentence=sentence)


@dataclass(frozen=True)
class Headline:
    """What the report opens with.

    Attributes:
        shown_as: the colour's name: the verdict's, or "in doubt".
        about: the verdict that it speaks of; None where it says that a comparison is missing.
    """

    verdict: Outcome
    shown_as: Shown
    label: str
    sentence: str
    about: Verdict | None = None


def difference_verdict(
    question: Question,
    metric: MetricInfo,
    sample: Sample,
    replicates_R: np.ndarray,
    values: tuple[float | None, float | None] = (None, None),
) -> Verdict:
    """Whether a difference excludes 0, in words.

    Args:
        sample: of the difference, and `replicates_R` its resamples.
        values: of the two models, on the same rows.
    """
    verdict: Outcome = "not shown"
    ci = percentile_interval(replicates_R) if sample.clusters > 1 else None
    if ci is not None:
        low, high = metric.scale
        ci = max(low - high, ci[0]), min(high - low, ci[1])
    if ci is not None and min(sample.clusters, sample.differing) >= MIN_CLUSTERS:
        low, high = _gain(metric, ci)
        good, bad = _CLAIMS.get(question.key, ("helped", "hurt"))
        verdict = good if low > 0 else bad if high < 0 else "not shown"
    label = _LABELS.get(question.key, {}).get(verdict, verdict) if sample.clusters >= MIN_CLUSTERS else verdict
    words = _difference_in_words(question, metric, sample, ci, verdict)
    if question.key == "rl_over_start" and None not in values and ci is not None:
        after, before = (number(value, decimals(metric.unit, ci)) for value in values)
        words = f"{words} Before {before}, after {after}."
    if question.key == "rl_over_sft":
        words = f"{words} {rollouts_in_words(question.a, question.b)}"
    could_show = (ci[1] - ci[0]) / 2 if ci is not None and verdict == "not shown" and sample.clusters >= MIN_CLUSTERS else None
    return Verdict(
        key=question.key,
        question=question.question,
        metric=metric.name,
        a=question.a.name,
        b=question.b.name,
        difference=sample.value,
        ratio=None,
        ci=ci,
        verdict=verdict,
        label=label,
        sentence=words,
        rows=sample.rows,
        clusters=sample.clusters,
        equal_tokens=equal_tokens(question.a, question.b) if question.key == "kd_over_sft" else None,
        could_show=could_show or None,
        values=values,
    )


_PLAIN = (COMPARED, "rl_over_sft")  # which is better; nothing is said of what helped
_CLAIMS: dict[str, tuple[Outcome, Outcome]] = dict.fromkeys(_PLAIN, ("better", "worse"))
_LABELS = {
    **{key: {"not shown": "no difference shown"} for key in _PLAIN},
    "quantized": {"helped": "no harm", "hurt": "hurt", "not shown": "no loss shown"},
    "teacher_over_sft": {"helped": "ahead", "hurt": "behind", "not shown": "not ahead"},
}
_DOING = {"kd_over_sft": "distilling", "sft_over_base": "fine-tuning", "gptq_over_rtn": "GPTQ"}
_DOING |= {"rl_over_start": "learning from rewards", "sft_over_start": "fine-tuning"}


def of_form(study: Study, verdict: Verdict) -> Verdict:
    """The same verdict; where a model learned the form alone and did not gain by the primary metric, its badge says so."""
    words = format_in_words(study.row(verdict.a))
    if not words or verdict.key != "rl_over_start" or verdict.metric != study.primary or verdict.ahead:
        return verdict
    return replace(verdict, label="format only", sentence=f"{verdict.sentence} {words[0].upper()}{words[1:]}.")


def _difference_in_words(
    question: Question, metric: MetricInfo, sample: Sample, ci: tuple[float, float] | None, verdict: Outcome
) -> str:
    a, b, difference = question.a.name, question.b.name, sample.value
    rows = f"{sample.rows} test rows" + (f" in {sample.clusters} clusters" if sample.clusters < sample.rows else "")
    if difference is None or ci is None:
        return f"{a} and {b} share {rows} scored by {metric.title}: nothing can be said."
    digits = decimals(metric.unit, ci)
    found = f"{a} − {b} is {number(difference, digits, signed=True)} {interval(ci, digits, signed=True)} by {metric.title}"
    if sample.clusters < MIN_CLUSTERS:
        return f"{found}, on {rows}: too few for any verdict."
    if verdict == "not shown":
        return _not_shown_in_words(question, metric, sample, found, ci, digits)
    size = f"{amount(difference, metric, digits)} {interval(sorted((abs(ci[0]), abs(ci[1]))), digits)}"
    than = f"{a} is {'better' if verdict in ('helped', 'better') else 'worse'} than {b} by {size}."
    if question.key in _PLAIN:
        return than
    if question.key == "teacher_over_sft":
        return f"{'There was something' if verdict == 'helped' else 'There was nothing'} to teach: {than}"
    doing = _doing(question)
    did = "did no harm" if question.key == "quantized" and verdict == "helped" else verdict
    return f"{doing[0].upper()}{doing[1:]} {did}: {than}"


def _doing(question: Question) -> str:
    """What is judged: of a student cut out of a larger model, the cut as well."""
    if question.key == "quantized":
        return bits_in_words(question.a.bits)
    return "cutting and fine-tuning" if question.cut else _DOING[question.key]


def _not_shown_in_words(
    question: Question, metric: MetricInfo, sample: Sample, found: str, ci: tuple[float, float], digits: int
) -> str:
    """What is still possible; "the same" only of scores that are, row by row."""
    if ci == (0, 0):
        reach = unseen(metric, sample.clusters)
        still = "the scores are the same"
        still += f", and on other rows could differ by up to {amount(reach, metric, digits)}" if reach is not None else ""
    elif ci[0] > 0 or ci[1] < 0:
        which = "rows" if sample.clusters == sample.rows else "clusters"
        still = f"they differ in {sample.differing} {which}, too few for a verdict"
    elif question.key == "quantized":
        loss = -_gain(metric, ci)[0]
        still = f"a loss of up to {amount(loss, metric, digits)} is still possible" if loss > 0 else "the interval ends at 0"
    else:
        reach = amount((ci[1] - ci[0]) / 2, metric, digits)
        at = "ends at 0" if 0 in ci else "includes 0"
        these = "These rows" if question.key in _PLAIN else "These rows and seeds"
        still = f"the interval {at}. {these} could have shown a difference of about {reach}"
    if question.key in _PLAIN:
        return f"Not shown that {question.a.name} and {question.b.name} differ: {found}; {still}."
    if question.key == "quantized":
        return f"No loss shown at {bits_in_words(question.a.bits)}: {found}; {still}."
    if question.key == "teacher_over_sft":
        return f"Not shown that there was anything to teach: {found}; {still}."
    return f"Not shown that {_doing(question)} helped: {found}; {still}."


def _gain(metric: MetricInfo, ci: tuple[float, float]) -> tuple[float, float]:
    """The interval with its sign turned so that more is better."""
    return ci if metric.higher_is_better else (-ci[1], -ci[0])


def retention_verdict(
    question: Question,
    metric: MetricInfo,
    a: Sample,
    b: Sample,
    a_R: np.ndarray,
    b_R: np.ndarray,
    *,
    level_with: Sequence[str] = (),
) -> Verdict | None:
    """The ratio of the means, not the mean of ratios: a row on which the teacher scores 0 must not blow it up.

    Args:
        level_with: controls that the teacher is not shown better than. A share of such a teacher is no share kept.
    """
    if a.value is None or b.value is None or b.value <= 0:
        return None
    ratio = 100 * a.value / b.value
    ci = None
    if a.clusters > 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            ci = percentile_interval(100 * np.clip(a_R, *metric.scale) / np.clip(b_R, *metric.scale))
    label, sentence = _retention_in_words(question, metric, ratio, ci, level_with)
    return Verdict(
        key=question.key,
        question=question.question,
        metric=metric.name,
        a=question.a.name,
        b=question.b.name,
        difference=None,
        ratio=ratio,
        ci=ci,
        verdict="measured",
        label=label,
        sentence=sentence,
        rows=a.rows,
        clusters=a.clusters,
    )


def _retention_in_words(
    question: Question, metric: MetricInfo, ratio: float, ci: tuple[float, float] | None, level_with: Sequence[str]
) -> tuple[str, str]:
    """Badge and sentence."""
    digits = decimals("%", ci)
    share, of = f"{number(ratio, digits)}% {interval(ci, digits)}", f"of the teacher's {metric.title}"
    name, teacher = question.a.name, question.b.name
    if level_with:
        sentence = (
            f"{name} has {share} {of}; {teacher} is not shown better than {joined(level_with)}, so that is no share kept."
        )
        return "teacher not ahead", sentence
    if not metric.higher_is_better:
        return f"{number(ratio, 0)}%", f"{name} has {share} {of}; lower is better."
    if ratio > 100:
        return "above the teacher", f"{name} has {share} {of}: more than its teacher, so that is no share kept."
    return f"{number(ratio, 0)}% kept", f"{name} keeps {share} {of}."


def headline(study: Study, verdicts: Sequence[Verdict]) -> Headline:
    """What the report opens with."""
    own = [verdict for verdict in verdicts if verdict.metric == study.primary]
    headed = own if study.compare else [v for key in ("kd_over_sft", "rl_over_start") for v in own if v.key == key]
    if headed:
        first = headed[0]
        return Headline(first.verdict, first.shown_as, first.label, _first_in_words(study, first, own), first)
    if study.with_role("kd"):
        missing = "no SFT-only student was measured" if not study.with_role("sft") else "KD and SFT lack scores to compare"
        sentence = f"Not shown that distilling helped: {missing}, and a share of the teacher proves nothing."
        return Headline("not shown", "not shown", "not shown", sentence)
    if study.with_role("rl"):
        sentence = "Not shown that learning from rewards helped: no score of the model that it began from was measured."
        return Headline("not shown", "not shown", "not shown", sentence)
    if verdicts:
        first = verdicts[0]
        return Headline(first.verdict, first.shown_as, first.label, first.sentence, first)
    return Headline("not shown", "not shown", "nothing compared", "No two models were measured that could be compared.")


def _first_in_words(study: Study, verdict: Verdict, own: Sequence[Verdict]) -> str:
    """The verdict's sentence, and in what the control was not trained like the distilled model; of a rewarded one, the control.

    Args:
        own: all verdicts by the primary metric.
    """
    if verdict.key == "rl_over_start":
        controls = [one for one in own if one.key == "rl_over_sft" and one.a == verdict.a]
        return " ".join([verdict.sentence, *(_over_control(study, one) for one in controls)])
    if verdict.key != "kd_over_sft":
        return verdict.sentence
    a, b = study.row(verdict.a), study.row(verdict.b)
    known = verdict.equal_tokens is not None
    amounts = amount_in_words(a, b) if known else "Whether both trained on equally many response tokens is not known."
    return " ".join(part for part in (verdict.sentence, amounts, *control_in_words(a, b)) if part)


def _over_control(study: Study, verdict: Verdict) -> str:
    """A rewarded model's difference to its control, in short."""
    equal = "NOT at equal rollouts" if rolled_apart(study.row(verdict.a), study.row(verdict.b)) else "at equal rollouts"
    metric = study.metric(verdict.metric)
    found = estimate(verdict.difference, verdict.ci, metric.unit, signed=True)
    return f"Over {verdict.b}, {equal}: {found} by {metric.title}, {verdict.label}."
