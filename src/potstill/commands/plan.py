"""What a recipe would take on this machine: rows, steps, time, memory and disk, as its stages describe themselves."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.commands.spread import Cluster
from potstill.core.artifact import Artifact
from potstill.core.numbers import count, size
from potstill.core.progress import clock
from potstill.edges.machine import total_memory
from potstill.recipe.header import Recipe
from potstill.run.graph import Planned, plan
from potstill.run.preflight import cost_of, done_models, notes_of, problems_of
from potstill.sources import rows_kept
from potstill.stages.base import Stage
from potstill.stages.outlook import Cost, Outlook

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 110


@dataclass(frozen=True)
class Line:
    """One node of the plan; figures of a stage that is done are what it really took.

    Attributes:
        state: `done`, `to do`, `damaged` or `outdated`; all but the first are done in a run.
        too_large: whether its memory is more than this machine has.
        spread: what one of several GPUs would have to do, where that was asked.
    """

    stage: str
    kind: str
    state: str
    seed: int | None
    cost: Cost
    too_large: bool = False
    spread: dict[str, Any] | None = None

    def json(self) -> dict[str, Any]:
        """Flat, for a program."""
        cost = {name: value for name, value in asdict(self.cost).items() if name != "step"}
        cost["rows"] = [{k: v for k, v in rows.items() if k != "lengths"} for rows in cost["rows"]]
        head = {"stage": self.stage, "kind": self.kind, "state": self.state, "seed": self.seed}
        return head | cost | {"too_large": self.too_large} | (self.spread or {})


@dataclass(frozen=True)
class Plan:
    """All lines of a recipe, and what is known to go wrong."""

    name: str
    lines: tuple[Line, ...]
    problems: tuple[str, ...] = ()
    shown: str = ""  # the smallest difference that the study could show, in words
    notes: tuple[str, ...] = ()  # what a person must know of models and data

    def to_do(self) -> list[Line]:
        return [line for line in self.lines if line.state != "done"]


@rows_kept()
def estimate(recipe: Recipe, out: Path, cluster: Cluster | None = None, *, measure: bool = True) -> Plan:
    """What each node of a recipe would take; passes are timed on this machine with `measure`, which takes seconds."""
    planned = plan(recipe, out, offline=True)
    done = done_models(planned)
    outlook = Outlook(done, measure=measure, seeds=len(recipe.header.seeds))
    problems = [f"{problem}: {problem.rule}" for problem in problems_of(recipe.stages, outlook)]
    pending = Outlook(done, measure=measure, seeds=len(recipe.header.seeds))
    pending.share(outlook)
    lines = []
    for item in planned:
        pending.add(item.node.stage)
        lines.append(_line(item, _known(item) if item.done else _timed(cost_of(item.node.stage, pending), measure), cluster))
    return Plan(recipe.name, tuple(lines), tuple(problems), _could_show(recipe.stages, outlook), tuple(notes_of(recipe.stages)))


def _timed(cost: Cost, measure: bool) -> Cost:
    """With a note where a pass was to be timed and could not be."""
    untimed = measure and cost.tokens is not None and cost.seconds is None and not cost.note
    why = "too little memory is free, or a first layer alone is no model"
    return replace(cost, note=f"some stages have no time: their models cannot be timed here ({why})") if untimed else cost


def _line(item: Planned, cost: Cost, cluster: Cluster | None) -> Line:
    stage = item.node.stage
    seeded = "optim" in type(stage).model_fields
    spread = None
    if cluster is not None and cost.step is not None and not item.done:
        step = cost.step
        optim = stage.optim  # pyright: ignore[reportAttributeAccessIssue]  # whatever has steps has an optimiser
        spread = cluster.share(step.size, step.teacher, optim, step.row_tokens, step.longest, step.flops, step.shard_teacher)
    return Line(
        item.node.id,
        str(stage.kind),
        item.state,
        stage.seed if seeded else None,
        cost,
        not item.done and (cost.memory_bytes or 0) > total_memory(),
        spread,
    )


def _known(item: Planned) -> Cost:
    """Of a stage that is done, what it really took."""
    artifact = Artifact.load(item.folder)
    found: dict[str, Any] = {key: artifact.summary.get(key) for key in ("parameters", "steps", "tokens", "response_tokens")}
    return Cost(**found, seconds=artifact.seconds, memory_bytes=artifact.peak_memory_bytes)


def _could_show(stages: Sequence[Stage], outlook: Outlook) -> str:
    """The smallest difference that the recipe's studies could show, in words; "" where there is no study."""
    return " ".join(sentence for stage in stages if (sentence := outlook.reading(stage).could_show(outlook)))


def print_plan(found: Plan, console: "Console | None" = None) -> None:
    """For a terminal of 80 columns or more."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else WIDEST)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("stage", overflow="fold")
    table.add_column("state", no_wrap=True)
    for column in ("params", "steps", "tokens", "time", "memory", "writes"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in found.lines:
        cost = line.cost
        table.add_row(
            Text(line.stage),
            line.state,
            _count(cost.parameters),
            f"{cost.steps:,}" if cost.steps is not None else "",
            _count(cost.tokens),
            clock(cost.seconds) if cost.seconds is not None else "?" if cost.note else "",
            Text(_size(cost.memory_bytes) + ("!" if line.too_large else ""), "red" if line.too_large else ""),
            _size((cost.output_bytes or 0) + (cost.cache_bytes or 0)),
        )
    console.print(table)
    for sentence in _in_words(found):
        console.print(Text(sentence))


def _in_words(found: Plan) -> Iterator[str]:
    """Sums, rows, what could be shown, what does not fit."""
    todo = found.to_do()
    yield ""
    yield f"{found.name}: {len(todo)} of {len(found.lines)} stages to do" + _sums(todo)
    yield from _rows_in_words(found.lines)
    yield from found.notes
    if found.shown:
        yield found.shown
    for line in todo:
        if line.too_large:
            need, have = size(line.cost.memory_bytes), size(total_memory())
            remedy = f"; {line.cost.less_memory}" if line.cost.less_memory else ""
            yield f"! {line.stage} needs about {need} of memory, and this machine has {have}{remedy}"
    notes = {line.cost.note for line in todo if line.cost.note}
    yield from sorted(note for note in notes if not any(note in problem for problem in found.problems))
    yield from (f"! {problem}" for problem in found.problems)


def _sums(todo: Sequence[Line]) -> str:
    if not todo:
        return ""
    seconds = [line.cost.seconds for line in todo if line.cost.seconds is not None]
    flops = sum(line.cost.flops or 0 for line in todo)
    peak = max((line.cost.memory_bytes or 0 for line in todo), default=0)
    written = sum((line.cost.output_bytes or 0) + (line.cost.cache_bytes or 0) for line in todo)
    cached = sum(line.cost.cache_bytes or 0 for line in todo)
    text = f", about {clock(sum(seconds))} here" if seconds else ""
    text += f", {flops:.1e} FLOP" if flops else ""
    if peak or written:
        text += f", {size(peak)} memory at most, {size(written)} on disk"
    unknown = sum(bool(line.cost.note) and line.cost.memory_bytes is None for line in todo)
    if unknown:
        text += f", {'nothing is' if unknown == len(todo) else f'{unknown} of them are not'} known: see below"
    return text + (f" (of it {size(cached)} of what teachers say)" if cached else "") + "; rough figures"


def _rows_in_words(lines: Sequence[Line]) -> Iterator[str]:
    """Each split once for each way to read it: rows that enter, rows that do not and why."""
    said: set[str] = set()
    for line in lines:
        for rows in line.cost.rows:
            text = rows.sentence()
            if text not in said and rows.rows:
                said.add(text)
                yield f"{line.stage.partition('@')[0]}: {text}"


def _count(value: float | None) -> str:
    return count(value) if value is not None else ""


def _size(value: float | None) -> str:
    return size(value) if value else ""
