"""Any data set of the hub, out of the cache that its own library would leave."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from writing import write_cache

from potstill.core.errors import UserError
from potstill.sources.dolly import Dolly
from potstill.sources.hub import Hub

PAIR = {"instruction": "Who?", "response": "Ann"}
CONFIGS = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.parquet}, {split: test, path: en/test.parquet}]
- config_name: es
  data_files: [{split: train, path: es/train.parquet}]
---
"""


def answers(**fields: Any) -> list[str]:
    return [row.response for row in Hub(hub="someone/rows", **fields).rows()]


def complaint(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        answers(**fields)
    return str(caught.value)


@pytest.fixture
def two_subsets(hub_cache: Path) -> Path:
    """Subset en with two splits, subset es with one; the folder of the cached copy."""
    commit = write_cache([PAIR], hub_cache, file="en/train.parquet")
    folder = hub_cache / "datasets--someone--rows" / "snapshots" / commit
    for name, answer in (("en/train", "Ann"), ("en/test", "Bob"), ("es/train", "Ana")):
        written = write_cache([{**PAIR, "response": answer}], hub_cache, "someone/part", "rows.parquet")
        (folder / name).parent.mkdir(exist_ok=True)
        (hub_cache / "datasets--someone--part" / "snapshots" / written / "rows.parquet").rename(folder / f"{name}.parquet")
    (folder / "README.md").write_text(CONFIGS)
    return folder


def test_subset_and_splits(two_subsets: Path) -> None:
    assert answers(subset="es") == ["Ana"]
    assert answers(subset="en") == ["Ann"]
    assert answers(subset="en", split="test") == ["Bob"]
    assert answers(subset="en", split=["test", "train"]) == ["Bob", "Ann"]
    assert Hub(hub="someone/rows", subset="en").content_hash() == two_subsets.name


def test_a_subset_or_split_that_is_not_there(two_subsets: Path) -> None:
    told = complaint()
    assert told.startswith("someone/rows: name one of its subsets with data.subset (Config name is missing.")
    assert "['en', 'es']" in told
    assert complaint(subset="fr") == (
        "someone/rows: name one of its subsets with data.subset (BuilderConfig 'fr' not found. Available: ['en', 'es'])"
    )
    assert complaint(subset="es", split="test") == (
        "someone/rows: has no split 'test'; set data.split (Bad split: test. Available splits: ['train'])"
    )


def test_rows_are_named_by_split(two_subsets: Path) -> None:
    told = complaint(subset="en", split="test", response="answer")
    assert told.startswith("someone/rows test row 1: no column 'answer'")


def test_csv_on_the_hub_stays_text(hub_cache: Path) -> None:
    rows = [{"instruction": f"{number}", "response": "007"} for number in range(5)] + [{"instruction": "x", "response": "NA"}]
    write_cache(rows, hub_cache, file="train.csv")
    assert answers() == [*["007"] * 5, "NA"]
    columns = {"instruction": "instruction", "context": "", "response": "response", "category": ""}
    assert [row.response for row in Dolly(hub="someone/rows", **columns).rows()] == [*["007"] * 5, "NA"]


def test_a_cached_copy_without_all_parts_is_refused(hub_cache: Path) -> None:
    write_cache([PAIR], hub_cache, file="data/train-00001-of-00003.parquet")
    assert complaint() == (
        "someone/rows: the hub is out of reach and the cached copy lacks 2 of the 3 parts of train-….parquet; "
        "download it again where there is network"
    )


def test_a_damaged_file(hub_cache: Path) -> None:
    commit = write_cache([PAIR], hub_cache)
    (hub_cache / "datasets--someone--rows" / "snapshots" / commit / "train.parquet").write_bytes(b"PAR1")
    told = complaint()
    assert told.startswith("someone/rows: cannot be read (")
    assert told.endswith('; read its files with data.kind = "parquet", "csv" or "jsonl"')


def test_neither_network_nor_cache(hub_cache: Path) -> None:
    assert complaint() == (
        "cannot reach the hub for someone/rows; download it where there is network and read its files with "
        'data.kind = "parquet", "csv" or "jsonl", or set HF_HOME to a cache that has it'
    )


@pytest.mark.parametrize("split", ["train[:10%]", "", [], ["train", "a b"], ["train", "train"]])
def test_a_split_is_a_name(split: Any) -> None:
    with pytest.raises(ValidationError):
        Hub(hub="someone/rows", split=split)
