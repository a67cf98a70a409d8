"""A student of a model's depth and less width."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.models import Model, head_width
from potstill.inits import Init

# What each axis of a parameter counts, by the end of its name; "" is cut nowhere. GPT-2 stores its matrices [in, out].
_GATED = {
    "embed_tokens.weight": ("", "hidden"),
    "lm_head.weight": ("", "hidden"),
    "norm.weight": ("norm",),
    "q_proj.weight": ("query", "hidden"),
    "q_proj.bias": ("query",),
    "k_proj.weight": ("key", "hidden"),
    "k_proj.bias": ("key",),
    "v_proj.weight": ("key", "hidden"),
    "v_proj.bias": ("key",),
    "o_proj.weight": ("hidden", "query"),
    "o_proj.bias": ("hidden",),
    "gate_proj.weight": ("inner", "hidden"),
    "gate_proj.bias": ("inner",),
    "up_proj.weight": ("inner", "hidden"),
    "up_proj.bias": ("inner",),
    "down_proj.weight": ("hidden", "inner"),
    "down_proj.bias": ("hidden",),
}
_GPT2 = {
    "wte.weight": ("", "hidden"),
    "wpe.weight": ("", "hidden"),
    "lm_head.weight": ("", "hidden"),
    "ln_1.weight": ("norm",),
    "ln_1.bias": ("hidden",),
    "ln_2.weight": ("norm",),
    "ln_2.bias": ("hidden",),
    "ln_f.weight": ("norm",),
    "ln_f.bias": ("hidden",),
    "attn.c_attn.weight": ("hidden", "qkv"),
    "attn.c_attn.bias": ("qkv",),
    "attn.c_proj.weight": ("query", "hidden"),
    "attn.c_proj.bias": ("hidden",),
    "mlp.c_fc.weight": ("hidden", "inner"),
    "mlp.c_fc.bias": ("inner",),
    "mlp.c_proj.weight": ("inner", "hidden"),
    "mlp.c_proj.bias": ("hidden",),
}
_AXES = {"qwen2": _GATED, "llama": _GATED, "gpt2": _GPT2}
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.\d+")


class Width(Init, kind="width"):
    """Keep the channels, inner units and attention heads whose weights are largest, in the order they have.

    Largest by the sum of squares of all weights that read or write them: the same channels everywhere, for layers add to
    one stream; heads and inner units layer by layer. Norms divide by a mean over fewer and larger channels, so their weights
    grow by √(old / new), as if the channels that went were 0. A head keeps its width. Every key-value head stays where `heads`
    divides among them, else whole groups go. Weights alone decide, so no data is needed and activations are not seen
    (unlike Minitron, Muralidharan et al., arXiv:2407.14679).
    """

    hidden_size: int | None = Field(default=None, ge=1, description="channels to keep; default: all")
    intermediate_size: int | None = Field(default=None, ge=1, description="inner units of the MLP to keep; default: all")
    heads: int | None = Field(default=None, ge=1, description="attention heads (queries) to keep; default: all")

    @model_validator(mode="after")
    def _cuts_something(self) -> "Width":
        if self.hidden_size is None and self.intermediate_size is None and self.heads is None:
            raise ValueError("needs hidden_size, intermediate_size or heads")
        return self

    def shape(self, config: Any) -> Any:
        if config.model_type not in _AXES:
            known = ", ".join(sorted(_AXES))
            raise UserError(f"init.kind = 'width' knows {known}, not '{config.model_type}'; cut it by layers (kind = 'layers')")
        has = {"hidden_size": config.hidden_size, "intermediate_size": _inner(config), "heads": config.num_attention_heads}
        wanted = {name: getattr(self, name) or size for name, size in has.items()}
        for name, size in has.items():
            if wanted[name] > size:
                raise UserError(f"init.{name} = {wanted[name]}: the model has {size}; choose at most that")
        hidden, heads, width = wanted["hidden_size"], wanted["heads"], head_width(config)
        cut = copy.deepcopy(config)
        if config.model_type == "gpt2":
            if hidden != heads * width:
                fits = self.heads is None and hidden % width == 0
                remedy = f"heads = {hidden // width}" if fits else f"hidden_size = {heads * width}"
                raise UserError(f"init.hidden_size = {hidden}: GPT-2's {heads} heads of {width} do not fill it; set {remedy}")
            cut.n_inner = None if wanted["intermediate_size"] == 4 * hidden else wanted["intermediate_size"]
        else:
            if config.model_type == "llama" and hidden % heads:
                raise UserError(f"init.hidden_size = {hidden}: {heads} heads do not divide it; choose another, or other heads")
            cut.num_key_value_heads = _kv_heads(heads, config)
            cut.intermediate_size = wanted["intermediate_size"]
            if hasattr(config, "head_dim") or hidden != heads * width:
                cut.head_dim = width
        cut.hidden_size, cut.num_attention_heads = hidden, heads
        return cut

    def weights(self, model: Model, config: Any) -> dict[str, Tensor]:
        axes = _AXES[config.model_type]
        axes_of = {name: next(axes[end] for end in axes if name.endswith(end)) for name, _ in model.named_parameters()}
        whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
        layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, weight in whole.items():
            within = _LAYER.match(name)
            layers[within[0] if within else ""][name] = weight
        channels = _largest(_energy("hidden", whole, axes_of), config.hidden_size)
        found = {}
        for layer, members in layers.items():
            kept = {"hidden": channels, "norm": channels}
            if layer:
                kept["inner"] = _largest(_energy("inner", members, axes_of), _inner(config))
                kept |= _heads(members, axes_of, model.config, config)
            for name, weight in members.items():
                for axis, label in enumerate(axes_of[name]):
                    weight = weight.index_select(axis, kept[label]) if label else weight
                if axes_of[name] == ("norm",):
                    weight = weight * math.sqrt(model.config.hidden_size / config.hidden_size)
                found[name] = weight.clone()
        return found


def _inner(config: Any) -> int:
    return (config.n_inner or 4 * config.n_embd) if config.model_type == "gpt2" else config.intermediate_size


def _kv_heads(heads: int, config: Any) -> int:
    """How many key-value heads so many queries keep."""
    has, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    if heads % has == 0:
        return has
    if heads % group == 0:
        return heads // group
    step = f"{has} or {group}" if has != group else str(has)
    raise UserError(
        f"init.heads = {heads}: the model has {has} key-value heads of {group} queries each; choose a multiple of {step}"
    )


def _energy(label: str, weights: Mapping[str, Tensor], axes_of: Mapping[str, tuple[str, ...]]) -> Tensor:
    """Sum of squares of everything that an axis of this label reads or writes, by its index."""
    total: Any = 0
    for name, weight in weights.items():
        if label in axes_of[name]:
            others = [axis for axis, found in enumerate(axes_of[name]) if found != label]
            square = weight.float().square()
            total = total + (square.sum(others) if others else square)
    return total


def _largest(energy_I: Tensor, count: int) -> Tensor:
    """Indices of the largest, the first of equals, in rising order."""
    return energy_I.argsort(descending=True, stable=True)[:count].sort().values


def _heads(weights: Mapping[str, Tensor], axes_of: Mapping[str, tuple[str, ...]], config: Any, cut: Any) -> dict[str, Tensor]:
    """Rows of queries, and of keys and values, that one layer keeps."""
    width, has = head_width(config), config.num_attention_heads
    query_H = _energy("query", weights, axes_of).view(has, width).sum(1)
    if config.model_type == "gpt2":
        head_H = query_H + _energy("qkv", weights, axes_of).view(3, has, width).sum((0, 2))
        rows = _rows(_largest(head_H, cut.num_attention_heads), width)
        return {"query": rows, "qkv": torch.cat([rows + part * has * width for part in range(3)])}
    groups = config.num_key_value_heads
    query_GQ = query_H.view(groups, -1)
    group_G = query_GQ.sum(1) + _energy("key", weights, axes_of).view(groups, width).sum(1)
    kept = _largest(group_G, cut.num_key_value_heads)
    each = cut.num_attention_heads // cut.num_key_value_heads
    queries = torch.cat([group * query_GQ.shape[1] + _largest(query_GQ[group], each) for group in kept])
    return {"query": _rows(queries, width), "key": _rows(kept, width)}


def _rows(heads: Tensor, width: int) -> Tensor:
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
