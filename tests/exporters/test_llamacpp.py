"""Every claim about a GGUF file, put to llama.cpp itself."""

import copy
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp import Refused, ask, needs_llamacpp
from strings import TEXTS as ANY_TEXTS
from tiny_export import QWEN2_REGEX, ROWS, split_then_bytes, tiny_model, train_tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from potstill.exporters._vocabulary import vocabulary_problems
from potstill.exporters.gguf import Gguf
from potstill.inits.layers import Layers
from potstill.inits.width import Width
from potstill.quant.layers import quantise_model

pytestmark = needs_llamacpp
IDS = torch.randint(0, 250, (1, 120), generator=torch.Generator().manual_seed(1))
LENGTHS = (1, 5, 40, 120)  # past the 32 positions that the stretched models were made for
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
GEMMA_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
THETA = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tied": True}),
    "qwen2, wide heads": ("qwen2", {"head_dim": 32}),
    "qwen2, narrow heads": ("qwen2", {"head_dim": 8, "tied": True}),
    "llama": ("llama", {"attention_bias": False}),
    "llama, all biases": ("llama", {"mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {}),
    "mistral, wide heads": ("mistral", {"head_dim": 32, "tied": True}),
    "mistral, a window as long as its positions": ("mistral", {"sliding_window": 128}),
    "qwen3": ("qwen3", {}),
    "qwen3, narrow heads": ("qwen3", {"head_dim": 8, "tied": True}),
    "smollm3": ("smollm3", {}),
    "smollm3, wide heads": ("smollm3", {"head_dim": 32, "tied": True}),
    "smollm3, rotated everywhere": ("smollm3", {"no_rope_layers": [1] * 5, "attention_bias": True, "mlp_bias": True}),
    "gemma3": ("gemma3", {"tied": True}),
    "gemma3, head of its own": ("gemma3", {}),
    "gemma3, other layers": ("gemma3", {"layer_types": GEMMA_LAYERS, "num_hidden_layers": 4}),
    "gemma3, windows alone": ("gemma3", {"layer_types": GEMMA_LAYERS[1:3], "num_hidden_layers": 2}),
    "gemma3, no window": ("gemma3", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}),
    "gemma3, scores scaled otherwise": ("gemma3", {"query_pre_attn_scalar": 100}),
    "gemma3, softcap of logits": ("gemma3", {"final_logit_softcapping": 5.0}),
    "gemma3, as many layers as the 27B": ("gemma3", {"num_hidden_layers": 62, "head_dim": 8, "query_pre_attn_scalar": 16}),
    "gemma3, a base for windows": ("gemma3", {"rope_parameters": {"sliding_attention": THETA, "full_attention": LINEAR}}),
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, attention": YARN | {"attention_factor": 1.7},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
}


def stretched(family: str, rope: dict[str, Any]) -> Any:
    return tiny_model(family, rope_parameters={"rope_theta": 500_000.0, "original_max_position_embeddings": 32, **rope})


def file_of(model: Any, tokenizer: Any, folder: Path, packed: Any = None, **fields: Any) -> Path:
    fields = {"types": ("f32",), **fields}
    return Gguf.model_validate(fields).write(model, tokenizer, packed or {}, folder, name="student")[0]


def farthest(model: Any, file: Path) -> float:
    """Largest difference of any log-probability between transformers and llama.cpp."""
    with torch.no_grad():
        logp_TV = model(IDS).logits[0].log_softmax(-1)
    found = ask(file, [IDS[0, :length].tolist() for length in LENGTHS])["logp"]
    assert all(len(logp) == ROWS for logp in found)
    pairs = zip(LENGTHS, found, strict=True)
    return max(abs(float(logp_TV[length - 1, id]) - value) for length, logp in pairs for id, value in logp.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_computes_what_the_model_computes(shape: str, tokenizer: Any, tmp_path: Path) -> None:
    family, fields = SHAPES[shape]
    model = tiny_model(family, **fields)
    assert farthest(model, file_of(model, tokenizer, tmp_path)) < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "smollm3"])
@pytest.mark.parametrize("rope", ROPES)
def test_stretched_positions_are_stretched_alike(family: str, rope: str, tokenizer: Any, tmp_path: Path) -> None:
    if rope == "llama3" and family in ("qwen3", "smollm3"):
        pytest.skip("refused: llama.cpp reads no frequency factors in this network")
    model = stretched(family, ROPES[rope])
    assert farthest(model, file_of(model, tokenizer, tmp_path)) < 1e-3


@pytest.mark.parametrize("rope", ROPES)
def test_a_file_that_leaves_the_stretching_out_is_told_apart(rope: str, tokenizer: Any, tmp_path: Path) -> None:
    model = stretched("llama", ROPES[rope])
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}  # the network stays
    assert farthest(model, file_of(model, tokenizer, tmp_path)) > 1e-2


OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"rms_norm_eps": 1e-2}),
    "mistral": ("mistral", {"rope_parameters": THETA}),
    "smollm3, rotated everywhere": ("smollm3", {"no_rope_layers": [1] * 5}),
    "gemma3, other windows": ("gemma3", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 4}),
    "gemma3, a wider window": ("gemma3", {"sliding_window": 24}),
    "gemma3, another base of windows": ("gemma3", {"rope_parameters": {"sliding_attention": THETA, "full_attention": THETA}}),
    "gemma3, another scale of scores": ("gemma3", {"query_pre_attn_scalar": 64}),
    "gemma3, a softcap of logits": ("gemma3", {"final_logit_softcapping": 5.0}),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_file_that_says_otherwise_is_told_apart(case: str, tokenizer: Any, tmp_path: Path) -> None:
    """Each key matters to the numbers that these tests compare."""
    family, fields = OTHERWISE[case]
    model = tiny_model(family)
    other = copy.copy(model)  # of the same weights
    other.config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(other.config, name, value)
    assert farthest(model, file_of(other, tokenizer, tmp_path)) > 1e-2


@pytest.mark.parametrize("cut", [{"hidden_size": 32}, {"heads": 2}, {"hidden_size": 32, "heads": 2, "intermediate_size": 64}])
def test_a_narrower_qwen2_opens_and_computes_the_same(cut: dict[str, int], tokenizer: Any, tmp_path: Path) -> None:
    model = Width(**cut, by="magnitude")(tiny_model("qwen2")).eval()
    assert farthest(model, file_of(model, tokenizer, tmp_path)) < 1e-3


@pytest.mark.parametrize("keep", [(0, 2, 5, 6), (5,), (0,)])
def test_a_shorter_gemma3_keeps_the_windows_of_its_layers(keep: tuple[int, ...], tokenizer: Any, tmp_path: Path) -> None:
    model = Layers(keep=keep)(tiny_model("gemma3")).eval()
    assert farthest(model, file_of(model, tokenizer, tmp_path)) < 1e-3


@pytest.mark.parametrize("keep", [(0, 1, 2, 3), (0, 1, 2, 4)])
def test_a_shorter_smollm3_rotates_as_before(keep: tuple[int, ...], tokenizer: Any, tmp_path: Path) -> None:
    """The fourth layer does not rotate; without it llama.cpp's llama is the network."""
    model = Layers(keep=keep)(tiny_model("smollm3")).eval()
    assert farthest(model, file_of(model, tokenizer, tmp_path)) < 1e-3


FOUR_BIT: dict[str, Callable[[], Any]] = {
    "qwen2, wide heads": lambda: tiny_model("qwen2", head_dim=32),
    "qwen2, llama3": lambda: stretched("qwen2", LLAMA3),
    "llama": lambda: tiny_model("llama"),
    "mistral": lambda: tiny_model("mistral"),
    "qwen3": lambda: tiny_model("qwen3"),
    "smollm3": lambda: tiny_model("smollm3"),
    "gemma3": lambda: tiny_model("gemma3", tied=True, query_pre_attn_scalar=100),
}


@pytest.mark.parametrize("make", FOUR_BIT.values(), ids=FOUR_BIT)
def test_four_bit_rows_are_reordered_with_their_scales_and_biases(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make()
    packed = quantise_model(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]).packed
    grid = file_of(model, tokenizer, tmp_path, packed, types=("f32",))
    assert grid.name == "model-q4_0-as-f32.gguf"
    assert farthest(model, grid) < 1e-3
    # llama.cpp multiplies four-bit weights by activations in eight bits: near, and far from what wrong rows would give
    four_bit = farthest(model, file_of(model, tokenizer, tmp_path, packed, types=("q4_0",)))
    assert 1e-3 < four_bit < 0.2


TEXTS = [
    *ANY_TEXTS, "a <x> b", "a  <x>  b", "a<x>b", "the <tool> still", "a\n\n<x>\n b", "x1234567 \t y\r\n", "naïve café",
    "日本語 สวัสดี مرحبا", "👍🏽 e\u0301", "<|im_start|>user\nhi<|im_end|>", "aaaaa", "  lead", "trail  ",
]  # fmt: skip


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: train_tokenizer(split_then_bytes(QWEN2_REGEX), normalizers.NFC()),
    "llama-bpe": lambda: train_tokenizer(split_then_bytes(LLAMA3_REGEX), ignore_merges=True),
    "gpt-2": lambda: train_tokenizer([byte_level()]),
    "smollm": lambda: train_tokenizer([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
}


def with_tokens(*tokens: AddedToken | str) -> Any:
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def same_ids(tokenizer: Any, folder: Path, texts: list[str] = TEXTS, name: str = "student") -> bool:
    """Whether llama.cpp gives the tokenizer's ids for every text in NFC; written whatever the exporter thinks of it."""
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    (file,) = Gguf(types=("f32",)).write_files(tiny_model("qwen2"), tokenizer, {}, folder, name)
    return ask(file, texts=composed)["ids"] == [tokenizer(text).input_ids for text in composed]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_ids_are_the_tokenizers_own(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert vocabulary_problems(tokenizer, ROWS) == []
    assert same_ids(tokenizer, tmp_path)


HONEST = {
    "plain": lambda: with_tokens(AddedToken("<x>", normalized=False), AddedToken("<y>", special=True)),
    "normalised": lambda: with_tokens(AddedToken("<x>", normalized=True), AddedToken("é", normalized=True)),
    "decomposed, raw": lambda: with_tokens(AddedToken("e\u0301", normalized=False)),
    "runs of blanks": lambda: with_tokens("  ", "   ", "\n\n"),
    "one begins another": lambda: with_tokens(AddedToken("<x", normalized=False), AddedToken("<x>", normalized=False)),
}
DISHONEST = {
    "lstrip": (lambda: with_tokens(AddedToken("<x>", lstrip=True)), "cannot express lstrip of the added token '<x>'"),
    "rstrip": (lambda: with_tokens(AddedToken("<x>", rstrip=True)), "cannot express rstrip of the added token '<x>'"),
    "single_word": (lambda: with_tokens(AddedToken("<x>", single_word=True)), "cannot express single_word"),
    "decomposed": (lambda: with_tokens(AddedToken("e\u0301", normalized=True)), "is not in Unicode's NFC"),
    "overlapping": (lambda: with_tokens(AddedToken("It"), AddedToken("t's")), "'It' and \"t's\" can overlap"),
    "one in another": (
        lambda: with_tokens(AddedToken("<x>", normalized=False), AddedToken("a<x>b", normalized=True)),
        "'<x>' and 'a<x>b' can overlap",
    ),
}


@pytest.mark.parametrize("kind", HONEST)
def test_added_tokens_that_llamacpp_finds_alike_are_taken(kind: str, tmp_path: Path) -> None:
    assert vocabulary_problems(HONEST[kind](), ROWS) == []
    assert same_ids(HONEST[kind](), tmp_path)


@pytest.mark.parametrize("kind", DISHONEST)
def test_added_tokens_that_llamacpp_finds_otherwise_are_refused(kind: str, tmp_path: Path) -> None:
    make, words = DISHONEST[kind]
    (problem,) = vocabulary_problems(make(), ROWS)
    assert words in problem
    assert not same_ids(make(), tmp_path), "the refusal has a reason"


@pytest.mark.parametrize("around", ["<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"])
def test_tokens_around_a_text_are_the_tokenizers_own(around: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gpt-2"]()
    tokenizer.bos_token = "<|im_start|>"
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>") if token in around]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ends)
    assert vocabulary_problems(tokenizer, ROWS) == []
    assert same_ids(tokenizer, tmp_path)
    twice = TemplateProcessing(single=" ".join([around, *around.replace("$A", "").split()]), special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = twice
    assert "cannot express the tokens that this tokenizer puts around a text" in vocabulary_problems(tokenizer, ROWS)[0]


def test_padding_rows_never_take_a_tokens_name(tmp_path: Path) -> None:
    """llama.cpp aborts on two tokens of one name."""
    tokenizer = with_tokens("[PAD310]", "[[PAD310]]", "[PAD286]")
    assert same_ids(tokenizer, tmp_path, [*TEXTS, "[PAD310] [[PAD310]] [PAD286] [PAD287]"])


@pytest.mark.parametrize("name", ["my-Phi-3-student", "PHI3", "modern-bert"])
def test_a_name_changes_no_token(name: str, tmp_path: Path) -> None:
    """llama.cpp takes models of these names for others, and fails or strips blanks after special tokens."""
    assert same_ids(TOKENIZERS["qwen2"](), tmp_path, name=name)


STOP = "{% for m in messages %}<role>{{ m.content }}<stop>{% endfor %}"


@pytest.mark.parametrize("template, ended", [(STOP, "stop"), (None, "length"), ({"default": STOP, "tool_use": "x"}, "stop")])
def test_an_untrained_model_stops_at_its_templates_end_of_turn(template: Any, ended: str, tmp_path: Path) -> None:
    """A model that says `<stop>` at every place: llama.cpp knows it as an end only by the file's own word."""
    tokenizer = with_tokens(AddedToken("<stop>", special=True), AddedToken("<role>", special=True))
    tokenizer.chat_template = template
    model, stop = tiny_model("gpt2"), tokenizer.convert_tokens_to_ids("<stop>")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[stop] = 1.0
    ((_, reason),) = ask(file_of(model, tokenizer, tmp_path), [[1, 2, 3]], words=4)["answers"]
    assert reason == ended


@pytest.mark.parametrize("templates", [{"default": STOP, "tool_use": "x", "rag-2": "y"}, {"tool_use": "x"}])
def test_a_tokenizer_of_several_templates_opens(templates: dict[str, str], tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.chat_template = templates
    answer = ask(file_of(tiny_model("qwen2"), tokenizer, tmp_path))
    if "default" in templates:
        assert answer["props"]["chat_template"] == STOP


def test_what_is_not_a_model_is_refused_and_not_answered(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(Refused):
        ask(tmp_path / "model.gguf")
