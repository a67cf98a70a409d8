"""What mistakes call a place: `kd.optim.lr`, as the recipe's own words have it, and where in the file that stands."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from potstill.core.errors import Problem
from potstill.recipe.spots import Loc
from potstill.stages.base import NAME, RESERVED

_PARTS = re.compile(r'"([^"]*)"|\[(\d+)\]|([^.\[\]"]+)')


def labels_of(raw_stages: Sequence[Any]) -> list[str]:
    """What each stage is called in messages: its name, or `stage[2]` where it has none of its own."""
    names = [raw.get("name") if isinstance(raw, dict) else None for raw in raw_stages]
    return [name if usable(name) and names.count(name) == 1 else f"stage[{i}]" for i, name in enumerate(names)]


def usable(name: Any) -> TypeGuard[str]:
    """Whether a stage may be called so."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None and name not in RESERVED


def place_of(prefix: str, loc: Loc) -> str:
    place = prefix
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return place


def within(place: str, outer: str) -> bool:
    """Whether a place is another one, or lies in it."""
    return place == outer or (place.startswith(outer) and place[len(outer)] in ".[")


def by_file(problems: Iterable[Problem], table: dict[str, Any]) -> list[Problem]:
    """Problems in the order of the file; what is missing from a table comes first in it."""
    raw_stages = table["stage"] if isinstance(table.get("stage"), list) else []
    labels = labels_of(raw_stages)
    return sorted(problems, key=lambda problem: _order(problem.place, labels, table))


def _order(place: str, labels: Sequence[str], table: dict[str, Any]) -> tuple[int, ...]:
    parts: list[int | str] = [int(number) if number else quoted or plain for quoted, number, plain in _PARTS.findall(place)]
    number = next((i for i, label in enumerate(labels) if within(place, label)), None)
    if number is not None:
        parts = ["stage", number, *parts[len(_PARTS.findall(labels[number])) :]]
    found: list[int] = []
    raw: Any = table
    for part in parts:
        if isinstance(raw, dict):
            found.append(list(raw).index(part) if part in raw else -1)
            if raw is table and part == "stage":
                found[0] = len(table)  # the header comes first, wherever an override has put it
            raw = raw.get(part)
        elif isinstance(part, int):
            found.append(part)
            raw = raw[part] if isinstance(raw, list) and part < len(raw) else None
        else:
            break
    return tuple(found)
