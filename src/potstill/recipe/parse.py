"""From one TOML file to checked stages, with all its mistakes reported at once."""

import copy
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import Problem, RecipeError, UserError
from potstill.recipe import overrides as setting
from potstill.recipe import sweep as sweeping
from potstill.recipe.header import Header, Recipe
from potstill.recipe.healing import Healed
from potstill.recipe.judged import Context, Judged, judge_header, judge_stage
from potstill.recipe.places import by_file, within
from potstill.recipe.references import header_path, mismatches, reference_problems, stage_paths, twice_named
from potstill.recipe.sweep import Sweep
from potstill.stages.base import Stage


@dataclass(frozen=True)
class Draft:
    """A recipe as far as its file could be read.

    Attributes:
        problems: every mistake of the file, in its order; each with its place, the rule and a suggestion.
        stages: those that are what the file says; all, where it has no mistake.
        doubtful: the other ones whose kind is known.
    """

    header: Header | None
    stages: tuple[Stage, ...]
    doubtful: tuple[Judged, ...]
    problems: tuple[Problem, ...]
    source: str
    table: dict[str, Any]

    @property
    def name(self) -> str:
        return self.header.name if self.header is not None else ""

    def recipe(self) -> Recipe:
        """The checked recipe.

        Raises:
            RecipeError: the file has mistakes.
        """
        if self.problems or self.header is None:
            raise RecipeError(Path(self.source).name, self.problems)
        return Recipe(self.header, self.stages, self.source, self.table)


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        overrides: `stage.field=value` or `field=value`, the value in TOML's notation or plain text.

    Raises:
        RecipeError: every mistake, each with its place, the rule and a suggestion.
        UserError: no such file, or not TOML.
    """
    return read_recipe(path, overrides).recipe()


def read_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Draft:
    """`load_recipe` of a file that may have mistakes.

    Raises:
        UserError: no such file, or not TOML; an override that sets nothing.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        near = suggest(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
        raise UserError(f"{path}: no such file{near}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a recipe file in it") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _draft(table, str(path), overrides)


def parse_recipe(table: dict[str, Any], source: str = "recipe", overrides: tuple[str, ...] = ()) -> Recipe:
    """Check a recipe given as a table.

    Raises:
        RecipeError: every mistake, each with its place, the rule and a suggestion, in the order of the file.
        UserError: an override that sets nothing.
    """
    return _draft(table, source, overrides).recipe()


def _draft(table: dict[str, Any], source: str, overrides: tuple[str, ...]) -> Draft:
    table = _overridden(table, overrides)
    header, header_problems = judge_header(table)
    context = Context.of(table, header_problems)
    sweeps, sweep_problems = sweeping.read(table.get("sweep", {}), context.raw_stages)
    setting.refuse_twice(sweeps, overrides)
    stages = [judge_stage(sweeps[i].table(raw) if i in sweeps else raw, i, context) for i, raw in enumerate(context.raw_stages)]
    beside = Path(source).parent if Path(source).suffix == ".toml" else None
    of_stages = [*twice_named(stages), *header_path(header, beside)]
    of_stages += [problem for i in range(len(stages)) for problem in _problems_of(stages, i, beside)]
    of_stages = [_in_sweep(problem, sweeps.values()) for problem in of_stages]
    expanded, of_values = _expanded(stages, sweeps, context, beside)
    problems = [*header_problems, *_no_stages(table), *sweep_problems, *of_stages, *of_values, *_idle_seeds(header, stages)]
    problems = by_file(dict.fromkeys(problems), table)
    doubtful = [judged for judged in stages if judged.healed.wounds or judged.healed.holes or judged.label.endswith("]")]
    sound = _sound(expanded, {judged.label for judged in stages if judged not in doubtful}) if problems else expanded
    return Draft(header.value, tuple(sound), tuple(doubtful), tuple(problems), source, table)


def _sound(stages: Sequence[Stage], labels: Collection[str]) -> list[Stage]:
    """The stages of these labels, without those whose rows another stage writes."""
    found: list[Stage] = []
    for stage in stages:
        writers = [ref for source in stage.sources() if (ref := source.written_by()) is not None and ref.scheme == "stage"]
        if stage.name.partition(".")[0] in labels and {ref.target for ref in writers} <= {other.name for other in found}:
            found.append(stage)
    return found


def _overridden(table: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    table = copy.deepcopy(table)  # an override must not reach into what the caller holds
    if "sweep" in table:
        table["sweep"] = sweeping.flat(table["sweep"])
    wrong: list[str] = []
    for override in overrides:
        try:
            setting.apply(table, override)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    return table


def _no_stages(table: dict[str, Any]) -> list[Problem]:
    found = table.get("stage")
    if isinstance(found, list) and found:
        return []
    if found:
        return [Problem("stage", "write [[stage]], in two pairs of brackets")]
    return [] if "stages" in table else [Problem("stage", "a recipe needs at least one [[stage]]")]


def _problems_of(stages: Sequence[Judged], number: int, beside: Path | None) -> list[Problem]:
    """What is wrong with one stage, in itself and in what it needs of others and of the disk."""
    judged = stages[number]
    found = [*judged.problems, *reference_problems(stages, number), *stage_paths(judged, beside)]
    places = {problem.place for problem in found}
    return [*found, *(problem for problem in mismatches(stages, number) if problem.place not in places)]


def _in_sweep(problem: Problem, sweeps: Iterable[Sweep]) -> Problem:
    """A problem of a swept field, at its place in the sweep."""
    return next((sweep.first_told(problem) for sweep in sweeps if within(problem.place, sweep.label)), problem)


def _expanded(
    stages: Sequence[Judged], sweeps: dict[int, Sweep], context: Context, beside: Path | None
) -> tuple[list[Stage], list[Problem]]:
    """The readable stages, swept ones once for each value; and what is wrong with those values."""
    expanded: list[Stage] = []
    problems: list[Problem] = []
    for i, judged in enumerate(stages):
        if i in sweeps:

            def judge(raw: dict[str, Any], i: int = i) -> tuple[Stage | None, list[Problem]]:
                variant = judge_stage(raw, i, context)
                others = [*stages[:i], variant, *stages[i + 1 :]]
                return variant.stage if not variant.healed.holes else None, _problems_of(others, i, beside)

            made, wrong = sweeps[i].expand(context.raw_stages[i], judge)
            expanded += made
            problems += wrong
        elif judged.stage is not None and not judged.healed.holes:
            expanded.append(judged.stage)
    return expanded, problems


def _idle_seeds(header: Healed[Header], stages: Sequence[Judged]) -> list[Problem]:
    """Several seeds that no stage is trained for."""
    if header.value is None or len(header.value.seeds) < 2 or not stages:
        return []
    if any(judged.stage is None or judged.stage.per_seed or judged.wounded("per_seed") for judged in stages):
        return []
    seeds = str(list(header.value.seeds))
    return [Problem("seeds", "no stage has per_seed = true, so more than one seed changes nothing", seeds)]
