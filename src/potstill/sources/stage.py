"""Rows that a `generate` stage wrote."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from potstill.core.artifact import Artifact, fingerprint
from potstill.core.errors import UserError
from potstill.core.refs import RowsRef
from potstill.core.types import Case, Example, Split, Tests, Turn
from potstill.sources import Skip, Source, Splits
from potstill.sources._lines import read

WRITTEN, HELD_OUT = "rows.jsonl", "held_out.jsonl"  # in the artifact: rows to train on, and the source's own to measure on
_TURNS = ("history", "since")
_COLUMNS = ("key", "instruction", "context", "response", "language", "tag")  # every row has them, as readers of columns want
_FIELDS = {field.name: field for field in fields(Example)}
_Asked = tuple[str, ...]


@dataclass(frozen=True)
class Foretold:
    """What stands for rows that are not written yet: those that they will be written for.

    Attributes:
        times: answers that will be written for each.
    """

    source: Source
    times: int


class OfStage(Source, kind="stage"):
    """Rows that an earlier `generate` stage wrote, to train on; validation and test rows are those of the source that it read.

    `data = "stage:NAME"` is short for it, and `data = "path:FOLDER"` names an artifact of another run. Answers are written for
    training rows alone, so none can meet a test row.

    Raises:
        UserError: the rows are not written yet, or the folder holds none.
    """

    own_splits: ClassVar[bool] = True

    stage: RowsRef = Field(description="the `generate` stage, by its name or as stage:NAME, or path:FOLDER of its artifact")
    _rows: Path | Foretold | None = PrivateAttr(default=None)

    @field_validator("stage", mode="before")
    @classmethod
    def _a_name_alone_is_a_stage(cls, value: Any) -> Any:
        return f"stage:{value}" if isinstance(value, str) and value and ":" not in value else value

    @model_validator(mode="after")
    def _splits_are_given(self) -> "OfStage":
        if self.splits != Splits():
            raise ValueError("splits are those of the rows that were asked; set them where these are read")
        return self

    def written_by(self) -> RowsRef:
        return self.stage

    def found_in(self, folder: Path) -> "OfStage":
        return self._at(folder)

    def foretold_by(self, source: Source, times: int) -> "OfStage":
        return self._at(Foretold(source, times))

    def _at(self, rows: Path | Foretold) -> "OfStage":
        found = OfStage(**{name: getattr(self, name) for name in type(self).model_fields})  # a copy would keep what is cached
        found._rows = rows
        return found

    @property
    def foretold(self) -> bool:
        return isinstance(self._there(), Foretold)

    def origin(self) -> dict[str, Any]:
        match self._there():
            case None:
                return self.spec()
            case Foretold(source, _):
                return source.origin()
            case folder:
                return Artifact.load(folder).stage["data"]

    def teacher(self) -> str | None:
        there = self._there()
        return Artifact.load(there).summary["teacher"] if isinstance(there, Path) else None

    def _there(self) -> Path | Foretold | None:
        if self._rows is None and self.stage.scheme == "path":
            return Path(self.stage.target).expanduser()
        return self._rows

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        match self._there():
            case None:
                raise UserError(f"the rows of {self.stage} are not written yet; run the recipe that has this stage")
            case Foretold(source, times):
                for example in source.examples("train"):
                    yield from [example] * times
            case folder:
                yield from (example_of(row, place) for place, row in read(str(_checked(folder) / WRITTEN)))
        yield from (example for example, _ in self._held_out())

    def split_of(self, example: Example) -> Split:
        return self._split_of_held_out.get(_asked(example), "train")

    def _held_out(self) -> Iterator[tuple[Example, Split]]:
        match self._there():
            case None:
                return
            case Foretold(source, _):
                yield from held_out(source)
            case folder:
                path = _checked(folder) / HELD_OUT
                for place, row in read(str(path)) if path.stat().st_size else ():
                    yield example_of(row, place), row["split"]

    @cached_property
    def _split_of_held_out(self) -> Mapping[_Asked, Split]:
        return {_asked(example): split for example, split in self._held_out()}

    def content_hash(self) -> str:
        match self._there():
            case None:
                return fingerprint("not written yet")  # the fingerprint of the stage stands beside it
            case Foretold(source, times):
                return fingerprint([source.spec(), source.content_hash(), times])
            case folder:
                return Artifact.load(_checked(folder)).content


def held_out(source: Source) -> Iterator[tuple[Example, Split]]:
    """All rows of a source that are not trained on, with their splits."""
    for split in get_args(Split):
        if split != "train":
            yield from ((example, split) for example in source.examples(split))


def row_of(example: Example) -> dict[str, Any]:
    """An example as a JSON object; of what is no plain column, only what it has."""
    row = {n: value for n, value in asdict(example).items() if n in _COLUMNS or value != _FIELDS[n].default}
    if example.references == (example.response,):
        del row["references"]
    for name in _TURNS:
        if name in row:
            row[name] = [{key: value for key, value in turn.items() if value or key == "content"} for turn in row[name]]
    return {name: value for name, value in row.items() if value not in ((), [])}


def example_of(row: Mapping[str, Any], place: str) -> Example:
    """The example that `row_of` wrote; other keys are passed over.

    Raises:
        UserError: it is none; names the place.
    """
    try:
        found = {name: _tupled(row[name]) for name in _FIELDS if name in row}
        for name in _TURNS:
            if name in found:
                found[name] = tuple(Turn(**{key: _tupled(value) for key, value in turn.items()}) for turn in found[name])
        if isinstance(found.get("tests"), dict):
            found["tests"] = _tests(found["tests"])
        return Example(**found)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{place}: no row that a generate stage wrote ({error})") from None


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tests(written: Mapping[str, Any]) -> Tests:
    return Tests(**{**written, "cases": tuple(Case(**case) for case in written.get("cases", ()))})


def _asked(example: Example) -> _Asked:
    """What tells two questions apart, whatever is answered."""
    turns = (part for turn in (*example.history, *example.since) for part in (turn.role, turn.content))
    return (example.key, example.instruction, example.context, *turns)


def _checked(folder: Path) -> Path:
    made = Artifact.load(folder)
    if made.makes != "rows":
        raise UserError(f"{folder} holds {made.makes}, not rows that a generate stage wrote")
    return folder
