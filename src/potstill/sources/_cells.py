"""Cells of rows, and the checks that every row-shaped source makes on them."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.core.types import Example

Row = dict[str, Any]
OnEmpty = Literal["skip", "refuse"]

NAMES = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
_LIST = '["one", "two"]'
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FEW, _SHORT = 20, 40  # names of columns in a message, characters of each


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
        raise no_column(row, name, place)
    return row[name]


def no_column(row: Row, name: str, place: str, remedy: str = "", field: str = "") -> UserError:
    """That a row lacks a column, which it has, and what to set.

    Args:
        remedy: what to set, where it is known; else a name alike is told, else `field`, which names the column.
    """
    found = f"columns: {shown(row)}" if row else "it has no columns"
    alike = "" if remedy else suggest(name, row)
    otherwise = f"; say by {field} which of them it is" if row and field and not remedy and not alike else ""
    return UserError(f"{place}: no column '{name}'{alike} ({found}){remedy}{otherwise}")


def shown(names: Iterable[str]) -> str:
    """Names of columns in a message, shortened: of a file without a header they are its first row."""
    names = list(names)
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(name if len(name) <= _SHORT else f"{name[:_SHORT]}…" for name in names[:_FEW]) + more


def text(row: Row, name: str, place: str) -> str:
    """The text of a column; null is the empty text.

    Raises:
        UserError: there is no such column, or it holds something else than text.
    """
    return _text(column(row, name, place), f"{place}: column '{name}'")


def texts(row: Row, name: str, place: str) -> tuple[str, ...]:
    """The texts of a column that holds a list of them, or that list as JSON; null and the empty text are the empty list.

    Raises:
        UserError: there is no such column, or it holds something else than a list of texts.
    """
    values = unpacked(column(row, name, place))
    if values is None or values == "":
        return ()
    if not isinstance(values, list):
        held = NAMES.get(type(values), type(values).__name__)
        raise UserError(f"{place}: column '{name}' holds {held}, not a list of texts; write it as {_LIST}")
    return tuple(_text(value, f"{place}: column '{name}', item {number}") for number, value in enumerate(values, 1))


def with_number(row: Row, name: str | None) -> Row:
    """A row with the text of one column as a number, as files of text need it; text that is no number stays, to be refused."""
    value = row.get(name) if name else None
    return {**row, name: float(value)} if name and isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else row


def unpacked(value: Any) -> Any:
    """The list that a text holds as JSON, as cells of CSV must; every other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value.strip()
    return found if isinstance(found, list) else value


def answered(
    example: Example,
    place: str,
    on_empty: OnEmpty,
    skip: Callable[[Example, str], None] | None,
    needed: Sequence[str] = ("instruction", "response"),
) -> bool:
    """Whether a row has both a question and an answer, or what else is needed; `skip` hears of it when it does not.

    Raises:
        UserError: it does not, and `on_empty` is "refuse".
    """
    for name in needed:
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
