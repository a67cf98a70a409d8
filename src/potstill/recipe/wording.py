"""What pydantic says of a mistake, in our words."""

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic_core import ErrorDetails

from potstill.core.component import Component, Settings, suggest
from potstill.core.errors import Problem


def place_of(prefix: str, loc: tuple[int | str, ...]) -> str:
    place = prefix
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return place


def problems_of(errors: list[ErrorDetails], model: Any, raw: Any, prefix: str) -> list[Problem]:
    """Pydantic's errors in our words."""
    inner = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
    # a list whose item is wrong is also counted as too short
    errors = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in inner)]
    return [Problem(place_of(prefix, e["loc"]) or prefix or "recipe", _rule(e, model, raw), _shown(e)) for e in errors]


def _shown(error: ErrorDetails) -> str | None:
    value = error.get("input")
    if error["type"] == "missing" or isinstance(value, dict | Settings) or not error["loc"]:
        return None
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _rule(error: ErrorDetails, model: Any, raw: Any) -> str:
    context = error.get("ctx") or {}
    kind = error["type"]
    match kind:
        case "missing":
            described = _model_at(model, raw, error["loc"][:-1])
            field = described.model_fields.get(str(error["loc"][-1])) if described else None
            return f"is needed: {field.description}" if field is not None and field.description else "is needed"
        case "extra_forbidden":
            described = _model_at(model, raw, error["loc"][:-1])
            return f"no such field{suggest(str(error['loc'][-1]), described.model_fields if described else ())}"
        case "less_than" | "less_than_equal" | "greater_than" | "greater_than_equal":
            words = {
                "less_than": "less than",
                "less_than_equal": "at most",
                "greater_than": "more than",
                "greater_than_equal": "at least",
            }
            bound = context[
                {"less_than": "lt", "less_than_equal": "le", "greater_than": "gt", "greater_than_equal": "ge"}[kind]
            ]
            return f"must be {words[kind]} {bound if isinstance(bound, int) else f'{bound:g}'}"
        case "int_parsing" | "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_parsing" | "float_type":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "bool_parsing" | "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text in quotes"
        case "tuple_type" | "list_type":
            return "must be a list: [ … ]"
        case "too_short":
            return f"needs at least {context.get('min_length', 1)}"
        case "too_long":
            return f"holds at most {context['max_length']}"
        case "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"must be at most {context['max_length']} characters"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "literal_error":
            options = [option.strip().strip("'") for option in str(context["expected"]).replace(" or ", ",").split(",")]
            return f"must be one of {', '.join(options)}{suggest(str(error.get('input')), options)}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "must be a table"
        case "value_error":
            return str(context["error"])
    return error["msg"]


def _model_at(model: Any, raw: Any, loc: tuple[int | str, ...]) -> type[Settings] | None:
    """The settings class that a place in the file describes, following kinds."""
    for part in loc:
        raw = (
            raw[part]
            if isinstance(raw, dict) and part in raw
            else raw[part]
            if isinstance(raw, list) and isinstance(part, int)
            else None
        )
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        found = next(_settings_in(field.annotation), None)
        if found is None:
            return None
        model = found
        if isinstance(model, type) and issubclass(model, Component) and isinstance(raw, dict):
            model = model.kinds.get(str(raw.get("kind")), model)
    if isinstance(model, type) and issubclass(model, Component) and model.kind is None and isinstance(raw, dict):
        model = model.kinds.get(str(raw.get("kind")), model)
    return model


def _settings_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Settings):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _settings_in(inner)
