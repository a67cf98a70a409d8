"""What recipes can name, read off the classes themselves."""

import json
import re
import typing
from typing import Any

from potstill.core.component import Component, Settings, suggest
from potstill.core.errors import UserError
from potstill.divergences import Divergence
from potstill.exporters import Exporter
from potstill.inits import Init
from potstill.metrics import Metric
from potstill.rewards import Reward
from potstill.sources import Source
from potstill.stages import Stage

ROLES: dict[str, type[Component]] = {role.role: role for role in (Stage, Source, Divergence, Init, Metric, Reward, Exporter)}


def components(name: str | None = None) -> dict[str, dict[str, Any]]:
    """Role -> kind -> its summary and fields: of all roles, of one, or of one kind in every role that has it.

    Raises:
        UserError: no such role and no such kind.
    """
    if name is None:
        return {role: _kinds(of) for role, of in ROLES.items()}
    if (role := name.removesuffix("s") if name not in ROLES else name) in ROLES:
        return {role: _kinds(ROLES[role])}
    found = {role: {name: _described(of.kinds[name])} for role, of in ROLES.items() if name in of.kinds}
    if not found:
        known = [*ROLES, *(kind for of in ROLES.values() for kind in of.kinds)]
        raise UserError(f"no role and no kind '{name}'{suggest(name, known)} (roles: {', '.join(ROLES)})")
    return found


def _kinds(role: type[Component]) -> dict[str, Any]:
    return {kind: _described(cls) for kind, cls in sorted(role.kinds.items())}


def _described(cls: type[Component]) -> dict[str, Any]:
    summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return {"summary": summary, "fields": fields_of(cls)}


def fields_of(cls: type[Settings], prefix: str = "") -> list[dict[str, Any]]:
    """Name, type, default and meaning of each field; groups of settings are flattened with dots."""
    found = []
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Component):
            group = fields_of(annotation, f"{prefix}{name}.")
            given = default.model_dump(mode="json") if isinstance(default, Settings) else {}
            for inner in group:
                key = inner["name"].removeprefix(f"{prefix}{name}.")
                if key in given:
                    inner["default"] = given[key]
            found += group
            continue
        found.append(
            {
                "name": f"{prefix}{name}",
                "type": _type(annotation) + _bounds(field.metadata),
                "required": field.is_required(),
                "default": _plain(default),
                "description": field.description or "",
            }
        )
        group = _optional_group(annotation)
        found += fields_of(group, f"{prefix}{name}.") if group is not None else []
    return found


def _optional_group(annotation: Any) -> type[Settings] | None:
    """The settings of a field that may be left out as a whole."""
    args = typing.get_args(annotation)
    of = args[0] if len(args) == 2 and args[1] is type(None) else None
    return of if isinstance(of, type) and issubclass(of, Settings) and not issubclass(of, Component) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return value.spec()
    if isinstance(value, Settings):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__ if issubclass(annotation, Settings) else annotation.__name__.replace("str", "text")
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if origin is typing.Annotated:
        return _type(args[0])
    if origin in (tuple, list):
        return "list of " + _type(args[0])
    if origin is dict:
        return "table"
    return " | ".join(_type(arg) for arg in args)


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    given = [(sign, getattr(m, key)) for m in metadata for key, sign in signs.items() if getattr(m, key, None) is not None]
    found = [f"{sign} {bound}" if isinstance(bound, int) else f"{sign} {bound:g}" for sign, bound in given]
    return f" ({', '.join(found)})" if found else ""


def print_overview(found: dict[str, dict[str, Any]], width: int) -> None:
    """Every kind in one line, for a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    column = max(len(kind) for kinds in found.values() for kind in kinds) + 4
    for role, kinds in found.items():
        console.print(f"[bold]{role}[/]")
        for kind, described in kinds.items():
            summary = _first_sentence(described["summary"], width - column)
            console.print(f"  [bold cyan]{kind}[/]{' ' * (column - 2 - len(kind))}{escape(summary)}")
    console.print("\nFields of a kind, or of all kinds of a role: potstill list NAME")


def _first_sentence(summary: str, width: int) -> str:
    """A summary's first sentence or clause, cut at a word where it is longer than the line."""
    sentence = re.split(r"(?<=[^.\d])[.:;] ", summary)[0].rstrip(".")
    if len(sentence) <= width:
        return sentence
    return f"{sentence[: width - 1].rsplit(' ', 1)[0].rstrip(',')} …"


def print_components(found: dict[str, dict[str, Any]]) -> None:
    """Kinds with their fields, for a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for role, kinds in found.items():
        console.print(f"[bold]{role}[/]")
        for kind, described in kinds.items():
            console.print(f"\n  [bold cyan]{kind}[/]  {escape(described['summary'])}")
            for field in described["fields"]:
                default = "needed" if field["required"] else f"= {toml(field['default'])}"
                meaning = f"  {field['description']}" if field["description"] else ""
                console.print(
                    f"    {field['name']:<28} [dim]{escape(field['type'])}[/]  {escape(default)}[dim]{escape(meaning)}[/]"
                )
        console.print()


def toml(value: Any) -> str:
    """As a recipe would write it; `none` where a field is left out."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, dict):
        inner = ", ".join(f"{k} = {toml(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}" if inner else "{}"
    return f"{value:g}" if isinstance(value, float) else str(value)
