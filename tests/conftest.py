"""Fixtures that several folders share: a tiny model family, built in code, on disk as the Hub stores it."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

import torch

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings, on a busy machine far more

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

TEXTS = [
    "What currency does Peru use?", "Peru uses the sol.", "¿Qué moneda usa Perú?", "La moneda de Perú se llama sol.",
    "What is the capital of France?", "The capital of France is Paris.", "Write a loop.", "for i in range(10):\n    print(i)",
]  # fmt: skip


def build_tokenizer(texts: list[str] = TEXTS, vocab_size: int = 400):
    from potstill.edges.bpe import train_tokenizer

    return train_tokenizer(texts * 3, vocab_size)


def build_model(tokenizer, hidden: int = 32, layers: int = 2, seed: int = 0, vocab: int | None = None, **more):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    for name, value in more.items():
        setattr(config, name, value)
    return Qwen2ForCausalLM(config).eval()


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
