"""Rows of JSON-lines files, and the checks that every row-shaped source makes on them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.core.types import Example

Row = dict[str, Any]
OnEmpty = Literal["skip", "refuse"]

_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}


def read(path: str) -> Iterator[tuple[str, Row]]:
    """Each row with its place, `file:line`; blank lines and a byte-order mark are passed over.

    Raises:
        UserError: the file is missing, a folder, forbidden, without rows, not UTF-8, or a line is no JSON object.
    """
    number = count = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                count += 1
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    if not count:
        raise UserError(f"{path}: has no rows; write one JSON object per line")


def sha256(path: str) -> str:
    """The hex digest of the file's bytes, read in pieces.

    Raises:
        UserError: the file cannot be opened.
    """
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            f"{place}: column '{name}' holds {_NAMES.get(type(values), type(values).__name__)}, not a list of texts"
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


def _open(path: str) -> BufferedReader:
    file = Path(os.path.expanduser(path))
    try:
        return file.open("rb")
    except FileNotFoundError:
        folder = file.parent
        if not folder.is_dir():
            raise UserError(f"{path}: no such folder as {folder.absolute()}; check data.path") from None
        hint = suggest(file.name, (other.name for other in folder.iterdir())) or "; check data.path"
        raise UserError(f"{path}: no such file in {folder.absolute()}{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name one JSON-lines file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; try `chmod u+r {path}`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check data.path") from None


def _parse(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise UserError(f"{place}: not UTF-8 (byte 0x{byte:02x} in column {error.start + 1}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in column {error.colno}"
        raise UserError(f"{place}: not valid JSON ({reason}); write one JSON object per line") from None
    except RecursionError:
        raise UserError(f"{place}: not valid JSON (nested too deeply); write one JSON object per line") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{place}: not valid JSON ({error}); write one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: {_NAMES.get(type(row), 'null')}, not an object; write one JSON object per line")
    return row


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place} holds {_NAMES.get(type(value), type(value).__name__)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = ascii(value[error.start])
        raise UserError(f"{place} holds {broken}, half of a surrogate pair; write the whole character") from None
    return value
