"""What may stand at a place in a table, read off the classes that the table describes."""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from potstill.core.component import Component, Settings

Loc = tuple[int | str, ...]


@dataclass(frozen=True)
class Spot:
    """A place in a table.

    Attributes:
        loc: without the names of union members that pydantic puts between field and item.
        annotation: what may stand there; None where the classes know nothing of it.
        owner: the settings whose field it is, or in whose field it lies.
        whole: whether `loc` is shorter than what pydantic gave, because no member of a union fits.
    """

    loc: Loc
    annotation: Any
    owner: type[Settings] | None = None
    field: FieldInfo | None = None
    whole: bool = False


def spot(model: type[Settings], raw: Any, loc: Loc) -> Spot:
    """The place that pydantic's `loc` means in a table of this class."""
    found = Spot((), model)
    for number, part in enumerate(loc):
        annotation = settled(found.annotation, raw)
        if len(members(annotation)) > 1 and isinstance(part, str) and not (isinstance(raw, Mapping) and part in raw):
            branch = next((member for member in members(annotation) if _is_tag(part, member)), None)
            if branch is None or number == len(loc) - 1:
                return Spot(found.loc, annotation, found.owner, found.field, whole=True)
            found = Spot(found.loc, branch, found.owner, found.field)
            continue
        raw = inside(raw, part)
        if isinstance(part, int):
            found = Spot((*found.loc, part), item_of(annotation, part), found.owner, None)
        elif is_settings(annotation):
            field = annotation.model_fields.get(part)
            found = Spot((*found.loc, part), field.annotation if field else None, annotation, field)
        else:
            found = Spot((*found.loc, part), None)
    return Spot(found.loc, settled(found.annotation, raw), found.owner, found.field)


def inside(raw: Any, part: int | str) -> Any:
    """An item of a list or a table; None where there is none."""
    if isinstance(raw, Mapping):
        return raw.get(part)
    return raw[part] if isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw) else None


def at(raw: Any, loc: Loc) -> Any:
    for part in loc:
        raw = inside(raw, part)
    return raw


def is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, Settings)


def is_role(annotation: Any) -> bool:
    return is_settings(annotation) and issubclass(annotation, Component) and annotation.kind is None


def members(annotation: Any) -> tuple[Any, ...]:
    """What a field may hold, None aside; one member where it is no union."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return (annotation,)
    return tuple(inner for arg in typing.get_args(annotation) if arg is not type(None) for inner in members(arg))


def settled(annotation: Any, raw: Any) -> Any:
    """An annotation without its None; of a role, the kind that the table names."""
    found = members(annotation)
    if len(found) != 1:
        return annotation
    if is_role(found[0]):
        kind = raw.get("kind") if isinstance(raw, Mapping) else raw
        return found[0].kinds.get(kind, found[0]) if isinstance(kind, str) else found[0]
    return found[0]


def item_of(annotation: Any, number: int) -> Any:
    """What a list holds at this place."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) not in (tuple, list) or not args:
        return None
    if typing.get_origin(annotation) is list or Ellipsis in args:
        return args[0]
    return args[number] if number < len(args) else None


def _is_tag(part: str, member: Any) -> bool:
    """Whether pydantic calls this member of a union so."""
    origin = typing.get_origin(member)
    if origin in (tuple, list, dict):
        return part.startswith(f"{origin.__name__}[")
    return part.startswith("literal[") if origin is typing.Literal else part == getattr(member, "__name__", None)


@dataclass(frozen=True)
class Named:
    """A field somewhere inside a table of settings; `kind`: only where the component before it is of that kind."""

    path: tuple[str, ...]
    kind: str | None = None

    @property
    def name(self) -> str:
        return self.path[-1]


def nested(cls: type[Settings], raw: Any, before: tuple[str, ...] = (), depth: int = 3) -> Iterator[Named]:
    """Every field of settings and of the groups in it, a component's by the kind that it has or would have."""
    for name, field in cls.model_fields.items():
        path = (*before, name)
        yield Named(path)
        group = group_of(field, inside(raw, name))
        if group is not None and depth:
            yield from nested(group, inside(raw, name), path, depth - 1)


def of_other_kinds(cls: type[Settings], raw: Any) -> Iterator[Named]:
    """Fields that components in these settings would have, were they of another kind."""
    for name, field in cls.model_fields.items():
        role = next((member for member in members(field.annotation) if is_role(member)), None)
        for kind, other in sorted(role.kinds.items()) if role is not None else ():
            if other is not group_of(field, inside(raw, name)):
                yield from (Named((name, inner), kind) for inner in other.model_fields)


def group_of(field: FieldInfo, raw: Any) -> type[Settings] | None:
    """The settings that a field holds: those that the table names, else those of its default."""
    found = settled(field.annotation, raw)
    if not is_settings(found):
        return None
    if not is_role(found):
        return found
    return type(field.default) if isinstance(field.default, Settings) else None
