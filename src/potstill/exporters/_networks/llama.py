"""Llama."""

from typing import Any

from potstill.exporters._networks import Network, register
from potstill.exporters._networks._decoder import STRETCHED, decoder_keys, decoder_problems


def _problems(config: Any) -> Any:
    return decoder_problems(config, (*STRETCHED, "llama3"))


register(Network(("llama",), problems=_problems, keys=decoder_keys, architecture=lambda config: "llama"))
