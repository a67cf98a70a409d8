"""Nothing is written of a model that the format cannot hold, or whose weights are not what was measured."""

import copy
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.core.errors import UserError
from potstill.exporters import Exporter
from potstill.exporters.gguf import Gguf
from potstill.exporters.safetensors import Safetensors
from potstill.quant.layers import quantise_model
from potstill.quant.packed import Packed

IDS = torch.arange(60).reshape(3, 20)
WRITERS: dict[str, Callable[[], Exporter]] = {
    "safetensors": Safetensors,
    "gguf f32": lambda: Gguf(types=("f32",)),
    "gguf f16": lambda: Gguf(types=("f16",)),
}


def quantised(model: Any) -> dict[str, Packed]:
    return quantise_model(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], method="rtn").packed


def refused(exporter: Exporter, model: Any, tokenizer: Any, packed: Any, folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        exporter.write(model, tokenizer, packed, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("writer", WRITERS)
def test_weights_that_are_no_numbers_are_refused(writer: str, value: float, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        model = tiny_model("qwen2")
        model.get_parameter(name).data.view(-1)[3] = value
        refused(WRITERS[writer](), model, tokenizer, {}, tmp_path, f"the weight '{name}' holds NaN or infinity")


@pytest.mark.parametrize(
    "exporter, match",
    [
        (Gguf(types=("f32", "f16")), r"'model.layers.0.mlp.up_proj.weight' is too large for float16; set types = \['f32'\]"),
        (Safetensors(dtype="float16"), "'model.layers.0.mlp.up_proj.weight' is too large for float16; use float32"),
    ],
)
def test_numbers_that_float16_cannot_hold_are_refused(exporter: Exporter, match: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    refused(exporter, model, tokenizer, {}, tmp_path, match)


@pytest.mark.parametrize("exporter", [Gguf(types=("f16",)), Safetensors(dtype="float16")])
def test_numbers_that_float16_flushes_to_zero_are_refused(exporter: Exporter, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.model.layers[0].mlp.up_proj.weight.data *= 1e-8
    refused(exporter, model, tokenizer, {}, tmp_path, "'model.layers.0.mlp.up_proj.weight' is too small for float16")
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert exporter.write(model, tokenizer, {}, tmp_path), "zeros are zeros"


def test_more_ends_than_the_file_can_name_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [1, 2, 3]
    refused(Gguf(), model, tokenizer, {}, tmp_path, "answers end at 4 tokens .* and a gguf file names 3; name fewer")


def test_eight_bit_embeddings_have_a_scale_in_float16_too(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.model.embed_tokens.weight.data[0, 0] = 1e7
    packed = quantised(model)
    refused(Gguf(embeddings="q8_0"), model, tokenizer, packed, tmp_path, "'model.embed_tokens.weight' is too large for float16")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("exporter", [Gguf(types=("q4_0", "f32")), Safetensors()])
def test_codes_that_the_weights_no_longer_are_are_refused(
    family: str, exporter: Exporter, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(family)
    packed = quantised(model)
    name = next(iter(packed))
    changed = copy.deepcopy(model)
    changed.get_submodule(name).weight.data[1, 2] += 1e-6
    refused(exporter, changed, tokenizer, packed, tmp_path, f"the weights of '{name}' were changed after they were quantised")
    gone = packed | {"model.layers.9.mlp.up_proj": packed[name]}
    refused(exporter, model, tokenizer, gone, tmp_path, r"'model.layers.9.mlp.up_proj' is not in the model; quantise the model")
    narrow = Packed(packed[name].codes_OI[:, :32], packed[name].scales_OG[:, :1], 32)
    refused(exporter, model, tokenizer, packed | {name: narrow}, tmp_path, "in its codes and .* in the model")
    assert exporter.write(model, tokenizer, packed, tmp_path)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_fails_half_way_leaves_nothing(writer: str, tokenizer: Any, tmp_path: Path) -> None:
    """No file may grow beyond 64 KB here, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "others.txt").write_text("kept")
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(Exception, match=r"No space left|File too large|os error 27"):
            WRITERS[writer]().write(tiny_model("qwen2"), tokenizer, {}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["others.txt"]


def test_all_problems_are_told_at_once_and_write_tells_the_same(tokenizer: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, hidden_act="gelu")
    ours = copy.deepcopy(tokenizer)
    ours.eos_token = None
    exporter = Gguf(types=("q4_0",))
    problems = exporter.problems(model.config, ours, quantised=False)
    for words in ("of type 'dynamic'", "activation 'gelu'", "'q4_0' but the model is not quantised", "tokenizer.eos_token"):
        assert sum(words in problem for problem in problems) == 1
    assert len(problems) == 4
    with pytest.raises(UserError) as error:
        exporter.write(model, ours, {}, tmp_path)
    assert str(error.value).splitlines() == problems


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"factor": 0.5, "rope_type": "linear"}, "positions stretched by a factor below 1"),
        ({"factor": 4.0, "rope_type": "yarn", "truncate": False}, "yarn without truncate"),
        ({"partial_rotary_factor": 0.5, "rope_type": "default"}, "rotary embeddings of a part of each head"),
    ],
)
def test_rotary_embeddings_of_other_kinds_are_refused(fields: dict[str, Any], words: str, tokenizer: Any) -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_theta": 10_000.0, "original_max_position_embeddings": 32, **fields}
    (problem,) = Gguf().problems(model.config, tokenizer, quantised=False)
    assert words in problem


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
THETA = {"rope_type": "default", "rope_theta": 10_000.0}
SLIDING = {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    "family, fields, words",
    [
        ("mistral", {"sliding_window": 16}, "sliding-window attention (16 of 128 positions)"),
        ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 2}, "sliding-window attention"),
        ("llama", SLIDING, "sliding-window attention (16 of 128 positions)"),
        ("llama", {"sliding_window": 16}, "sliding-window attention"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ("qwen2", SLIDING, "sliding-window attention (16 of 128 positions)"),
        ("mistral", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("mistral", {"rope_parameters": DYNAMIC}, "rotary embeddings of type 'dynamic'"),
        ("qwen3", SLIDING, "sliding-window attention (16 of 128 positions)"),
        ("qwen3", {"attention_bias": True}, "biases of attention"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rotary embeddings of type 'llama3'"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "layers without rotary positions other than each 4th"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 0]}, "layers without rotary positions other than each 4th"),
        ("smollm3", {"attention_bias": True}, "biases"),
        ("smollm3", {"mlp_bias": True}, "biases"),
        ("smollm3", {"rope_parameters": LLAMA3}, "rotary embeddings of type 'llama3'"),
        ("smollm3", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 5}, "sliding-window attention"),
        ("gemma3", {"attention_bias": True}, "biases of attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "a softcap of attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("gemma3", {"hidden_activation": "relu"}, "the activation 'relu'"),
        ("gemma3", {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": THETA}}, "of type 'llama3'"),
        ("gemma3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": THETA}}, "of type 'yarn'"),
        ("gemma3", {"rope_parameters": {"full_attention": THETA, "sliding_attention": YARN}}, "of type 'yarn'"),
    ],
)
def test_what_llamacpp_does_not_compute_is_refused(family: str, fields: dict[str, Any], words: str, tokenizer: Any) -> None:
    config = tiny_model(family).config
    assert Gguf().problems(config, tokenizer, quantised=False) == []
    for name, value in fields.items():
        setattr(config, name, value)
    (problem,) = Gguf().problems(config, tokenizer, quantised=False)
    assert problem.startswith("the gguf exporter cannot express ")
    assert words in problem
    assert problem.endswith("; export 'safetensors' instead")


@pytest.mark.parametrize("field", ["end_of_word_suffix", "continuing_subword_prefix"])
def test_bpe_of_another_make_is_refused(field: str, tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({sign: i for i, sign in enumerate(sorted(signs))}, [], **{field: "</w>"}))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    (problem,) = Gguf().problems(tiny_model("qwen2").config, made, quantised=False)
    assert f"cannot express the tokenizer's {field} = '</w>'" in problem


@pytest.mark.parametrize("templates", [{"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}, {"tool_use": "{{ 2 }}"}])
def test_several_chat_templates_are_all_written(templates: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader

    ours = copy.deepcopy(tokenizer)
    ours.chat_template = templates
    model = tiny_model("qwen2")
    files = [*Safetensors().write(model, ours, {}, tmp_path), *Gguf().write(model, ours, {}, tmp_path)]
    assert set(files) == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == templates
    fields = GGUFReader(tmp_path / "model-f16.gguf").fields
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ 2 }}"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert ("tokenizer.chat_template" in fields) is ("default" in templates)


def test_an_untrained_folder_names_its_end_of_turn(tokenizer: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader

    ours = copy.deepcopy(tokenizer)
    ours.eos_token = "<|endoftext|>"
    model = tiny_model("qwen2")
    Safetensors().write(model, ours, {}, tmp_path)
    Gguf().write(model, ours, {}, tmp_path)
    turn, end = ours.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [turn, end]
    fields = GGUFReader(tmp_path / "model-f16.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == turn
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end
    assert model.generation_config.eos_token_id is None, "the caller's model is left alone"
