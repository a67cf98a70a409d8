"""Rows of named columns: which column is what, whatever kind of file the rows come from."""

import re
from abc import abstractmethod
from collections.abc import Iterator

from pydantic import Field

from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.scorers.text import primary
from potstill.sources import Skip, Source
from potstill.sources._cells import OnEmpty, Row, answered, column, no_column, text, texts, with_first
from potstill.sources._chats import Chat, read_chat
from potstill.sources._files import sha256
from potstill.sources._shapes import remedy
from potstill.sources._survey import asked_key


class Columns(Source):
    """Rows of named columns; fields say which column is what, and a kind says by `read` where the rows are.

    Raises:
        UserError: names the row and the column that is missing or of the wrong type, and for shapes that are known the fields
            that would read them.
    """

    instruction: str = Field(default="instruction", description="column of what is asked")
    response: str = Field(
        default="response", description='column of the answer; "": rows are questions alone, for `generate` to answer'
    )
    context: str | None = Field(default=None, description="column of the supporting text")
    references: str | None = Field(default=None, description="column of a list of accepted answers, or that list as JSON")
    messages: str | None = Field(
        default=None, description="column of a chat in OpenAI's or ShareGPT's shape, instead of instruction and response"
    )
    tools: str = Field(default="tools", description="column of the tools on offer in a chat, where a row has it")
    ignored: tuple[str, ...] = Field(default=(), description="keys of messages that are passed over, such as an id")
    key: str | None = Field(default=None, description="column by which rows are split; default: a hash of what is asked")
    tag: str | None = Field(default=None, description="column of the group, for breakdowns in the report")
    weight: str | None = Field(default=None, description="column of what a row counts in training, 0 or more; default: 1")
    language: str | None = Field(
        default=None,
        pattern="^[a-z]{2}$",
        description="ISO 639-1 code of rows that name none; default: detected from those rows",
    )
    language_column: str | None = Field(default=None, description="column of each row's own language code")
    on_empty: OnEmpty = Field(default="skip", description="what to do with rows that have no instruction or no response")

    @abstractmethod
    def read(self) -> Iterator[tuple[str, Row]]:
        """Each row with its place, in a fixed order.

        Raises:
            UserError: the rows cannot be read.
        """

    def needed(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        asked = (self.messages,) if self.messages else (self.instruction, *self._response())
        others = (self.context, self.references, self.key, self.tag, self.weight, self.language_column)
        return (*asked, *(name for name in others if name))

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for place, row in self.read():
            example = self._example(row, place)
            needed = ("instruction", "response") if self.messages or self.response else ("instruction",)
            if answered(example, place, self.on_empty, skip, needed):
                yield example

    def _response(self) -> tuple[str, ...]:
        return (self.response,) if self.response else ()

    def keyed_by_question(self) -> bool:
        return self.key is None

    def _example(self, row: Row, place: str) -> Example:
        chat = self._chat(row, place)
        response = chat.answer.content
        context = text(row, self.context, place) if self.context else ""
        return Example(
            key=_key(row, self.key, place) if self.key else self._asked(chat, context),
            instruction=chat.instruction,
            response=response,
            context=context,
            references=with_first(response, texts(row, self.references, place)) if self.references else (),
            history=chat.history,
            language=(_language(row, self.language_column, place) if self.language_column else "") or self.language or "",
            tag=text(row, self.tag, place) if self.tag else "",
            weight=(_weight(row, self.weight, place) if self.weight else 1.0) * chat.weight,
            reasoning=chat.answer.reasoning,
            tool_calls=chat.answer.tool_calls,
            since=chat.since,
            tools=chat.tools,
        )

    def _chat(self, row: Row, place: str) -> Chat:
        asked = (self.messages,) if self.messages else (self.instruction, *self._response())
        missing = next((name for name in asked if name not in row), None)
        if missing is not None:
            field = next(field for field in ("messages", "instruction", "response") if getattr(self, field) == missing)
            raise no_column(row, missing, place, remedy(row, self.instruction, self.response, self.context), f"data.{field}")
        if self.messages:
            return read_chat(row, self.messages, self.tools, self.ignored, place)
        instruction = text(row, self.instruction, place)
        response = text(row, self.response, place) if self.response else ""
        return Chat((), instruction, (), Turn("assistant", response))

    def _asked(self, chat: Chat, context: str) -> str:
        # of a chat without its context: the rows of its later turns have their first question in their history, and no more
        return asked_key(chat.instruction, "" if self.messages else context, chat.history)


class FileColumns(Columns):
    """Rows of named columns in one local file."""

    path: str = Field(min_length=1, description="the file; relative to the current directory, ~ is the home directory")

    def content_hash(self) -> str:
        return sha256(self.path)


def _language(row: Row, name: str, place: str) -> str:
    """The code of a row's language without its region, "en" of "en-US" and of "eng"; "" where the row names none."""
    said = primary(text(row, name, place))
    if said and not re.fullmatch("[a-z]{2,3}", said):
        raise UserError(f"{place}: column '{name}' holds {said!r}; write an ISO 639-1 code, such as en")
    return said


def _key(row: Row, name: str, place: str) -> str:
    value = column(row, name, place)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{place}: column '{name}' splits the rows and must hold text or a whole number")
    return str(value)


def _weight(row: Row, name: str, place: str) -> float:
    value = column(row, name, place)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"{place}: column '{name}' weights the rows and must hold a number of 0 or more")
    return float(value)
