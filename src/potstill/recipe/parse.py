"""From one TOML file to checked stages, with all its mistakes reported at once."""

import copy
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from potstill.core.component import suggest
from potstill.core.errors import Problem, RecipeError, UserError
from potstill.recipe import sweep as sweeping
from potstill.recipe.header import Header, Recipe
from potstill.recipe.references import mismatches, path_problems, reference_problems
from potstill.recipe.wording import place_of, problems_of
from potstill.stages.base import NAME_RULE, DataStage, Stage


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        overrides: `stage.field=value` or `field=value`, the value in TOML's notation or plain text.

    Raises:
        RecipeError: every mistake, each with its place, the rule and a suggestion.
        UserError: no such file, or not TOML.
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
    return parse_recipe(table, str(path), overrides)


def parse_recipe(table: dict[str, Any], source: str = "recipe", overrides: tuple[str, ...] = ()) -> Recipe:
    """Check a recipe given as a table; see `load_recipe`."""
    table = copy.deepcopy(table)  # an override must not reach into what the caller holds
    if "sweep" in table:
        table["sweep"] = sweeping.flat(table["sweep"])
    for override in overrides:
        _apply(table, override)
    problems: list[Problem] = []
    head = {key: value for key, value in table.items() if key != "stage"}
    header: Header | None = None
    try:
        header = Header.model_validate(head)
    except ValidationError as error:
        problems += problems_of(error.errors(), Header, head, "")
    stages: list[Stage | None] = []
    raw_stages = table.get("stage", [])
    if not isinstance(raw_stages, list) or not raw_stages:
        rule = "write [[stage]], in two pairs of brackets" if raw_stages else "a recipe needs at least one [[stage]]"
        problems.append(Problem("stage", rule))
        raw_stages = []
    told = {problem.place for problem in problems}
    sweeps, wrong = sweeping.read(table.get("sweep", {}), raw_stages)
    problems += wrong
    for override in overrides:
        place = ".".join(key.strip() for key in override.partition("=")[0].split("."))
        if (twice := sweeping.set_twice(sweeps, place)) is not None:
            raise UserError(f"--set {override}: '{twice}' is swept; give its values with --set 'sweep.{twice}=[ … ]'")
    for i, raw in enumerate(raw_stages):
        stages.append(_stage(sweeps[i].table(raw) if i in sweeps else raw, i, table, told, problems))
    names = [raw.get("name") if isinstance(raw, dict) else None for raw in raw_stages]
    for i, name in enumerate(names):
        if name is not None and names.index(name) < i:
            problems.append(Problem(f"stage[{i}].name", f"stage[{names.index(name)}] already has this name", repr(name)))
    problems += reference_problems(stages, names)
    problems += mismatches(stages)
    problems += path_problems(header, stages)
    if header and len(header.seeds) > 1 and all(stages) and not any(stage and stage.per_seed for stage in stages):
        problems.append(
            Problem("seeds", "no stage has per_seed = true, so more than one seed changes nothing", str(list(header.seeds)))
        )
    expanded: list[Stage] = []
    for i, stage in enumerate(stages):
        if i in sweeps:

            def judge(raw: dict[str, Any], i: int = i) -> tuple[Stage | None, list[Problem]]:
                found: list[Problem] = []
                variant = _stage(raw, i, table, told, found)
                others = [*stages[:i], variant, *stages[i + 1 :]]
                found += [*reference_problems(others, names), *path_problems(header, others)]
                return variant, [problem for problem in found if _stage_number(problem) == i]

            made, wrong = sweeps[i].expand(raw_stages[i], judge)
            problems = [sweeps[i].first_told(problem) for problem in problems] + wrong
            expanded += made
        elif stage is not None:
            expanded.append(stage)
    if problems:
        swept = [f'sweep."{place}"' for place in table.get("sweep", {})] if sweeps else []
        raise RecipeError(Path(source).name, sorted(problems, key=lambda problem: _where(problem, swept)))
    assert header is not None
    return Recipe(header, tuple(expanded), source, table)


def _apply(table: dict[str, Any], override: str) -> None:
    place, equals, text = override.partition("=")
    keys = [key.strip() for key in place.split(".")]
    if not equals or not all(keys):
        raise UserError(f"--set {override}: write stage.field=value, or field=value for the recipe's own fields")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if keys[0] == "sweep" and len(keys) > 1:  # its keys are themselves places, in quotes or not
        keys = ["sweep", ".".join(keys[1:]).strip("\"'")]
    target = table
    stages = [stage for stage in listed if isinstance(stage, dict)] if isinstance(listed := table.get("stage"), list) else []
    names = [str(stage.get("name")) for stage in stages]
    if keys[0] in names:
        target, keys = stages[names.index(keys[0])], keys[1:]
        if not keys:
            raise UserError(f"--set {override}: name a field of the stage too, such as {place}.seed=1")
    elif keys[0] not in Header.model_fields:
        known = [*names, *Header.model_fields]
        raise UserError(f"--set {override}: '{keys[0]}' is neither a stage nor a field of the recipe{suggest(keys[0], known)}")
    try:
        sweeping.put(target, keys, sweeping.flat(value) if keys == ["sweep"] else value)
    except TypeError as way:
        raise UserError(f"--set {override}: '{way}' is not a table") from None


def _where(problem: Problem, swept: list[str]) -> tuple[int, int]:
    """Where in the file a problem stands: the header, what is swept in its order, then the stages."""
    return _stage_number(problem), next((i for i, place in enumerate(swept) if problem.place.startswith(place)), -1)


def _stage_number(problem: Problem) -> int:
    found = re.match(r"stage\[(\d+)\]", problem.place)
    return int(found[1]) if found else -1


def _stage(raw: Any, i: int, table: dict[str, Any], told: set[str], problems: list[Problem]) -> Stage | None:
    place = f"stage[{i}]"
    if not isinstance(raw, dict):
        problems.append(Problem(place, "must be a table: write [[stage]]", repr(raw)))
        return None
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in Stage.kinds:
        known = ", ".join(sorted(Stage.kinds))
        if kind is None:
            problems.append(Problem(f"{place}.kind", f"is needed: one of {known}"))
        else:
            problems.append(
                Problem(f"{place}.kind", f"no such stage{suggest(str(kind), Stage.kinds)} (known: {known})", repr(kind))
            )
        return None
    cls = Stage.kinds[kind]
    fields = {key: value for key, value in raw.items() if key != "kind"}
    if fields.get("name", "") == "":
        problems.append(Problem(f"{place}.name", "is needed: later stages refer to it"))
    elif isinstance(fields["name"], str) and "." in fields["name"]:
        problems.append(Problem(f"{place}.name", NAME_RULE, repr(fields["name"])))  # names of swept values alone have a dot
        fields["name"] = ""
    if issubclass(cls, DataStage):
        for key in ("data", "prompts"):
            shared = table.get(key)
            own = fields.get(key)
            if key == "data" and isinstance(shared, str):
                shared = {"kind": shared}
            if own is None and shared is not None:
                fields[key] = shared
            elif isinstance(own, dict) and isinstance(shared, dict) and (key == "prompts" or "kind" not in own):
                fields[key] = {**shared, **own}
    try:
        return typing.cast(Stage, cls.model_validate(fields))
    except ValidationError as error:
        details = [e for e in error.errors() if not _told_already(e, raw, told)]
        missing_data = [e for e in details if e["type"] == "missing" and e["loc"] == ("data",)]
        problems += [
            Problem(f"{place}.data", "is needed: rows for this stage, here or once as the recipe's own `data`")
            for _ in missing_data
        ]
        problems += problems_of([e for e in details if e not in missing_data], cls, fields, place)
        return None


def _told_already(error: ErrorDetails, raw: dict[str, Any], told: set[str]) -> bool:
    """Whether it is the shared `data` or `prompts` that is wrong, and the recipe's own fields have said so."""
    if error["loc"][:1] not in (("data",), ("prompts",)) or place_of("", error["loc"]) not in told:
        return False
    own: Any = raw
    for part in error["loc"]:
        if not isinstance(own, dict) or part not in own:
            return True
        own = own[part]
    return isinstance(own, dict) and "kind" not in own
