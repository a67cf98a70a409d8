"""SmolLM 3: Llama's network in which some layers do not rotate q and k."""

from collections.abc import Iterator
from typing import Any

from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import STRETCHED, decoder_keys, decoder_problems, names_windows, window_problems

EVERY = 4  # llama.cpp's smollm3 rotates in all layers but each fourth, whatever the file says


def _rotated(config: Any) -> list[bool]:
    return [bool(rotated) for rotated in config.no_rope_layers[: config.num_hidden_layers]]


def _architecture(config: Any) -> str:
    return "llama" if all(_rotated(config)) else "smollm3"


def _problems(config: Any) -> Iterator[str]:
    as_llama = _architecture(config) == "llama"
    yield from decoder_problems(config, (*STRETCHED, "llama3") if as_llama else STRETCHED)
    yield from window_problems(config, windowed=names_windows(config))
    if not as_llama and _rotated(config) != [layer % EVERY != EVERY - 1 for layer in range(config.num_hidden_layers)]:
        yield f"layers without rotary positions other than each {EVERY}th, as a cut by layers leaves them"
    if not as_llama and (config.attention_bias or config.mlp_bias):
        yield "biases"


register(Network(("smollm3",), problems=_problems, keys=decoder_keys, architecture=_architecture))
