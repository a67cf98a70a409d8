"""What a reader must know before believing the verdicts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from potstill.core.numbers import decimals, number
from potstill.study.bootstrap import student
from potstill.study.controls import (
    begun_apart,
    equal_tokens,
    format_in_words,
    mean_amount,
    other_order,
    rolled_apart,
    rollouts_in_words,
    searched_apart,
    taught_wrongly,
    trained_apart,
)
from potstill.study.doubts import Estimates, floored, picked_by, teacher_not_ahead, trained_once, untold_teachers
from potstill.study.healing import of_healing
from potstill.study.questions import ABOUT_TEACHER, COMPARED, source_of
from potstill.study.records import MetricInfo, ModelRow, Study
from potstill.study.verdicts import MIN_CLUSTERS, Verdict
from potstill.study.words import bits_in_words, joined, plain, reasons

FEW_CLUSTERS = 30
FEW_SEEDS = 5


def caveats(study: Study, estimates: Estimates, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """All of them as sentences, the weightiest first."""
    yield from _of_the_form_alone(study)
    yield from _of_the_teacher(study, estimates, verdicts)
    yield from _of_the_floor(study, estimates)
    yield from _of_the_metrics(study)
    yield from _of_seeds(study)
    for a in study.with_role("kd"):
        for b in study.with_role("sft"):
            yield from _of_the_control(a, b)
    yield from _of_rewarded(study)
    yield from of_healing(study)
    yield from _of_the_origins(study)
    yield from _of_the_form(study)
    yield from _of_what_was_compared(study, verdicts)
    yield from _of_training_rows(study)
    yield from _of_test_rows(study)
    yield from _of_repeats(study)
    yield from _of_answers(study, estimates)


def _of_the_form_alone(study: Study) -> Iterator[str]:
    for row in study.rows:
        if words := format_in_words(row):
            yield f"{row.name}: {words}."


def _of_the_teacher(study: Study, estimates: Estimates, verdicts: Sequence[Verdict]) -> Iterator[str]:
    for verdict in verdicts:
        if verdict.key != "kd_over_sft" or verdict.metric != study.primary:
            continue
        teacher = study.teacher_of(study.row(verdict.a))
        unmeasured = untold_teachers(study, study.row(verdict.a)) if study.with_role("teacher") else []
        if unmeasured:
            others = joined([row.name for row in study.with_role("teacher")])
            yield (
                f"{joined(unmeasured)}, which taught {verdict.a}, was not measured, and {others} did not teach it: "
                "whether there was anything to teach is not known."
            )
        elif teacher is None:
            yield f"No teacher was measured: whether there was anything to teach to {verdict.a} is not known."
        elif teacher_not_ahead(study, verdict, list(verdicts)):
            values = " against ".join(_value(study, row, estimates) for row in (teacher.name, verdict.b))
            yield (
                f"{teacher.name} is not shown better than {verdict.b} by {study.metric(study.primary).title} ({values}): "
                f"there was nothing to teach, so a gain of {verdict.a} comes from something else."
            )


def _of_the_floor(study: Study, estimates: Estimates) -> Iterator[str]:
    students = study.with_role("kd", "rl", "sft")
    metric = study.metric(study.primary)
    low = [row.name for row in students if floored(study, row, row, metric.name, estimates)]
    if low and len(low) == len(students):
        values = ", ".join(f"{name} {_value(study, name, estimates)}" for name in low)
        yield (
            f"All students score near the floor of {metric.title} ({values}): "
            "a difference there may mean nothing for the answers; read them before you believe it."
        )


def _of_the_metrics(study: Study) -> Iterator[str]:
    for name, why in study.unfit.items():
        titles = {metric.name: metric.title for metric in study.metrics}
        yield f"{titles.get(name, name)} is unfit for these rows: {why}."


def _of_seeds(study: Study) -> Iterator[str]:
    trained = study.with_role("kd", "rl", "sft")
    once = [row.name for row in trained if trained_once(row)]
    few = [row for row in trained if 1 < len(row.seeds) < FEW_SEEDS]
    if once:
        were = "was" if len(once) == 1 else "were"
        yield (
            f"{joined(once)} {were} trained with one seed: the intervals speak of the test rows only, not of training luck. "
            "Another seed could turn the verdict."
        )
    if few:
        counts = ", ".join(f"{row.name}: {len(row.seeds)}" for row in few)
        least = min(len(row.seeds) for row in few)
        yield (
            f"Fewer than {FEW_SEEDS} seeds ({counts}): they say little about how much training luck varies. The intervals "
            f"are wider for it ({student(least - 1):.1f} standard errors with {least} seeds, not {student(None):.1f})."
        )


def _of_the_control(a: ModelRow, b: ModelRow) -> Iterator[str]:
    if a.seeds != b.seeds and max(len(a.seeds), len(b.seeds)) > 1:
        yield f"{a.name} and {b.name} do not have the same seeds, so their training luck is not paired."
    equal = equal_tokens(a, b)
    if equal is None:
        yield (
            f"Whether {a.name} and {b.name} trained on equally many response tokens is not known: "
            "a gain may come from more training."
        )
    elif not equal:
        amounts = [
            f"{plain(mean_amount(a, unit))} against {plain(mean_amount(b, unit))} {unit}"
            for unit in ("response tokens", "optimizer steps")
        ]
        yield f"{a.name} and {b.name} are NOT compared at equal tokens: {', '.join(amounts)}."
    yield from taught_wrongly(a, b)
    differ = trained_apart(b, a)
    if differ:
        differences = "; ".join(f"{key} {x} against {y}" for key, (x, y) in differ.items())
        yield f"{b.name} and {a.name} were not trained alike: {differences}. Part of the difference may come from that."
    if other_order(a, b):
        yield f"{a.name} and {b.name} saw their training rows in another order or in other batches."
    for sentence in searched_apart(a, b):
        yield f"{sentence} A search finds better settings, and takes the luckier of equal ones."


def _of_rewarded(study: Study) -> Iterator[str]:
    """Whether models that learned from rewards had a control, and whether it was one."""
    rl, sft = study.with_role("rl"), study.with_role("sft")
    if rl and not sft:
        yield (
            "There is no control of rejection sampling and SFT: this study cannot show what learning from rewards adds to "
            "fine-tuning on the same answers that pass."
        )
    for a in rl:
        for b in sft:
            if rolled_apart(a, b):
                yield f"{a.name} against {b.name}: {rollouts_in_words(a, b)}"
            if differ := begun_apart(a, b):
                yield f"{b.name} and {a.name} differ in {joined(differ)}: part of the difference may come from that."


def _of_the_origins(study: Study) -> Iterator[str]:
    """Models whose origin was not measured, and test rows that were no test."""
    for row in study.with_role("quantized", "rtn"):
        if row.made_from and source_of(study, row) is None:
            yield (
                f"The model that {row.name} was made from ({row.made_from}) was not measured: what {bits_in_words(row.bits)} "
                "cost is not known."
            )
    known = [f"{row.name} {row.known_rows:,} of {len(study.examples):,}" for row in study.rows if row.known_rows]
    if known:
        yield f"Test rows were trained on: {', '.join(known)}. The scores of these models say little about new rows."
    picked = [f"{row.name}: {joined(names)}" for row in study.rows if (names := picked_by(study, row))]
    if picked:
        yield f"Validation rows picked settings, and these are validation rows ({'; '.join(picked)}): use split = 'test'."


def _of_the_form(study: Study) -> Iterator[str]:
    unlike = [
        row.name for row in study.rows if study.prompts and any(one.prompts != study.prompts for one in row.trained or ())
    ]
    if unlike:
        yield (
            f"The prompts of this evaluation are not those that {joined(unlike)} trained with: "
            "a model asked in another form than it learned may score lower than it could."
        )
    forms: dict[str, list[str]] = {}
    for row in study.rows:
        if row.template is not None:
            forms.setdefault(row.template, []).append(row.name)
    if len(forms) > 1:
        groups = "; ".join(joined(names) for names in forms.values())
        own = "tokens and template" if any(metric.over == "bytes" for metric in study.metrics) else "template"
        yield f"The models were asked in different forms, each in that of its own {own} ({groups})."
    counts: dict[tuple[int, ...], list[str]] = {}
    for row in study.rows:
        counts.setdefault(study.tokens_of(row), []).append(row.name)
    titles = [metric.title for metric in study.metrics if metric.over == "tokens" and _apart(study, metric)]
    if len(counts) > 1 and titles:
        groups = "; ".join(f"{joined(names)} {sum(tokens):,}" for tokens, names in counts.items())
        yield (
            f"The references have different numbers of tokens in these forms ({groups}), so {joined(titles)} per token "
            "cannot be compared between them, and no verdict does."
        )
    of_bytes = [metric.title for metric in study.metrics if metric.over == "bytes"]
    if of_bytes:
        yield (
            f"The models have different tokenizers, so what is summed over tokens is divided by the bytes of the references "
            f"({joined(of_bytes)}): it cannot be compared with a figure per token of another study."
        )
    for words, names in _alike((row.name, row.teacher_reads) for row in study.rows):
        yield f"The teacher of {joined(names)} was made to read the rows in the student's form, which is not its own: {words}."
    for metric in (metric for metric in study.metrics if metric.against_teacher):
        for words, names in _alike((row.name, row.apart) for row in study.rows if metric.name in row.scores):
            yield (
                f"For {metric.title} of {joined(names)} the teacher was made to read the rows in a form that is not its own: "
                f"{words}."
            )
        for words, names in _alike((row.name, row.apart) for row in study.rows if metric.name not in row.scores):
            yield f"{metric.title} was not taken of {joined(names)}, which the teacher reads in another form: {words}."


def _apart(study: Study, metric: MetricInfo) -> bool:
    """Whether models that a metric was taken of have different numbers of tokens."""
    return len({study.tokens_of(row) for row in study.rows if metric.name in row.scores}) > 1


def _alike(pairs: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, list[str]]]:
    """What was said of some models, once, with all the models that it was said of."""
    found: dict[str, list[str]] = {}
    for name, words in pairs:
        if words is not None:
            found.setdefault(words, []).append(name)
    yield from found.items()


def _of_what_was_compared(study: Study, verdicts: Sequence[Verdict]) -> Iterator[str]:
    kd, sft = study.with_role("kd"), study.with_role("sft")
    if kd and not sft:
        yield "There is no SFT-only student: this study cannot show what distilling adds to plain fine-tuning."
    counted = verdicts if study.compare or study.with_role("rl") else [one for one in verdicts if one.key == COMPARED]
    pairs = {(verdict.a, verdict.b) for verdict in counted if verdict.key not in ABOUT_TEACHER}
    if len(kd) > 1 or len(sft) > 1 or len(pairs) > 1:
        what = f"{len(pairs)} pairs of models" if len(pairs) > 1 else "Several KD or SFT models"
        yield (
            f"{what} are compared, each at 95% and without correction for it: "
            "where nothing differs, one in twenty such verdicts still claims a difference."
        )


def _of_training_rows(study: Study) -> Iterator[str]:
    found = [lost for row in study.rows if (lost := _left_out(row))]
    if found:
        yield f"Training rows were left out: {'; '.join(found)}."
    cut = [
        f"{row.name} {max(one.shortened for one in row.trained):,} of {max(one.rows for one in row.trained):,}"
        for row in study.rows
        if row.trained and any(one.shortened for one in row.trained)
    ]
    if cut:
        yield f"Contexts of training rows were shortened: {', '.join(cut)}."


def _left_out(row: ModelRow) -> str:
    """`KD 247 of 248 (247 too long)`: of the seed that lost most; empty where none was left out."""
    most = max(row.trained or (), key=lambda one: sum(one.left_out.values()), default=None)
    lost = sum(most.left_out.values()) if most else 0
    return f"{row.name} {lost:,} of {lost + most.rows:,} ({reasons(most.left_out)})" if most and lost else ""


def _of_test_rows(study: Study) -> Iterator[str]:
    N, K = len(study.examples), study.cluster_count()
    if K < N:
        yield f"{N:,} test rows fall into {K:,} groups that share a key; the bootstrap draws groups."
    if K < FEW_CLUSTERS:
        what, unit = (f"{K} clusters (titles, modules …) of test rows", "clusters") if K < N else (f"{N} test rows", "rows")
        none = f"fewer than {MIN_CLUSTERS} {unit} give no verdict at all"
        yield f"Only {what}: {none}." if K < MIN_CLUSTERS else f"Only {what}: the intervals are rough, and {none}."
    lost = sum(study.left_out.values())
    if lost:
        of = N + lost if study.of_rows is None else study.of_rows
        yield f"{lost:,} of {of:,} test rows were left out before scoring ({reasons(study.left_out)})."
    if study.shortened:
        yield f"The contexts of {study.shortened:,} of {N:,} test rows were shortened: what answers them may have been cut off."


def _of_repeats(study: Study) -> Iterator[str]:
    if study.near_duplicates:
        yield f"{study.near_duplicates}. A model may know the answers to such rows by heart."


def _of_answers(study: Study, estimates: Estimates) -> Iterator[str]:
    N = len(study.examples)
    limit = study.decoding.max_new_tokens
    cut = [f"{row.name} {many:,} of {N * len(row.seeds):,}" for row in study.rows if (many := sum(row.cut_answers or ()))]
    if cut:
        at = f"the limit of {limit} tokens" if limit else "the limit"
        yield f"Answers reached {at} and were cut there: {', '.join(cut)}. Raise decoding.max_new_tokens."
    for metric in study.metrics:
        found = []
        for row in study.rows:
            estimate = estimates[row.name].get(metric.name)
            if estimate is not None and estimate.abstained:
                why = reasons(Counter(row.abstentions.get(metric.name, {})))
                found.append(f"{row.name} {estimate.abstained} of {N * len(row.seeds)}{f': {why}' if why else ''}")
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
    if study.decoding.precision == "bf16":
        yield "Answers were given in bfloat16: some would read otherwise in float32. Log-probabilities were taken in float32."


def _value(study: Study, name: str, estimates: Estimates) -> str:
    found = estimates[name].get(study.primary)
    return number(found.value if found else None, decimals(study.metric(study.primary).unit))
