"""A student of a model's depth and less width."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.codes import weight_of
from potstill.edges.models import Model, head_width, linears_in
from potstill.inits import Calibration, Choice, Init, Read

# What each axis of a parameter counts, by the end of its name; "" is cut nowhere. GPT-2 stores its matrices [in, out].
_GATED = {
    "q_norm.weight": ("",),  # of a head, which keeps its width
    "k_norm.weight": ("",),
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
_AXES = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _GATED), "gpt2": _GPT2}
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.\d+")


class Width(Init, kind="width"):
    """Keep the channels, inner units and attention heads that matter most, in the order they have.

    By activation: each adds mean(x²)·‖w‖² to a layer that reads it, where x are its values over calibration rows and w the
    weights that multiply it (Wanda, Sun et al., arXiv:2306.11695; Minitron, Muralidharan et al., arXiv:2407.14679, takes x
    alone); channels are summed over all layers, each layer's shares summing to 1. By magnitude: the sum of squares of all
    weights that read or write them. The same channels stay everywhere, because layers add to one stream; heads and inner
    units are chosen layer by layer. Norms divide by a mean over fewer and larger channels, so their weights grow by
    √(old / new), as if the channels that went were 0. A head keeps its width. Every key-value head stays where `heads` divides
    among them, else whole groups go.
    """

    hidden_size: int | None = Field(default=None, ge=1, description="channels to keep; default: all")
    intermediate_size: int | None = Field(default=None, ge=1, description="inner units of the MLP to keep; default: all")
    heads: int | None = Field(default=None, ge=1, description="attention heads (queries) to keep; default: all")
    by: Literal["activation", "magnitude"] = Field(
        default="activation", description="what decides: values on calibration rows, or weights alone"
    )
    rows: int | None = Field(default=None, ge=1, description="by activation: training rows to calibrate on; default: 32")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_activation(cls, given: Any) -> Any:
        reads = isinstance(given, dict) and given.get("by", "activation") == "activation"
        return {"rows": 32} | given if reads else given

    @model_validator(mode="after")
    def _cuts_something(self) -> "Width":
        if self.hidden_size is None and self.intermediate_size is None and self.heads is None:
            raise ValueError("needs hidden_size, intermediate_size or heads")
        if self.by == "magnitude" and self.rows is not None:
            raise ValueError("rows is for by = 'activation'; leave it out")
        return self

    def calibration(self, config: Any) -> Calibration:
        return Calibration(self.rows, 1, 1.0) if self.rows is not None else Calibration()

    def without_rows(self) -> str:
        return "set by = 'magnitude'"

    def choose(self, model: Model, nll: Read) -> Choice:
        assert self.rows is not None
        found = by_activation(model, partial(nll, model, self.rows))
        return Choice(found, {"by": "activation", "rows": self.rows, **self._shares(found, self.shape(model.config))})

    def _shares(self, importance: "Importance", cut: Any) -> dict[str, float]:
        """How much of the importance stays, averaged over layers."""
        inner, heads = _inner(cut), cut.num_attention_heads
        return {
            "hidden_size_share": _share(importance.channels, cut.hidden_size),
            "intermediate_size_share": _mean(_share(layer["inner"], inner) for layer in importance.layers.values()),
            "heads_share": _mean(_share(layer["head"], heads) for layer in importance.layers.values()),
        }

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

    def weights(self, model: Model, choice: Choice) -> tuple[Any, dict[str, Tensor]]:
        config, axes_of = self.shape(model.config), _axes_of(model)
        importance: Importance = choice.keep or by_magnitude(model)
        channels = _largest(importance.channels, config.hidden_size)
        stays: dict[str, dict[str, Tensor]] = {"": {}}
        for layer, units in importance.layers.items():
            stays[layer] = {"inner": _largest(units["inner"], _inner(config)), **_heads(units, model.config, config)}
        found = {}
        for name, parameter in model.named_parameters():
            kept, weight = {**stays[_layer_of(name)], "hidden": channels, "norm": channels}, parameter.detach()
            for axis, label in enumerate(axes_of[name]):
                weight = weight.index_select(axis, kept[label].to(weight.device)) if label else weight
            if axes_of[name] == ("norm",):
                weight = weight * math.sqrt(model.config.hidden_size / config.hidden_size)
            found[name] = weight.clone()
        return config, found


@dataclass(frozen=True)
class Importance:
    """How much the units of a model matter, in float32.

    Attributes:
        channels: of each channel, [hidden].
        layers: by the layer's name: "inner" of each inner unit, "head" of each query head, "group" of each key-value head.
    """

    channels: Tensor
    layers: dict[str, dict[str, Tensor]]


def by_magnitude(model: Model) -> Importance:
    """Sums of squares of the weights that read or write each unit."""
    config, axes_of, width = model.config, _axes_of(model), head_width(model.config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layers = {}
    for layer, names in _by_layer(weights).items():
        members = {name: weights[name] for name in names}
        head_H = _energy("query", members, axes_of).view(-1, width).sum(1)
        if config.model_type == "gpt2":
            head_H = head_H + _energy("qkv", members, axes_of).view(3, -1, width).sum((0, 2))
            group_G = head_H
        else:
            group_G = _by_group(head_H, config) + _energy("key", members, axes_of).view(-1, width).sum(1)
        layers[layer] = {"inner": _energy("inner", members, axes_of), "head": head_H, "group": group_G}
    return Importance(_energy("hidden", weights, axes_of), layers)


def by_activation(model: Model, ask: Callable[[], float]) -> Importance:
    """mean(x²)·‖w‖² of each unit, in shares of the layer that reads it; x is what `ask` lets the layer read."""
    axes_of, width = _axes_of(model), head_width(model.config)
    reads = {"hidden": "hidden", "inner": "inner", "query": "head"}
    squares: dict[str, Tensor] = {}
    linears = linears_in(model.base_model)
    prefix = next(name for name, part in model.named_modules() if part is model.base_model)

    def hook(name: str) -> Callable[..., None]:
        def seen(_: Any, args: tuple[Any, ...]) -> None:
            squares[name] = squares.get(name, 0) + args[0].detach().flatten(0, -2).float().square().sum(0)

        return seen

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears.items()]
    try:
        ask()
    finally:
        for handle in handles:
            handle.remove()
    channels: Any = 0
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, square_I in squares.items():
        full = f"{prefix}.{name}.weight"
        label = axes_of[full][0 if model.config.model_type == "gpt2" else 1]
        share_I = square_I * weight_of(linears[name]).detach().float().square().sum(0)
        share_I = share_I / share_I.sum().clamp(min=torch.finfo(torch.float32).tiny)
        if label == "hidden":
            channels = channels + share_I
        elif label == "query":
            share_I = share_I.view(-1, width).sum(1)
        if label in ("inner", "query"):
            layers[_layer_of(full)][reads[label]] = share_I
    for units in layers.values():
        units["group"] = _by_group(units["head"], model.config)
    return Importance(channels.cpu(), {name: {k: v.cpu() for k, v in units.items()} for name, units in layers.items()})


def _share(importance_I: Tensor, stay: int) -> float:
    return float(importance_I[_largest(importance_I, stay)].sum() / importance_I.sum())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _axes_of(model: Model) -> dict[str, tuple[str, ...]]:
    axes = _AXES[model.config.model_type]
    return {name: next(axes[end] for end in axes if name.endswith(end)) for name, _ in model.named_parameters()}


def _layer_of(name: str) -> str:
    """The decoder layer that a parameter is in; "" outside of all."""
    within = _LAYER.match(name)
    return within[0] if within else ""


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if layer := _layer_of(name):
            found[layer].append(name)
    return found


def _by_group(head_H: Tensor, config: Any) -> Tensor:
    """Of each key-value head the sum over its queries."""
    return head_H.view(getattr(config, "num_key_value_heads", None) or len(head_H), -1).sum(1)


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


def _heads(units: Mapping[str, Tensor], config: Any, cut: Any) -> dict[str, Tensor]:
    """Rows of queries, and of keys and values, that one layer keeps."""
    width, has = head_width(config), config.num_attention_heads
    if config.model_type == "gpt2":
        rows = _rows(_largest(units["head"], cut.num_attention_heads), width)
        return {"query": rows, "qkv": torch.cat([rows + part * has * width for part in range(3)])}
    query_GQ = units["head"].view(config.num_key_value_heads, -1)
    kept = _largest(units["group"], cut.num_key_value_heads)
    each = cut.num_attention_heads // cut.num_key_value_heads
    queries = torch.cat([group * query_GQ.shape[1] + _largest(query_GQ[group], each) for group in kept])
    return {"query": _rows(queries, width), "key": _rows(kept, width)}


def _rows(heads: Tensor, width: int) -> Tensor:
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
