"""Rows whose own reference fails its tests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.core.artifact import read_json, write_json
from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.metrics import Metric
from potstill.rewards import Reward
from potstill.scorers import programs
from potstill.stages.readers import Readable, Rendered

REFERENCE_FAILS = "its own reference fails its tests"
SET_ASIDE = "set_aside.json"


def failing(examples: Sequence[Example], judge: Metric | Reward) -> dict[int, str]:
    """Place and reason of each row whose own reference fails its tests, judged within the limits of what runs programs."""
    judging: Any = getattr(judge, "judging", None)
    return programs.failing_references(examples, judging.limits() if judging is not None else None)


def failing_rows(examples: Sequence[Example], judge: Metric | Reward, folder: Path, who: str) -> set[int]:
    """Places of the rows whose own reference fails their tests: every right program would count as wrong there.

    They are named with the judge's reason in `set_aside.json`, which a stage that goes on reads instead of judging again.

    Args:
        judge: runs programs; its limits are those of the references.

    Raises:
        UserError: no row is left, or the sandbox could not judge a reference.
    """
    file = folder / SET_ASIDE
    if not file.is_file():
        named = failing(examples, judge).items()
        write_json(file, [{"row": row, "key": examples[row].key, "why": why} for row, why in named])
    found = read_json(file)
    if found and len(found) == len(examples):
        raise UserError(f"{who}: every row's own reference fails its tests; the first: {found[0]['why']}")
    return {entry["row"] for entry in found}


def set_aside(found: Readable, metrics: Sequence[Metric], folder: Path, who: str) -> Readable:
    """The rows that every model can read without those whose own reference fails, which are counted as left out.

    Raises:
        UserError: see `failing_rows`.
    """
    judge = next((metric for metric in metrics if metric.runs_programs), None)
    return found if judge is None else _without(found, failing_rows(found.examples, judge, folder, who))


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
