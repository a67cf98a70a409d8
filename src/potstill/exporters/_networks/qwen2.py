"""Qwen 2 and 2.5: Llama's network with biases of q, k and v."""

from collections.abc import Iterator
from typing import Any

from potstill.edges.models import head_width
from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import STRETCHED, decoder_keys, decoder_problems, names_windows, window_problems
from potstill.exporters._rope import rope_type


def _problems(config: Any) -> Iterator[str]:
    yield from decoder_problems(config, (*STRETCHED, "llama3"))
    yield from window_problems(config, windowed=names_windows(config))


def _architecture(config: Any) -> str:
    """llama.cpp's qwen2 demands heads as wide together as the hidden state, and knows no `rope_freqs`.

    Its llama knows both, and biases: the same network once the rows of q and k stand in pairs.
    """
    wide = config.num_attention_heads * head_width(config)
    return "llama" if wide != config.hidden_size or rope_type(config.rope_parameters) == "llama3" else "qwen2"


register(Network(("qwen2",), problems=_problems, keys=decoder_keys, architecture=_architecture))
