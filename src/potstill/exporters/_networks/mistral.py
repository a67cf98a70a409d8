"""Mistral: Llama's network, whose attention may be a window of positions."""

from typing import Any

from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import STRETCHED, decoder_keys, decoder_problems


def _problems(config: Any) -> Any:
    return decoder_problems(config, (*STRETCHED, "llama3"))


register(Network(("mistral",), problems=_problems, keys=decoder_keys, architecture=lambda config: "llama"))
