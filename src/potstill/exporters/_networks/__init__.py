"""How llama.cpp builds each family of models: the network's name, its keys, what it cannot compute. One file a family."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from potstill.core.component import discover
from potstill.exporters._keys import Keys

INSTEAD = "export 'safetensors' instead"


@dataclass(frozen=True)
class Network:
    """One family.

    Attributes:
        types: transformers' `model_type`s of it.
        problems: what a config asks for that llama.cpp does not compute, as objects of "cannot express …".
        keys: hyper-parameters under llama.cpp's names, without the architecture before them.
        architecture: llama.cpp's name of the network, by config.
        stored: what the file holds of a parameter, by its name, its float32 values and the config.
    """

    types: tuple[str, ...]
    problems: Callable[[Any], Iterable[str]]
    keys: Callable[[Any], Keys]
    architecture: Callable[[Any], str]
    stored: Callable[[str, Any, Any], Any] = lambda name, values, config: values


NETWORKS: dict[str, Network] = {}


def register(network: Network) -> None:
    """Let models of these types be written so."""
    NETWORKS.update(dict.fromkeys(network.types, network))


def network_of(config: Any) -> Network:
    """The family of a config in which `network_problems` finds none."""
    return NETWORKS[config.model_type]


def network_problems(config: Any) -> list[str]:
    """Why llama.cpp would not compute what this model computes; empty where it would."""
    network = NETWORKS.get(config.model_type)
    if network is None:
        return [f"the gguf exporter knows {', '.join(sorted(NETWORKS))}, not '{config.model_type}'; {INSTEAD}"]
    return [f"the gguf exporter cannot express {what}; {INSTEAD}" for what in network.problems(config)]


def architecture_of(config: Any) -> str:
    """llama.cpp's name of the network."""
    return network_of(config).architecture(config)


def network_keys(config: Any) -> Keys:
    """Hyper-parameters that llama.cpp builds the network from; the config is one in which `network_problems` finds none."""
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
    }
    return {f"{architecture_of(config)}.{key}": value for key, value in (keys | network_of(config).keys(config)).items()}


discover(__name__, __path__)
