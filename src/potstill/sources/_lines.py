"""Rows of JSON-lines files."""

import json
from collections.abc import Iterator

from potstill.core.errors import UserError
from potstill.sources._cells import NAMES, Row
from potstill.sources._files import is_table, open_text


def read(path: str) -> Iterator[tuple[str, Row]]:
    """Each row with its place, `file:line`; blank lines and a byte-order mark are passed over.

    Raises:
        UserError: the file is missing, a folder, forbidden, without rows, not UTF-8, or a line is no JSON object.
    """
    number = count = 0
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                count += 1
                if count == 1:
                    _refuse_other_habits(line.strip(), path)
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    if not count:
        raise UserError(f"{path}: has no rows; write one JSON object per line")


def _refuse_other_habits(start: bytes, path: str) -> None:
    """One JSON list of all rows, which is the other habit of files that end in .json; and a table."""
    if not start.startswith(b"{") and is_table(path):
        raise UserError(f'{path}: is no JSON, and named like a table; set data.kind = "csv"')
    if start == b"[" or start.startswith((b"[{", b"[ {")):
        raise UserError(f"{path}: is one JSON list, not one JSON object per line; write `jq -c '.[]' {path} > rows.jsonl`")


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
        raise UserError(f"{place}: {NAMES.get(type(row), 'null')}, not an object; write one JSON object per line")
    return row
