from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_export import QWEN2_REGEX, ROWS, TEMPLATE, split_then_bytes, train_tokenizer

from potstill.core.errors import UserError
from potstill.exporters import Exporter
from potstill.exporters._rope import row_order
from potstill.exporters._tensors import q4_0_bytes, q8_0_bytes
from potstill.exporters._vocabulary import vocabulary_keys, vocabulary_problems
from potstill.exporters.gguf import Gguf
from potstill.quant.layers import quantise_model
from potstill.quant.packed import Packed
from potstill.quant.rounding import round_to_nearest

LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
F32, F16, Q4_0, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q4_0", "Q8_0"))
HEADS = {"q_proj": 4, "k_proj": 2}
PAIRED = ("llama", "mistral", "smollm3")  # families whose rotary rows llama.cpp wants in pairs
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "smollm3", "gemma3", "gpt2")
ARCHITECTURES = {"mistral": "llama"}  # where llama.cpp's name is another
SHORT_NAMES = {
    "llama": {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    },
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "gpt2": {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}


def quantised(model: Any, group: int = 32) -> dict[str, Packed]:
    ids = torch.arange(60).reshape(3, 20)
    return quantise_model(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], group=group).packed


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors of a file, by the `gguf` package's own reader."""
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")},
        {tensor.name: tensor for tensor in reader.tensors},
    )


def values(tensor: Any) -> torch.Tensor:
    """float32, by the `gguf` package's own dequantiser."""
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).copy())


def gguf_name(name: str, family: str) -> str:
    """Independently of the package's own map."""
    outer = {"model.embed_tokens": "token_embd", "transformer.wte": "token_embd", "transformer.wpe": "position_embd"}
    outer |= {"model.norm": "output_norm", "transformer.ln_f": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    index, short = stem.split(".", 3)[2:]
    own = SHORT_NAMES["gpt2"] if family == "gpt2" else SHORT_NAMES["llama"] | SHORT_NAMES.get(family, {})
    return f"blk.{index}.{own[short]}.{kind}"


def expected_tensors(model: Any, family: str) -> dict[str, torch.Tensor]:
    """Every parameter as llama.cpp wants it: Conv1D transposed, q and k with paired rotary rows, Gemma's norms with their 1."""
    expected = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if family == "gpt2" and ".c_" in name and value.ndim == 2:
            value = value.T
        if family == "gemma3" and "norm" in name:
            value = value + 1
        heads = HEADS.get(name.split(".")[-2]) if family in PAIRED else None
        if heads:
            half = len(value) // heads // 2
            rows = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
            value = value[rows]
        expected[gguf_name(name, family)] = value
    return expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embeddings", ["f16", "q8_0"])
def test_every_tensor_is_there_in_its_type_with_its_values(family, tied, embeddings, build, tokenizer, tmp_path) -> None:
    model = build(family, tied=tied)
    packed = quantised(model)
    files = Gguf(types=("f32", "f16", "q4_0"), embeddings=embeddings).write(model, tokenizer, packed, tmp_path)
    assert [file.name for file in files] == ["model-q4_0-as-f32.gguf", "model-q4_0-as-f16.gguf", "model-q4_0.gguf"]
    expected = expected_tensors(model, family)
    assert ("output.weight" in expected) is not tied
    solved = {gguf_name(f"{name}.weight", family) for name in packed}
    head = {"token_embd.weight", "output.weight"}
    for file in files:
        _, tensors = read(file)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            if file.name == "model-q4_0-as-f32.gguf" or tensor.data.ndim == 1 or name == "position_embd.weight":
                wanted = F32
            elif file.name == "model-q4_0.gguf" and name in solved:
                wanted = Q4_0
            elif file.name == "model-q4_0.gguf" and name in head and embeddings == "q8_0":
                wanted = Q8_0
            else:
                wanted = F16
            assert (name, tensor.tensor_type) == (name, wanted)
            if wanted in (F32, Q4_0):  # bit for bit: the solver's weights, never quantised again
                assert torch.equal(values(tensor), expected[name])
            elif wanted == F16:
                assert torch.equal(values(tensor), expected[name].half().float())
            else:
                assert (values(tensor) - expected[name]).abs().max() < 0.01


@pytest.mark.parametrize("group", [32, 64, 128])
def test_q4_0_bytes_are_the_codes_and_scales_bit_for_bit(group: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    packed = round_to_nearest(weight, group)
    blocks = q4_0_bytes(packed, "layer")
    assert blocks.shape == (48, 256 // 32 * 18)
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks, Q4_0)), packed.dequantise())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_q8_0_bytes_are_the_codes_and_scales_bit_for_bit(group: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    packed = round_to_nearest(weight, group, bits=8)
    assert (int(packed.codes_OI.min()), packed.scales_OG.dtype) == (-128, torch.float16)
    blocks = q8_0_bytes(packed, "layer")
    assert blocks.shape == (48, 256 // 32 * 34)
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks, Q8_0)), packed.dequantise())


def test_a_q4_0_block_by_hand() -> None:
    codes = torch.arange(32, dtype=torch.int8).remainder(16).sub(8)[None]
    packed = Packed(codes, torch.tensor([[-1.5]], dtype=torch.float16), 32)
    # −1.5 in float16 is 0xBE00, little-endian; elements j and j + 16 are equal here, so both nibbles are j
    assert q4_0_bytes(packed, "layer")[0].tolist() == [0x00, 0xBE] + [17 * j for j in range(16)]


def test_quantising_anew_would_not_have_been_exact() -> None:
    """Why the codes are repacked: ggml's own quantiser, given the solver's weights, moves them."""
    packed = quantised_layer_with_a_group_that_misses_minus_eight()
    anew = gguf.dequantize(gguf.quantize(packed.dequantise().numpy(), Q4_0), Q4_0)
    assert not np.array_equal(anew, packed.dequantise().numpy())
    assert np.array_equal(gguf.dequantize(q4_0_bytes(packed, "layer"), Q4_0), packed.dequantise().numpy())


def quantised_layer_with_a_group_that_misses_minus_eight() -> Packed:
    codes = torch.randint(-7, 8, (4, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return Packed(codes, torch.full((4, 1), 0.1, dtype=torch.float16), 32)


def test_paired_rotary_rows_give_the_attention_of_halves() -> None:
    """llama.cpp rotates rows 2i and 2i + 1; on the reordered rows that is transformers' rotation of i and i + d/2."""

    class Config:
        model_type, num_attention_heads, num_key_value_heads = "llama", 2, 2

    q, k = np.random.default_rng(0).normal(size=(2, 16, 5))  # two heads of 8, five positions
    angles = np.arange(5) / 10_000 ** (np.arange(4)[:, None] / 4)

    def rotate_halves(x):
        low, high = x.reshape(2, 2, 4, 5).swapaxes(0, 1)
        return np.stack([low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], 1)

    def rotate_pairs(x):
        low, high = np.moveaxis(x.reshape(2, 4, 2, 5), 2, 0)
        return np.stack([low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], 2)

    def scores(rotated_q, rotated_k):
        return np.einsum("hdt,hds->hts", rotated_q.reshape(2, 8, 5), rotated_k.reshape(2, 8, 5))

    names = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj", "k_proj")]
    reorder_q, reorder_k = (row_order(name, Config, "llama") for name in names)
    halves = scores(rotate_halves(q), rotate_halves(k))
    np.testing.assert_allclose(scores(rotate_pairs(reorder_q(q)), rotate_pairs(reorder_k(k))), halves, atol=1e-12)
    assert not np.allclose(scores(rotate_pairs(q), rotate_pairs(k)), halves)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_there(family, build, tokenizer, tmp_path) -> None:
    model = build(family)
    packed = quantised(model)
    files = Gguf(types=("f16", "q4_0")).write(model, tokenizer, packed, tmp_path, name="my student")
    assert [file.name for file in files] == ["model-q4_0-as-f16.gguf", "model-q4_0.gguf"]
    for file, file_type in zip(files, (1, 2), strict=True):
        keys, _ = read(file)
        tokens, types, merges = (keys.pop(f"tokenizer.ggml.{part}") for part in ("tokens", "token_type", "merges"))
        assert len(tokens) == len(types) == ROWS
        vocabulary = tokenizer.get_vocab()
        assert tokens[: len(tokenizer)] == sorted(vocabulary, key=vocabulary.__getitem__)
        assert tokens[len(tokenizer) :] == [f"[PAD{i}]" for i in range(len(tokenizer), ROWS)]
        kinds = dict(zip(tokens, types, strict=True))
        assert [kinds[token] for token in ("the", "<|im_end|>", "<tool>", tokens[-1])] == [1, 3, 4, 5]
        assert all(a + b in vocabulary for a, b in (merge.split(" ") for merge in merges))
        eps = "layer_norm_epsilon" if family == "gpt2" else "layer_norm_rms_epsilon"
        own = {
            "vocab_size": ROWS,
            "context_length": 128,
            "embedding_length": 64,
            "block_count": {"smollm3": 5, "gemma3": 7}.get(family, 2),
            "feed_forward_length": 256 if family == "gpt2" else 96,
            "attention.head_count": 4,
            "attention.head_count_kv": 4 if family == "gpt2" else 2,
            f"attention.{eps}": pytest.approx(1e-5 if family == "gpt2" else 1e-6),
        }
        if family != "gpt2":
            width = 32 if family in ("qwen3", "gemma3") else 16
            own |= {"rope.freq_base": 1_000_000.0, "rope.dimension_count": width}
            own |= {"attention.key_length": width, "attention.value_length": width}
        if family == "gemma3":
            own |= {"attention.sliding_window": 16, "rope.freq_base_swa": 10_000.0}
        architecture = ARCHITECTURES.get(family, family)
        assert keys == {
            "general.architecture": architecture,
            "general.name": "my student",
            "general.file_type": file_type,
            "general.quantization_version": 2,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.eos_token_id": vocabulary["<|im_end|>"],
            "tokenizer.ggml.padding_token_id": vocabulary["<|endoftext|>"],
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.chat_template": TEMPLATE,
        } | {f"{architecture}.{key}": value for key, value in own.items()}


def test_a_layer_kept_at_full_precision_stands_as_f16(build, tokenizer, tmp_path) -> None:
    model = build("qwen2", width=48)
    packed = quantised(model)
    assert packed.keys() == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    _, tensors = read(Gguf(types=("q4_0",)).write(model, tokenizer, packed, tmp_path)[0])
    assert tensors["blk.0.ffn_down.weight"].tensor_type == Q4_0
    assert tensors["blk.0.ffn_up.weight"].tensor_type == F16


def test_unquantised_models_get_one_f16_file(build, tokenizer, tmp_path) -> None:
    assert Exporter.parse("gguf").write(build("qwen2"), tokenizer, {}, tmp_path) == [tmp_path / "model-f16.gguf"]


def byte_level(**options: Any) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False, "use_regex": True} | options))


def digits() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    "make, pre",
    [
        (lambda: train_tokenizer(split_then_bytes(QWEN2_REGEX)), "qwen2"),
        (lambda: train_tokenizer(split_then_bytes(LLAMA3_REGEX), ignore_merges=True), "llama-bpe"),
        (lambda: train_tokenizer([byte_level()]), "gpt-2"),
        (lambda: train_tokenizer([digits(), byte_level()]), "smollm"),
    ],
)
def test_the_way_of_cutting_is_read_off_the_tokenizer(make, pre) -> None:
    assert vocabulary_problems(make(), ROWS) == []
    assert vocabulary_keys(make(), ROWS)["tokenizer.ggml.pre"] == pre


@pytest.mark.parametrize(
    "make",
    [
        lambda: train_tokenizer(split_then_bytes(QWEN2_REGEX.replace("'ll|", ""))),
        lambda: train_tokenizer(split_then_bytes(QWEN2_REGEX), ignore_merges=True),
        lambda: train_tokenizer(split_then_bytes(LLAMA3_REGEX)),
        lambda: train_tokenizer([byte_level(add_prefix_space=True)]),
        lambda: train_tokenizer([byte_level(use_regex=False)]),
        lambda: train_tokenizer([digits()]),
        lambda: train_tokenizer([byte_level()], lowercase()),
    ],
)
def test_an_unknown_way_of_cutting_is_refused(make) -> None:
    assert "does not recognise how this tokenizer cuts text" in vocabulary_problems(make(), ROWS)[0]


def lowercase() -> Any:
    from tokenizers import normalizers

    return normalizers.Lowercase()


def test_a_beginning_of_sequence_token_is_added_where_the_tokenizer_adds_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer([byte_level()])
    tokenizer.bos_token = "<|im_start|>"
    silent = vocabulary_keys(tokenizer, ROWS)
    assert silent["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert silent["tokenizer.ggml.add_bos_token"] is False
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert vocabulary_keys(tokenizer, ROWS)["tokenizer.ggml.add_bos_token"] is True


def test_what_the_format_cannot_hold_is_refused(build, tokenizer, tmp_path) -> None:
    def refused(model: Any, match: str, packed: Any = None, **fields: Any) -> None:
        with pytest.raises(UserError, match=match):
            Gguf(**fields).write(model, tokenizer, packed or {}, tmp_path)
        assert list(tmp_path.iterdir()) == []

    scaled = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    refused(build("qwen2"), "types name 'q4_0' but the model is not quantised", types=("q4_0",))
    refused(build("llama", rope_parameters=scaled), "cannot express rotary embeddings of type 'dynamic'")
    refused(build("llama", hidden_act="gelu"), "cannot express the activation 'gelu'")
    refused(build("gpt2", activation_function="relu"), "cannot express the activation 'relu'")
    refused(build("gpt2", scale_attn_by_inverse_layer_idx=True), "attention scaled in another way")
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    refused(build("qwen2", **sliding), "cannot express sliding-window attention")
    refused(build("qwen2", vocab_size=270), "has token 283, but the model's embeddings have 270 rows")
    small_groups = build("qwen2")
    refused(small_groups, "Q4_0 stores groups of 32, and '.*' has 16", quantised(small_groups, group=16), types=("q4_0",))
    narrow = build("qwen2", width=48)
    refused(narrow, "divisible by 32, not 48", quantised(narrow), types=("q4_0",), embeddings="q8_0")
    other = build("qwen2")
    other.config.model_type = "olmo2"
    refused(other, "knows gemma3_text, gpt2, llama, mistral, qwen2, qwen3, smollm3, not 'olmo2'")


def test_sentencepiece_and_endless_tokenizers_are_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    sentencepiece = Tokenizer(models.BPE({"<0x00>": 0, "a": 1}, [], byte_fallback=True))
    problems = vocabulary_problems(PreTrainedTokenizerFast(tokenizer_object=sentencepiece), ROWS)
    assert "a token for every byte, never merged, and the tokenizer lacks 255" in problems[1]
    endless = train_tokenizer([byte_level()])
    endless.eos_token = None
    assert vocabulary_problems(endless, ROWS) == [
        "the gguf exporter needs the tokenizer to have an end-of-sequence token; set tokenizer.eos_token"
    ]
