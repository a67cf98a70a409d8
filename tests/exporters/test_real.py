"""Pretrained models through the exporter and llama.cpp."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp import ask, needs_llamacpp
from strings import TEXTS as ANY_TEXTS
from strings import random_texts

from potstill.edges.models import load_stored, load_tokenizer
from potstill.exporters.gguf import Gguf

REAL = os.environ.get("POTSTILL_REAL_MODELS", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL, reason="set POTSTILL_REAL_MODELS to a folder that holds smollm2 and gemma3"),
    needs_llamacpp,
]
TEXTS = [
    "It's 12 o'clock: don't wait!", "naïve café e\u0301 日本語 สวัสดี مرحبا 👍🏽", "a\x04b in\x04g", "\U000f0000", " \n\n\t x  ",
    "", "<|im_start|>user\nhi<|im_end|>\n", "x <file_sep> y", "1234567 3.14 x²", "def f(x):\n\treturn x+1",
]  # fmt: skip


def of(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer; CI can fetch one of the two."""
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f"POTSTILL_REAL_MODELS holds no {name}")
    where = f"path:{REAL}/{name}"
    return load_stored(where), load_tokenizer(where)


def test_smollm2_says_the_same_in_llamacpp(tmp_path: Path) -> None:
    model, tokenizer = of("smollm2")
    (file,) = Gguf(types=("f32",)).write(model, tokenizer, {}, tmp_path)
    messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)).input_ids
    lengths = (5, len(prompt))
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS]
    answer = ask(file, [prompt[:length] for length in lengths], texts)
    assert answer["ids"] == [tokenizer(text).input_ids for text in texts]
    with torch.no_grad():
        logp_TV = model.float()(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for length, found in zip(lengths, answer["logp"], strict=True):
        assert len(found) == 49_152
        assert max(abs(float(logp_TV[length - 1, id]) - value) for id, value in found.items()) < 1e-3
    ((text, reason),) = ask(file, [prompt], words=40)["answers"]
    assert text == "The capital of Peru is Lima."
    assert reason == "stop"


SPANISH = [
    "La capital del Perú es Lima, y la de Ecuador es Quito.",
    "El alambique calienta el mosto hasta que el espíritu se eleva, y entonces se recoge el corazón del destilado.",
    "¿Cuántos habitantes tiene la ciudad? Unos diez millones, según el último censo.",
]


def test_gemma3_says_the_same_in_llamacpp(tmp_path: Path) -> None:
    """In float16: KL of its next words to llama.cpp's, at several places of Spanish sentences."""
    model, tokenizer = of("gemma3")
    (file,) = Gguf(types=("f16",)).write(model, tokenizer, {}, tmp_path)
    rows = [tokenizer(text).input_ids for text in SPANISH]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    prompts = [row[:length] for row in rows for length in (4, len(row))]
    texts = [*ANY_TEXTS, *random_texts(200, "ban d,:a-=\n"), "</s>", "<end_of_turn>\n", "[multimodal]", "\n" * 40]
    answer = ask(file, prompts, texts)
    assert answer["ids"] == [tokenizer(text).input_ids for text in texts]
    for prompt, found in zip(prompts, answer["logp"], strict=True):
        with torch.no_grad():
            logp_V = model.float()(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert len(found) == len(logp_V) == 262_144
        logq_V = torch.tensor([found[id] for id in range(len(logp_V))])
        assert float((logp_V.exp() * (logp_V - logq_V)).sum()) < 1e-3
