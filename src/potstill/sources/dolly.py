"""Databricks Dolly, and data sets of its shape."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from potstill.core.types import Example
from potstill.edges.hub_rows import HubRows
from potstill.sources import Skip, Source
from potstill.sources._cells import OnEmpty, Row, answered, text
from potstill.sources._files import sha256
from potstill.sources._lines import read
from potstill.sources._survey import asked_key


class Dolly(Source, kind="dolly"):
    """Instructions written by people, some with a context. Conover et al., "Free Dolly", 2023; CC BY-SA 3.0.

    From the hub, or from `path` with the same rows as JSON lines. Split by instruction and context, so that a
    question asked twice never straddles splits. Column fields fit data sets of this shape in other languages.

    Raises:
        UserError: the hub cannot be reached, or a row lacks a column.
    """

    version: ClassVar[int] = 4  # 2: normalised questions are keys; 3: without typography; 4: CSV of the hub stays text

    path: str | None = Field(default=None, min_length=1, description="the rows as JSON lines, instead of the hub")
    hub: str = Field(default="databricks/databricks-dolly-15k", min_length=1, description="name of the data set on the hub")
    revision: str | None = Field(
        default=None, min_length=1, description="branch, tag or commit on the hub; default: the newest"
    )
    language: str | None = Field(
        default=None, pattern="^[a-z]{2}$", description="ISO 639-1 code of the rows; default: detected from the rows"
    )
    instruction: str = Field(default="instruction", description="column of what is asked")
    context: str = Field(default="context", description="column of the supporting text; empty when there is none")
    response: str = Field(default="response", description="column of the answer")
    category: str = Field(default="category", description="column of the category, the row's tag; empty when there is none")
    on_empty: OnEmpty = Field(default="skip", description="what to do with rows that have no instruction or no response")

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for place, row in read(self.path) if self.path else HubRows(self.hub, self.revision).stream():
            example = self._example(row, place)
            if answered(example, place, self.on_empty, skip):
                yield example

    def keyed_by_question(self) -> bool:
        return True

    def content_hash(self) -> str:
        return sha256(self.path) if self.path else HubRows(self.hub, self.revision).commit()

    def _example(self, row: Row, place: str) -> Example:
        instruction = text(row, self.instruction, place)
        context = text(row, self.context, place) if self.context else ""
        return Example(
            key=asked_key(instruction, context),
            instruction=instruction,
            response=text(row, self.response, place),
            context=context,
            language=self.language or "",
            tag=text(row, self.category, place) if self.category else "",
        )
