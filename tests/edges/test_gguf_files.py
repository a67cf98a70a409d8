"""What the exporter writes is read back as it was: logits, token ids, template, ends. What is not known is refused by name."""

import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llamacpp import ask, needs_llamacpp
from strings import TEXTS as ANY_TEXTS
from strings import random_texts

from potstill.core.errors import UserError
from potstill.edges.models import (
    bytes_of,
    config_of,
    content_id,
    load_head,
    load_model,
    load_stored,
    load_tokenizer,
    save_model,
    shared_vocabulary,
    weight_problems,
)
from potstill.edges.vocabulary import tokenizer_note
from potstill.exporters.gguf import Gguf
from potstill.quant.layers import quantise_model

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEFAULT = [
    r"[\p{P}$+<=>^~|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
]
TEXTS = [
    "", " ", "  ", "\n", " \n\n\t x  ", "a\r\nb\r\n\r\nc", "tabs\t\there", "1", "12", "123", "1234567 3.14 10,000 x² ½ ٣٤٥",
    "It's 12 o'clock: don't wait!", "I'LL THEY'RE we've you'd 'twas", "¿Qué tal, naïve café? ¡Olé! año, pingüino",
    "e\u0301 cafe\u0301 A\u030a", "日本語 中文 한국어", "สวัสดี مرحبا שלום Ελλάδα", "👍🏽 👨‍👩‍👧 🇵🇪",
    "a\x04b", "\U000f0000 \u200b\u00a0x",
    "def f(x):\n\treturn x+1  # ok", "<|im_start|>user\nhi<|im_end|>\n", "x<tool>y <tool> z", "<|endoftext|><|endoftext|>",
    "http://a.b/c?d=1&e=2", "________ ------- ....", "CamelCase snake_case kebab-case", "'", "''s", "x'S y'T", "ﬁ ﬂ Å Å",
]  # fmt: skip
Reader = Callable[..., Any]


def trained(cut: str, *, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer that cuts text as one of llama.cpp's names says, built without the package's own tables."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    digits = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}.get(cut)
    backend = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    if digits is not None:
        split = pre.Split(Regex(CONTRACTIONS + digits + REST), behavior="isolated")
        backend.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif cut == "smollm":
        backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    elif cut == "default":
        splits = [pre.Split(Regex(regex), behavior="isolated") for regex in DEFAULT]
        backend.pre_tokenizer = pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    texts = [text for text in TEXTS if "<" not in text] * 3 + ["1234567 don't café 12 345"] * 9
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    begin = {"bos_token": "<|im_start|>"} if bos else {}
    if bos:
        id = backend.token_to_id("<|im_start|>")
        backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", id)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", **begin)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return tokenizer


def network(family: str, **more: Any) -> Any:
    """Two layers, biases too: at their initial zero, a lost one would not be seen."""
    import transformers as t

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 352, "tie_word_embeddings": False, "max_position_embeddings": 128}
    shape |= {"bos_token_id": None, "eos_token_id": None}
    match family:
        case "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**(shape | more)))
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**(shape | more)))
        case _:
            shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 352}
            model = t.GPT2LMHeadModel(t.GPT2Config(**(shape | {"bos_token_id": None, "eos_token_id": None} | more)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 103)[None]).logits


def exported(model: Any, folder: Path, type: str = "f32", tokenizer: Any = None, packed: Any = None) -> str:
    files = Gguf(types=(type,)).write(model, tokenizer or trained("qwen2"), packed or {}, folder)
    return f"path:{files[0]}"


ROPE = {"rope_theta": 10_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
NETWORKS = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 of narrow heads": ("qwen2", {"head_dim": 8}),
    "qwen2 with stretched positions": ("qwen2", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}, "attention_bias": True}),
    "llama stretched evenly": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "gpt2": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 tied": ("gpt2", {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_that_was_exported_is_read_back_to_the_last_bit(name: str, tmp_path: Path) -> None:
    family, more = NETWORKS[name]
    model = network(family, **more)
    where = exported(model, tmp_path)
    assert weight_problems(where) == []
    found = load_model(where)
    assert torch.equal(logits(found), logits(model))
    assert type(found) is type(model)
    assert config_of(where).tie_word_embeddings == model.config.tie_word_embeddings
    head, form = load_head(where)
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    assert form.plain


def test_yarn_is_read_back_within_the_rounding_of_its_float32_keys(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}
    model = network("llama", rope_parameters=rope)
    assert (logits(load_model(exported(model, tmp_path))) - logits(model)).abs().max() < 1e-4
    plain = network("llama")
    plain.load_state_dict(model.state_dict())
    assert (logits(plain) - logits(model)).abs().max() > 0.01, "the scaling matters"


@needs_llamacpp
@pytest.mark.parametrize("type", [None, "linear", "none"])
@pytest.mark.parametrize("factor", [4.0, 0.0])
def test_positions_are_stretched_where_llamacpp_stretches_them(type: str | None, factor: float, tmp_path: Path) -> None:
    """A file that names a factor and no way is stretched evenly; a factor of 0 stretches nothing."""
    file = Path(exported(network("llama"), tmp_path).removeprefix("path:"))
    path = rewritten(file, keys={"llama.rope.scaling.type": type, "llama.rope.scaling.factor": factor})
    ids = [*range(3, 60)]
    with torch.no_grad():
        ours = load_model(f"path:{path}")(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    (theirs,) = ask(path, prompts=[ids])["logp"]
    assert max(abs(float(ours[id]) - value) for id, value in theirs.items()) < 0.01
    stretched = not torch.equal(logits(load_model(f"path:{path}")), logits(network("llama")))
    assert stretched == (factor == 4 and type != "none")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_rounded_files_hold_what_their_codes_stand_for(family: str, tmp_path: Path) -> None:
    model = network(family)
    half = load_model(exported(model, tmp_path, "f16"))
    for name, parameter in model.named_parameters():
        wanted = parameter if parameter.ndim == 1 or name.endswith("wpe.weight") else parameter.half().float()
        assert torch.equal(half.get_parameter(name), wanted), name
    ids = torch.arange(60).reshape(3, 20)
    packed = quantise_model(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], group=32).packed
    found = load_model(exported(model, tmp_path, "q4_0", packed=packed))
    assert packed
    for name, matrix in packed.items():
        own = found.get_parameter(f"{name}.weight")
        assert torch.equal(own.T if family == "gpt2" else own, matrix.dequantise()), name


@pytest.mark.parametrize("type", ["Q8_0", "Q4_1", "Q5_0", "BF16"])
def test_types_that_others_write_are_decoded_as_the_gguf_package_does(type: str, tmp_path: Path) -> None:
    model = network("qwen2")
    path = Path(exported(model, tmp_path).removeprefix("path:"))
    kind = gguf.GGMLQuantizationType[type]
    other = rewritten(path, tensors={"blk.0.attn_v.weight": (lambda values: gguf.quantize(values, kind), kind)})
    values = gguf.dequantize(gguf.quantize(model.model.layers[0].self_attn.v_proj.weight.detach().numpy(), kind), kind)
    assert np.array_equal(load_model(f"path:{other}").model.layers[0].self_attn.v_proj.weight.detach().numpy(), values)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("cut", ["qwen2", "llama-bpe", "smollm", "gpt-2", "default"])
def test_text_is_cut_as_before(cut: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = trained(cut, bos=bos)
    where = exported(network("qwen2"), tmp_path, tokenizer=tokenizer)
    found = load_tokenizer(where)
    assert {text: found(text).input_ids for text in TEXTS} == {text: tokenizer(text).input_ids for text in TEXTS}
    plain = {"add_special_tokens": False}
    assert [found(text, **plain).input_ids for text in TEXTS] == [tokenizer(text, **plain).input_ids for text in TEXTS]
    for text in TEXTS:
        assert found.decode(found(text, **plain).input_ids) == tokenizer.decode(tokenizer(text, **plain).input_ids)
    assert shared_vocabulary(tokenizer, found) == len(tokenizer)
    assert found.special_tokens_map == tokenizer.special_tokens_map
    assert found.chat_template == tokenizer.chat_template
    assert (found.bos_token == "<|im_start|>") == bos


@pytest.mark.parametrize("cut", ["llama-bpe", "smollm", "gpt-2", "default"])
def test_the_cuts_differ_so_that_a_lost_name_would_be_seen(cut: str, tmp_path: Path) -> None:
    path = Path(exported(network("qwen2"), tmp_path).removeprefix("path:"))
    mine = load_tokenizer(f"path:{path}")
    other = load_tokenizer(f"path:{rewritten(path, keys={'tokenizer.ggml.pre': cut})}")
    assert [mine(text).input_ids for text in TEXTS] != [other(text).input_ids for text in TEXTS]


NAMELESS = {"named default": "default", "named nothing": "", "without the key": None}
PIECES = {
    "It's 1234567.": ["It", "'", "s", "Ġ", "123", "456", "7", "."],
    "a=b  ,c `x` ٣1234": ["a", "=", "b", "ĠĠ", ",", "c", "Ġ`", "x", "`", "Ġ", "Ù£", "123", "4"],
    "x\n\n y $5": ["x", "ĊĊ", "Ġy", "Ġ", "$", "5"],
}


def nameless(folder: Path, pre: str | None) -> Path:
    """A file that does not say how its text is cut, of a tokenizer that merges as much as it can."""
    path = Path(exported(network("qwen2"), folder, tokenizer=trained("gpt-2")).removeprefix("path:"))
    return rewritten(path, keys={"tokenizer.ggml.pre": pre})


@pytest.mark.parametrize("pre", NAMELESS.values(), ids=NAMELESS)
def test_a_file_without_a_name_is_cut_in_the_default_way(pre: str | None, tmp_path: Path) -> None:
    """Punctuation apart, then GPT-2's words, numbers without their blank, digits by threes from the left."""
    cut = load_tokenizer(f"path:{nameless(tmp_path, pre)}").backend_tokenizer.pre_tokenizer
    assert {text: [piece for piece, _ in cut.pre_tokenize_str(text)] for text in PIECES} == PIECES


@needs_llamacpp
@pytest.mark.parametrize("pre", NAMELESS.values(), ids=NAMELESS)
def test_llamacpp_cuts_a_file_without_a_name_alike(pre: str | None, tmp_path: Path) -> None:
    path = nameless(tmp_path, pre)
    mixed = random_texts(200, "a1 '=,`\n\t$é٣½Ⅷ—。‿€´\u00a0\u2028\u0301😀")
    texts = [unicodedata.normalize("NFC", text) for text in [*ANY_TEXTS, *TEXTS, *mixed]]
    found = load_tokenizer(f"path:{path}")
    assert ask(path, texts=texts)["ids"] == [found(text).input_ids for text in texts]
    other = trained("gpt-2")
    assert [found(text).input_ids for text in ANY_TEXTS] != [other(text).input_ids for text in ANY_TEXTS], "the cut matters"


@pytest.mark.parametrize("pre", NAMELESS.values(), ids=NAMELESS)
def test_a_file_without_a_name_is_said(pre: str | None, tmp_path: Path) -> None:
    path = nameless(tmp_path, pre)
    told = tokenizer_note(f"path:{path}")
    assert told.startswith(f"path:{path}: does not name how its tokenizer cuts text (tokenizer.ggml.pre), so text is cut in")
    assert "\n" not in told
    assert tokenizer_note(f"path:{rewritten(path, keys={'tokenizer.ggml.pre': 'gpt-2'})}") == ""
    assert tokenizer_note(f"path:{tmp_path}") == tokenizer_note("hf:some/model") == "", "no GGUF files"


def test_sentencepiece_has_no_way_to_name(tmp_path: Path) -> None:
    keys = sentencepiece_keys(sentencepiece("gemma"))
    assert keys["tokenizer.ggml.pre"] == "default"
    model, own = decoder("mistral")
    assert tokenizer_note(converted(model, "llama", keys, tmp_path / "m.gguf", **own)) == ""


def test_check_and_run_say_that_a_file_names_no_way(tmp_path: Path) -> None:
    from tiny_parts import write_rows

    from potstill.core.progress import Progress
    from potstill.recipe.parse import parse_recipe
    from potstill.run.preflight import notes_of
    from potstill.run.runner import run_recipe

    said: list[str] = []

    class Heard(Progress):
        def note(self, text: str) -> None:
            said.append(text)

    file = nameless(tmp_path, None)
    data = {"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", 40))}
    cut = [{"name": name, "kind": "cut", "model": f"path:{file}", "init": {"kind": "layers", "keep": [0]}} for name in "ab"]
    prompts = {"generation_prompt": "<|im_start|>assistant\n", "max_tokens": 120, "max_prompt_tokens": 90}
    recipe = parse_recipe({"name": "tiny", "data": data, "prompts": prompts, "stage": cut})
    wanted = tokenizer_note(f"path:{file}")
    assert list(notes_of(recipe.stages)).count(wanted) == 1, "once, however many stages read the file"
    run_recipe(recipe, tmp_path / "run", progress=Heard("quiet"))
    assert said.count(wanted) == 1
    said.clear()
    run_recipe(recipe, tmp_path / "run", progress=Heard("quiet"))
    assert wanted not in said, "nothing is left to do"


# Files of llama.cpp's own converter


def converted(model: Any, architecture: str, tokenizer: dict[str, Any], path: Path, **own: Any) -> str:
    """A file as llama.cpp's converter writes it, independently of the package's exporter."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "block_count": len(model.model.layers),
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "attention.key_length": width,
        "attention.value_length": width, **own,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    _add_keys(writer, {f"{architecture}.{key}": value for key, value in keys.items()} | tokenizer)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], len(model.model.layers))
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and architecture in ("llama", "smollm3"):
            values = values.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"path:{path}"


def decoder(family: str) -> tuple[Any, dict[str, Any]]:
    """A tiny network and the keys of its own."""
    import transformers as t

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4, "head_dim": 32}
    shape |= {"num_key_value_heads": 2, "vocab_size": 460, "tie_word_embeddings": True, "max_position_embeddings": 128}
    shape |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
    torch.manual_seed(0)
    own: dict[str, Any] = {"rope.freq_base": 1_000_000.0}
    match family:
        case "qwen3":
            model = t.Qwen3ForCausalLM(t.Qwen3Config(**(shape | rope)))
        case "smollm3":
            model = t.SmolLM3ForCausalLM(t.SmolLM3Config(**(shape | rope)))
        case "mistral":
            model = t.MistralForCausalLM(t.MistralConfig(**(shape | rope | {"sliding_window": None})))
        case _:
            more = {"sliding_window": 16, "query_pre_attn_scalar": 32, "final_logit_softcapping": 9.0}
            theta = {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}}}
            model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**(shape | more | theta)))
            own |= {"attention.sliding_window": 16, "final_logit_softcapping": 9.0}
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for name, parameter in model.named_parameters():  # less of the inner layer: llama.cpp looks its GELU up in float16
        parameter.data -= 0.9 * name.endswith("post_feedforward_layernorm.weight")
    return model.eval(), own


ARCHITECTURES = {"qwen3": "qwen3", "smollm3": "smollm3", "mistral": "llama", "gemma3": "gemma3"}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_files_of_other_families_compute_what_transformers_does(family: str, tmp_path: Path) -> None:
    model, own = decoder(family)
    where = converted(model, ARCHITECTURES[family], sentencepiece_keys(sentencepiece("gemma")), tmp_path / "m.gguf", **own)
    assert weight_problems(where) == []
    assert (logits(load_model(where)) - logits(model)).abs().max() < 1e-5


def sentencepiece(blanks: str) -> Any:
    """BPE over ▁ with tokens for bytes, in which each way to make a token of two others is a merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    written = normalizers.Replace(" ", "▁")
    first = Tokenizer(models.BPE())
    first.normalizer = written
    first.train_from_iterator(SPOKEN * 5, trainers.BpeTrainer(vocab_size=180, show_progress=False, special_tokens=[]))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    runs = ["▁" * length for length in range(2, 9)]
    vocab = {
        name: id for id, name in enumerate(dict.fromkeys([*special, *runs, *sorted(first.get_vocab(), key=first.token_to_id)]))
    }
    pieces = [name for name in vocab if name not in special and len(name) > 1]
    merges = [(name[:i], name[i:]) for name in pieces for i in range(1, len(name)) if name[:i] in vocab and name[i:] in vocab]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), written]) if blanks == "llama" else written
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if blanks == "llama" else steps)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SPOKEN = [
    "The still heats the wash until its spirit rises.",
    "no, no, no: banana bandana",
    "a  b   c    d",
    "aaaa aaaaaa",
    "====-----",
]
MIXED = [
    *TEXTS,
    *SPOKEN,
    "▁",
    " ▁a",
    "<s>",
    "<s> a",
    "a<s>b",
    "<0x41>",
    "x" * 50,
    " " * 20,
    "ban  and ,aaa=== -- an",
    "aaaaaaa bb",
]


def sentencepiece_keys(tokenizer: Any, *, given: bool = False) -> dict[str, Any]:
    """Keys as the converter writes them; with `given`, blanks as tokens that SentencePiece was given, all of one score."""
    vocab = tokenizer.get_vocab()
    names = sorted(vocab, key=vocab.__getitem__)
    types = [2, 3, 3, *[6] * 256, *[1] * (len(names) - 259), *[5] * (460 - len(names))]
    names += [f"[PAD{id}]" for id in range(len(names), 460)]
    scores = [-float(id) for id in range(len(names))]
    if given:
        for id, name in enumerate(names):
            if len(name) > 1 and not name.strip("▁"):
                names[id], types[id], scores[id] = " " * len(name), 4, -1000.0
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": "Prepend" in tokenizer.backend_tokenizer.to_str(),
    }  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("blanks", ["gemma", "llama"])
def test_sentencepiece_cuts_text_as_before(blanks: str, given: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(blanks)
    keys = sentencepiece_keys(tokenizer, given=given)
    found = load_tokenizer(converted(decoder("mistral")[0], "llama", keys, tmp_path / "m.gguf", **{"rope.freq_base": 1e6}))
    assert {text: found(text).input_ids for text in MIXED} == {text: tokenizer(text).input_ids for text in MIXED}
    for text in MIXED:
        assert found.decode(tokenizer(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert shared_vocabulary(tokenizer, found) == len(tokenizer)
    assert found.special_tokens_map == tokenizer.special_tokens_map


@needs_llamacpp
@pytest.mark.parametrize("blanks", ["gemma", "llama"])
def test_llamacpp_reads_the_same_file_alike(blanks: str, tmp_path: Path) -> None:
    model, own = decoder("gemma3")
    where = converted(model, "gemma3", sentencepiece_keys(sentencepiece(blanks)), tmp_path / "m.gguf", **own)
    texts = [text for text in MIXED if unicodedata.is_normalized("NFC", text)]
    prompt = list(range(260, 300))
    answer = ask(tmp_path / "m.gguf", [prompt], texts)
    assert answer["ids"] == [load_tokenizer(where)(text).input_ids for text in texts]
    with torch.no_grad():
        logp = load_model(where)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert max(abs(float(logp[id]) - value) for id, value in answer["logp"][0].items()) < 1e-3


def test_scores_that_leave_the_order_open_are_refused(tmp_path: Path) -> None:
    keys = sentencepiece_keys(sentencepiece("gemma"))
    keys["tokenizer.ggml.scores"] = [0.0] * len(keys["tokenizer.ggml.scores"])
    where = converted(decoder("mistral")[0], "llama", keys, tmp_path / "m.gguf", **{"rope.freq_base": 1e6})
    with pytest.raises(UserError, match="have one score, so that no rank can say which is merged first"):
        load_tokenizer(where)


def test_templates_of_several_names_are_all_there(tmp_path: Path) -> None:
    tokenizer = trained("qwen2")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    assert load_tokenizer(exported(network("qwen2"), tmp_path, tokenizer=tokenizer)).chat_template == tokenizer.chat_template


def test_ends_of_the_file_are_those_of_the_model(tmp_path: Path) -> None:
    path = Path(exported(network("qwen2"), tmp_path).removeprefix("path:"))
    ends = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7}
    model = load_model(f"path:{rewritten(path, keys=ends)}")
    assert model.generation_config.eos_token_id == [7, 5]
    assert load_model(f"path:{path}").generation_config.eos_token_id == trained("qwen2").eos_token_id


def test_what_was_read_can_be_saved_and_read_again(tmp_path: Path) -> None:
    model, tokenizer = network("llama", rope_parameters={**LLAMA3, "original_max_position_embeddings": 32}), trained("smollm")
    where = exported(model, tmp_path, "f16", tokenizer)
    save_model(load_stored(where), load_tokenizer(where), tmp_path / "saved")
    again = f"path:{tmp_path / 'saved'}"
    assert torch.equal(logits(load_model(again)), logits(load_model(where)))
    assert [load_tokenizer(again)(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    where = exported(network("qwen2"), tmp_path)
    path = Path(where.removeprefix("path:"))
    copy = tmp_path / "other name.GGUF"
    copy.write_bytes(path.read_bytes())
    assert content_id(f"path:{copy}") == content_id(where)
    assert content_id(f"path:{rewritten(path, keys={'general.name': 'x'})}") != content_id(where)
    assert bytes_of(copy) == path.stat().st_size


def test_training_goes_on_from_a_file_as_from_its_folder(tmp_path: Path) -> None:
    from tiny_parts import write_rows

    from potstill.recipe.parse import parse_recipe
    from potstill.run.runner import run_recipe

    model, tokenizer = network("qwen2"), trained("qwen2")
    tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    save_model(model, tokenizer, tmp_path / "folder")
    (tmp_path / "files").mkdir()
    wheres = [f"path:{tmp_path / 'folder'}", exported(model, tmp_path / "files", tokenizer=tokenizer)]
    training = {"optim": {"steps": 2, "batch_size": 4}, "validation": {"times": 0}}
    kd = {"name": "kd", "kind": "distill", "student": wheres[0], "teacher": wheres[1], **training}
    stages = [{"name": f"from{i}", "kind": "sft", "model": where, **training} for i, where in enumerate(wheres)]
    data = {"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", 40))}
    prompts = {"max_tokens": 120, "max_prompt_tokens": 90}
    table = {"name": "tiny", "data": data, "prompts": prompts, "stage": [*stages, kd]}
    done = run_recipe(parse_recipe(table), tmp_path / "run")
    one, other = (load_model(f"path:{done[f'from{i}'].folder}").state_dict() for i in range(2))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert done["kd"].summary["steps"] == 2


# Refusals


def rewritten(
    path: Path, keys: dict[str, Any] | None = None, tensors: dict[str, tuple[Reader, Any] | None] | None = None
) -> Path:
    """A copy with other keys (None: without it) and other tensors."""
    reader = gguf.GGUFReader(path)
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    found |= keys or {}
    made = path.with_name(f"rewritten-{abs(hash(repr((keys, sorted(tensors or {})))))}.gguf")
    writer = gguf.GGUFWriter(made, found.pop("general.architecture"))
    _add_keys(writer, found)
    for tensor in reader.tensors:
        change = (tensors or {}).get(tensor.name, ())
        if change is None:
            continue
        data, kind = (change[0](np.array(tensor.data)), change[1]) if change else (np.array(tensor.data), tensor.tensor_type)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name in (tensors or {}).keys() - {tensor.name for tensor in reader.tensors}:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def _add_keys(writer: Any, keys: dict[str, Any]) -> None:
    for name, value in keys.items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(exported(network("qwen2"), tmp_path_factory.mktemp("file")).removeprefix("path:"))


def refusal(ask: Callable[[str], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        ask(f"path:{path}")
    assert str(path) in str(caught.value), "says which file"
    return str(caught.value)


NETWORK_CHANGES = {
    "general.architecture": (
        "mamba",
        "the architecture 'mamba' is not read from GGUF files (known: gemma3, gpt2, llama,",
    ),
    "qwen2.attention.sliding_window": (4096, "its key 'qwen2.attention.sliding_window' = 4096 is not known here"),
    "qwen2.some.new_thing": (0.5, "its key 'qwen2.some.new_thing' = 0.5 is not known here, and without it this would be"),
    "qwen2.rope.scaling.type": ("longrope", "rotary embeddings of type 'longrope' are not read from GGUF files"),
    "qwen2.rope.dimension_count": (8, "its rope.dimension_count is 8 and its heads are 16 wide"),
    "qwen2.block_count": (None, "it lacks 'qwen2.block_count'; convert the model again"),
    "qwen2.attention.head_count_kv": ([2, 1], "it has a value for each layer in 'qwen2.attention.head_count_kv'"),
    "split.count": (3, "one part of a model in 3 files; join them with llama-gguf-split --merge"),
}


@pytest.mark.parametrize("key", NETWORK_CHANGES)
def test_networks_that_are_not_known_are_refused_by_the_key(key: str, file: Path) -> None:
    value, told = NETWORK_CHANGES[key]
    if key == "general.architecture":
        made = file.with_name("mamba.gguf")
        made.write_bytes(file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0mamba", 1))
    else:
        made = rewritten(file, keys={key: value})
    assert told in refusal(config_of, made)


TOKENIZER_CHANGES = {
    "an unknown cut": ({"tokenizer.ggml.pre": "tekken"}, "names 'tekken' for how its tokenizer cuts text"),
    "a cut that is no name": ({"tokenizer.ggml.pre": [1, 2]}, "names '[1, 2]' for how its tokenizer cuts text"),
    "another kind": ({"tokenizer.ggml.model": "t5"}, "its tokenizer is of llama.cpp's kind 't5', and only byte-"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "it holds no tokenizer.ggml.scores; convert the model again"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "it holds no tokenizer"),
    "no merges": ({"tokenizer.ggml.merges": None}, "it holds no tokenizer.ggml.merges; convert the model again"),
    "merges of others": ({"tokenizer.ggml.merges": ["zz qq"]}, "its tokens and merges do not fit together"),
    "an end beyond": ({"tokenizer.ggml.eos_token_id": 9999}, "its eos_token has id 9999, and there are 352 tokens"),
    "BOS beyond": (
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9999},
        "its bos_token has id 9999, and there are 352 tokens",
    ),
    "BOS without one": ({"tokenizer.ggml.add_bos_token": True}, "it asks for BOS around texts and names no such token"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZER_CHANGES)
def test_tokenizers_that_are_not_known_are_refused_by_name(name: str, file: Path) -> None:
    keys, told = TOKENIZER_CHANGES[name]
    assert told in refusal(load_tokenizer, rewritten(file, keys=keys))


def test_tensors_that_are_missing_or_have_no_place_are_named(file: Path) -> None:
    lost = rewritten(file, tensors={"blk.1.ffn_up.weight": None})
    assert "1 weight is missing: 'model.layers.1.mlp.up_proj.weight'; the file is not complete" in refusal(load_model, lost)
    more = rewritten(file, tensors={"blk.0.attn_sinks.weight": (np.array, None)})
    assert "1 weight has no place in the model that the file's header describes, it is 'blk.0.attn_sinks.weight'" in refusal(
        load_model, more
    )
    strange = rewritten(file, tensors={"rope_freqs.weight": (np.array, None)})
    assert "its rope_freqs.weight stretches positions in a way that is not known here" in refusal(config_of, strange)


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 5000, -1])
def test_truncated_files_are_refused(kept: int, file: Path) -> None:
    cut = file.with_name("cut.gguf")
    cut.write_bytes(file.read_bytes()[:kept])
    told = refusal(config_of, cut)
    assert "copy or download it again" in told
    assert ("not a GGUF file" if kept in (0, 3) else "truncated") in told


def test_files_that_are_something_else_are_refused(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("not a model at all, only words")
    assert "not a GGUF file (it does not begin with GGUF)" in refusal(config_of, text)
    old = tmp_path / "old.gguf"
    old.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "GGUF version 1 is not known" in refusal(load_tokenizer, old)
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(file.read_bytes())
    assert "one part of a model in several files; join them with llama.cpp's `llama-gguf-split --merge`" in refusal(
        config_of, part
    )
    assert "no such file; did you mean 'model-00001-of-00003.gguf'?" in refusal(
        config_of, tmp_path / "model-00001-of-00002.gguf"
    )


def test_ollamas_files_need_no_ending(file: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123abcd"
    blob.write_bytes(file.read_bytes())
    assert torch.equal(logits(load_model(f"path:{blob}")), logits(load_model(f"path:{file}")))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    told = refusal(config_of, tmp_path / "model.safetensors")
    assert told.endswith("is a file and not a GGUF file; name the folder that holds config.json and the weights")


def test_a_folder_with_nothing_but_a_file_says_how_to_name_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file.read_bytes())
    told = refusal(config_of, tmp_path)
    assert told.endswith(f"name the GGUF file itself: path:{tmp_path}/m.gguf")
    assert unicodedata.is_normalized("NFC", told)
