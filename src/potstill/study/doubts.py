"""Why a verdict must not be believed as it stands."""

from collections.abc import Iterator, Mapping

from potstill.study.controls import control_in_words, more_training
from potstill.study.estimate import Estimate
from potstill.study.floor import near_floor
from potstill.study.records import ModelRow, Study
from potstill.study.verdicts import Verdict

Estimates = Mapping[str, Mapping[str, Estimate]]


def doubts(study: Study, verdict: Verdict, verdicts: list[Verdict], estimates: Estimates) -> Iterator[str]:
    """What speaks against a verdict of "helped" or "hurt", in a few words each.

    The teacher is not shown better than the control, so there was nothing to teach; both models score near the floor; a model
    was trained with one seed; the control was not trained like the distilled model; the metric is unfit for the rows' language.
    """
    a, b = study.row(verdict.a), study.row(verdict.b)
    if verdict.metric in study.unfit:
        yield f"{study.metric(verdict.metric).title} is unfit for these rows"
    if verdict.key in ("retention", "teacher_over_sft"):
        return
    if verdict.key == "kd_over_sft":
        if verdict.verdict == "helped" and teacher_not_ahead(study, verdict, verdicts):
            yield f"the teacher is not shown better than {b.name}"
        if more_training(a, b) is not None:
            yield "not at equal tokens"
        if control_in_words(a, b):
            yield "the control was not trained alike"
    if floored(study, a, b, verdict.metric, estimates):
        yield "both score near the floor"
    once = [row.name for row in (a, b) if trained_once(row)]
    if once and verdict.key in ("kd_over_sft", "sft_over_base"):
        yield "one seed"


def teacher_not_ahead(study: Study, verdict: Verdict, verdicts: list[Verdict]) -> bool:
    """Whether a measured teacher is not shown better than the control of this verdict, by its metric."""
    teacher = study.teacher_of(study.row(verdict.a))
    if teacher is None:
        return False
    about = ("teacher_over_sft", verdict.metric, teacher.name, verdict.b)
    found = next((v for v in verdicts if (v.key, v.metric, v.a, v.b) == about), None)
    return found is not None and found.verdict != "helped"


def floored(study: Study, a: ModelRow, b: ModelRow, metric: str, estimates: Estimates) -> bool:
    """Whether two models score near the floor of a metric."""
    teacher = study.teacher_of(a)
    values = (_value(estimates, row, metric) for row in (a, b, teacher))
    return near_floor(study.metric(metric), *values)


def trained_once(row: ModelRow) -> bool:
    """Whether the intervals cannot know this model's luck of training."""
    return len(row.seeds) == 1 and (row.role in ("kd", "sft") or row.trained is not None)


def _value(estimates: Estimates, row: ModelRow | None, metric: str) -> float | None:
    found = estimates[row.name].get(metric) if row is not None else None
    return found.value if found is not None else None
