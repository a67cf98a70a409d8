"""Any data set of the Hugging Face hub."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator

from potstill.edges.hub_rows import HubRows
from potstill.sources._arrow import without_nulls
from potstill.sources._cells import Row, with_number
from potstill.sources._columns import Columns

Name = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]


class Hub(Columns, kind="hub"):
    """The rows of a data set on the hub, streamed, or out of the hub's local cache; columns are named by fields.

    Raises:
        UserError: the data set is neither reachable nor cached, lacks the subset or split; names the row and the column that
            is missing or of the wrong type.
    """

    hub: str = Field(min_length=1, description="name of the data set, such as databricks/databricks-dolly-15k")
    subset: str | None = Field(default=None, min_length=1, description="the data set's configuration; default: its own default")
    split: tuple[Name, ...] = Field(
        default=("train",),
        min_length=1,
        description="the data set's own split to read, or a list of them; `splits` then splits their rows",
    )
    revision: str | None = Field(
        default=None, min_length=1, description="branch, tag or commit on the hub; default: the newest"
    )

    @field_validator("split", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("split")
    @classmethod
    def _each_once(cls, split: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(split)) < len(split):
            raise ValueError("names a split twice, whose rows would count twice")
        return split

    def read(self) -> Iterator[tuple[str, Row]]:
        for place, row in self._data_set().stream():
            yield place, with_number(without_nulls(row), self.weight)

    def content_hash(self) -> str:
        return self._data_set().commit()

    def _data_set(self) -> HubRows:
        instead = 'read its files with data.kind = "parquet", "csv" or "jsonl"'
        return HubRows(self.hub, self.revision, self.subset, self.split, instead)
