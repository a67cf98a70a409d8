"""What Llama and the decoders after it have in common: RMS norms, rotary positions, a gated inner layer."""

from collections.abc import Iterator
from typing import Any

from potstill.edges.models import head_width
from potstill.exporters._keys import Keys
from potstill.exporters._rope import rope_keys, rope_problems

STRETCHED = ("default", "linear", "yarn")  # types of positions that llama.cpp reads from keys, in every architecture


def attention_keys(config: Any) -> Keys:
    return {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
    }


def decoder_keys(config: Any) -> Keys:
    return attention_keys(config) | rope_keys(config, config.rope_parameters)


def decoder_problems(config: Any, types: tuple[str, ...] = STRETCHED) -> Iterator[str]:
    """What llama.cpp could not compute of a decoder with SiLU and full attention, and positions of these types."""
    yield from rope_problems(config.rope_parameters, types)
    if config.hidden_act not in ("silu", "swish"):
        yield f"the activation '{config.hidden_act}'"
    if _windowed(config) and config.sliding_window < config.max_position_embeddings:
        yield f"sliding-window attention ({config.sliding_window:,} of {config.max_position_embeddings:,} positions)"


def _windowed(config: Any) -> bool:
    """Whether a layer sees a window alone: those that `layer_types` names, or all where the family has no such list."""
    layers = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (layers is None or "sliding_attention" in layers)
