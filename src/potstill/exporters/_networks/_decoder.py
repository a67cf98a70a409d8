"""What Llama and the decoders after it have in common: RMS norms, rotary positions, a gated inner layer."""

from collections.abc import Collection, Iterator
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


def decoder_problems(config: Any, types: Collection[str] = STRETCHED) -> Iterator[str]:
    """What llama.cpp could not compute of a decoder with SiLU, and positions of these types."""
    yield from rope_problems(config.rope_parameters, types)
    if config.hidden_act not in ("silu", "swish"):
        yield f"the activation '{config.hidden_act}'"


def window_problems(config: Any, *, windowed: bool) -> Iterator[str]:
    """A window of attention that is shorter than the positions.

    Args:
        windowed: whether a layer sees only `sliding_window` positions.
    """
    window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
    if windowed and (window is None or window < positions):
        yield f"sliding-window attention ({window} of {positions} positions)"


def names_windows(config: Any) -> bool:
    """Whether `layer_types` has layers of other attention than the full one."""
    return any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or ())
