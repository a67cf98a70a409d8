"""Llama."""

from collections.abc import Iterator
from typing import Any

from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import STRETCHED, decoder_keys, decoder_problems, names_windows, window_problems


def _problems(config: Any) -> Iterator[str]:
    yield from decoder_problems(config, (*STRETCHED, "llama3"))
    yield from window_problems(config, windowed=names_windows(config) or getattr(config, "sliding_window", None) is not None)


register(Network(("llama",), problems=_problems, keys=decoder_keys, architecture=lambda config: "llama"))
