"""One loading path: what a model's files hold is what every way of reading them gives, and nothing else is let in."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import chat_tokenizer, gpt2_tokenizer, tiny_model
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.models import (
    bytes_of,
    check_positions,
    config_of,
    content_id,
    load_head,
    load_model,
    load_tokenizer,
    positions_of,
    save_model,
    size_of,
    weight_problems,
)
from potstill.inits.layers import Layers

FAMILIES = ("qwen2", "llama", "gpt2")
EMBEDDING = {"qwen2": "model.embed_tokens.weight", "llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    chat = chat_tokenizer()
    return {"qwen2": chat, "llama": chat, "gpt2": gpt2_tokenizer()}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, names_per_file: int = 5) -> None:
    """The same weights in several files and an index, whatever the flags in config.json say."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = [names[i : i + names_per_file] for i in range(0, len(names), names_per_file)]
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def written(
    folder: Path, tokenizers: dict[str, Any], family: str, stored: str, flag: bool, sharded: bool, bare: bool
) -> Tensor:
    """A model folder; returns the head that it holds.

    Args:
        stored: what the file holds beside the embedding: no head, the embedding `again`, or an `own` one.
        bare: without the names' prefix, as the first GPT-2 files are.
    """
    tokenizer = tokenizers[family]
    save_model(tiny_model(family, len(tokenizer), tie_word_embeddings=True), tokenizer, folder)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING[family]]
    head = torch.randn_like(embedding) if stored == "own" else embedding.clone()

    def change(weights: dict[str, Tensor]) -> None:
        if stored != "none":
            weights["lm_head.weight"] = head
        for name in [name for name in weights if bare and name.startswith(("model.", "transformer."))]:
            weights[name.partition(".")[2]] = weights.pop(name)

    edit_weights(folder, change)
    edit_config(folder, tie_word_embeddings=flag)
    if sharded:
        shard(folder)
    return head


def heads_of(folder: Path, tokenizer: Any) -> dict[str, Tensor]:
    """The head that each way of reading a folder gives."""
    where = f"path:{folder}"
    model = load_model(where)
    kept = Layers(keep=(0, 1))(model)
    again = folder.with_name("again")
    save_model(kept, tokenizer, again)
    whole = folder.with_name("whole")
    save_model(model, tokenizer, whole)
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        logits = model(ids).logits[0]
        hidden = model.base_model(ids).last_hidden_state[0]
    head, _ = load_head(where)
    torch.testing.assert_close(head(hidden), logits, rtol=1e-5, atol=1e-5)
    found = {
        "load_model": model.get_output_embeddings().weight,
        "load_head": head.weight,
        "layers": kept.get_output_embeddings().weight,
        "layers saved": load_model(f"path:{again}").get_output_embeddings().weight,
        "saved": load_head(f"path:{whole}")[0].weight,
    }
    assert size_of(config_of(where)).parameters == sum(p.numel() for p in model.parameters())
    assert size_of(config_of(f"path:{again}")).parameters == sum(p.numel() for p in model.parameters())
    return found


@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(("stored", "flag"), [("none", True), ("again", True), ("again", False), ("own", True), ("own", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_reading_gives_the_head_of_the_file(
    tmp_path: Path, tokenizers: dict[str, Any], family: str, stored: str, flag: bool, sharded: bool, bare: bool
) -> None:
    head = written(tmp_path / "model", tokenizers, family, stored, flag, sharded, bare)
    for way, found in heads_of(tmp_path / "model", tokenizers[family]).items():
        assert torch.equal(found, head), way
    assert load_model(f"path:{tmp_path / 'model'}").config.tie_word_embeddings == (flag and stored != "own")


def test_an_own_head_in_half_precision_is_the_files_own(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    head = written(tmp_path / "model", tokenizers, "qwen2", "own", True, False, False)
    edit_weights(tmp_path / "model", lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items()}))
    for dtype in (torch.float32, torch.bfloat16):
        read, _ = load_head(f"path:{tmp_path / 'model'}", dtype)
        whole = load_model(f"path:{tmp_path / 'model'}", dtype).get_output_embeddings()
        assert read.weight.dtype == whole.weight.dtype == dtype
        assert torch.equal(read.weight, whole.weight)
        assert torch.equal(read.weight, head.bfloat16().to(dtype))


def test_the_bytes_of_an_own_head_count(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    written(tmp_path / "model", tokenizers, "llama", "own", True, False, False)
    model = load_model(f"path:{tmp_path / 'model'}")
    assert bytes_of(tmp_path / "model") >= 4 * sum(p.numel() for p in model.parameters())


def test_a_head_that_is_nowhere_is_refused(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    written(tmp_path / "model", tokenizers, "llama", "none", False, False, False)
    for load in (load_model, load_head):
        with pytest.raises(UserError, match=r"1 weight is missing: 'lm_head.weight'.*set tie_word_embeddings to true"):
            load(f"path:{tmp_path / 'model'}")


# What the config does not describe

BIASES = ("q_proj", "k_proj", "v_proj", "o_proj")


def with_biases(weights: dict[str, Tensor]) -> None:
    weights |= {f"model.layers.{i}.self_attn.{name}.bias": torch.ones(4) for i in range(2) for name in BIASES}


def with_a_third_layer(weights: dict[str, Tensor]) -> None:
    third = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in weights.items() if "layers.1." in n}
    weights |= third


def with_eyes(weights: dict[str, Tensor]) -> None:
    weights |= {"vision_tower.patch_embed.weight": torch.ones(4, 4)}


def under_another_name(weights: dict[str, Tensor]) -> None:
    for name in list(weights):
        weights[f"language_model.{name}"] = weights.pop(name)


def in_eight_bits(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_biases, r"8 weights have no place .* the first is 'model.layers.0.self_attn.k_proj.bias'"),
        (with_a_third_layer, r"9 weights have no place .* the first is 'model.layers.2.input_layernorm.weight'"),
        (with_eyes, r"1 weight has no place .* it is 'vision_tower.patch_embed.weight'"),
        (
            under_another_name,
            r"weights are missing.*; .*no place .* the first is 'language_model.model.embed_tokens.weight'",
        ),
        (in_eight_bits, r"'model.norm.weight' is stored as I8"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_what_the_config_does_not_describe_is_refused(
    tmp_path: Path, tokenizers: dict[str, Any], change: Callable[[dict[str, Tensor]], Any], told: str, sharded: bool
) -> None:
    folder = tmp_path / "model"
    save_model(tiny_model("llama", len(tokenizers["llama"])), tokenizers["llama"], folder)
    assert weight_problems(f"path:{folder}") == []
    edit_weights(folder, change)
    if sharded:
        shard(folder)
    for load in (load_model, load_head):
        with pytest.raises(UserError, match=told):
            load(f"path:{folder}")
    assert weight_problems(f"path:{folder}")


def test_buffers_that_a_model_makes_by_itself_are_let_in(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    save_model(tiny_model("gpt2", len(tokenizers["gpt2"])), tokenizers["gpt2"], tmp_path / "gpt2")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 256, 256) for i in range(2)}
    edit_weights(
        tmp_path / "gpt2", lambda weights: weights.update(masks, **{"transformer.h.0.attn.masked_bias": torch.ones(1)})
    )
    save_model(tiny_model("llama", len(tokenizers["llama"])), tokenizers["llama"], tmp_path / "llama")
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    edit_weights(tmp_path / "llama", lambda weights: weights.update(frequencies))
    for family in ("gpt2", "llama"):
        assert weight_problems(f"path:{tmp_path / family}") == []
        load_model(f"path:{tmp_path / family}")


def test_a_bias_that_is_called_as_a_mask_elsewhere_is_no_buffer(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    save_model(tiny_model("llama", len(tokenizers["llama"])), tokenizers["llama"], tmp_path / "model")
    edit_weights(tmp_path / "model", lambda weights: weights.update({"model.h.0.attn.bias": torch.ones(4)}))
    assert len(weight_problems(f"path:{tmp_path / 'model'}")) == 1


def test_two_sets_of_weights_are_refused(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    save_model(tiny_model("llama", len(tokenizers["llama"])), tokenizers["llama"], folder)
    single = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(single)
    for act in (load_model, load_head, content_id):
        with pytest.raises(UserError, match=r"holds two sets of weights, model\.safetensors and the \d files"):
            act(f"path:{folder}")


def test_a_weight_in_two_shards_is_refused(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    save_model(tiny_model("llama", len(tokenizers["llama"])), tokenizers["llama"], folder)
    shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    doubled = load_file(second)
    doubled |= dict([next(iter(load_file(first).items()))])
    save_file(doubled, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"stands in model-00001-of-.* as well"):
        load_model(f"path:{folder}")


# Adapters

READERS = (load_model, load_head, config_of, content_id, load_tokenizer, weight_problems)


@pytest.mark.parametrize("installed", [True, False], ids=["with peft", "without peft"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_model_is_refused_by_every_reader(
    tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, installed: bool
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "peft", None)
    save_model(tiny_model("qwen2", len(tokenizers["qwen2"])), tokenizers["qwen2"], tmp_path / "model")
    (tmp_path / "model" / name).write_text("{}")
    for act in READERS:
        with pytest.raises(UserError, match=r"holds a model and an adapter .*merge it into .* or move the adapter"):
            act(f"path:{tmp_path / 'model'}")


def test_an_adapter_alone_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for act in READERS:
        with pytest.raises(UserError, match=r"holds an adapter .* and no model; merge it"):
            act(f"path:{tmp_path}")


@pytest.mark.parametrize("name", ["tokenizer.model", "additional_chat_templates/tool.jinja", "vocab.txt"])
def test_identity_counts_whatever_a_tokenizer_is_read_from(tmp_path: Path, tokenizers: dict[str, Any], name: str) -> None:
    save_model(tiny_model("qwen2", len(tokenizers["qwen2"])), tokenizers["qwen2"], tmp_path / "model")
    before = content_id(f"path:{tmp_path / 'model'}")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("x")
    assert content_id(f"path:{tmp_path / 'model'}") != before


# The hub, as its cache lies on disk


def test_a_model_of_the_hub_is_read_as_a_folder_is(
    tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--ORG--tiny" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    head = written(snapshot, tokenizers, "qwen2", "own", True, True, False)
    where = f"hf:ORG/tiny@{commit}"
    assert torch.equal(load_head(where)[0].weight, head)
    assert torch.equal(load_model(where).get_output_embeddings().weight, head)
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf:ORG/tiny@.*: holds a model and an adapter"):
        load_model(where)


WINDOWS = [
    (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 2},
        r"sliding_attention, but the config has no window; set sliding_window",
    ),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, r"layer_types names chunked_attention"),
    ("llama", {"layer_types": ["sliding_attention"] * 2}, r"layer_types asks for windows of attention, which llama does not"),
    ("llama", {"sliding_window": 4}, r"sliding_window asks for windows of attention, which llama does not have; remove it"),
]


@pytest.mark.parametrize(("family", "fields", "words"), WINDOWS)
def test_windows_that_a_network_does_not_have_are_refused(
    tmp_path: Path, tokenizers: dict[str, Any], family: str, fields: dict[str, Any], words: str
) -> None:
    """Llama's forward pass ignores them while its generation forgets what left the window: two models in one folder."""
    save_model(tiny_model(family, len(tokenizers[family])), tokenizers[family], tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    for look in (config_of, load_model):
        with pytest.raises(UserError, match=words):
            look(f"path:{tmp_path}")


# Positions


def test_positions_by_config_alone() -> None:
    gpt2, qwen2 = tiny_model("gpt2", 40, n_positions=64), tiny_model("qwen2", 40, max_position_embeddings=64)
    for config in (gpt2.config, qwen2.config):
        assert positions_of(config) == 64
        check_positions(config, 64, "teacher")
        with pytest.raises(
            UserError, match=r"^teacher: a row has 65 tokens and the model 64 positions; lower prompts.max_tokens"
        ):
            check_positions(config, 65, "teacher")


def longrope() -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    return {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32, **factors}


def test_longrope_is_bounded_by_the_length_at_which_its_frequencies_change() -> None:
    config = tiny_model("llama", 40, rope_parameters=longrope()).config
    assert positions_of(config) == 32
    check_positions(config, 32, "student")
    with pytest.raises(UserError, match=r"student: a row has 33 tokens, .* more than 32 .* \(rope type longrope\)"):
        check_positions(config, 33, "student")
