"""What was measured, as the record that reports are made from."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from potstill.core.artifact import PRINT, fingerprint
from potstill.core.types import Example
from potstill.edges.models import bits_of
from potstill.metrics import Metric, ModelMetric, TextMetric, TokenMetric
from potstill.scorers.language import UNKNOWN
from potstill.stages.lineage import Place, rollouts
from potstill.stages.measure import Measured
from potstill.stages.readers import Readable, Row
from potstill.study.records import NO_SANDBOX, Decoding, JudgedBy, MetricInfo, ModelRow, Study, TestRow


def study_of(
    stage: Any,
    jobs: Sequence[tuple[Row, Place]],
    results: Sequence[Measured],
    metrics: Sequence[Metric],
    found: Readable,
    foreign: Mapping[str, str],
    near_duplicates: str,
    known: Mapping[str, int],
    *,
    apart: bool,
) -> Study:
    """What an evaluation found, as a report reads it.

    Args:
        stage: has the fields `study`, `primary`, `compare`, `decoding`, `prompts`, `data` and `split`.
        jobs: each model at each of its seeds.
        results: of each of these.
        foreign: models that cannot be compared with the teacher token by token, or read the rows otherwise, with the reason.
        known: of each model, test rows that it was trained on.
        apart: whether the models have different tokenizers.
    """
    examples = found.examples
    lengths = [tuple(len(response) for _, response in found.read[place.where].pairs) for _, place in jobs]
    usual = min(Counter(lengths).items(), key=lambda found: (-found[1], found[0]))[0]
    rows = []
    for row in stage.study:
        mine = [(place, result) for (r, place), result in zip(jobs, results, strict=True) if r is row]
        own = next(length for (r, _), length in zip(jobs, lengths, strict=True) if r is row)
        records = tuple(place.trained for place, _ in mine if place.trained is not None)
        as_it_was = all(place.as_it_was for place, _ in mine)
        trained = records if len(records) == len(mine) and not as_it_was else None
        speeds = [speed for _, result in mine if (speed := result.of_model.get("decode_speed")) is not None]
        rows.append(
            ModelRow(
                name=row.name,
                role=row.role,
                model=str(row.model),
                made_from=mine[0][0].origin,
                source=next(iter(_rows_called([mine[0][0].origin], mine[0][0], jobs)), None),
                bits=bits_of(mine[0][0].where),
                taught_by=_rows_called([one.teacher for one in records if one.teacher], mine[0][0], jobs),
                known_rows=known[row.name],
                parameters=mine[0][1].parameters,
                bytes=mine[0][1].bytes,
                decode_tokens_per_s=sum(speeds) / len(speeds) if len(speeds) == len(mine) else None,
                trained=trained,
                healing=_each([place.healing for place, _ in mine]),
                equals=_healed_of(mine[0][0], jobs) if as_it_was else None,
                rollouts=_each([rollouts(place) for place, _ in mine]),
                format_only=_each([place.summary.get("format_only") for place, _ in mine]),
                abstentions=_summed([result.abstentions for _, result in mine]),
                cut_answers=tuple(result.cut for _, result in mine),
                template=fingerprint(found.read[mine[0][0].where].pairs)[:PRINT],
                teacher_reads=next((words for place, _ in mine if (words := place.teacher_reads)), None),
                apart=foreign.get(row.name),
                tokens=own if own != usual else None,
                outcomes={name: tuple(tuple(result.outcomes[name]) for _, result in mine) for name in mine[0][1].outcomes},
                unsafe=any(made.summary.get("sandbox") == NO_SANDBOX for place, _ in mine for made in place.ancestry.values()),
                seeds=tuple(place.seed for place, _ in mine),
                scores={name: tuple(tuple(result.scores[name]) for _, result in mine) for name in mine[0][1].scores},
            )
        )
    return Study(
        metrics=tuple(info(metric, apart=apart) for metric in metrics if not isinstance(metric, ModelMetric)),
        primary=stage.primary,
        rows=tuple(rows),
        tokens=usual,
        bytes=tuple(map(_bytes_of, examples)),
        examples=tuple(
            TestRow(
                key=fingerprint(e.key)[:16],
                prompt="\n\n".join(part for part in (e.instruction, e.context) if part),
                references=e.references,
                language=e.language,
                tag=e.tag,
            )
            for e in examples
        ),
        decoding=Decoding(
            method=stage.decoding.method,
            temperature=stage.decoding.temperature if stage.decoding.method == "sample" else None,
            max_new_tokens=stage.decoding.max_new_tokens,
            precision=stage.decoding.precision,
        ),
        prompts=fingerprint(stage.prompts.model_dump(mode="json"))[:PRINT],
        languages=(languages := dict(Counter(example.language or UNKNOWN for example in examples).most_common())),
        shortened=found.shortened,
        left_out=found.left_out,
        of_rows=found.of_rows,
        near_duplicates=near_duplicates,
        compare=stage.compare,
        judged_by=tuple(dict.fromkeys(JudgedBy(**result.judged_by) for result in results if result.judged_by)),
        unfit={str(m.kind): why for m in metrics if isinstance(m, TextMetric) and (why := unfit(m, languages))},
        data={
            **stage.data.spec(),
            "split": stage.split,
            "rows": len(examples),
            "language_in_use": stage.data.language_note(),
        },
    )


def unfit(metric: TextMetric, languages: Mapping[str, int]) -> str:
    """Why a metric's figures may mislead on some of these rows, given by language, with their share; empty: they do not."""
    rows = sum(languages.values())
    reasons_by = {language: why for language in languages if (why := metric.unfit(language))}
    parts = [
        why if languages[language] == rows else f"on {languages[language]:,} of {rows:,} rows ({language}), {why}"
        for language, why in reasons_by.items()
    ]
    return "; ".join(parts)


def _each(of_seeds: Sequence[Any]) -> tuple[Any, ...] | None:
    """Of each seed; None where one is not known."""
    return None if None in of_seeds else tuple(of_seeds)


def _summed(each: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Abstentions of all seeds: metric -> reason -> answers."""
    total: dict[str, Counter[str]] = {}
    for abstentions in each:
        for metric, counts in abstentions.items():
            total.setdefault(metric, Counter()).update(counts)
    return {metric: dict(counts) for metric, counts in total.items()}


def _rows_called(refs: Sequence[str], place: Place, jobs: Sequence[tuple[Row, Place]]) -> tuple[str, ...]:
    """The names of the study's models that are what a model's own stage refers to."""
    found = (row.name for row, other in jobs for ref in refs if place.came_from(ref, other, str(row.model)))
    return tuple(dict.fromkeys(found))


def _healed_of(place: Place, jobs: Sequence[tuple[Row, Place]]) -> str:
    """The row that a model was healed from; where that was not measured, the model as the stage refers to it."""
    assert place.healing is not None
    return next(iter(_rows_called([place.healing.student], place, jobs)), place.healing.student)


def info(metric: Metric, *, apart: bool = False) -> MetricInfo:
    """`apart`: the study's models have different tokenizers."""
    of_bytes = metric.per_byte if apart and isinstance(metric, TokenMetric) else ""
    return MetricInfo(
        name=str(metric.kind),
        title=f"{metric.title} per byte" if of_bytes else metric.title,
        unit=of_bytes or metric.unit,
        higher_is_better=metric.higher_is_better,
        over="bytes" if of_bytes else "tokens" if isinstance(metric, TokenMetric) else "rows",
        against_teacher=metric.needs_teacher,
    )


def _bytes_of(example: Example) -> int:
    """Of all that a row's answer says, as UTF-8: reasoning, text and tool calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in example.tool_calls]
    return sum(len(text.encode()) for text in (example.reasoning, example.response, *calls))
