"""Where rows come from. One file per source; a new file here is a new `kind` in every recipe."""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import Field, model_validator

from potstill.core.component import Component, Settings, discover
from potstill.core.errors import UserError
from potstill.core.refs import RowsRef
from potstill.core.types import Example, Split
from potstill.scorers.text import key_form
from potstill.sources._near import NearDuplicates, identity, near_duplicates, none_looked_for
from potstill.sources._survey import Survey, place, survey

Skip = Callable[[Example, str], None]
T = TypeVar("T")
_Kept = tuple[list[tuple[Split, Example]], list[tuple[Example, str]]]  # rows in use; rows left out, with the reason

_FEW = 20  # rows: of fewer, a fifth is chance
_KEPT = 2**24  # characters of a source's rows, and 1,000 more for each row
NEAR_DUPLICATE = "nearly repeats a held-out row"


class Splits(Settings):
    """Shares of the rows kept out of training; a row's split depends on the hash of its key alone."""

    validation: float = Field(default=0.05, ge=0, lt=1, description="share of keys for validation")
    test: float = Field(default=0.1, ge=0, le=1, description="share of keys for the test; 1: no row is trained on")
    near_duplicates: Literal["tell", "drop"] = Field(
        default="tell", description="training rows that nearly repeat a held-out row: count them, or leave them out of training"
    )
    similarity: float = Field(
        default=0.8, ge=0.5, le=1, description="from which on two questions are near: Jaccard index of runs of five characters"
    )

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> "Splits":
        if self.validation + self.test >= 1 and (self.validation, self.test) != (0, 1):
            raise ValueError(
                f"validation + test = {self.validation + self.test:g} leaves no row to train on; where nothing is trained, "
                "set validation = 0 and test = 1"
            )
        return self

    def of(self, key: str) -> Split:
        """The split of a key: stable when rows are added, removed or reordered, equal for keys of one `key_form`."""
        return self.at(place(key))

    def at(self, place: int) -> Split:
        """The split of one of 2⁶⁴ places."""
        share = place / 2**64
        if share < self.test or self.test == 1:  # the last places are rounded up to 1
            return "test"
        return "validation" if share < self.test + self.validation else "train"


class Source(Component):
    """Rows of one data set, as `Example`s, in a fixed order and without loading them all into memory."""

    own_splits: ClassVar[bool] = False  # True where `split_of` is overridden: such splits are left as they are

    splits: Splits = Splits()
    share: float = Field(
        default=1.0, gt=0, le=1, description="use this share of the rows, drawn by a hash: stable, and an even mix of the file"
    )
    limit: int | None = Field(
        default=None, ge=1, description="for a quick look: use only the first so many rows of the file, over all splits"
    )

    @classmethod
    def parse(cls, value: Any) -> Component:
        return super().parse(table_of(value))

    def written_by(self) -> RowsRef | None:
        """What writes these rows before they can be read; None where they are there."""
        return None

    def found_in(self, folder: Path) -> "Source":
        """The same rows, once `written_by` has written them into a folder."""
        return self

    def foretold_by(self, source: "Source", times: int) -> "Source":
        """The same before they are written: what is asked is known, and answers are guessed.

        Args:
            source: the rows that answers will be written for, `times` for each.
        """
        return self

    @property
    def foretold(self) -> bool:
        """Whether the answers of training rows are guesses."""
        return False

    def origin(self) -> dict[str, Any]:
        """The spec of the rows that are asked, whoever answered them."""
        return self.spec()

    def teacher(self) -> str | None:
        """The model that wrote the answers, as its stage names it; None where no model of a recipe did."""
        return None

    @abstractmethod
    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        """Every row, all splits, in a fixed order; `skip` hears of each row left out, and why.

        Raises:
            UserError: the file is missing, empty, not UTF-8, not what its columns say; names file and line.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """A hex digest that changes whenever `rows` would."""

    def keyed_by_question(self) -> bool:
        """Whether every row's key is `asked_key` of what it asks, so that no two keys can ask the same."""
        return False

    def split_of(self, example: Example) -> Split:
        """The split of a row of `rows`: rows that share a key, or ask the same, share it. `own_splits` says: overridden."""
        return self.splits.at(self._place(example))

    def examples(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Example]:
        """The rows of one split; `skipped` counts the rows of this split that are left out, by reason.

        Each row has its language, and the key that it shares with all rows that must not be parted from it.
        """

        def skip(example: Example, reason: str) -> None:
            if skipped is not None and self._drawn(example) and self.split_of(example) == split:
                skipped[reason] += 1

        near = self._near_dropped() if split == "train" else frozenset()
        for found, example in self._parted(skip):
            if found != split:
                continue
            if near and identity(example) in near:
                skip(example, NEAR_DUPLICATE)
                continue
            language = example.language or self._survey.language.language
            yield replace(example, key=self._shared_key(example), language=language)

    def language_in_use(self) -> str:
        """ISO 639-1 codes of the rows: those that rows name, and the one detected for the others; or "und"."""
        detected = {self._survey.language.language} if self._survey.unnamed else set()
        return ", ".join(sorted(self._survey.named | detected))

    def language_note(self) -> str:
        """The languages in use; for rows that name none, how the language was detected."""
        guess = self._survey.language
        return (
            f"{self.language_in_use()} (detected from the rows: {guess.why})"
            if self._survey.unnamed
            else self.language_in_use()
        )

    def largest_key(self) -> tuple[str, int, int]:
        """The first question of the key that most rows in use share, how many share it, and how many rows there are.

        Raises:
            UserError: the rows cannot be read.
        """
        counts, first = Counter[int](), dict[int, str]()
        for _, row in self._parted():
            here = self._place(row)
            counts[here] += 1
            first.setdefault(here, next((turn.content for turn in row.history if turn.role == "user"), row.instruction))
        if not counts:
            return "", 0, 0
        largest, count = counts.most_common(1)[0]
        return first[largest], count, counts.total()

    def notes(self) -> list[str]:
        """What a person must know of the splits: that one key holds more than a fifth of the rows.

        Raises:
            UserError: the rows cannot be read.
        """
        asked, count, rows = ("", 0, 0) if self.own_splits else self.largest_key()
        if 5 * count <= rows or rows < _FEW:
            return []
        return [
            f"one key holds {count:,} of {rows:,} rows, which all lie in one split; the first of them begins with "
            f"{asked[:40]!r}: name a finer key, or the shares of the splits are far from those asked for"
        ]

    def near_duplicates(self) -> NearDuplicates:
        """Training rows that nearly repeat a held-out one. Takes seconds for ten thousand rows; counted once a process.

        Raises:
            UserError: the rows cannot be read, or to drop such rows would leave out more than half of the training rows.
        """
        return self._near[0]

    def _parted(self, skip: Skip | None = None) -> Iterator[tuple[Split, Example]]:
        """Each row in use with its split; `skip` hears of each row left out, and why."""
        kept = _ROWS.read(self) if _ROWS is not None else None
        if kept is None:
            yield from self._in_use(skip)
            return
        rows, skipped = kept
        if skip is not None:
            for example, reason in skipped:
                skip(example, reason)
        yield from rows

    def _in_use(self, skip: Skip | None) -> Iterator[tuple[Split, Example]]:
        for number, example in enumerate(filter(self._drawn, self.rows(skip))):
            if self.limit is not None and number >= self.limit:
                return
            yield self.split_of(example), example

    def _drawn(self, example: Example) -> bool:
        """Whether a row belongs to `share`: by its own texts, and by another hash than the one that splits."""
        if self.share == 1:
            return True
        hashed = hashlib.blake2b(digest_size=8, person=b"potstill share")
        for part in (example.key, example.instruction, example.response):
            data = part.encode()
            hashed.update(len(data).to_bytes(8, "big") + data)
        return int.from_bytes(hashed.digest(), "big") / 2**64 < self.share

    def _place(self, example: Example) -> int:
        here = place(example.key)
        return self._kin.get(here, here)

    def _shared_key(self, example: Example) -> str:
        if self.own_splits:
            return example.key
        joined = self._kin.get(place(example.key)) if self._kin else None
        return key_form(example.key) if joined is None else f"{joined:016x}"

    @property
    def _kin(self) -> Mapping[int, int]:
        return self._survey.kin if self._joins else {}

    @property
    def _joins(self) -> bool:
        return not (self.own_splits or self.keyed_by_question())

    @cached_property
    def _survey(self) -> Survey:
        return _once("survey", self, lambda: survey(self.rows(), join=self._joins))

    @cached_property
    def _near(self) -> tuple[NearDuplicates, frozenset[bytes]]:
        if self.own_splits:
            return none_looked_for(self.splits.similarity), frozenset()
        dropped = self.splits.near_duplicates == "drop"
        near = _once("near", self, lambda: near_duplicates(self._parted, self.splits.similarity, dropped=dropped))
        if dropped and 2 * near[0].training > near[0].rows:
            raise UserError(
                f'splits.near_duplicates = "drop" would leave out {near[0].training:,} of {near[0].rows:,} training rows; '
                f'raise splits.similarity ({self.splits.similarity:g}), or set near_duplicates = "tell" and look at the rows'
            )
        return near

    def _near_dropped(self) -> frozenset[bytes]:
        return self._near[1] if self.splits.near_duplicates == "drop" else frozenset()


def table_of(value: Any) -> Any:
    """The table that a short form of `data` stands for: a kind alone, or the stage or folder whose rows were written."""
    if not isinstance(value, str):
        return value
    return {"kind": "stage", "stage": value} if value.startswith(("stage:", "path:")) else {"kind": value}


_KNOWN: dict[str, object] = {}


class _Rows:
    """Rows of sources, each read once; None of a source that has too many."""

    def __init__(self) -> None:
        self._of: dict[str, _Kept | None] = {}

    def read(self, source: Source) -> _Kept | None:
        key = _key("rows", source)
        if key not in self._of:
            self._of[key] = self._fitting(source)
        return self._of[key]

    def _fitting(self, source: Source) -> _Kept | None:
        rows, skipped, size = [], [], 0

        def skip(example: Example, reason: str) -> None:
            nonlocal size
            size += _size(example)
            if size <= _KEPT:
                skipped.append((example, reason))

        for found in source._in_use(skip):
            size += _size(found[1])
            if size > _KEPT:
                return None
            rows.append(found)
        return (rows, skipped) if size <= _KEPT else None


def _size(example: Example) -> int:
    """About as many characters as a row takes of memory, its tests among them."""
    return 1_000 + len(repr(example))


_ROWS: _Rows | None = None


@contextmanager
def rows_kept() -> Iterator[None]:
    """Within it, a source of up to 16 million characters is read once: before a run every stage passes over the rows."""
    global _ROWS
    outer = _ROWS
    _ROWS = outer or _Rows()
    try:
        yield
    finally:
        _ROWS = outer


def _key(what: str, source: Source) -> str:
    return json.dumps([what, source.spec(), source.version, source.content_hash()], sort_keys=True)


def _once(what: str, source: Source, ask: Callable[[], T]) -> T:
    """Cached per process for equal fields and equal rows, because each stage builds its own sources."""
    key = _key(what, source)
    if key not in _KNOWN:
        _KNOWN[key] = ask()
    return cast(T, _KNOWN[key])


def hash_of_made(source: Source) -> str:
    """The content hash of rows that follow from a source's fields and version alone; computed once a process."""

    def content() -> str:
        hashed = hashlib.sha256(f"{source.kind} {source.version}".encode())
        for row in source.rows():
            hashed.update(repr(row).encode())
        return hashed.hexdigest()

    key = json.dumps(["content", source.spec(), source.version], sort_keys=True)
    if key not in _KNOWN:
        _KNOWN[key] = content()
    return cast(str, _KNOWN[key])


discover(__name__, __path__)
