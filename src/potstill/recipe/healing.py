"""A table with mistakes, made into settings all the same, so that no mistake hides another one.

What is wrong is taken out of the table: unknown fields go, wrong ones are left to their default, and a field that has none
gets a placeholder, so that what comes after can look at everything else.
"""

import copy
import difflib
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from potstill.core.component import Settings
from potstill.recipe.places import place_of, within
from potstill.recipe.spots import Loc, at, inside, is_role, is_settings, item_of, members, spot
from potstill.recipe.wording import Reported
from potstill.stages.base import StageRef

SAME = 0.8  # difflib's ratio, from which on a misspelt kind is judged by the rules of the one that was meant
ROUNDS = 12  # each one mends what the one before it found; a table is small

S = TypeVar("S", bound=Settings)
Tell = Callable[[Sequence[ErrorDetails], Any], list[Reported]]


@dataclass(frozen=True)
class Healed(Generic[S]):
    """Settings as far as a table could be read.

    Attributes:
        value: None where not even placeholders help.
        wounds: places whose values are not the file's: they are defaults or placeholders.
        holes: whether some are placeholders, which must not leave the check of a recipe.
    """

    value: S | None
    reported: list[Reported] = field(default_factory=list)
    wounds: tuple[str, ...] = ()
    holes: bool = False

    def wounded(self, place: str) -> bool:
        """Whether what stands at a place of the settings, or in it, or what it lies in, is not the file's."""
        return any(within(place, wound) or within(wound, place) for wound in self.wounds)


def heal(cls: type[S], raw: dict[str, Any], tell: Tell) -> Healed[S]:
    """Read a table in spite of its mistakes.

    Args:
        tell: pydantic's errors and the table -> those errors in our words.
    """
    raw = copy.deepcopy(raw)
    reported: list[Reported] = []
    wounds: list[str] = []
    guessed: list[str] = []
    holes: set[Loc] = set()
    names = (f"unknown-{number}" for number in itertools.count())
    for number in range(ROUNDS):
        try:
            value = cls.model_validate(raw)
        except ValidationError as error:
            found = tell(error.errors(), raw)
        else:
            return Healed(value, reported, tuple(dict.fromkeys([*wounds, *guessed])), bool(holes))
        reported += [each for each in found if number == 0 or not _follows(each, wounds)]
        for each in found:
            if each.error["type"] == "unknown_kind" and _guess_kind(raw, each):
                guessed.append(place_of("", each.spot.loc))
            elif not _mend(cls, raw, each, wounds, holes, names):
                return Healed(None, reported, tuple(dict.fromkeys([*wounds, *guessed])), True)
    return Healed(None, reported, tuple(dict.fromkeys([*wounds, *guessed])), True)


def kind_meant(kind: Any, kinds: Iterable[str]) -> str | None:
    """The kind that is all but spelt so, by which the rest of a table can be judged."""
    close = difflib.get_close_matches(kind, list(kinds), n=1, cutoff=SAME) if isinstance(kind, str) else []
    return close[0] if close else None


def _guess_kind(raw: dict[str, Any], reported: Reported) -> bool:
    """Give a component the kind that was meant, so that its fields are judged too; false where none is near."""
    role, value = members(reported.spot.annotation)[0], at(raw, reported.spot.loc)
    if not is_role(role):
        return False
    meant = kind_meant(value.get("kind") if isinstance(value, dict) else value, role.kinds)
    if meant is None:
        return False
    return _fill(raw, reported.spot.loc, {**value, "kind": meant} if isinstance(value, dict) else meant)


def _follows(reported: Reported, wounds: Sequence[str]) -> bool:
    """Whether a mistake is only there because of what was taken out before."""
    place = place_of("", reported.spot.loc)
    if reported.error["type"] == "missing" or any(within(place, wound) for wound in wounds):
        return True
    words = set(re.findall(r"\w+", reported.problem.rule))  # a rule between fields names them
    inner = [wound[len(place) :] for wound in wounds if not place or within(wound, place)]
    return any(words & set(re.findall(r"[a-z_]\w*", wound)) for wound in inner)


def _mend(
    cls: type[Settings], raw: dict[str, Any], reported: Reported, wounds: list[str], holes: set[Loc], names: Iterator[str]
) -> bool:
    """Take one mistake out of the table; false where that cannot be done."""
    wounds += reported.meant
    loc, kind = reported.spot.loc, reported.error["type"]
    if kind == "extra_forbidden":
        _remove(raw, loc)
        return True
    if kind in ("value_error", "assertion_error") and isinstance(at(raw, loc), dict):
        key = _blamed(cls, raw, reported)
        if key is not None:
            _remove(raw, (*loc, key))
            wounds.append(place_of("", (*loc, key)))
            return True
    while loc:
        place = place_of("", loc)
        wounds.append(place)
        here = spot(cls, raw, loc)
        if here.field is not None and not here.field.is_required():
            if _remove(raw, loc):
                return True
        elif loc not in holes and _fill(raw, loc, _placeholder(_declared(cls, raw, loc), names)):
            holes.add(loc)
            return True
        loc = loc[:-1]
    return False


def _blamed(cls: type[Settings], raw: dict[str, Any], reported: Reported) -> str | None:
    """A field without which a table breaks none of the rules between its fields; one that the rule names, if it can be."""
    loc, table = reported.spot.loc, at(raw, reported.spot.loc)
    owner = spot(cls, raw, loc).annotation
    fields = owner.model_fields if is_settings(owner) else {}
    words = set(re.findall(r"\w+", reported.problem.rule))
    keys = [key for key in table if key in fields and not fields[key].is_required()]
    for key in sorted(keys, key=lambda key: (key not in words, str(table[key]).startswith("stage:"))):
        without = copy.deepcopy(raw)
        _remove(without, (*loc, key))
        try:
            cls.model_validate(without)
        except ValidationError as error:
            if any(each["loc"] == reported.error["loc"] and each["type"] == reported.error["type"] for each in error.errors()):
                continue
        return key
    return None


def _declared(cls: type[Settings], raw: Any, loc: Loc) -> Any:
    """What the classes say of a place, before the kind that stands there is looked at."""
    owner = spot(cls, raw, loc[:-1]).annotation
    last = loc[-1]
    if isinstance(last, int):
        return item_of(owner, last)
    return owner.model_fields[last].annotation if is_settings(owner) and last in owner.model_fields else None


def _placeholder(annotation: Any, names: Iterator[str]) -> Any:
    """Something that a field takes, which no user wrote; undefined where that is unknown."""
    only = members(annotation)[0]
    origin, args = typing.get_origin(only), typing.get_args(only)
    if origin is typing.Literal:
        return args[0]
    if origin in (tuple, list):
        items = args if origin is tuple and Ellipsis not in args else args[:1]
        made = [_placeholder(item, names) for item in items]
        return PydanticUndefined if PydanticUndefined in made else made
    if only in (int, float, bool, str):
        return next(names) if only is str else only(1)
    if isinstance(only, type) and issubclass(only, StageRef):
        return f"{only.schemes[0]}:{next(names)}"
    if is_role(only):
        return next((made for cls in only.kinds.values() if (made := _bare(cls)) is not None), PydanticUndefined)
    if is_settings(only):
        needed = {name: field.annotation for name, field in only.model_fields.items() if field.is_required()}
        made = {name: _placeholder(inner, names) for name, inner in needed.items()}
        return PydanticUndefined if PydanticUndefined in made.values() else made
    return PydanticUndefined


def _bare(cls: type[Settings]) -> Settings | None:
    """A component with nothing but its defaults, if it can be."""
    try:
        return cls()
    except (ValidationError, TypeError):  # a field is needed; or it is a part of other kinds
        return None


def _remove(raw: Any, loc: Loc) -> bool:
    table = _parent(raw, loc)
    if not isinstance(table, dict) or loc[-1] not in table:
        return False
    del table[loc[-1]]
    return True


def _fill(raw: Any, loc: Loc, value: Any) -> bool:
    table, last = _parent(raw, loc), loc[-1]
    if value is PydanticUndefined:
        return False
    if isinstance(table, dict):
        table[last] = value
        return True
    if isinstance(table, list) and isinstance(last, int) and last < len(table):
        table[last] = value
        return True
    return False


def _parent(raw: Any, loc: Loc) -> Any:
    for part in loc[:-1]:
        raw = inside(raw, part)
    return raw
