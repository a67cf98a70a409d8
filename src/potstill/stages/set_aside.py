"""Test rows whose own reference fails its tests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.core.artifact import read_json, write_json
from potstill.core.errors import UserError
from potstill.metrics import Metric
from potstill.sandbox.verdict import Limits
from potstill.scorers import programs
from potstill.stages.readers import Readable, Rendered

REFERENCE_FAILS = "its own reference fails its tests"
SET_ASIDE = "set_aside.json"


def set_aside(found: Readable, metrics: Sequence[Metric], folder: Path, who: str) -> Readable:
    """The rows without those whose own reference fails their tests, which would count every right program as wrong.

    They are counted as left out, and named with the judge's reason in `set_aside.json`, which a stage that goes on reads
    instead of judging again.

    Raises:
        UserError: no row is left, or the sandbox could not judge a reference.
    """
    judge = next((metric for metric in metrics if metric.runs_programs), None)
    if judge is None:
        return found
    file = folder / SET_ASIDE
    if not file.is_file():
        failing = programs.failing_references(found.examples, _limits(judge))
        write_json(file, [{"row": row, "key": found.examples[row].key, "why": why} for row, why in failing.items()])
    rows = {entry["row"] for entry in read_json(file)}
    if len(rows) == len(found.examples):
        raise UserError(f"{who}: every row's own reference fails its tests; the first: {read_json(file)[0]['why']}")
    return _without(found, rows)


def _limits(metric: Any) -> Limits | None:
    return metric.judging.limits() if hasattr(metric, "judging") else None


def _without(found: Readable, rows: set[int]) -> Readable:
    if not rows:
        return found
    kept = [number for number in range(len(found.examples)) if number not in rows]
    read: dict[int, Rendered] = {}  # places of one form share one object, which later code tells by identity
    for rendered in found.read.values():
        read[id(rendered)] = Rendered(rendered.renderer, [rendered.pairs[number] for number in kept])
    return replace(
        found,
        examples=[found.examples[number] for number in kept],
        read={where: read[id(rendered)] for where, rendered in found.read.items()},
        left_out={**found.left_out, REFERENCE_FAILS: len(rows)},
    )
