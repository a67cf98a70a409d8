"""The transformers config of a GGUF file, from the keys of its architecture. A key that is not known is refused by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from potstill.edges.gguf_files.header import Gguf, whole_number
from potstill.edges.gguf_files.rope import rope_of, short
from potstill.edges.hub import library


@dataclass(frozen=True)
class _Architecture:
    """How one of llama.cpp's networks is called and built in transformers.

    Attributes:
        keys: its own hyper-parameters, by llama.cpp's name; all others are refused.
        config: the transformers config of a file.
        pairs: whether rotated entries of q and k stand in pairs in the file, and in halves in transformers.
    """

    keys: frozenset[str]
    config: Callable[[Gguf], Any]
    pairs: bool = False


_COUNTS = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv",
}  # fmt: skip
_ROTARY = {
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned",
}  # fmt: skip
_WINDOWS = {
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping",
}  # fmt: skip
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.sliding_window": 0, "attention.causal": True}  # these values


def config_of(file: Gguf) -> Any:
    """The transformers config of a file.

    Raises:
        UserError: a network that is not known here, or a key of it that is not.
    """
    if not file.architecture:
        raise file.refuse("it does not say which network it holds (general.architecture); copy or download it again")
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        raise file.refuse(
            f"the architecture '{file.architecture}' is not read from GGUF files (known: {', '.join(sorted(ARCHITECTURES))}); "
            "name the model's transformers folder or hub name instead"
        )
    for key, value in file.own.items():
        if key not in known.keys and not (key in _NEUTRAL and value == _NEUTRAL[key]):
            shown = f" = {value}" if isinstance(value, int | float | str) else ""
            raise file.refuse(
                f"its key '{file.architecture}.{key}'{shown} is not known here, and without it this would be another model; "
                "name the model's transformers folder or hub name instead"
            )
    config = known.config(file)
    ends = [file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eos", "eom")]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    config.eos_token_id = found[0] if len(found) == 1 else found or None
    config.bos_token_id = file.keys.get("tokenizer.ggml.bos_token_id")
    config.pad_token_id = file.keys.get("tokenizer.ggml.padding_token_id")
    config._name_or_path = file.where
    return config


def embedding_rows(file: Gguf) -> int:
    """Of the embedding: the vocabulary with its padding."""
    if "token_embd.weight" not in file.tensors:
        raise file.refuse("it holds no token embeddings (token_embd.weight), so it is no language model")
    return file.tensors["token_embd.weight"].shape[0]


def _shape(file: Gguf) -> dict[str, Any]:
    heads = whole_number(file, "attention.head_count")
    width = whole_number(file, "attention.key_length", whole_number(file, "embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if whole_number(file, key, width) != width:
            raise file.refuse(f"its {key} is {file.own[key]} and its heads are {width} wide, which is not read here")
    return {
        "vocab_size": embedding_rows(file),
        "hidden_size": whole_number(file, "embedding_length"),
        "intermediate_size": whole_number(file, "feed_forward_length"),
        "num_hidden_layers": whole_number(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole_number(file, "attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": whole_number(file, "context_length"),
        "rms_norm_eps": _epsilon(file, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": rope_of(file, width),
    }


def _epsilon(file: Gguf, key: str) -> float:
    if key not in file.own:
        raise file.refuse(f"it lacks '{file.architecture}.{key}'; convert the model again")
    return short(file.own[key])


def _llama(file: Gguf) -> Any:
    """Llama and what llama.cpp builds as Llama: biases of q, k and v alone are Qwen2's, of all four Llama's own."""
    of_qkv, of_output, of_mlp = (f"blk.0.{name}.bias" in file.tensors for name in ("attn_q", "attn_output", "ffn_gate"))
    if of_qkv and not of_output:
        return _qwen2(file)
    return library().LlamaConfig(**_shape(file), attention_bias=of_qkv, mlp_bias=of_mlp)


def _qwen2(file: Gguf) -> Any:
    return library().Qwen2Config(**_shape(file), use_sliding_window=False)


def _qwen3(file: Gguf) -> Any:
    return library().Qwen3Config(**_shape(file), use_sliding_window=False)


def _smollm3(file: Gguf) -> Any:
    """Every fourth layer has no rotary embeddings: llama.cpp does not ask the file."""
    return library().SmolLM3Config(**_shape(file), no_rope_layer_interval=4, use_sliding_window=False)


def _gemma3(file: Gguf) -> Any:
    """Gemma 3, text alone. llama.cpp divides scores by the root of a head's width, in the 27B by that of heads side by side."""
    shape, own = _shape(file), file.own
    layers, window = shape["num_hidden_layers"], own.get("attention.sliding_window", 0)
    full, theta = shape.pop("rope_parameters"), short(own.get("rope.freq_base_swa", 10_000.0))
    beside = shape["hidden_size"] // shape["num_attention_heads"]
    softcap = own.get("final_logit_softcapping")
    return library().Gemma3TextConfig(
        **shape,
        layer_types=["sliding_attention" if slides else "full_attention" for slides in _sliding(file, layers, window)],
        sliding_window=window or shape["max_position_embeddings"],
        rope_parameters={"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}},
        query_pre_attn_scalar=beside if layers == _GEMMA_27B else shape["head_dim"],
        final_logit_softcapping=short(softcap) if softcap else None,
    )


def _sliding(file: Gguf, layers: int, window: int) -> list[bool]:
    """Which layers see a window alone: as the file says, else all but each sixth."""
    pattern = file.own.get("attention.sliding_window_pattern", 6)
    if not window:
        return [False] * layers
    if isinstance(pattern, int):
        return [layer % pattern < pattern - 1 for layer in range(layers)]
    if len(pattern) < layers:
        raise file.refuse(
            f"its attention.sliding_window_pattern names {len(pattern)} of {layers} layers; convert the model again"
        )
    return [bool(slides) for slides in pattern[:layers]]


_GEMMA_27B = 62  # layers


def _gpt2(file: Gguf) -> Any:
    heads = whole_number(file, "attention.head_count")
    if whole_number(file, "attention.head_count_kv", heads) != heads:
        raise file.refuse("its heads share keys, which GPT-2's do not")
    return library().GPT2Config(
        vocab_size=embedding_rows(file),
        n_positions=whole_number(file, "context_length"),
        n_embd=whole_number(file, "embedding_length"),
        n_layer=whole_number(file, "block_count"),
        n_head=heads,
        n_inner=whole_number(file, "feed_forward_length"),
        layer_norm_epsilon=_epsilon(file, "attention.layer_norm_epsilon"),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


ARCHITECTURES = {
    "llama": _Architecture(frozenset(_COUNTS | _ROTARY), _llama, pairs=True),
    "qwen2": _Architecture(frozenset(_COUNTS | _ROTARY), _qwen2),
    "qwen3": _Architecture(frozenset(_COUNTS | _ROTARY), _qwen3),
    "smollm3": _Architecture(frozenset(_COUNTS | _ROTARY), _smollm3, pairs=True),
    "gemma3": _Architecture(frozenset(_COUNTS | _ROTARY | _WINDOWS), _gemma3),
    "gpt2": _Architecture(frozenset(_COUNTS | {"attention.layer_norm_epsilon"}), _gpt2),
}
