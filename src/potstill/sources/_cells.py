"""Cells of rows, and the checks that every row-shaped source makes on them."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, Literal

from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.core.types import Example

Row = dict[str, Any]
OnEmpty = Literal["skip", "refuse"]

NAMES = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}


def digest(*parts: str) -> str:
    """A short key that equal texts share; lengths keep ("ab", "c") apart from ("a", "bc")."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.hexdigest()


def column(row: Row, name: str, place: str) -> Any:
    """The value of a column.

    Raises:
        UserError: there is no such column.
    """
    if name not in row:
        found = f"columns: {', '.join(row)}" if row else "it has no columns"
        raise UserError(f"{place}: no column '{name}'{suggest(name, row)} ({found})")
    return row[name]


def text(row: Row, name: str, place: str) -> str:
    """The text of a column; null is the empty text.

    Raises:
        UserError: there is no such column, or it holds something else than text.
    """
    return _text(column(row, name, place), f"{place}: column '{name}'")


def texts(row: Row, name: str, place: str) -> tuple[str, ...]:
    """The texts of a column that holds a list of them; null is the empty list.

    Raises:
        UserError: there is no such column, or it holds something else than a list of texts.
    """
    values = column(row, name, place)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise UserError(
            f"{place}: column '{name}' holds {NAMES.get(type(values), type(values).__name__)}, not a list of texts"
        )
    return tuple(_text(value, f"{place}: column '{name}', item {number}") for number, value in enumerate(values, 1))


def answered(example: Example, place: str, on_empty: OnEmpty, skip: Callable[[Example, str], None] | None) -> bool:
    """Whether a row has both a question and an answer; `skip` hears of it when it does not.

    Raises:
        UserError: it does not, and `on_empty` is "refuse".
    """
    for name in ("instruction", "response"):
        if not getattr(example, name).strip() and not (name == "response" and example.tool_calls):
            if on_empty == "refuse":
                raise UserError(f'{place}: empty {name}; fill it in, or set on_empty = "skip"')
            if skip is not None:
                skip(example, f"empty {name}")
            return False
    return True


def with_first(response: str, accepted: tuple[str, ...]) -> tuple[str, ...]:
    """The accepted answers, the response first, each once, none of them empty."""
    return tuple(dict.fromkeys(answer for answer in (response, *accepted) if answer.strip()))


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place} holds {NAMES.get(type(value), type(value).__name__)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = ascii(value[error.start])
        raise UserError(f"{place} holds {broken}, half of a surrogate pair; write the whole character") from None
    return value
