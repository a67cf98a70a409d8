"""From one TOML file to checked stages, with all its mistakes reported at once."""

import copy
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from potstill.core.component import Component, Settings, suggest
from potstill.core.errors import Problem, RecipeError, UserError
from potstill.data.prompts import Prompts
from potstill.recipe import sweep as sweeping
from potstill.sources import Source
from potstill.stages.base import NAME, NAME_RULE, DataStage, Stage, StageRef
from potstill.train.work import CheckpointRules


class Header(Settings):
    """A recipe's own fields; what stages share stands here once."""

    name: str = Field(description="the run's folder is runs/NAME unless --out says otherwise")
    description: str = ""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="stages with per_seed = true are trained for each")
    log: tuple[Literal["tensorboard"], ...] = Field(default=(), description="where figures go besides metrics.jsonl")
    checkpoint: CheckpointRules = CheckpointRules()
    data: Source | None = Field(default=None, description="rows for every stage that names none")
    prompts: Prompts = Field(default=Prompts(), description="how rows become tokens, for every stage that does not say")
    sweep: dict[str, Any] = Field(default={}, description='values of stages\' fields to try: "STAGE.FIELD" = [ … ], and `by`')

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("must be letters, digits, '-' or '_', and begin with a letter")
        return name

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
            raise ValueError("must be different whole numbers from 0 to 2147483647")
        return seeds


@dataclass(frozen=True)
class Recipe:
    """Checked stages in order, and the file they came from; a swept stage stands there once for each value, then as `best`."""

    header: Header
    stages: tuple[Stage, ...]
    source: str
    table: dict[str, Any]

    @property
    def name(self) -> str:
        return self.header.name


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
        problems += _problems(error.errors(), Header, head, "")
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
    problems += _reference_problems(stages, names)
    problems += _mismatches(stages)
    problems += _path_problems(header, stages)
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
                found += [*_reference_problems(others, names), *_path_problems(header, others)]
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
        problems += _problems([e for e in details if e not in missing_data], cls, fields, place)
        return None


def _told_already(error: ErrorDetails, raw: dict[str, Any], told: set[str]) -> bool:
    """Whether it is the shared `data` or `prompts` that is wrong, and the recipe's own fields have said so."""
    if error["loc"][:1] not in (("data",), ("prompts",)) or _place("", error["loc"]) not in told:
        return False
    own: Any = raw
    for part in error["loc"]:
        if not isinstance(own, dict) or part not in own:
            return True
        own = own[part]
    return isinstance(own, dict) and "kind" not in own


def _place(prefix: str, loc: tuple[int | str, ...]) -> str:
    place = prefix
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return place


def _problems(errors: list[ErrorDetails], model: Any, raw: Any, prefix: str) -> list[Problem]:
    """Pydantic's errors in our words."""
    inner = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
    # a list whose item is wrong is also counted as too short
    errors = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in inner)]
    return [Problem(_place(prefix, e["loc"]) or prefix or "recipe", _rule(e, model, raw), _shown(e)) for e in errors]


def _shown(error: ErrorDetails) -> str | None:
    value = error.get("input")
    if error["type"] == "missing" or isinstance(value, dict | Settings) or not error["loc"]:
        return None
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _rule(error: ErrorDetails, model: Any, raw: Any) -> str:
    context = error.get("ctx") or {}
    kind = error["type"]
    match kind:
        case "missing":
            described = _model_at(model, raw, error["loc"][:-1])
            field = described.model_fields.get(str(error["loc"][-1])) if described else None
            return f"is needed: {field.description}" if field is not None and field.description else "is needed"
        case "extra_forbidden":
            described = _model_at(model, raw, error["loc"][:-1])
            return f"no such field{suggest(str(error['loc'][-1]), described.model_fields if described else ())}"
        case "less_than" | "less_than_equal" | "greater_than" | "greater_than_equal":
            words = {
                "less_than": "less than",
                "less_than_equal": "at most",
                "greater_than": "more than",
                "greater_than_equal": "at least",
            }
            bound = context[
                {"less_than": "lt", "less_than_equal": "le", "greater_than": "gt", "greater_than_equal": "ge"}[kind]
            ]
            return f"must be {words[kind]} {bound if isinstance(bound, int) else f'{bound:g}'}"
        case "int_parsing" | "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_parsing" | "float_type":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "bool_parsing" | "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text in quotes"
        case "tuple_type" | "list_type":
            return "must be a list: [ … ]"
        case "too_short":
            return f"needs at least {context.get('min_length', 1)}"
        case "too_long":
            return f"holds at most {context['max_length']}"
        case "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"must be at most {context['max_length']} characters"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "literal_error":
            options = [option.strip().strip("'") for option in str(context["expected"]).replace(" or ", ",").split(",")]
            return f"must be one of {', '.join(options)}{suggest(str(error.get('input')), options)}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "must be a table"
        case "value_error":
            return str(context["error"])
    return error["msg"]


def _model_at(model: Any, raw: Any, loc: tuple[int | str, ...]) -> type[Settings] | None:
    """The settings class that a place in the file describes, following kinds."""
    for part in loc:
        raw = (
            raw[part]
            if isinstance(raw, dict) and part in raw
            else raw[part]
            if isinstance(raw, list) and isinstance(part, int)
            else None
        )
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        found = next(_settings_in(field.annotation), None)
        if found is None:
            return None
        model = found
        if isinstance(model, type) and issubclass(model, Component) and isinstance(raw, dict):
            model = model.kinds.get(str(raw.get("kind")), model)
    if isinstance(model, type) and issubclass(model, Component) and model.kind is None and isinstance(raw, dict):
        model = model.kinds.get(str(raw.get("kind")), model)
    return model


def _settings_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Settings):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _settings_in(inner)


def _reference_problems(stages: list[Stage | None], names: list[Any]) -> Iterator[Problem]:
    needs = {stage.name: [ref.target for _, ref in stage.references() if ref.scheme == "stage"] for stage in stages if stage}
    for i, stage in enumerate(stages):
        for field, ref in stage.references() if stage else []:
            if ref.scheme != "stage":
                continue
            place, shown = f"stage[{i}].{field}", repr(str(ref))
            earlier = names[:i]
            if ref.target in earlier:
                made = stages[earlier.index(ref.target)]
                if made is not None and made.makes not in ref.accepts:
                    rule = f"'{ref.target}' makes {_a(made.makes)}, and this needs {_a(ref.accepts[0])}"
                    yield Problem(place, rule, shown)
            elif ref.target == names[i]:
                yield Problem(place, "refers to its own stage; a stage can only use earlier ones", shown)
            elif names[i] in _needed_by(ref.target, needs):
                yield Problem(place, f"'{ref.target}' in turn needs '{names[i]}'; stages cannot need each other", shown)
            elif ref.target in names:
                yield Problem(place, f"'{ref.target}' comes later; move it before this stage", shown)
            else:
                yield Problem(
                    place,
                    f"no earlier stage of that name{suggest(ref.target, [n for n in earlier if isinstance(n, str)])}",
                    shown,
                )


def _mismatches(stages: list[Stage | None]) -> Iterator[Problem]:
    earlier: dict[str, Stage] = {}
    for i, stage in enumerate(stages):
        if stage is not None:
            for field, rule in stage.mismatches(earlier):
                yield Problem(f"stage[{i}].{field}", rule)
            earlier[stage.name] = stage


def _needed_by(name: str, needs: dict[str, list[str]]) -> set[str]:
    """Every stage that the named one refers to, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for target in needs.get(waiting.pop(), []):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _path_problems(header: Header | None, stages: list[Stage | None]) -> Iterator[Problem]:
    def missing(path: str) -> str | None:
        full = Path(os.path.expanduser(path))  # unlike pathlib's, leaves the home of nobody as it is
        if os.path.exists(full):  # unlike pathlib's, false for a name that is too long
            return None
        near = suggest(full.name, [p.name for p in full.parent.iterdir()] if os.path.isdir(full.parent) else [])
        return f"no such file{near}" if full.suffix else f"no such folder{near}"

    seen = set()
    shared = getattr(header.data, "path", None) if header and header.data else None
    for i, stage in enumerate(stages):
        for source in stage.sources() if stage else []:
            path = getattr(source, "path", None)
            if path is not None and path not in seen and (rule := missing(path)):
                yield Problem("data.path" if path == shared else f"stage[{i}].data.path", rule, repr(path))
            seen.add(path)
        for field, ref in stage.references() if stage else []:
            if isinstance(ref, StageRef) and ref.scheme == "path" and (rule := missing(ref.target)):
                yield Problem(f"stage[{i}].{field}", rule, repr(str(ref)))
