"""What a stage must know before programs are judged: a sandbox, and rows with tests that can be run."""

from collections.abc import Iterator, Sequence

from potstill.core.errors import Problem, UserError
from potstill.core.types import Split
from potstill.metrics import Metric
from potstill.rewards import Reward
from potstill.scorers import programs
from potstill.sources import Source


def program_problems(judges: Sequence[Metric | Reward], data: Source, split: Split, place: str) -> Iterator[Problem]:
    """Why metrics or rewards that run programs cannot judge.

    No row of the split has tests, a row's tests cannot be run, or no sandbox is safe here.

    Args:
        place: the field that names them.
    """
    running = ", ".join(str(judge.kind) for judge in judges if judge.runs_programs)
    if not running:
        return
    try:
        tested = [(example.key, example.tests) for example in data.examples(split) if example.tests is not None]
    except UserError:  # the rows cannot be read, which is a problem of its own
        return
    if not tested:
        yield Problem(place, f"{running}: no {split} row of {data.kind} has tests; leave it out, or name rows with tests")
        return
    for key, tests in tested:
        if wrong := programs.unfit(tests):
            yield Problem("data", f"{split} row {key!r}: {wrong}")
            return
    try:
        programs.sandbox()
    except UserError as error:
        yield Problem(place, f"{running}: {error}")
