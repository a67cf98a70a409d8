"""SQuAD in the shape of a file and in the shape of the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import left_out
from pydantic import ValidationError

from potstill.core.errors import UserError
from potstill.sources.squad import Squad

WriteRows = Callable[..., str]
ROW = {"id": "1", "title": "Ann", "instruction": "Who?", "context": "Ann sang.", "response": "Ann", "responses": ["Ann", "she"]}
HUB_ROW = {"id": "1", "title": "Ann", "question": "Who?", "context": "Ann sang.", "answers": {"text": ["Ann", "Ann", "she"]}}


@pytest.mark.parametrize("row", [ROW, HUB_ROW])
def test_both_shapes_give_the_same_row(row: dict[str, Any], write_rows: WriteRows) -> None:
    (example,) = Squad(path=write_rows([row])).rows()
    assert (example.instruction, example.context, example.response) == ("Who?", "Ann sang.", "Ann")
    assert (example.references, example.key, example.tag) == (("Ann", "she"), "Ann", "Ann")


def test_a_paragraph_without_title_has_one_key(write_rows: WriteRows) -> None:
    row = {"instruction": "Who?", "context": "Ann sang.", "response": "Ann"}
    rows = [row, {**row, "instruction": "What did she do?"}, {**row, "context": "Bob sang."}]
    first, second, third = Squad(path=write_rows(rows)).rows()
    assert first.key == second.key != third.key


def test_a_question_without_answer_counts_as_empty(write_rows: WriteRows) -> None:
    path = write_rows([{**HUB_ROW, "answers": {"text": []}}, HUB_ROW, {**ROW, "response": "", "responses": []}])
    assert len(list(Squad(path=path).rows())) == 1
    assert left_out(Squad(path=path)) == {"empty response": 2}


@pytest.mark.parametrize(("fields", "given"), [({}, "neither"), ({"path": "a.jsonl", "hub": "rajpurkar/squad"}, "both")])
def test_path_or_hub(fields: dict[str, str], given: str) -> None:
    message = rf"needs either path \(a JSON-lines file\) or hub \(a data set's name\); {given} given"
    with pytest.raises(ValidationError, match=message):
        Squad(**fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Who?", "context": "x"}, "no column 'response' (columns: instruction, context)"),
        ({"context": "x", "response": "y"}, "no column 'instruction' (columns: context, response)"),
        ({**ROW, "responses": "Ann"}, 'column \'responses\' holds text, not a list of texts; write it as ["one", "two"]'),
        ({**HUB_ROW, "answers": "Ann"}, "column 'answers' must hold an object with a list of texts under 'text'"),
        ({**HUB_ROW, "answers": {"texts": []}}, "column 'answers': no column 'text'; did you mean 'texts'? (columns: texts)"),
    ],
)
def test_a_wrong_column_is_named(row: dict[str, Any], message: str, write_rows: WriteRows) -> None:
    path = write_rows([row])
    with pytest.raises(UserError) as caught:
        list(Squad(path=path).rows())
    assert str(caught.value) == f"{path}:1: {message}"


@pytest.mark.shared
@pytest.mark.parametrize(("name", "count"), [("squad-es", 5697), ("xquad-es", 1013), ("xquad-en", 1013)])
def test_real_rows(name: str, count: int, shared_data: Path) -> None:
    source = Squad(path=str(shared_data / name / "rows.jsonl"), language=name[-2:])
    splits: dict[str, set[str]] = {}
    number = 0
    for example in source.rows():
        number += 1
        splits.setdefault(example.context, set()).add(source.split_of(example))
    assert number == count
    assert all(len(each) == 1 for each in splits.values())
