"""Tiny sources of every kind, built from nothing; and real rows where they lie beside the checkout."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from potstill.sources import Source

WriteRows = Callable[..., str]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


def _pair(number: int) -> dict[str, Any]:
    return {
        "instruction": f"¿{number}?",
        "context": f"c{number}",
        "response": f"r{number}",
        "category": "qa",
        "title": f"t{number}",
    }


@pytest.fixture
def make_source(write_rows: WriteRows) -> Callable[[str, Iterable[int]], Source]:
    """A source of a kind with one row per number; kinds that make their own rows ignore the numbers."""

    def make(kind: str, numbers: Iterable[int] = range(60)) -> Source:
        own_rows = {"primer": {"countries": 3}, "stdlib": {"max_lines": 2}}
        fields = own_rows[kind] if kind in own_rows else {"path": write_rows(map(_pair, numbers))}
        return Source.kinds[kind].model_validate(fields)

    return make


@pytest.fixture
def shared_data() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real rows in {folder}")
    return folder
