"""What recipes can name, read off the classes themselves."""

import typing
from typing import Any

from potstill.core.component import Component, Settings, suggest
from potstill.core.errors import UserError
from potstill.divergences import Divergence
from potstill.exporters import Exporter
from potstill.inits import Init
from potstill.metrics import Metric
from potstill.sources import Source
from potstill.stages import Stage

ROLES: dict[str, type[Component]] = {role.role: role for role in (Stage, Source, Divergence, Init, Metric, Exporter)}


def components(role: str | None = None) -> dict[str, dict[str, Any]]:
    """Role -> kind -> its summary and fields.

    Raises:
        UserError: no such role.
    """
    if role is not None and role not in ROLES:
        singular = role.removesuffix("s")
        if singular not in ROLES:
            raise UserError(f"no role '{role}'{suggest(role, ROLES)} (known: {', '.join(ROLES)})")
        role = singular
    chosen = {role: ROLES[role]} if role else ROLES
    return {name: {kind: _described(cls) for kind, cls in sorted(of.kinds.items())} for name, of in chosen.items()}


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
        return " | ".join(f"'{arg}'" for arg in args)
    if origin in (tuple, list):
        return "list of " + _type(args[0])
    if origin is dict:
        return "table"
    return " | ".join(_type(arg) for arg in args)


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if getattr(m, key, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def print_components(found: dict[str, dict[str, Any]]) -> None:
    """For a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for role, kinds in found.items():
        console.print(f"[bold]{role}[/]")
        for kind, described in kinds.items():
            console.print(f"\n  [bold cyan]{kind}[/]  {escape(described['summary'])}")
            for field in described["fields"]:
                default = "needed" if field["required"] else f"= {toml(field['default'])}"
                told = f"  {field['description']}" if field["description"] else ""
                console.print(
                    f"    {field['name']:<28} [dim]{escape(field['type'])}[/]  {escape(default)}[dim]{escape(told)}[/]"
                )
        console.print()


def toml(value: Any) -> str:
    """As a recipe would write it; `none` where a field is left out."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, dict):
        inner = ", ".join(f"{k} = {toml(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}" if inner else "{}"
    return f"{value:g}" if isinstance(value, float) else str(value)
