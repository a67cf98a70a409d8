"""Mistral: Llama's network, in which every layer may see a window of positions alone."""

from collections.abc import Iterator
from typing import Any

from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import STRETCHED, decoder_keys, decoder_problems, window_problems


def _problems(config: Any) -> Iterator[str]:
    yield from decoder_problems(config, (*STRETCHED, "llama3"))
    yield from window_problems(config, windowed=config.sliding_window is not None)  # whatever `layer_types` says


register(Network(("mistral",), problems=_problems, keys=decoder_keys, architecture=lambda config: "llama"))
