"""The folder that transformers loads with the package `compressed-tensors`: the same codes, scales and weights."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.core.errors import UserError
from potstill.exporters.compressed_tensors import FOLDER, CompressedTensors, pack_int32
from potstill.quant.layers import quantise_model

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def library() -> Iterator[Any]:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="the loader is not here: pip install --no-deps compressed-tensors loguru",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        yield helpers


def packed_of(model: Any, group: int = 32) -> dict[str, Any]:
    return quantise_model(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], group=group).packed


def test_codes_lie_in_words_as_the_library_packs_them(library: Any) -> None:
    codes_OI = torch.randint(-8, 8, (5, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    words_OJ = pack_int32(codes_OI)
    assert words_OJ.equal(library.pack_to_int32(codes_OI, 4))
    assert library.unpack_from_int32(words_OJ, 4, codes_OI.shape).equal(codes_OI)


@pytest.mark.parametrize(
    "family, tied, group", [("qwen2", True, 32), ("llama", False, 64), ("qwen3", True, 128), ("gemma3", True, 32)]
)
def test_transformers_loads_the_very_weights(family, tied, group, library, build, tokenizer, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(family, tied=tied, width=group, intermediate_size=2 * group, num_hidden_layers=2)
    packed = packed_of(model, group)
    CompressedTensors().write(model, tokenizer, packed, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / FOLDER)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)  # the first call unpacks
    for name, matrix in packed.items():
        assert torch.equal(loaded.get_submodule(name).weight, matrix.dequantise())
    assert loaded.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / FOLDER).chat_template == tokenizer.chat_template


def test_the_file_holds_codes_and_float16_scales_and_is_small(build, tokenizer, tmp_path) -> None:
    model = build("qwen2").bfloat16().float()
    packed = packed_of(model)
    files = CompressedTensors().write(model, tokenizer, packed, tmp_path)
    assert {tmp_path / FOLDER / name for name in ("config.json", "model.safetensors", "tokenizer.json")} < set(files)
    stored = load_file(tmp_path / FOLDER / "model.safetensors")
    for name, matrix in packed.items():
        assert stored[f"{name}.weight_scale"].equal(matrix.scales_OG)
        assert stored[f"{name}.weight_scale"].dtype == torch.float16
        assert stored[f"{name}.weight_packed"].equal(pack_int32(matrix.codes_OI))
        assert stored[f"{name}.weight_shape"].tolist() == list(matrix.codes_OI.shape)
    others = {name: value for name, value in stored.items() if not any(name.startswith(layer + ".weight") for layer in packed)}
    assert all(value.dtype == torch.bfloat16 for value in others.values())
    assert all(value.float().equal(model.get_parameter(name)) for name, value in others.items())
    said = json.loads((tmp_path / FOLDER / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert said["ignore"] == ["lm_head"]


def test_what_the_format_cannot_hold_is_refused_first(build, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="writes four-bit weights, and the model is not quantised; quantise it first"):
        CompressedTensors().write(build("qwen2"), tokenizer, {}, tmp_path)
    model = build("gpt2")
    with pytest.raises(UserError, match="not GPT-2's transposed ones; export 'safetensors'"):
        CompressedTensors().write(model, tokenizer, packed_of(model), tmp_path)
    assert list(tmp_path.iterdir()) == []
