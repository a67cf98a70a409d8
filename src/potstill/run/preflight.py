"""What is known to fail before anything has run: every problem of every stage that is still to do, at once."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from potstill.core.errors import Problem, RecipeError, UserError
from potstill.core.numbers import size
from potstill.edges.hub import is_cached
from potstill.edges.machine import total_memory
from potstill.edges.vocabulary import tokenizer_note
from potstill.recipe.header import Recipe
from potstill.recipe.judged import Judged
from potstill.recipe.parse import Draft
from potstill.recipe.places import by_file, within
from potstill.run.graph import Planned
from potstill.sources import Source, rows_kept
from potstill.stages.base import Stage
from potstill.stages.outlook import Cost, Outlook
from potstill.stages.refs import ModelRef

MARGIN = 1.25  # how far the memory that a stage needs may lie below what was foreseen


def done_models(planned: Sequence[Planned]) -> dict[str, str]:
    """Folders of stages that are done for every seed, by the stage's name; of several seeds the first."""
    found: dict[str, str] = {}
    unfinished = {item.node.stage.name for item in planned if not item.done}
    for item in planned:
        if item.node.stage.name not in unfinished:
            found.setdefault(item.node.stage.name, str(item.folder))
    return found


def problems_of(stages: Sequence[Stage], outlook: Outlook) -> Iterator[Problem]:
    """Each stage's own problems at their places in the recipe; what several stages share, or a model's own, is said once."""
    said: set[tuple[str, str]] = set()
    for stage in stages:
        stage = outlook.reading(stage)
        for problem in _problems(stage, outlook) if stage.name not in outlook.done else ():
            shared = problem.place.partition(".")[0]
            own = f"{stage.name.partition('.')[0]}.{problem.place}"
            of_model = (problem.value or "").startswith(("'path:", "'hf:", "'stage:"))
            where = str(getattr(stage, shared)) if shared in ("data", "prompts") else "model" if of_model else own
            key = (where, problem.rule)
            if key not in said:
                said.add(key)
                yield _placed(stage.name.partition(".")[0], problem)  # of a swept value, as the stage that the file names
        outlook.add(stage)


def _problems(stage: Stage, outlook: Outlook) -> Iterator[Problem]:
    """A stage's own; where one of them keeps it from looking further, that one alone."""
    found = False
    try:
        for problem in stage.problems(outlook):
            found = True
            yield problem
    except UserError as error:
        if not found:
            place, ref = next(iter(stage.references()), ("kind", stage.kind))
            yield Problem(place, str(error), repr(str(ref)))


def _placed(stage: str, problem: Problem) -> Problem:
    """At its place in the recipe; a rule that begins with its own place, `init.keep = [0, 5]: …`, is taken apart."""
    parts = re.match(rf"({re.escape(problem.place)}[\w.]*)(?: = (.+?))?: (.+)", problem.rule, re.DOTALL)
    if parts is not None:
        return Problem(f"{stage}.{parts[1]}", parts[3], parts[2])
    return replace(problem, place=f"{stage}.{problem.place}")


def room_problems(stages: Sequence[Stage], outlook: Outlook, out: Path) -> Iterator[Problem]:
    """What this machine has no room for: memory of each stage, disk of all of them."""
    written = 0
    for stage in stages:
        if stage.name in outlook.done:
            continue
        cost = cost_of(stage, outlook)
        written += (cost.output_bytes or 0) + (cost.cache_bytes or 0)
        if cost.memory_bytes is not None and cost.memory_bytes > MARGIN * total_memory():
            remedy = f"; {cost.less_memory}" if cost.less_memory else ""
            rule = f"needs about {size(cost.memory_bytes)} of memory, and this machine has {size(total_memory())}{remedy}"
            yield Problem(stage.name, rule)
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if written > free:
        yield Problem("stage", f"writes about {size(written)}, and {place} has {size(free)} free; free some, or choose --out")


def cost_of(stage: Stage, outlook: Outlook) -> Cost:
    """A stage's cost; where it is not known, why."""
    try:
        return outlook.reading(stage).cost(outlook)
    except UserError as error:
        return Cost(note=str(error))


def notes_of(stages: Sequence[Stage]) -> Iterator[str]:
    """What a person must know of stages, models and data: languages, keys that rows share, rows that nearly repeat."""
    yield from stage_notes(stages)
    for source, who in _readers(stages).values():
        try:
            found = [f"language {source.language_note()}", *source.notes(), source.near_duplicates().sentence()]
        except UserError:  # rows that cannot be read are a problem of their stage
            continue
        yield from (f"{who}{source.kind}: {note}" for note in found if note)


def _readers(stages: Sequence[Stage]) -> dict[str, tuple[Source, str]]:
    """Each source by its fields, and how a line on it begins: with the stages that read it, where others read other rows."""
    read: dict[str, tuple[Source, dict[str, None]]] = {}
    for stage in stages:
        for source in stage.sources():
            read.setdefault(str(source.spec()), (source, {}))[1][stage.name.partition(".")[0]] = None
    alone = len(read) == 1
    return {spec: (source, "" if alone else f"{', '.join(names)}: ") for spec, (source, names) in read.items()}


def stage_notes(stages: Sequence[Stage]) -> Iterator[str]:
    """What a person must know of each stage's fields, and of each model that is there before the recipe runs."""
    yield from dict.fromkeys(f"{stage.name}: {note}" for stage in stages for note in stage.notes())
    for where in dict.fromkeys(str(ref) for stage in stages for _, ref in stage.references() if ref.scheme != "stage"):
        if where.startswith("hf:") and not is_cached(where):
            yield f"{where}: not on this machine; a run downloads it first; without a network name a copy, 'path:FOLDER'"
        try:
            note = tokenizer_note(where)
        except UserError:  # a model that cannot be read is a problem of its stage
            continue
        if note:
            yield note


@dataclass(frozen=True)
class Seen:
    """What models, rows and this machine show of a recipe.

    Attributes:
        problems: in the order of the file.
        notes: what a person must know of rows and models; empty where there are problems.
    """

    problems: list[Problem]
    notes: list[str]


@rows_kept()
def check(draft: Draft) -> Seen:
    """Find everything that is known to fail beside the mistakes of the file itself, as far as that could be read.

    Of a stage that is not what the file says, only whether the models and rows that it names can be read.
    """
    outlook = Outlook()
    found = [*problems_of(draft.stages, outlook), *room_problems(draft.stages, outlook, Path("runs") / draft.name)]
    rules = {problem.rule for problem in found}
    doubtful = (problem for judged in draft.doubtful for problem in _unreadable(judged, outlook))
    found += [problem for problem in doubtful if problem.rule not in rules]
    told = [problem.place for problem in draft.problems]
    found = [problem for problem in found if not any(within(problem.place, place) for place in told)]
    if found or told:
        return Seen(by_file(found, draft.table), [])
    readers = _readers(draft.stages)
    left_out = [f"{readers[spec][1] if spec in readers else ''}{lost}" for spec, lost in outlook.rows_left_out()]
    return Seen([], [*left_out, *notes_of(draft.stages)])


def _unreadable(judged: Judged, outlook: Outlook) -> Iterator[Problem]:
    """Models and rows that a stage names where it is what the file says, and that cannot be read."""
    stage = judged.stage
    if stage is None:
        return
    for place, ref in stage.references():
        if isinstance(ref, ModelRef) and not judged.wounded(place):
            try:
                outlook.model(ref)
            except UserError as error:
                yield Problem(f"{judged.label}.{place}", str(error), repr(str(ref)))
    if not judged.wounded("data"):
        try:
            for source in stage.sources():
                for _ in source.examples("train") if source.written_by() is None else ():
                    pass
        except UserError as error:
            yield Problem(f"{judged.label}.data", str(error))


def refuse(recipe: Recipe, out: Path, done: Mapping[str, str]) -> None:
    """Stop before the first step when something is known to fail.

    Raises:
        RecipeError: with every problem.
    """
    outlook = Outlook(done)
    with rows_kept():
        found = [*problems_of(recipe.stages, outlook), *room_problems(recipe.stages, outlook, out)]
    if found:
        raise RecipeError(Path(recipe.source).name, by_file(found, recipe.table))


def refuse_stage(stage: Stage) -> None:
    """`refuse` of one stage by itself.

    Raises:
        RecipeError: with every problem.
    """
    found = [*problems_of([stage], Outlook())]
    if found:
        raise RecipeError(stage.name, found)
