"""Rows that a teacher writes: by whom, which, how a run goes on, and what is learned from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.artifact import Artifact
from potstill.edges.models import save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.sources.jsonl import Jsonl

OPTIM = {"steps": 3, "batch_size": 4, "lr": 1e-3}
QUIET = {"times": 1, "rows": 4, "max_new_tokens": 4}
OPEN = {"finished": False, "repetition": False}  # random models do not end


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    tokenizer = chat_tokenizer(320)
    for name, width, seed in (("student", 16, 1), ("teacher", 32, 2)):
        save_model(tiny_model("qwen2", len(tokenizer), width=width, seed=seed), tokenizer, folder / name)
    write_rows(folder / "rows.jsonl")
    return folder


def data(root: Path) -> dict[str, Any]:
    splits = {"validation": 0.2, "test": 0.3}
    return {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "context": "context", "splits": splits}


def table(root: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    return {"name": "written", "data": data(root), "prompts": prompts, "stage": list(stages), **more}


def generate(root: Path, **more: Any) -> dict[str, Any]:
    written = {"name": "written", "kind": "generate", "model": f"path:{root}/teacher", "filters": OPEN}
    return written | {"sampling": {"temperature": 0, "max_new_tokens": 8}} | more


def sft(root: Path, **more: Any) -> dict[str, Any]:
    student = {"name": "sft", "kind": "sft", "model": f"path:{root}/student", "data": "stage:written"}
    return student | {"optim": OPTIM, "validation": QUIET} | more


def run(root: Path, out: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Artifact]:
    return run_recipe(parse_recipe(table(root, *stages, **more)), out)


def lines(artifact: Artifact, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.folder / name).read_text(encoding="utf-8").splitlines()]


def test_rows_are_written_and_learned(root: Path, tmp_path: Path) -> None:
    made = run(root, tmp_path, generate(root), sft(root))
    rows = lines(made["written"])
    print(json.dumps(rows[0], indent=1), made["written"].summary, made["sft"].summary["trained"], made["sft"].summary["data"])
    assert rows
