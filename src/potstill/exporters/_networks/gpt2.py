"""GPT-2."""

from collections.abc import Iterator
from typing import Any

from potstill.exporters._keys import Keys
from potstill.exporters._networks import Network, register


def _problems(config: Any) -> Iterator[str]:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        yield f"the activation '{config.activation_function}'"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        yield "attention scaled in another way"
    if config.add_cross_attention:
        yield "cross-attention"


def _keys(config: Any) -> Keys:
    return {
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count_kv": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


register(Network(("gpt2",), problems=_problems, keys=_keys, architecture=lambda config: "gpt2"))
