"""What pydantic says of a mistake, in our words."""

import datetime
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from potstill.core.component import Settings, suggest
from potstill.core.errors import Problem
from potstill.recipe.hints import hint
from potstill.recipe.places import place_of
from potstill.recipe.spots import Spot, at, is_role, is_settings, members, spot
from potstill.stages.base import StageRef

BOUNDS = {
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
PATTERNS = {
    "^[a-z]{2}$": "must be a two-letter language code such as en",
    '^[^"\r\n]$': 'must be one character, and not a quotation mark; a tab is "\\t"',
    r"^\w+(\.\w+)*$": "must be the name of a split, without a slice; for fewer rows set share or limit",
}
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes", dict: "a table"}
HUB = "https://huggingface.co/"
LONGEST = 40  # characters of a value in a message


@dataclass(frozen=True)
class Reported:
    """One of pydantic's errors in our words.

    Attributes:
        spot: its place in the table.
        meant: places in the same table that an unknown name may have stood for.
    """

    problem: Problem
    error: ErrorDetails
    spot: Spot
    meant: tuple[str, ...] = ()


def reported_of(
    errors: Sequence[ErrorDetails], cls: type[Settings], raw: Any, label: str = "", stages: Sequence[str] = ()
) -> list[Reported]:
    """Pydantic's errors in our words, one for each mistake.

    Args:
        label: what messages call the stage; empty for the recipe's header.
        stages: names of all stages, for references that lack their `stage:`.
    """
    spots = [spot(cls, raw, error["loc"]) for error in errors]
    inner = {found.loc[:depth] for found in spots for depth in range(len(found.loc))}
    reported: dict[Any, Reported] = {}
    for error, found in zip(errors, spots, strict=True):
        # a list whose item is wrong is also too short; where no member of a union fits, each says so
        if found.loc in inner and (found.whole or error["type"] == "too_short"):
            continue
        key = found.loc if found.whole else (found.loc, error["type"], error["msg"])
        reported.setdefault(key, _reported(error, found, cls, raw, label, stages))
    return list(reported.values())


def _reported(error: ErrorDetails, found: Spot, cls: type[Settings], raw: Any, label: str, stages: Sequence[str]) -> Reported:
    place = place_of(label, found.loc) or "recipe"
    value = _value(error, found, raw)
    if error["type"] == "extra_forbidden":
        meant = hint(str(found.loc[-1]), found.loc[:-1], cls, raw, label)
        return Reported(Problem(place, f"no such field{meant.text}", value), error, found, meant.meant)
    return Reported(Problem(place, _rule(error, found, stages), value), error, found)


def _value(error: ErrorDetails, found: Spot, raw: Any) -> str | None:
    value = at(raw, found.loc) if found.whole else error.get("input")
    if error["type"] == "missing" or isinstance(value, dict | Settings) or not error["loc"]:
        return None
    if isinstance(value, str) and "api" in found.loc:  # it may be a key in a wrong place, and messages are shown around
        return None
    return shown(value)


def _rule(error: ErrorDetails, found: Spot, stages: Sequence[str]) -> str:
    context = error.get("ctx") or {}
    kind = error["type"]
    if found.whole:
        return f"must be {expected(found.annotation)}"
    match kind:
        case "missing":
            described = found.field.description if found.field is not None else None
            return f"is needed: {described}" if described else "is needed"
        case "less_than" | "less_than_equal" | "greater_than" | "greater_than_equal" | "multiple_of":
            words, name = BOUNDS[kind]
            bound = context[name]
            return f"must be {words} {bound if isinstance(bound, int) else f'{bound:g}'}"
        case "finite_number":
            return "must be a finite number"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "must be a whole number"
        case "float_parsing" | "float_type":
            return "must be a number"
        case "bool_parsing" | "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text in quotes"
        case "tuple_type" | "list_type":
            return "must be a list: [ … ]"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "must be a table"
        case "too_short":
            return f"needs at least {context.get('min_length', 1)}"
        case "too_long":
            return f"holds at most {context['max_length']}"
        case "string_too_short":
            least = context.get("min_length", 1)
            return "must not be empty" if least == 1 else f"must be at least {least} characters"
        case "string_too_long":
            return f"must be at most {context['max_length']} characters"
        case "string_pattern_mismatch":
            described = found.field.description if found.field is not None else None
            return PATTERNS.get(context["pattern"], f"is not written as it must be: {described or 'see the reference'}")
        case "literal_error":
            options = [str(option) for option in typing.get_args(found.annotation)]
            close = suggest(str(error.get("input")), options)
            return f"must be {'one of ' if len(options) > 1 else ''}{', '.join(options)}{close}"
        case "value_error" | "assertion_error":
            return str(context["error"])
        case "reference":
            return f"{error['msg']}{_reference(error.get('input'), found.annotation, stages)}"
        case "table" | "no_kind" | "unknown_kind" | "truth_for_number":
            return error["msg"]
    return f"must be {expected(found.annotation)}"


def expected(annotation: Any) -> str:
    """What a field takes, for people."""
    several = members(annotation)
    if len(several) > 1:
        return " or ".join(expected(member) for member in several)
    only: Any = several[0] if several else None
    origin, args = typing.get_origin(only), typing.get_args(only)
    if origin is typing.Literal:
        return f"'{args[0]}'" if len(args) == 1 else f"one of {', '.join(map(str, args))}"
    if origin in (tuple, list):
        item = typing.get_origin(args[0]) if args else None
        return f"a list of {', '.join(map(str, typing.get_args(args[0])))}" if item is typing.Literal else "a list: [ … ]"
    if isinstance(only, type) and issubclass(only, StageRef):
        return f"text such as '{only.schemes[0]}:…'"
    if is_role(only):
        return f"a table with a kind, or the kind alone: one of {', '.join(sorted(only.kinds))}"
    if is_settings(only) or origin is dict:
        return "a table"
    return PLAIN.get(only, "something else; see the reference")


def _reference(value: Any, annotation: Any, stages: Sequence[str]) -> str:
    """The reference that was meant by a text without a scheme: a stage, a folder that is there, or a model of the hub."""
    (ref,) = members(annotation)[:1]
    schemes = getattr(ref, "schemes", ())
    if not isinstance(value, str) or not value.strip():
        return ""
    scheme, colon, rest = (part.strip() for part in value.partition(":"))
    bare = rest if colon and not value.startswith("http") and "/" not in scheme and rest else value.strip()
    if bare in stages:
        return f"; did you mean 'stage:{bare}'?"
    if "path" in schemes and _is_folder(bare):
        return f"; did you mean 'path:{bare}'?"
    if "hf" in schemes and _like_hub(bare.removeprefix(HUB)):
        return f"; did you mean 'hf:{bare.removeprefix(HUB)}'?"
    close = suggest(bare, stages)
    if close:
        return close.replace("'", "'stage:", 1)
    if "path" in schemes and bare.startswith((".", "/", "~")):
        return f"; did you mean 'path:{bare}'?"
    return suggest(scheme, schemes) if colon else ""


def _is_folder(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, the home of nobody
        return False


def _like_hub(text: str) -> bool:
    """ORG/NAME, perhaps with @REVISION."""
    org, slash, name = text.partition("/")
    two_parts = bool(slash and org and name) and "/" not in name and org not in (".", "..", "~")
    return two_parts and not any(character.isspace() for character in text)


def shown(value: Any) -> str:
    """A value as it stands in a message, near to what the file says, and short."""
    text = _written(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "…"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{key} = {_written(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return str(value)
