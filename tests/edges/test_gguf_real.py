"""A pretrained model as a GGUF file."""

import os
from pathlib import Path

import pytest
import torch
from llamacpp import ask, needs_llamacpp
from strings import TEXTS as ANY_TEXTS
from strings import random_texts

from potstill.edges.models import load_model, load_stored, load_tokenizer, shared_vocabulary
from potstill.exporters.gguf import Gguf

REAL = os.environ.get("POTSTILL_REAL_MODELS", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL, reason="set POTSTILL_REAL_MODELS to a folder that holds smollm2"),
]
TEXTS = [
    "It's 12 o'clock: don't wait!", "naïve café e\u0301 日本語 สวัสดี مرحبا 👍🏽", "a\x04b in\x04g", " \n\n\t x  ", "",
    "<|im_start|>user\nhi<|im_end|>\n", "x <file_sep> y", "1234567 3.14 x² 10,000", "def f(x):\n\treturn x+1",
    "¿Qué tal? ¡Olé!", "'' 'S x'LL", "________ ..... http://a.b/c?d=1",
]  # fmt: skip


def test_smollm2_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    where = f"path:{REAL}/smollm2"
    model, tokenizer = load_model(where), load_tokenizer(where)
    (file,) = Gguf(types=("f32",)).write(model, tokenizer, {}, tmp_path)
    found, cut = load_model(f"path:{file}"), load_tokenizer(f"path:{file}")
    assert {text: cut(text).input_ids for text in TEXTS} == {text: tokenizer(text).input_ids for text in TEXTS}
    assert shared_vocabulary(tokenizer, cut) == 49_152
    messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    ids = torch.tensor([cut(cut.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)).input_ids])
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids.tolist() == [tokenizer(asked).input_ids]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert found.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@needs_llamacpp
def test_smollm2_without_the_name_of_its_cut_has_llamacpps_ids(tmp_path: Path) -> None:
    where = f"path:{REAL}/smollm2"
    tokenizer = load_tokenizer(where)
    (named,) = Gguf(types=("f16",)).write(load_stored(where), tokenizer, {}, tmp_path)
    file = tmp_path / "nameless.gguf"
    file.write_bytes(named.read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.xxx", 1))
    named.unlink()
    texts = [*ANY_TEXTS, *random_texts(100, "abc A1 2,.'\"=-é٣日\n\t$`")]
    found = [load_tokenizer(f"path:{file}")(text).input_ids for text in texts]
    assert ask(file, texts=texts)["ids"] == found
    assert found != [tokenizer(text).input_ids for text in texts], "the cut matters"
