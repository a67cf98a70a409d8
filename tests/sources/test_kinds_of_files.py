"""Equal rows in files of any kind are equal examples in equal splits."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writing import write_cache, write_csv, write_jsonl, write_parquet

from potstill.core.types import Example, Split
from potstill.sources import Source
from potstill.sources._delimited import Form, read_delimited

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
OTHER_CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": "PET", "seconds": 1}}}
PAIRS = [
    {
        "q": f'¿"{number}",\n{number + 1};\t?',
        "a": f" {number}'s, “{number}” \n",
        "c": "" if number % 3 else f"c{number}",
        "refs": [f"r{number}", '"'] if number % 2 else [],
        "id": f"00{number // 2}",
        "g": "NA",
        "w": number / 2,
        "l": "es" if number % 2 else None,
        "unused": number,
    }
    for number in range(60)
]
CHATS = [
    {
        "chat": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One,"}, {"type": "text", "text": f"two {number}?"}]},
            {"role": "assistant", "tool_calls": [CALL if number % 2 else OTHER_CALL]},
            {"role": "tool", "content": "20 °C", "name": "weather"},
            {"role": "assistant", "content": f"{number}", "weight": 0.5},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    for number in range(40)
]
COLUMNS = {"instruction": "q", "response": "a", "context": "c", "references": "refs"}
COLUMNS |= {"key": "id", "tag": "g", "weight": "w", "language_column": "l"}
TABLES = {"pairs": (PAIRS, COLUMNS), "chats": (CHATS, {"messages": "chat"})}

Make = Callable[[list[dict[str, Any]], Path], dict[str, Any]]


def texts_of_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content parts as the text that they are: a column of Arrow holds either texts or lists."""

    def joined(held: dict[str, Any]) -> dict[str, Any]:
        parts = held.get("content")
        return held | {"content": "\n".join(part["text"] for part in parts)} if isinstance(parts, list) else held

    return json.loads(json.dumps(rows), object_hook=joined)


def _file(write: Callable[[list[Any], Path], None], name: str, kind: str, **fields: Any) -> Make:
    def make(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        write(rows, folder / name)
        return {"kind": kind, "path": str(folder / name), **fields}

    return make


def _compressed(compress: Callable[[bytes], bytes], make: Make, suffix: str) -> Make:
    def made(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        fields = make(rows, folder)
        file = Path(fields["path"])
        target = file.with_name(file.name + suffix)
        target.write_bytes(compress(file.read_bytes()))
        return {**fields, "path": str(target)}

    return made


def zstandard(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def _hub(rows: list[dict[str, Any]], folder: Path, file: str = "train.parquet") -> dict[str, Any]:
    return {"kind": "hub", "hub": "someone/rows", "revision": write_cache(rows, folder / "hub", file=file)}


def _hub_csv(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    return _hub(rows, folder, "train.csv")


JSONL = _file(write_jsonl, "rows.jsonl", "jsonl")
CSV = _file(write_csv, "rows.csv", "csv")
TSV = _file(lambda rows, file: write_csv(rows, file, "\t"), "rows.tsv", "csv")
MAKE: dict[str, Make] = {
    "csv": CSV,
    "csv with semicolons": _file(lambda rows, file: write_csv(rows, file, ";"), "rows.csv", "csv"),
    "csv with apostrophes": _file(
        lambda rows, file: write_csv(rows, file, "|", "'"), "rows.txt", "csv", delimiter="|", quote="'"
    ),
    "tsv": TSV,
    "parquet": _file(lambda rows, file: write_parquet(texts_of_parts(rows), file), "rows.parquet", "parquet"),
    "hub": lambda rows, folder: _hub(texts_of_parts(rows), folder),
    "csv on the hub": _hub_csv,
    "jsonl.gz": _compressed(gzip.compress, JSONL, ".gz"),
    "csv.bz2": _compressed(bz2.compress, CSV, ".bz2"),
    "tsv.xz": _compressed(lzma.compress, TSV, ".xz"),
    "csv.zst": _compressed(zstandard, CSV, ".zst"),
    "tsv.gz of two members": _compressed(lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]), TSV, ".gz"),
    "jsonl.bz2 of two streams": _compressed(lambda data: bz2.compress(data[:99]) + bz2.compress(data[99:]), JSONL, ".bz2"),
}


def examples(fields: Mapping[str, Any], columns: Mapping[str, Any]) -> list[tuple[Split, Example]]:
    source = Source.parse({**fields, **columns, "splits": {"validation": 0.2, "test": 0.3}})
    assert isinstance(source, Source)
    splits: tuple[Split, ...] = ("train", "validation", "test")
    return [(split, example) for split in splits for example in source.examples(split)]


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("made", MAKE)
def test_equal_rows_are_equal_examples_in_equal_splits(made: str, table: str, tmp_path: Path) -> None:
    rows, columns = TABLES[table]
    expected = examples(JSONL(rows, tmp_path), columns)
    assert len(expected) == len(rows)
    assert len({split for split, _ in expected}) == 3
    assert examples(MAKE[made](rows, tmp_path), columns) == expected


def test_the_law_rejects_a_reader_that_guesses_types(tmp_path: Path) -> None:
    """As pandas reads by itself: 00 a number, NA nothing."""
    import pandas

    rows, columns = TABLES["pairs"]
    write_csv(rows, tmp_path / "rows.csv")
    guessed = pandas.read_csv(tmp_path / "rows.csv", converters={"refs": json.loads}).to_dict("records")
    rows_guessed = [{name: None if value != value else value for name, value in row.items()} for row in guessed]
    assert examples(JSONL(rows_guessed, tmp_path), columns) != examples(JSONL(rows, tmp_path), columns)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ['"', '""', ",", "\n", "\r\n", " a", '"a"', "a,b", "'", "", "\ufeff", "\u2028", "\x85"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_whatever_a_csv_writer_writes_is_read_back(
    cells: list[tuple[str, str, str]], delimiter: str, quoting: Literal[0, 1], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=delimiter, quoting=quoting)
        writer.writerow(["first", "second", "third"])
        writer.writerows(cells)
    assert [tuple(row.values()) for _, row in read_delimited(str(file), Form())] == cells
