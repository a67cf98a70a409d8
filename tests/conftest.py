"""Fixtures that several folders share: a tiny model family, built in code, on disk as the Hub stores it."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

import torch
from family import build_model, build_tokenizer

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings, on a busy machine far more

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def family(tmp_path_factory, tokenizer):
    """Two folders of one family: {'student': Path, 'teacher': Path}."""
    from potstill.edges.models import save_model

    root = tmp_path_factory.mktemp("family")
    for name, hidden, seed in (("student", 32, 1), ("teacher", 64, 2)):
        save_model(build_model(tokenizer, hidden, seed=seed), tokenizer, root / name)
    return {"student": root / "student", "teacher": root / "teacher"}


@pytest.fixture
def rows_file(tmp_path):
    """Sixty rows of JSON lines with distinct questions."""
    import json

    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"What is {i} plus {i % 7}?", "response": f"It is {i + i % 7}."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def shared():
    """Real rows beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"real rows are not here ({SHARED.parent.name}/data)")
    return SHARED
