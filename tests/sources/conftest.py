"""Tiny sources of every kind, built from nothing; and real rows where they lie beside the checkout."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from writing import WRITERS, write_cache

from potstill.core.artifact import Artifact
from potstill.sources import Source

WriteRows = Callable[..., str]
OWN_ROWS = {
    "primer": {"countries": 3},
    "stdlib": {"max_lines": 2},
    "programs": {"families": 4, "new_families": 1, "instances": 6},
}


def _gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"¿{number}?", "answer": f"It is <<{number}*1={number}>>{number}.\n#### {number}"}


def _mbpp(number: int) -> dict[str, Any]:
    code = f"def f(x):\r\n\treturn x + {number}"
    return {"text": f"Add {number}.", "code": code, "task_id": number, "test_list": [f"assert f(1) == {number + 1}"]}


def _codeforces(number: int) -> dict[str, Any]:
    return {
        "id": f"{number}/A",
        "title": f"Problem {number}",
        "description": f"Add {number} to n.",
        "input_format": "n",
        "output_format": "the sum",
        "note": None,
        "examples": [{"input": "1\n", "output": f"{number + 1}\n"}],
        "generation": f"<think>\nadd\n</think>\n\n```python\nprint(int(input()) + {number})\n```",
        "finish_reason": "stop",
    }


def _bugnet(number: int) -> dict[str, Any]:
    return {
        "problem_id": f"p{number:05}",
        "language": "Python",
        "original_status": "Wrong Answer",
        "fail": f"print(int(input()) - {number})",
        "pass": f"print(int(input()) + {number})",
        "error": "",
        "input": "1\n",
        "output": f"{number + 1}\n",
    }


def _quixbugs(number: int) -> dict[str, Any]:
    return {
        "name": f"add{number}",
        "fail": f"def add{number}(x):\n    return x - {number}",
        "pass": f'def add{number}(x):\n    return x + {number}\n\n"""\nor otherwise\n"""\n',
        "tests": [[[1], number + 1]],
    }


def _debugbench(number: int) -> dict[str, Any]:
    program = "class Solution:\n    def add(self, n: int) -> int:\n        return n {} {}"
    return {
        "slug": f"add-{number}",
        "description": f"Add {number}.",
        "examples": [f"Input: n = 1\nOutput: {number + 1}\nExplanation: 1 + {number}."],
        "buggy": program.format("-", number),
        "fixed": program.format("+", number),
        "bug_type": "operation error",
        "error": "",
    }


SHAPES = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "codeforces_cots": _codeforces,
    "bugnet": _bugnet,
    "quixbugs": _quixbugs,
    "debugbench": _debugbench,
}


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
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, in use while the test runs; there is no network in tests."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def write_written(rows: list[dict[str, Any]], folder: Path) -> Path:
    """The artifact of a generate stage that kept the references as they were, a third of the questions held out."""
    written, held = [], []
    for row in rows:
        line = {"key": row["instruction"], "language": "es", **{n: row[n] for n in ("instruction", "context", "response")}}
        number = int(row["instruction"].strip("¿?"))
        written.append(line) if number % 3 else held.append({**line, "split": ("validation", "test")[number % 2]})
    work = folder.with_name("work")
    work.mkdir()
    for name, lines in (("rows.jsonl", written), ("held_out.jsonl", held)):
        (work / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    Artifact(folder, "written", "generate", "rows", "0" * 64, stage={"data": {"kind": "primer"}}).commit(work)
    return folder


@pytest.fixture
def make_source(write_rows: WriteRows, tmp_path: Path, hub_cache: Path) -> Callable[[str, Iterable[int]], Source]:
    """A source of a kind with one row per number; kinds that make their own rows ignore the numbers."""

    def fields(kind: str, numbers: Iterable[int]) -> dict[str, Any]:
        if kind in OWN_ROWS:
            return OWN_ROWS[kind]
        if kind in SHAPES:
            return {"path": write_rows(map(SHAPES[kind], numbers), f"{kind}.jsonl")}
        rows = [*map(_pair, numbers)]
        if kind == "hub":
            return {"hub": "someone/rows", "revision": write_cache(rows, hub_cache)}
        if kind == "stage":
            return {"stage": f"path:{write_written(rows, tmp_path / 'written')}"}
        if kind in WRITERS:
            file = tmp_path / f"rows.{kind}"
            WRITERS[kind](rows, file)
            return {"path": str(file)}
        return {"path": write_rows(rows)}

    def make(kind: str, numbers: Iterable[int] = range(60)) -> Source:
        return Source.kinds[kind].model_validate(fields(kind, numbers))

    return make


@pytest.fixture
def shared_data() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real rows in {folder}")
    return folder
