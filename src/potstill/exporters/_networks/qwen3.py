"""Qwen 3: norms of each head's q and k before they are rotated."""

from collections.abc import Iterator
from typing import Any

from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import decoder_keys, decoder_problems, names_windows, window_problems


def _problems(config: Any) -> Iterator[str]:
    yield from decoder_problems(config)
    yield from window_problems(config, windowed=names_windows(config))
    if config.attention_bias:  # llama.cpp's qwen3 has no place for the bias of the output
        yield "biases of attention"


register(Network(("qwen3",), problems=_problems, keys=decoder_keys, architecture=lambda config: "qwen3"))
