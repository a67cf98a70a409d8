"""One table of rows, written as each kind of file, and as the hub's cache keeps a data set."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def write_jsonl(rows: Rows, file: Path) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(rows: Rows, file: Path, delimiter: str = ",", quote: str = '"') -> None:
    """Lists as JSON, numbers as digits, null as an empty cell."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=delimiter, quotechar=quote)
        writer.writerow(rows[0])
        writer.writerows([_cell(value) for value in row.values()] for row in rows)


def write_parquet(rows: Rows, file: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), file, row_group_size=7)


def write_cache(rows: Rows, home: Path, name: str = "someone/rows", file: str = "train.parquet") -> str:
    """A data set as the hub's cache keeps it below `home`; its commit, which follows from the rows."""
    commit = hashlib.sha1(json.dumps([name, *rows]).encode()).hexdigest()
    copy = home / f"datasets--{name.replace('/', '--')}"
    (copy / "refs").mkdir(parents=True, exist_ok=True)
    (copy / "refs" / "main").write_text(commit)
    target = copy / "snapshots" / commit / file
    target.parent.mkdir(parents=True, exist_ok=True)
    {".parquet": write_parquet, ".jsonl": write_jsonl, ".csv": write_csv}[target.suffix](rows, target)
    return commit


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}
