import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.core.errors import UserError
from potstill.exporters import Exporter
from potstill.exporters.safetensors import Safetensors
from potstill.quant.layers import quantise_model

IDS = torch.arange(40).reshape(2, 20)


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_the_folder_loads_in_plain_transformers_with_equal_logits(family, tied, build, tokenizer, tmp_path) -> None:
    model = build(family, tied=tied)
    packed = quantise_model(model, rows()).packed
    files = Exporter.parse("safetensors").write(model, tokenizer, packed, tmp_path)
    assert set(files) == set(tmp_path.iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for name, matrix in packed.items():
        weight = loaded.get_submodule(name).weight
        assert torch.equal(weight.T if family == "gpt2" else weight, matrix.dequantise())
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("It's drawn off <tool>").input_ids == tokenizer("It's drawn off <tool>").input_ids
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_is_written_and_the_model_itself_is_left_alone(dtype, build, tokenizer, tmp_path) -> None:
    model = build("qwen2")
    Safetensors(dtype=dtype).write(model, tokenizer, {}, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == getattr(torch, dtype)
    assert model.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.dtype))


def test_only_its_own_files_are_returned(build, tokenizer, tmp_path) -> None:
    (tmp_path / "model-f16.gguf").touch()
    files = Safetensors().write(build("qwen2"), tokenizer, {}, tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    assert tmp_path / "model-f16.gguf" not in files


def test_a_dtype_that_would_leave_the_grid_is_refused(build, tokenizer, tmp_path) -> None:
    model = build("qwen2")
    packed = quantise_model(model, rows(), method="rtn").packed
    with pytest.raises(UserError, match="dtype = 'bfloat16' cannot hold quantised weights exactly; use 'auto' or 'float32'"):
        Safetensors(dtype="bfloat16").write(model, tokenizer, packed, tmp_path)
    assert list(tmp_path.iterdir()) == []
