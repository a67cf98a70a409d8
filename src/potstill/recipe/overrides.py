"""`--set`: a field changed for one call."""

import tomllib
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.recipe import sweep as sweeping
from potstill.recipe.header import Header


def apply(table: dict[str, Any], override: str) -> None:
    """Set one field of a recipe's table, as `stage.field=value` or `field=value`.

    Raises:
        UserError: no such stage or field of the recipe, or a value on the way that is no table.
    """
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


def refuse_twice(sweeps: dict[int, sweeping.Sweep], overrides: tuple[str, ...]) -> None:
    """An override of a field that is swept would be set again by every value.

    Raises:
        UserError: names the field.
    """
    for override in overrides:
        place = ".".join(key.strip() for key in override.partition("=")[0].split("."))
        if (twice := sweeping.set_twice(sweeps, place)) is not None:
            raise UserError(f"--set {override}: '{twice}' is swept; give its values with --set 'sweep.{twice}=[ … ]'")
