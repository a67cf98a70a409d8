"""Models from a config alone, without trained weights."""

from typing import Any

from potstill.edges.hub import library


def new_model(config: Any) -> Any:
    """A causal language model of this config with new float32 weights, drawn from torch's random state."""
    return library().AutoModelForCausalLM.from_config(config)


def qwen2_config(**fields: Any) -> Any:
    """The config of a Qwen2 model."""
    return library().Qwen2Config(**fields)
