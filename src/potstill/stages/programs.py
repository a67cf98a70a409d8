"""What a stage must know before programs judge its models: a sandbox, and rows with tests."""

from collections.abc import Iterator, Sequence

from potstill.core.errors import Problem, UserError
from potstill.core.types import Split
from potstill.metrics import Metric
from potstill.scorers import programs
from potstill.sources import Source


def program_problems(metrics: Sequence[Metric], data: Source, split: Split, place: str) -> Iterator[Problem]:
    """Why metrics that run programs cannot judge: no row of the split has tests, or no sandbox is safe here.

    Args:
        place: the field that names the metrics.
    """
    running = [str(metric.kind) for metric in metrics if metric.runs_programs]
    if not running:
        return
    try:
        tested = any(example.tests is not None for example in data.examples(split))
    except UserError:  # the rows cannot be read, which is a problem of its own
        return
    if not tested:
        rule = f"{', '.join(running)}: no {split} row of {data.kind} has tests; leave it out, or name rows with tests"
        yield Problem(place, rule)
        return
    try:
        programs.sandbox()
    except UserError as error:
        yield Problem(place, f"{', '.join(running)}: {error}")
