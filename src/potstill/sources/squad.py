"""SQuAD: questions answered by a span of a paragraph."""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, model_validator

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.edges.hub_rows import HubRows
from potstill.scorers.text import key_form
from potstill.sources import Skip, Source
from potstill.sources._cells import OnEmpty, Row, answered, digest, text, texts, with_first
from potstill.sources._files import sha256
from potstill.sources._lines import read


class Squad(Source, kind="squad"):
    """Paragraph, question, short answers. Rajpurkar et al., 2016; Carrino et al., 2020 (Spanish).

    Rows as JSON lines (`instruction, context, response`, and where known `title`, `responses`) or from the hub
    (`title, context, question, answers.text`). Split by title, else by paragraph: neither straddles splits.
    The first accepted answer is the response; questions without answer count as empty.

    Raises:
        UserError: the hub cannot be reached, or a row lacks a column.
    """

    version: ClassVar[int] = 4  # 2: titles that ask the same joined; 3: keys without typography; 4: CSV of the hub stays text

    path: str | None = Field(default=None, min_length=1, description="the rows as JSON lines")
    hub: str | None = Field(default=None, min_length=1, description="name of the data set on the hub, such as rajpurkar/squad")
    revision: str | None = Field(
        default=None, min_length=1, description="branch, tag or commit on the hub; default: the newest"
    )
    language: str | None = Field(
        default=None, pattern="^[a-z]{2}$", description="ISO 639-1 code of the rows; default: detected from the rows"
    )
    on_empty: OnEmpty = Field(default="skip", description="what to do with rows that have no instruction or no response")

    @model_validator(mode="after")
    def _name_one_place(self) -> "Squad":
        if (self.path is None) == (self.hub is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"needs either path (a JSON-lines file) or hub (a data set's name); {given} given")
        return self

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for place, row in read(self.path) if self.path else HubRows(self.hub or "", self.revision).stream():
            example = self._example(row, place)
            if answered(example, place, self.on_empty, skip):
                yield example

    def content_hash(self) -> str:
        return sha256(self.path) if self.path else HubRows(self.hub or "", self.revision).commit()

    def _example(self, row: Row, place: str) -> Example:
        context, title = text(row, "context", place), text(row, "title", place) if "title" in row else ""
        answers = _answers(row, place)
        return Example(
            key=title or digest(key_form(context)),
            instruction=text(row, "question" if "question" in row else "instruction", place),
            response=answers[0] if answers else "",
            context=context,
            references=answers,
            language=self.language or "",
            tag=title,
        )


def _answers(row: Row, place: str) -> tuple[str, ...]:
    """Every accepted answer, the first of them the response."""
    if "answers" in row:
        return with_first("", texts(_spans(row["answers"], place), "text", f"{place}: column 'answers'"))
    if "responses" in row:
        response = text(row, "response", place) if "response" in row else ""
        return with_first(response, texts(row, "responses", place))
    return with_first("", (text(row, "response", place),))


def _spans(answers: Any, place: str) -> Row:
    if not isinstance(answers, dict):
        raise UserError(f"{place}: column 'answers' must hold an object with a list of texts under 'text'")
    return answers
