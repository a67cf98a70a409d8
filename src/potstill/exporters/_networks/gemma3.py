"""Gemma 3, text alone: windows of attention with a rotary base of their own, norms before and after, norms of q and k."""

from collections.abc import Iterator
from typing import Any

from potstill.edges.models import head_width
from potstill.exporters._keys import Keys
from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import attention_keys
from potstill.exporters._rope import rope_keys, rope_problems

FULL, WINDOW = "full_attention", "sliding_attention"
EVERY = 6  # llama.cpp takes each sixth layer for a full one where the file names none
BY_WIDTH = 62  # layers of the 27B, whose scores llama.cpp scales by the width of the hidden state instead of a head's


def _problems(config: Any) -> Iterator[str]:
    yield from rope_problems(config.rope_parameters[FULL], ("default", "linear"))
    yield from rope_problems(config.rope_parameters[WINDOW], ("default",))
    if config.hidden_activation not in ("gelu_pytorch_tanh", "gelu_new"):
        yield f"the activation '{config.hidden_activation}'"
    if config.attention_bias:  # llama.cpp's gemma3 has no place for the bias of the output
        yield "biases of attention"
    if config.attn_logit_softcapping is not None:
        yield "a softcap of attention"
    if config.use_bidirectional_attention:
        yield "attention to later tokens"


def _keys(config: Any) -> Keys:
    keys: Keys = attention_keys(config) | rope_keys(config, config.rope_parameters[FULL])
    windows = [layer == WINDOW for layer in config.layer_types[: config.num_hidden_layers]]
    if any(windows):
        keys |= {
            "attention.sliding_window": config.sliding_window,
            "rope.freq_base_swa": float(config.rope_parameters[WINDOW]["rope_theta"]),
        }
    if any(windows) and windows != [layer % EVERY != EVERY - 1 for layer in range(len(windows))]:
        # left out where it says what llama.cpp assumes anyway: its releases before 2026 do not know it
        keys["attention.sliding_window_pattern"] = windows
    if config.final_logit_softcapping is not None:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _stored(name: str, values: Any, config: Any) -> Any:
    """Norms as llama.cpp multiplies by them: 1 + weight; that of q also by what llama.cpp scales scores otherwise."""
    if not name.endswith("norm.weight"):
        return values
    return (1 + values) * _score_scale(config) if name.endswith("q_norm.weight") else 1 + values


def _score_scale(config: Any) -> float:
    """√(d / query_pre_attn_scalar), where llama.cpp divides scores by √d and transformers by √query_pre_attn_scalar."""
    width = head_width(config)
    if config.num_hidden_layers == BY_WIDTH:
        width = config.hidden_size // config.num_attention_heads
    return (width / config.query_pre_attn_scalar) ** 0.5


register(Network(("gemma3_text",), problems=_problems, keys=_keys, architecture=lambda config: "gemma3", stored=_stored))
