"""The tensors of a GGUF file as transformers names and orders them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from potstill.edges.gguf_files.header import Gguf, values
from potstill.edges.gguf_files.networks import ARCHITECTURES
from potstill.edges.gguf_files.rope import ROPE_FREQS
from potstill.edges.weights import Stored

Order = Callable[[Any], Any]  # a tensor as transformers has it, from the file's


@dataclass(frozen=True)
class _Decoded(Stored):
    """A tensor of a GGUF file, as transformers has it: float32, in its order of rows."""

    source: Gguf | None = None
    named: str = ""
    order: Order = field(default=lambda array: array)

    def read(self, name: str) -> Any:
        import numpy as np
        import torch

        assert self.source is not None
        return torch.from_numpy(np.ascontiguousarray(self.order(values(self.source, self.named))))


def stored_in(file: Gguf, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """All tensors of a file by transformers' names; one that has no such name keeps its own.

    Args:
        config: what `config_of` gave.
        shapes: of the network's parameters, by transformers' names.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    renamed = get_tensor_name_map(architectures[file.architecture], config.num_hidden_layers)
    ours = {renamed.get_name(name, try_suffixes=(".weight", ".bias")): name for name in shapes}
    found: dict[str, Stored] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:  # is in the config
            continue
        own = ours.get(name) or name
        order, turned = _order(file, config, own)
        shape = tensor.shape[::-1] if turned else tensor.shape
        found[own] = _Decoded(file.path, "F32", shape, file, name, order)
    return found


def _order(file: Gguf, config: Any, name: str) -> tuple[Order, bool]:
    """How a tensor becomes transformers' own, and whether its rows become columns."""
    layer = name.split(".")[-2:][0]
    if config.model_type == "gpt2" and layer in ("c_attn", "c_proj", "c_fc") and name.endswith(".weight"):
        return (lambda array: array.T), True
    if config.model_type == "gemma3_text" and layer.endswith("norm"):  # llama.cpp multiplies by what transformers adds to 1
        return (lambda array: array - 1), False
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(layer)
    if heads is None or not ARCHITECTURES[file.architecture].pairs:
        return (lambda array: array), False
    count = getattr(config, heads)
    return (lambda array: array.reshape(count, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)), False
