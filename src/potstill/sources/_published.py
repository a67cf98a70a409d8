"""Data sets of one fixed shape, from a local file of JSON lines or from the hub."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from potstill.core.errors import UserError
from potstill.core.types import Case, Example
from potstill.edges.hub_rows import HubRows
from potstill.sources import Skip, Source
from potstill.sources._arrow import without_nulls
from potstill.sources._cells import NAMES, OnEmpty, Row, answered, column, text
from potstill.sources._files import sha256
from potstill.sources._lines import read


class LeftOut(Exception):
    """A row that is passed over and counted, with the reason."""

    def __init__(self, example: Example, reason: str) -> None:
        self.example, self.reason = example, reason
        super().__init__(reason)


class Published(Source):
    """Rows of a published data set; a kind says by `example` what they are.

    Raises:
        UserError: the file cannot be read, the hub cannot be reached, or a row lacks a column or has one of another type.
    """

    needed: ClassVar[tuple[str, ...]] = ("instruction", "response")

    path: str | None = Field(default=None, min_length=1, description="the rows as JSON lines, instead of the hub")
    hub: str = Field(min_length=1, description="name of the data set on the hub")
    subset: str | None = Field(default=None, min_length=1, description="the data set's configuration; default: its own default")
    split: str = Field(
        default="train", min_length=1, description="the data set's own split to read; `splits` then splits its rows"
    )
    revision: str | None = Field(
        default=None, min_length=1, description="branch, tag or commit on the hub; default: the newest"
    )
    on_empty: OnEmpty = Field(default="skip", description="what to do with rows that have no instruction or no response")

    @abstractmethod
    def example(self, row: Row, place: str) -> Example:
        """The example of a row.

        Raises:
            LeftOut: the row is not of use here.
            UserError: names the column that is missing or of the wrong type.
        """

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for place, row in self._read():
            try:
                example = self.example(row, place)
            except LeftOut as left:
                if skip is not None:
                    skip(left.example, left.reason)
                continue
            if answered(example, place, self.on_empty, skip, self.needed):
                yield example

    def content_hash(self) -> str:
        return sha256(self.path) if self.path else self._data_set().commit()

    def _read(self) -> Iterator[tuple[str, Row]]:
        if self.path:
            return read(self.path)
        return ((place, without_nulls(row)) for place, row in self._data_set().stream())

    def _data_set(self) -> HubRows:
        return HubRows(self.hub, self.revision, self.subset, (self.split,))


def optional(row: Row, name: str, place: str) -> str:
    """The text of a column, "" where there is no such column."""
    return text(row, name, place) if name in row else ""


def first_of(row: Row, names: tuple[str, ...], place: str) -> str:
    """The text of the first column of several names that a row has.

    Raises:
        UserError: it has none of them.
    """
    name = next((name for name in names if name in row), names[0])
    return text(row, name, place)


def items(row: Row, name: str, place: str) -> list[Any]:
    """The values of a column that holds a list; null is the empty list.

    Raises:
        UserError: there is no such column, or it holds something else.
    """
    value = column(row, name, place)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{place}: column '{name}' holds {NAMES.get(type(value), type(value).__name__)}, not a list")
    return value


def cases(values: list[Any], name: str, place: str) -> tuple[Case, ...]:
    """Tests of objects with `input` and `output`.

    Raises:
        UserError: one is no such object.
    """
    found = []
    for number, value in enumerate(values, 1):
        where = f"{place}: column '{name}', item {number}"
        if not isinstance(value, dict):
            raise UserError(f'{where} holds no object; write it as {{"input": "…", "output": "…"}}')
        found.append(Case(text(value, "input", where), text(value, "output", where)))
    return tuple(found)


def fenced(program: str) -> str:
    """A program as an answer holds it: lines end as on Unix, no blank line around it."""
    return f"```python\n{unix(program)}\n```"


def unix(program: str) -> str:
    """A program with line feeds alone, without blank lines at its ends."""
    return program.replace("\r\n", "\n").replace("\r", "\n").strip("\n").rstrip()
