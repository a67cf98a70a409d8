"""Parquet: types as they are, and what is no Parquet."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.sources.parquet import Parquet


def rows_of(table: Any, folder: Path, **fields: Any) -> list[Example]:
    write_table(table, folder / "rows.parquet", row_group_size=100)
    return list(Parquet(path=str(folder / "rows.parquet"), **fields).rows())


def complaint(folder: Path, table: Any = None, **fields: Any) -> str:
    file = folder / "rows.parquet"
    if table is not None:
        write_table(table, file)
    with pytest.raises(UserError) as caught:
        list(Parquet(path=str(file), **fields).rows())
    return str(caught.value).replace(str(file), "FILE")


def test_texts_of_every_arrow_type_and_nulls(tmp_path: Path) -> None:
    questions = pyarrow.array(["a", "b", None]).dictionary_encode()
    answers = pyarrow.array(["x", None, "z"], pyarrow.large_string())
    (row,) = rows_of(pyarrow.table({"instruction": questions, "response": answers}), tmp_path)
    assert (row.instruction, row.response) == ("a", "x")


def test_columns_of_every_field(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"q": ["a"], "r": ["b"], "w": [0.5], "k": [7], "refs": [["c", None]], "a.b": ["t"], "vector": [[1.0]]}
    )
    (row,) = rows_of(table, tmp_path, instruction="q", response="r", weight="w", key="k", references="refs", tag="a.b")
    assert (row.weight, row.key, row.references, row.tag) == (0.5, "7", ("b", "c"), "t")


def test_rows_of_many_groups_come_in_order(tmp_path: Path) -> None:
    texts = [str(number) for number in range(1000)]
    rows = rows_of(pyarrow.table({"instruction": texts, "response": texts}), tmp_path)
    assert [row.response for row in rows] == texts


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"instruction": ["a"], "response": [4]}, "FILE row 1: column 'response' holds a number, not text"),
        ({"instruction": ["a", "b"], "response": [b"x", b"y"]}, "FILE row 1: column 'response' holds bytes, not text"),
        (
            {"question": ["a"], "answer": ["b"]},
            "FILE row 1: no column 'instruction' (columns: question, answer); "
            'set data.instruction = "question" and data.response = "answer"',
        ),
        (
            {"instruction": pyarrow.array([], "string"), "response": pyarrow.array([], "string")},
            "FILE: has no rows; write at least one",
        ),
    ],
)
def test_a_wrong_column_is_named(columns: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, pyarrow.table(columns)) == told


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"])] * 3, names=["instruction", "response", "response"])
    assert complaint(tmp_path, table) == "FILE: two columns are named 'response'; rename one of them"


def test_what_is_no_parquet(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    write_table(pyarrow.table({"instruction": ["a"], "response": ["b"]}), file)
    data = file.read_bytes()
    for harmed in (b"", b"instruction,response\n", data[:-20], data[:60] + b"\0" * 20 + data[80:]):
        file.write_bytes(harmed)
        told = complaint(tmp_path)
        assert told.startswith("FILE: cannot be read as Parquet (")
        assert told.endswith("); download it again, or set data.kind to what it is")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pyarrow.array([b"\xe9"]).view("string")
    told = complaint(tmp_path, pyarrow.table({"instruction": broken, "response": ["a"]}))
    assert told.startswith("FILE: cannot be read as Parquet ('utf-8' codec can't decode byte 0xe9")


def test_no_such_file(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"FILE: no such file in {tmp_path}; check data.path"
