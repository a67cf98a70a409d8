"""A preflight reads rows once, and sees what it would see if it read them each time."""

import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from potstill import sources
from potstill.core.types import Case, Example, Split
from potstill.core.types import Tests as RowTests
from potstill.sources import Source, rows_kept
from potstill.sources.jsonl import Jsonl


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Forty rows, of which some lack their answer, half of them in use."""
    path = tmp_path / "rows.jsonl"
    rows = ({"instruction": f"What is {i}?", "response": f"It is {i}." if i % 5 else ""} for i in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Jsonl(path=str(path), share=0.6, limit=20)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each time that rows of a file are read from the start."""
    found, rows = [], Jsonl.rows

    def counted(self, skip=None):
        found.append(1)
        return rows(self, skip)

    monkeypatch.setattr(Jsonl, "rows", counted)
    return found


def seen(source: Source) -> dict[Split, tuple[list[Example], Counter[str]]]:
    found = {}
    for split in get_args(Split):
        left_out: Counter[str] = Counter()
        found[split] = list(source.examples(split, left_out)), left_out
    return found


@pytest.mark.parametrize("room", [2**24, 5_000], ids=["few rows", "too many rows"])
def test_what_is_kept_is_what_is_read(source: Source, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_KEPT", room)
    expected = seen(source)
    assert sum(left_out.total() for _, left_out in expected.values()) > 0
    with rows_kept():
        assert seen(source) == expected
        assert seen(source) == expected


def test_rows_are_read_once_for_equal_sources_and_not_kept_beyond(source: Source, passes: list[int]) -> None:
    seen(source)  # looks at the languages, which are known to the process from here on
    passes.clear()
    with rows_kept():
        seen(source)
        with rows_kept():
            seen(Source.parse(source.spec()))
        seen(Source.parse(source.spec() | {"share": 1.0}))
    assert len(passes) == 2 + 1, "two sources, and the languages of the second"
    passes.clear()
    seen(source)
    assert len(passes) == len(get_args(Split))


def test_a_changed_file_is_read_again(source: Source) -> None:
    with rows_kept():
        before = seen(source)
        path = Path(source.model_dump()["path"])
        path.write_text(path.read_text(encoding="utf-8").replace("It is", "That is"), encoding="utf-8")
        after = seen(source)
    assert after != before
    assert after == seen(source)


class Judged(Source, kind="judged_rows_kept"):
    """Rows whose tests are long, or that are left out."""

    lost: int = 0
    long: int = 0

    def rows(self, skip=None):
        for number in range(self.lost if skip is not None else 0):
            assert skip is not None
            skip(Example(key=f"lost {number}", instruction="What?", response=""), "no answer")
        yield Example("a", "What?", "It.", tests=RowTests(cases=(Case("x" * self.long, "y"),)))

    def content_hash(self) -> str:
        return f"{self.lost} {self.long}"


del Source.kinds["judged_rows_kept"]  # other tests go through all kinds


@pytest.mark.parametrize(("fields", "kept"), [({}, True), ({"lost": 10}, False), ({"long": 10_000}, False)])
def test_tests_and_rows_that_are_left_out_take_room_too(fields, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_KEPT", 5_000)
    assert (sources._Rows().read(Judged(**fields)) is not None) == kept
