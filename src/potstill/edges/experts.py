"""Mixtures of experts: which layers have experts, how many a token passes through, and what a cut makes of them."""

from collections.abc import Sequence
from typing import Any

from potstill.core.errors import UserError

# configs of different families call the same number by different names
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
INNER = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
SHARED_INNER = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # so many layers have none
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def names_experts(config: Any) -> bool:
    """Whether a config names more than one expert; some dense models do."""
    return _first(config, COUNTS) > 1


def expert_weights(module: Any) -> dict[str, Any]:
    """Weights that hold one matrix for each expert, [experts, …, …], by name.

    They are of modules whose class says so: Mamba and others have weights of three dimensions too.
    """
    found = {}
    for owner, inner in module.named_modules():
        if "expert" in type(inner).__name__.lower() or "moe" in type(inner).__name__.lower():
            own = inner.named_parameters(recurse=False)
            found |= {f"{owner}.{name}".lstrip("."): weight for name, weight in own if weight.dim() == 3}
    return found


def is_mixture(model: Any) -> bool:
    """Whether a model has experts, whatever its config says; a skeleton will do.

    As one tensor for all, as a list of modules called experts, or as an embedding inside a layer, which Doge has.
    """
    from torch import nn

    return bool(expert_weights(model)) or any(
        (name.endswith(".experts") and any(True for _ in part.parameters()))
        or (isinstance(part, nn.Embedding) and any(piece.isdecimal() for piece in name.split(".")))
        for name, part in model.named_modules()
    )


def refuse_experts(model: Any, what: str, remedy: str) -> None:
    """Refuse a mixture where only linear layers are treated, which would leave most of its weights as they are.

    Args:
        what: cannot be done.

    Raises:
        UserError: so it is.
    """
    if is_mixture(model):
        kind = f"a '{model.config.model_type}' is a mixture of experts"
        raise UserError(f"{kind}, whose weights are no linear layers: {what}; {remedy}")


def idle_parameters(model: Any) -> int:
    """Parameters of experts that a token does not pass through: weights · (1 − chosen / experts)."""
    chosen = _first(model.config, CHOSEN)
    return sum(
        weight.numel() - weight.numel() * min(chosen or len(weight), len(weight)) // len(weight)
        for weight in expert_weights(model).values()
    )


def inner_units(config: Any) -> int:
    """Inner units that a token passes through in a layer: of the chosen experts and the shared ones; 0 where none is known."""
    inner = _preferred(config, INNER)
    shared = _preferred(config, SHARED_INNER) or _first(config, SHARED) * inner
    return max(_first(config, CHOSEN) * inner + shared, _first(config, ("intermediate_size",)))


def layers_with_experts(config: Any) -> list[bool]:
    """Whether each layer of a mixture has experts; of a dense model, whatever its fields say."""
    return [_has_experts(config, layer) for layer in range(config.num_hidden_layers)]


def _has_experts(config: Any, layer: int) -> bool:
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds:
        return kinds[layer] != "dense"
    step = _first(config, ("decoder_sparse_step", "moe_layer_interval")) or 1
    last = getattr(config, "moe_layer_end_index", None)
    if layer < _first(config, DENSE_FIRST):
        return False
    if last is not None and 0 <= last < layer:
        return False
    if layer in (getattr(config, "mlp_only_layers", None) or ()):
        return False
    named = getattr(config, "moe_layers", None)
    return (layer + 1) % step == 0 and (named is None or layer in named)


def keep_experts(config: Any, cut: Any, keep: Sequence[int]) -> None:
    """Let every layer of a cut config have experts where the layer that it was has; `refuse_other_layers` sees whether it does.

    Args:
        cut: the config to change; it has these layers already.
    """
    has = [_has_experts(config, layer) for layer in keep]
    with_experts = [i for i, found in enumerate(has) if found]
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if getattr(config, name, None):
            setattr(cut, name, sum(layer < getattr(config, name) for layer in keep))
    if hasattr(config, "decoder_sparse_step"):
        cut.decoder_sparse_step = 1
        cut.mlp_only_layers = [i for i, found in enumerate(has) if not found]
    if getattr(config, "moe_layers", None) is not None:
        cut.moe_layers = with_experts
    if getattr(config, "moe_layer_start_index", None) is not None:
        cut.moe_layer_interval = 1
        cut.moe_layer_start_index = with_experts[0] if with_experts else len(keep)
        cut.moe_layer_end_index = with_experts[-1] if with_experts else len(keep)


def refuse_other_layers(full: Any, cut: Any, blocks: str, keep: Sequence[int]) -> None:
    """Refuse a cut whose layers are built otherwise than those that stay: dense where experts were, or the reverse.

    Args:
        full, cut: the two models, whose weights are not looked at.
        blocks: where their layers are.

    Raises:
        UserError: names the layer.
    """
    theirs, ours = (list(model.get_submodule(blocks)) for model in (full, cut))
    for place, layer in enumerate(keep):
        one, other = (
            {name: weight.shape for name, weight in block.named_parameters()} for block in (theirs[layer], ours[place])
        )
        if one != other:
            raise UserError(
                f"layer {layer} would be layer {place} of the cut model, where a '{full.config.model_type}' places layers with "
                "experts by a rule that this cut breaks; choose other layers to keep, the first ones for example"
            )


def _preferred(config: Any, names: Sequence[str]) -> int:
    """The first of these fields that holds a number."""
    return next((found for name in names if (found := _first(config, (name,)))), 0)


def _first(config: Any, names: Sequence[str]) -> int:
    """The largest of these fields that holds a number."""
    values = (getattr(config, name, None) for name in names)
    return max((value for value in values if isinstance(value, int) and not isinstance(value, bool)), default=0)
