"""Why a verdict must not be believed as it stands."""

from collections.abc import Iterator, Mapping

from potstill.study.controls import begun_apart, control_in_words, format_in_words, more_training, rolled_apart
from potstill.study.estimate import Estimate
from potstill.study.floor import near_floor
from potstill.study.questions import ABOUT_TEACHER, COMPARED, source_of
from potstill.study.records import ModelRow, Study
from potstill.study.verdicts import Verdict
from potstill.study.words import joined

_OF_TRAINING = ("kd_over_sft", "sft_over_base", "rl_over_start", "rl_over_sft", "sft_over_start", COMPARED)
Estimates = Mapping[str, Mapping[str, Estimate]]


def doubts(study: Study, verdict: Verdict, verdicts: list[Verdict], estimates: Estimates) -> Iterator[str]:
    """What speaks against a claim, in a few words each.

    The teacher is not shown better than the control, so there was nothing to teach, or another model than the teacher was
    measured; both models score near the floor; a model was trained with one seed; a healed model was trained further; the
    control was not trained like the distilled model, or not on as many answers as the rewarded one; rewards of the form alone
    rose; the metric is unfit for the rows' language; a model was trained on test rows, or picked by them; programs were judged
    without a sandbox.
    """
    a, b = study.row(verdict.a), study.row(verdict.b)
    if verdict.metric in study.unfit:
        yield f"{study.metric(verdict.metric).title} is unfit for these rows"
    yield from _of_the_rows(study, a, b)
    if any(one.unsafe for one in study.judged_by) and verdict.metric in (*a.outcomes, *b.outcomes):
        yield "judged without a sandbox"
    if verdict.key in ABOUT_TEACHER:
        if verdict.key == "teacher_over_sft":
            yield from _one_seed(a, b)
        return
    if verdict.key == "kd_over_sft":
        if untold_teachers(study, a) and study.with_role("teacher"):
            yield f"the teacher of {a.name} was not measured"
        if verdict.verdict == "helped" and teacher_not_ahead(study, verdict, verdicts):
            yield f"the teacher is not shown better than {b.name}"
        if more_training(a, b) is not None:
            yield "not at equal tokens"
        if control_in_words(a, b):
            yield "the control was not trained alike"
    if verdict.key == "quantized" and a.trained:
        yield f"{a.name} was trained further than {b.name}"
    if verdict.key == "rl_over_sft" and rolled_apart(a, b):
        yield "not at equal rollouts"
    if verdict.key == "rl_over_sft" and begun_apart(a, b):
        yield "the control was not trained alike"
    if verdict.key == "rl_over_start" and verdict.ahead and any(a.format_only or ()):
        yield format_in_words(a)
    if floored(study, a, b, verdict.metric, estimates):
        yield "both score near the floor"
    if verdict.key in _OF_TRAINING:
        yield from _one_seed(a, b)


def teacher_not_ahead(study: Study, verdict: Verdict, verdicts: list[Verdict]) -> bool:
    """Whether a measured teacher is not shown better than the control of this verdict, by its metric."""
    teacher = study.teacher_of(study.row(verdict.a))
    if teacher is None:
        return False
    if teacher.name == verdict.b:  # it was taught by what it is compared with
        return True
    metric = study.primary if study.metric(verdict.metric).against_teacher else verdict.metric
    about = ("teacher_over_sft", metric, teacher.name, verdict.b)
    found = next((v for v in verdicts if (v.key, v.metric, v.a, v.b) == about), None)
    return found is not None and found.verdict != "helped"


def untold_teachers(study: Study, row: ModelRow) -> list[str]:
    """What taught a model, where none of it was measured."""
    refs = dict.fromkeys(trained.teacher for trained in row.trained or () if trained.teacher is not None)
    return list(refs) if study.teachers_of(row) == [] else []


def picked_by(study: Study, row: ModelRow) -> list[str]:
    """The settings of a model, or of the one that it was made from, that a search picked by validation rows: these rows."""
    if study.data.get("split") != "validation":
        return []
    full = source_of(study, row) if row.role in ("quantized", "rtn") and row.trained is None else row
    tried = [one.searched for one in (full.trained if full is not None else None) or ()]
    return list(dict.fromkeys(name for searched in tried for name, values in searched.items() if len(values) > 1))


def _of_the_rows(study: Study, a: ModelRow, b: ModelRow) -> Iterator[str]:
    """Test rows that chose, or taught, one of the models."""
    picked = list(dict.fromkeys(name for row in (a, b) for name in picked_by(study, row)))
    if picked:
        yield f"these rows picked {joined(picked)}"
    known = [row.name for row in (a, b) if row.known_rows]
    if known:
        yield f"{joined(known)} {'was' if len(known) == 1 else 'were'} trained on some of these rows"


def floored(study: Study, a: ModelRow, b: ModelRow, metric: str, estimates: Estimates) -> bool:
    """Whether two models score near the floor of a metric."""
    teacher = study.teacher_of(a)
    values = (_value(estimates, row, metric) for row in (a, b, teacher))
    return near_floor(study.metric(metric), *values)


def _one_seed(a: ModelRow, b: ModelRow) -> Iterator[str]:
    once = [row.name for row in (a, b) if trained_once(row)]
    if once:
        yield "one seed" if len(once) == 2 else f"one seed of {once[0]}"


def trained_once(row: ModelRow) -> bool:
    """Whether the intervals cannot know this student's luck of training; base, start and teacher are given."""
    trained = row.role in ("other", "quantized") and row.trained is not None  # quantised and trained: healed
    return len(row.seeds) == 1 and (row.role in ("kd", "sft", "rl") or trained)


def _value(estimates: Estimates, row: ModelRow | None, metric: str) -> float | None:
    found = estimates[row.name].get(metric) if row is not None else None
    return found.value if found is not None else None
