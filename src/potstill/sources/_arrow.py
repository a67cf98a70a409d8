"""Rows of Arrow tables as rows of JSON."""

from typing import Any

from potstill.sources._cells import Row


def without_nulls(row: Row) -> Row:
    """A row without the keys that hold null inside its cells.

    All structs of an Arrow column have the same keys, so a key that a row never had holds null there: an argument of another
    tool's call, for one. A null of the row's own cannot be told from it.
    """
    return {name: _bare(value) for name, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items() if inner is not None}
    return [_bare(inner) for inner in value] if isinstance(value, list) else value
