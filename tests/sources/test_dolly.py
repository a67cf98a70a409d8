"""Dolly from a file, from the cache of the hub, and without either."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from counting import left_out

from potstill.core.errors import UserError
from potstill.sources.dolly import Dolly

WriteRows = Callable[..., str]
ROW = {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "closed_qa"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_rows_of_a_file(write_rows: WriteRows) -> None:
    (example,) = Dolly(path=write_rows([ROW])).rows()
    assert (example.instruction, example.context, example.response, example.tag) == ("Who?", "Ann sang.", "Ann", "closed_qa")


def test_a_question_asked_twice_has_one_key(write_rows: WriteRows) -> None:
    rows = [ROW, {**ROW, "response": "It was Ann."}, {**ROW, "context": "Bob sang."}]
    first, second, third = Dolly(path=write_rows(rows)).rows()
    assert first.key == second.key != third.key


def test_columns_in_another_language(write_rows: WriteRows) -> None:
    path = write_rows([{"pregunta": "¿Quién?", "respuesta": "Ana"}])
    source = Dolly(path=path, language="es", instruction="pregunta", response="respuesta", context="", category="")
    (example,) = source.rows()
    assert (example.instruction, example.response, example.context, example.tag, example.language) == (
        "¿Quién?",
        "Ana",
        "",
        "",
        "es",
    )


def test_a_missing_column_is_named(write_rows: WriteRows) -> None:
    path = write_rows([{"instruction": "Who?", "response": "Ann", "category": "qa"}])
    with pytest.raises(UserError) as caught:
        list(Dolly(path=path).rows())
    assert str(caught.value) == f"{path}:1: no column 'context' (columns: instruction, response, category)"


def test_empty_responses_are_counted_or_refused(write_rows: WriteRows) -> None:
    path = write_rows([ROW, {**ROW, "response": ""}])
    assert len(list(Dolly(path=path).rows())) == 1
    assert left_out(Dolly(path=path)) == {"empty response": 1}
    with pytest.raises(UserError, match=f"{path}:2: empty response; fill it in"):
        list(Dolly(path=path, on_empty="refuse").rows())


def test_a_commit_is_its_own_hash() -> None:
    assert Dolly(revision=COMMIT).content_hash() == COMMIT


def _without_network(home: Path, program: str) -> str:
    # in a process of its own, because huggingface_hub reads these variables when it is imported
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout


def test_the_cache_serves_without_network(tmp_path: Path, write_rows: WriteRows) -> None:
    copy = tmp_path / "hub" / "datasets--someone--dolly-es"
    (copy / "refs").mkdir(parents=True)
    (copy / "refs" / "main").write_text(COMMIT)
    (copy / "snapshots" / COMMIT).mkdir(parents=True)
    write_rows([ROW, ROW], f"hub/datasets--someone--dolly-es/snapshots/{COMMIT}/rows.jsonl")
    program = """
from potstill.sources.dolly import Dolly
source = Dolly(hub="someone/dolly-es")
print(source.content_hash(), [row.response for row in source.rows()])
"""
    assert _without_network(tmp_path, program) == f"{COMMIT} ['Ann', 'Ann']\n"


def test_neither_network_nor_cache(tmp_path: Path) -> None:
    program = """
from potstill.core.errors import UserError
from potstill.sources.dolly import Dolly
for attempt in (lambda: next(Dolly().rows()), Dolly().content_hash):
    try:
        attempt()
    except UserError as error:
        print(error)
"""
    message = (
        "cannot reach the hub for databricks/databricks-dolly-15k; download it where there is network and name its rows, "
        "as JSON lines, with `--set data.path=…`, or set HF_HOME to a cache that has it\n"
    )
    assert _without_network(tmp_path, program) == message * 2


@pytest.mark.shared
def test_real_rows(shared_data: Path) -> None:
    source = Dolly(path=str(shared_data / "dolly-en" / "rows.jsonl"))
    splits: dict[tuple[str, str], set[str]] = {}
    count = with_context = 0
    for example in source.rows():
        count += 1
        with_context += bool(example.context.strip())
        splits.setdefault((example.instruction, example.context), set()).add(source.split_of(example))
    assert (count, with_context) == (14_482, 4_315)
    assert len(splits) == 14_312
    assert all(len(each) == 1 for each in splits.values())
