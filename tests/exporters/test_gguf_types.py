"""The types of whole models: each file holds what its type's own definition says of every weight."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_export import tiny_model

from potstill.core.errors import UserError
from potstill.exporters.gguf import Gguf
from potstill.quant.layers import quantise_model


def matrices(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if tensor.data.ndim > 1}


def plain(tensor: Any) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """ggml's Q8_0 by its definition: of 32 weights the largest magnitude is 127 steps, a step is kept in float16."""
    blocks = values.reshape(-1, 32)
    steps = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.where(steps == 0, 0, np.float32(1) / np.where(steps == 0, 1, steps)).astype(np.float32)
    codes = np.sign(blocks * inverse) * np.floor(np.abs(blocks * inverse) + np.float32(0.5))
    return (codes * steps.astype(np.float16).astype(np.float32)).reshape(values.shape).astype(np.float32)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gemma3"])
def test_q8_0_and_bf16_hold_every_matrix_as_their_definitions_say(family: str, tokenizer: Any, tmp_path: Path) -> None:
    wide = {} if family == "gpt2" else {"hidden_size": 64}
    files = Gguf(types=("f32", "bf16", "q8_0")).write(tiny_model(family, **wide), tokenizer, {}, tmp_path)
    assert [file.name for file in files] == ["model-f32.gguf", "model-bf16.gguf", "model-q8_0.gguf"]
    exact, narrow, coded = (matrices(file) for file in files)
    assert exact.keys() == narrow.keys() == coded.keys()
    for name, tensor in exact.items():
        values = plain(tensor)
        if name.startswith("position_embd"):
            continue
        assert narrow[name].tensor_type == gguf.GGMLQuantizationType.BF16
        assert torch.equal(torch.from_numpy(plain(narrow[name])), torch.from_numpy(values.copy()).bfloat16().float())
        if values.shape[-1] % 32:
            assert np.array_equal(plain(coded[name]), values.astype(np.float16).astype(np.float32))
            continue
        assert coded[name].tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert np.array_equal(plain(coded[name]), eight_bits(values))


def test_q8_0_of_a_four_bit_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    ids = torch.arange(60).reshape(3, 20)
    packed = quantise_model(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]).packed
    with pytest.raises(UserError, match="would round four-bit weights a second time; export the model that was quantised"):
        Gguf(types=("q8_0",)).write(model, tokenizer, packed, tmp_path)
    assert not list(tmp_path.iterdir())
