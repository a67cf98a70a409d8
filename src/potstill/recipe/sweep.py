"""A recipe's `sweep`: the same stage with several values of its fields, and one stage that keeps the best of them.

Sweeping is done while a recipe is read. The swept stage `kd` becomes one stage for each value, `kd.lr=0.0001` …, and a
stage of kind `best` named `kd`, so that whatever refers to `stage:kd` needs to know nothing of it.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from potstill.core.artifact import fingerprint
from potstill.core.component import Component, suggest
from potstill.core.errors import Problem
from potstill.recipe.places import labels_of, within
from potstill.recipe.wording import shown as written
from potstill.stages.base import Stage
from potstill.stages.best import Best, TrainedRef, shown
from potstill.stages.training import known_figures

FIXED = {
    "seed": "seeds are not swept, for the best of several is luck; give the recipe's own `seeds`, and per_seed = true",
    **dict.fromkeys(("name", "kind", "per_seed"), "says which stage this is, and is not swept"),
    **dict.fromkeys(("data", "prompts", "validation"), "decides what is measured, so its values could not be compared"),
}
LONGEST = 48  # characters of a value in a stage's name

Judge = Callable[[dict[str, Any]], tuple[Stage | None, list[Problem]]]


@dataclass(frozen=True)
class Sweep:
    """The swept fields of one stage.

    Attributes:
        label: what messages call the stage.
        fields: place within the stage, such as `optim.lr` -> its values.
    """

    label: str
    stage: str
    fields: Mapping[str, Sequence[Any]]
    by: str

    def place(self, field: str) -> str:
        return f'sweep."{self.stage}.{field}"'

    def table(self, raw: dict[str, Any], values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The stage's own table with these values; with each field's first where none are given."""
        made = copy.deepcopy(raw)
        for field, value in (values or self.first()).items():
            put(made, field.split("."), copy.deepcopy(value))
        return made

    def first(self) -> dict[str, Any]:
        return {field: values[0] for field, values in self.fields.items()}

    def first_told(self, problem: Problem) -> Problem:
        """A problem of the stage with every field's first value, at its place in the sweep if it is one of a swept field."""
        return next((moved for field in self.fields if (moved := self.placed(problem, field, 0)) != problem), problem)

    def placed(self, problem: Problem, field: str, number: int) -> Problem:
        """A problem of the stage at its place in the sweep, if it is one of this field; else as it is."""
        at = f"{self.label}.{field}"
        if not within(problem.place, at):
            return problem
        rest = problem.place.removeprefix(at)
        if problem.rule.startswith("no such field") and not rest:
            return replace(problem, place=self.place(field), value=None)
        return replace(problem, place=f"{self.place(field)}[{number}]{rest}")

    def touched(self, field: str, problems: Sequence[Problem]) -> bool:
        """Whether a field of the stage, or what it lies in, is wrong."""
        place = f"{self.label}.{field}"
        return any(within(problem.place, place) or within(place, problem.place) for problem in problems)

    def expand(self, raw: dict[str, Any], judge: Judge) -> tuple[list[Stage], list[Problem]]:
        """One stage for each value (for each combination, where several fields are swept), then the one that picks.

        Args:
            judge: a table -> the stage it describes, and its mistakes.
        """
        base, known = judge(self.table(raw))  # with every field's first value; its mistakes are reported by the caller
        problems: list[Problem] = []
        for field, values in self.fields.items():
            seen = [base if not self.touched(field, known) else None]
            for number, value in enumerate(values[1:], 1):
                stage, wrong = judge(self.table(raw, {**self.first(), field: value}))
                for problem in wrong:
                    moved = self.placed(problem, field, number)
                    if problem not in known and moved.place != self.place(field):  # "no such field", whatever the value
                        here = moved if moved != problem else replace(problem, place=f"{self.place(field)}[{number}]")
                        problems.append(here)
                if self.touched(field, wrong):
                    stage = None  # a default stands for the value
                elif stage is not None and stage in seen:
                    rule = f"stands there already, as number {seen.index(stage)}"
                    problems.append(Problem(f"{self.place(field)}[{number}]", rule, _in_words(value)))
                seen.append(stage)
        if problems or known or base is None:
            return [], problems
        if self.by not in base.validation.figures():  # pyright: ignore[reportAttributeAccessIssue]  # it is validated
            measured = ", ".join(base.validation.figures())  # pyright: ignore[reportAttributeAccessIssue]
            return [], [Problem("sweep.by", f"'{self.stage}' measures {measured} while it trains", _in_words(self.by))]
        combined = [dict(zip(self.fields, each, strict=True)) for each in itertools.product(*self.fields.values())]
        stages: list[Stage] = []
        for name, values in zip(names(self.stage, combined), combined, strict=True):
            stage, wrong = judge(self.table(raw, values))
            setting = ", ".join(f"{self.stage}.{field} = {shown(value)}" for field, value in values.items())
            problems += [Problem("sweep", f"with {setting}: {problem.place} {problem.rule}") for problem in wrong]
            if stage is not None:
                stages.append(stage.model_copy(update={"name": name}))
        refs = tuple(TrainedRef(f"stage:{stage.name}") for stage in stages)
        data = getattr(base, "data", None)
        return [*stages, Best(name=self.stage, candidates=refs, values=tuple(combined), by=self.by, data=data)], problems


def put(table: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a field inside tables; tables on the way are made, or copied, so that the caller's stay as they are.

    Raises:
        TypeError: what stands on the way is not a table; names it.
    """
    for key in keys[:-1]:
        inner = table.get(key, {})
        if isinstance(inner, str):
            inner = {"kind": inner}
        if not isinstance(inner, dict):
            raise TypeError(key)
        table[key] = dict(inner)
        table = table[key]
    table[keys[-1]] = value


def flat(sweep: Any, before: str = "") -> Any:
    """`{kd = {optim = {lr = […]}}}`, as TOML reads `kd.optim.lr = […]`, as `{"kd.optim.lr": […]}`."""
    if not isinstance(sweep, dict):
        return sweep
    found: dict[str, Any] = {}
    for key, value in sweep.items():
        place = f"{before}{key}"
        found |= flat(value, f"{place}.") if isinstance(value, dict) and value else {place: value}
    return found


def read(sweep: Any, raw_stages: Sequence[Any]) -> tuple[dict[int, Sweep], list[Problem]]:
    """What is swept, by the number of the stage, and what is wrong with the sweep itself; `sweep` as `flat` gives it."""
    if not isinstance(sweep, dict):
        return {}, []  # the header's own problem
    problems: list[Problem] = []
    by = "validation_rouge_l"
    fields: dict[int, dict[str, Sequence[Any]]] = {}
    stages = [raw if isinstance(raw, dict) else {} for raw in raw_stages]
    called = [str(raw.get("name")) for raw in stages]
    labels = labels_of(raw_stages)
    for place, values in sweep.items():
        if place == "by":
            known = known_figures()
            if values in known:
                by = values
            else:
                rule = f"must be one of {', '.join(known)}{suggest(str(values), known)}"
                problems.append(Problem("sweep.by", rule, _in_words(values)))
            continue
        stage, _, field = place.partition(".")
        rule = _refused(stage, field, values, called, stages)
        if rule is None:
            number = called.index(stage)
            try:
                put(copy.deepcopy(stages[number]), field.split("."), None)
            except TypeError as way:
                rule = f"'{way}' is not a table"
            else:
                fields.setdefault(number, {})[field] = values
        if rule is not None:
            listed = isinstance(values, list) and values
            problems.append(Problem(f'sweep."{place}"', rule, None if listed else _in_words(values)))
    for number, swept in fields.items():
        for field in list(swept):
            inside = next((other for other in swept if field.startswith(f"{other}.")), None)
            if inside is not None:
                rule = f"'{called[number]}.{inside}' is swept too, and holds it; sweep one of them"
                problems.append(Problem(f'sweep."{called[number]}.{field}"', rule))
                del swept[field]
        validation = stages[number].get("validation")
        if isinstance(validation, dict) and validation.get("times") == 0:
            rule = f"must be at least 1: the sweep of '{called[number]}' picks by its validations"
            problems.append(Problem(f"{labels[number]}.validation.times", rule, "0"))
    return {number: Sweep(labels[number], called[number], swept, by) for number, swept in fields.items()}, problems


def _refused(stage: str, field: str, values: Any, called: Sequence[str], stages: Sequence[dict[str, Any]]) -> str | None:
    """Why this cannot be swept, or None."""
    if stage not in called:
        return f"no such stage{suggest(stage, called)}"
    kind = stages[called.index(stage)].get("kind")
    cls = Stage.kinds.get(kind) if isinstance(kind, str) else None
    if cls is not None and not _validated(cls):
        known = sorted(name for name, other in Stage.kinds.items() if _validated(other))
        return f"'{stage}' is of kind {kind}; what is validated while training can be swept: {', '.join(known)}"
    if not all(field.split(".")):
        return f"name a field of the stage, such as {stage}.optim.lr"
    if field.partition(".")[0] in FIXED:
        return FIXED[field.partition(".")[0]]
    if not isinstance(values, list):
        return "must be a list: [ … ]"
    return None if values else "needs at least 1"


def _validated(cls: type[Component]) -> bool:
    return issubclass(cls, Stage) and cls.validated


def set_twice(sweeps: Mapping[int, Sweep], place: str) -> str | None:
    """The swept field that an override of this place would set too, or None."""
    for sweep in sweeps.values():
        for field in sweep.fields:
            swept = f"{sweep.stage}.{field}"
            if place == swept or swept.startswith(f"{place}.") or place.startswith(f"{swept}."):
                return swept
    return None


def names(stage: str, combined: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """`kd.lr=0.0001` for each combination: no user may write such a name, and it does not change when values are added."""
    fields = list(combined[0])
    last = [field.rpartition(".")[2] for field in fields]
    short = {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}
    made = []
    for values in combined:
        said = ",".join(f"{short[field]}={_word(value)}" for field, value in values.items())
        made.append(said if len(said) <= LONGEST else f"{said[:LONGEST]}-{fingerprint(values)[:6]}")
    for name, values in zip(made, combined, strict=True):
        yield f"{stage}.{name}" if made.count(name) == 1 else f"{stage}.{name}-{fingerprint(values)[:6]}"


def _in_words(value: Any) -> str:
    """A value as it stands in the message of a mistake."""
    return written(value) if isinstance(value, str) else shown(value)


def _word(value: Any) -> str:
    """A value in the letters of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", shown(value)).strip("-") or "none"
