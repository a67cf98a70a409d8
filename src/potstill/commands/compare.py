"""A study of finished models, whoever made them: the recipe of `potstill compare`, made in memory."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import RecipeError, UserError
from potstill.metrics import Metric, ModelMetric
from potstill.recipe.header import Recipe
from potstill.recipe.parse import parse_recipe
from potstill.recipe.places import within
from potstill.sources import Source
from potstill.stages.refs import ModelRef

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SCHEMES = tuple(f"{scheme}:" for scheme in ModelRef.schemes if scheme != "stage")  # there is no recipe to name a stage of
_OPTIONS = {  # what a mistake's place in the recipe is called on the command line
    "data.path": "--data",
    "study.data": "--data",
    "study.rows": "--rows",
    "study.metrics": "--metrics",
    "study.primary": "--metrics",
    "study.decoding.max_new_tokens": "--max-new-tokens",
}


def comparison(
    models: Sequence[str],
    data: str,
    *,
    teacher: str | None = None,
    rows: int | None = None,
    metrics: str | None = None,
    max_new_tokens: int | None = None,
    overrides: tuple[str, ...] = (),
) -> Recipe:
    """The recipe that scores models on all rows of one file and reports how they compare.

    The model called `base`, else the first that is not the teacher, has the role base; the others are candidates, of which
    nothing is assumed: no verdict says why one is better.

    Args:
        models: NAME=MODEL each, at least two.
        data: a file; its ending says which source reads it.
        teacher: the name of the model that the others are measured by.
        rows: score so many, drawn by a hash; None: all.
        metrics: kinds, with commas between; the first that can be is the primary one. None: those of `evaluate`.
        overrides: as `--set` of a recipe has them.

    Raises:
        UserError: names what is wrong with the words.
        RecipeError: with every mistake in the recipe's fields.
    """
    named = _named(models, teacher)
    study: dict[str, Any] = {"name": "study", "kind": "evaluate", "study": _roles(named, teacher)}
    if rows is not None:
        study["rows"] = rows
    if max_new_tokens is not None:
        study["decoding"] = {"max_new_tokens": max_new_tokens}
    if metrics is not None:
        study |= _measured(metrics, teacher)
    table = {
        "name": "compare-" + (re.sub("[^A-Za-z0-9_]+", "-", _bare(data).stem).strip("-") or "rows"),
        "data": {"kind": _kind(data), "path": data, "splits": {"validation": 0.0, "test": 1.0}},
        "stage": [study, {"name": "report", "kind": "report", "study": "stage:study"}],
    }
    with in_words_of(named):
        return parse_recipe(table, "compare", overrides)


@contextmanager
def in_words_of(models: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Mistakes inside are placed where the command line has them.

    Raises:
        RecipeError: the same, with other places.
    """
    places = {f"study.study[{number}]": name for number, (name, _) in enumerate(models)}
    try:
        yield
    except RecipeError as error:
        problems = [replace(p, place=_place(p.place, places), rule=p.rule + _how(p.rule)) for p in error.problems]
        raise RecipeError("compare", problems) from None


def models_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Name and model of each study model of a `comparison`."""
    return [(row["name"], row["model"]) for row in recipe.table["stage"][0]["study"]]


def _place(place: str, models: dict[str, str]) -> str:
    named = {own: name for own, name in (models | _OPTIONS).items() if within(place, own)}
    return next(iter(named.values()), f"--set {place}")


def _how(rule: str) -> str:
    """How a field is set that a mistake's words speak of."""
    if "no column" in rule:
        return " (each by --set)" if "set data." in rule else "; name yours by --set, such as --set data.response=COLUMN"
    field = re.search(r"\b(prompts|data|decoding|study)\.[a-z_.]+|teacher_reads", rule)
    return f" (set by --set {'study.' if field[0].startswith(('decoding', 'teacher')) else ''}{field[0]}=…)" if field else ""


def _named(models: Sequence[str], teacher: str | None) -> list[tuple[str, str]]:
    """Each model's name and where it lies."""
    named = [_pair(model) for model in models]
    names = [name for name, _ in named]
    if len(named) < 2:
        raise UserError(
            "compare needs two models or more: potstill compare base=hf:ORG/NAME tuned=path:FOLDER --data ROWS.jsonl"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"two models are called '{twice[0]}'; names must differ")
    if teacher is not None and teacher not in names:
        hint = suggest(teacher, names) or f"; the models are {', '.join(names)}"
        raise UserError(f"--teacher {teacher}: no model is called so{hint}")
    return named


def _pair(words: str) -> tuple[str, str]:
    name, equals, where = words.partition("=")
    if not equals or not name.strip() or not where.strip():
        raise UserError(f"{words}: write NAME=MODEL, such as tuned=path:FOLDER or base=hf:ORG/NAME")
    if not where.startswith(_SCHEMES):
        near = f"; did you mean {name}=path:{where}?" if Path(where).expanduser().exists() else ""
        raise UserError(f"{words}: a model begins with {' or '.join(_SCHEMES)}{near}")
    return name.strip(), where.strip()


def _roles(named: Sequence[tuple[str, str]], teacher: str | None) -> list[dict[str, Any]]:
    names = [name for name, _ in named if name != teacher]
    base = next((name for name in names if name.casefold() == "base"), names[0])
    roles = dict.fromkeys(names, "candidate") | {base: "base"} | ({teacher: "teacher"} if teacher is not None else {})
    return [{"name": name, "role": roles[name], "model": where} for name, where in named]


def _measured(metrics: str, teacher: str | None) -> dict[str, Any]:
    """The fields of the metrics; a misspelt one is left to the recipe's own check."""
    kinds = [kind.strip() for kind in metrics.split(",") if kind.strip()]
    if not kinds:
        raise UserError(f"--metrics {metrics!r}: name some, with commas between: {', '.join(sorted(Metric.kinds))}")
    primary = next((kind for kind in kinds if _decides(kind)), None)
    if primary is None and all(kind in Metric.kinds for kind in kinds):
        able = ", ".join(kind for kind in sorted(Metric.kinds) if _decides(kind))
        raise UserError(f"--metrics {metrics}: none of them can decide between models; add one of {able}")
    if teacher is None and (against := [kind for kind in kinds if _against_teacher(kind)]):
        raise UserError(f"--metrics {metrics}: {against[0]} compares with a teacher; name one by --teacher, or leave it out")
    return {"metrics": kinds} | ({"primary": primary} if primary is not None else {})


def _decides(kind: str) -> bool:
    """Whether a metric can be the primary one."""
    metric = Metric.kinds.get(kind)
    return metric is not None and not issubclass(metric, ModelMetric) and not _against_teacher(kind)


def _against_teacher(kind: str) -> bool:
    metric = Metric.kinds.get(kind)
    return metric is not None and issubclass(metric, Metric) and metric.needs_teacher


def _bare(data: str) -> Path:
    """The file without what says that it is compressed."""
    path = Path(data)
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path


def _kind(data: str) -> str:
    """The source that reads a file, by its ending."""
    ending = _bare(data).suffix.lower()
    kind = _KINDS.get(ending, "")
    if kind not in Source.kinds:
        known = ", ".join(ending for ending, kind in _KINDS.items() if kind in Source.kinds)
        raise UserError(f"--data {data}: no source reads files that end in '{ending}'; known are {known}")
    return kind
