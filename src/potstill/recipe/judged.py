"""A recipe's header and each of its stages, read in spite of their mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import Problem
from potstill.recipe.header import Header
from potstill.recipe.healing import Healed, heal, kind_meant
from potstill.recipe.places import labels_of, place_of, usable
from potstill.recipe.spots import at
from potstill.recipe.wording import Reported, reported_of, shown
from potstill.sources import table_of
from potstill.stages.base import NAME_RULE, DataStage, Stage


@dataclass(frozen=True)
class Judged:
    """One stage as far as its table could be read.

    Attributes:
        stage: defaults and placeholders stand where the table is wrong; None where not even its kind is known.
        raw: its own table, as the file has it.
        label: what messages call it.
        healed: which places of `stage` are not the file's.
    """

    stage: Stage | None
    raw: Any
    label: str
    healed: Healed[Stage] = field(default_factory=lambda: Healed(None))
    problems: tuple[Problem, ...] = ()

    def wounded(self, place: str) -> bool:
        return self.healed.wounded(place)


@dataclass(frozen=True)
class Context:
    """What the judgement of a stage needs of the rest of the recipe."""

    table: dict[str, Any]
    raw_stages: Sequence[Any]
    labels: Sequence[str]
    names: Sequence[Any]
    header_places: frozenset[str] = frozenset()  # of mistakes in the header, which stages that share its fields would repeat

    @classmethod
    def of(cls, table: dict[str, Any], header: Sequence[Problem] = ()) -> "Context":
        raw_stages = listed if isinstance(listed := table.get("stage"), list) else []
        names = [raw.get("name") if isinstance(raw, dict) else None for raw in raw_stages]
        return cls(table, raw_stages, labels_of(raw_stages), names, frozenset(problem.place for problem in header))


def judge_header(table: dict[str, Any]) -> tuple[Healed[Header], list[Problem]]:
    """A recipe's own fields."""
    head = {key: value for key, value in table.items() if key != "stage"}
    healed = heal(Header, head, lambda errors, raw: reported_of(errors, Header, raw))
    return healed, [reported.problem for reported in healed.reported]


def judge_stage(raw: Any, number: int, context: Context) -> Judged:
    """One stage, by its own table."""
    label = context.labels[number]
    if not isinstance(raw, dict):
        return Judged(None, raw, label, problems=(Problem(label, "must be a table: write [[stage]]", shown(raw)),))
    named = _name_problems(raw, label)
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in Stage.kinds:
        return _of_unknown_kind(raw, number, context, named)
    cls = Stage.kinds[kind]
    assert issubclass(cls, Stage)
    fields = {key: value for key, value in raw.items() if key != "kind"}
    if named:
        fields["name"] = ""
    if issubclass(cls, DataStage):
        fields |= _shared(fields, context.table)
    stages = [name for name in context.names if isinstance(name, str) and name != raw.get("name")]
    healed = heal(cls, fields, lambda errors, raw: reported_of(errors, cls, raw, label, stages))
    reported = [
        _needed_data(each, label) for each in healed.reported if not _stands_in_header(each, raw, context.header_places)
    ]
    return Judged(healed.value, raw, label, healed, (*named, *reported))


def _of_unknown_kind(raw: dict[str, Any], number: int, context: Context, named: list[Problem]) -> Judged:
    """A stage whose kind is missing or misspelt: judged as the kind that was meant, where that is plain."""
    label, kind = context.labels[number], raw.get("kind")
    unknown = _unknown_kind(kind, label)
    meant = kind_meant(kind, Stage.kinds)
    if meant is not None:
        guess = judge_stage({**raw, "kind": meant}, number, context)
        return replace(guess, raw=raw, healed=replace(guess.healed, holes=True), problems=(unknown, *guess.problems))
    name = raw.get("name")
    if not named and not usable(name):
        named = [Problem(f"{label}.name", NAME_RULE if isinstance(name, str) else "must be text in quotes", shown(name))]
    return Judged(None, raw, label, problems=(*named, unknown))


def _name_problems(raw: dict[str, Any], label: str) -> list[Problem]:
    name = raw.get("name", "")
    if name == "":
        return [Problem(f"{label}.name", "is needed: later stages refer to it")]
    if isinstance(name, str) and "." in name:  # names of swept values alone have a dot
        return [Problem(f"{label}.name", NAME_RULE, shown(name))]
    return []


def _unknown_kind(kind: Any, label: str) -> Problem:
    known = ", ".join(sorted(Stage.kinds))
    if kind is None:
        return Problem(f"{label}.kind", f"is needed: one of {known}")
    return Problem(f"{label}.kind", f"no such stage{suggest(str(kind), Stage.kinds)} (known: {known})", shown(kind))


def _shared(fields: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The recipe's own `data` and `prompts`, for a stage that gives none or parts of them."""
    found: dict[str, Any] = {}
    for key in ("data", "prompts"):
        shared, own = table.get(key), fields.get(key)
        if key == "data":
            shared = table_of(shared)
        if own is None and shared is not None:
            found[key] = shared
        elif isinstance(own, dict) and isinstance(shared, dict) and (key == "prompts" or "kind" not in own):
            found[key] = {**shared, **own}
    return found


def _needed_data(reported: Reported, label: str) -> Problem:
    if reported.error["type"] == "missing" and reported.spot.loc == ("data",):
        return Problem(f"{label}.data", "is needed: rows for this stage, here or once as the recipe's own `data`")
    return reported.problem


def _stands_in_header(reported: Reported, raw: dict[str, Any], header_places: frozenset[str]) -> bool:
    """Whether it is the shared `data` or `prompts` that is wrong, and the recipe's own fields have said so."""
    loc = reported.spot.loc
    if loc[:1] not in (("data",), ("prompts",)):
        return False
    if place_of("", loc) not in header_places:
        return False
    own = at(raw, loc)
    return own is None or (isinstance(own, dict) and "kind" not in own)
