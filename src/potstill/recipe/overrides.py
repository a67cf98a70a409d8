"""`--set`: a field changed for one call."""

import tomllib
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.recipe import sweep as sweeping
from potstill.recipe.header import Header


def apply(table: dict[str, Any], override: str) -> None:
    """Set one field of a recipe's table, as `stage.field=value` or `field=value`; or a model wherever it is named.

    `hf:ORG/NAME=path:FOLDER` names another model wherever the recipe names the first, such as a copy of it on this machine.

    Raises:
        UserError: no such stage, field or model in the recipe, or a value on the way that is no table.
    """
    place, equals, text = override.partition("=")
    if equals and place.startswith(("hf:", "path:")):
        replaced, count = _renamed(table, place, text)
        if not count:
            raise UserError(f"--set {override}: the recipe names no model '{place}'; write it as the recipe does")
        table |= replaced
        return
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


def _renamed(value: Any, old: str, new: str) -> tuple[Any, int]:
    """A value with one text put in place of another, wherever it is, and how often; tables and lists are copied."""
    if isinstance(value, dict):
        found = {key: _renamed(inner, old, new) for key, inner in value.items()}
        return {key: inner for key, (inner, _) in found.items()}, sum(count for _, count in found.values())
    if isinstance(value, list):
        items = [_renamed(inner, old, new) for inner in value]
        return [inner for inner, _ in items], sum(count for _, count in items)
    return (new, 1) if value == old else (value, 0)


def refuse_twice(sweeps: dict[int, sweeping.Sweep], overrides: tuple[str, ...]) -> None:
    """An override of a field that is swept would be set again by every value.

    Raises:
        UserError: names the field.
    """
    for override in overrides:
        place = ".".join(key.strip() for key in override.partition("=")[0].split("."))
        if (twice := sweeping.set_twice(sweeps, place)) is not None:
            raise UserError(f"--set {override}: '{twice}' is swept; give its values with --set 'sweep.{twice}=[ … ]'")
