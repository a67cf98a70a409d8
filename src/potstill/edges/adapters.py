"""Low-rank adapters inside a transformers model, by the peft library."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.edges.blank import new_model
from potstill.edges.experts import refuse_experts
from potstill.edges.models import Model, linears_in


def check_peft() -> None:
    """Refuse adapters where peft is not installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("peft") is None:
        raise UserError("adapter: needs the peft library; pip install 'potstill[lora]'")


def check_targets(config: Any, targets: Sequence[str]) -> None:
    """Refuse names of linear layers that a model of this config does not have.

    Raises:
        UserError: names one.
    """
    import torch

    with torch.device("meta"):
        _known(new_model(config), targets)


def _known(model: Model, targets: Sequence[str]) -> list[str]:
    """Last names of the body's linear layers."""
    known = sorted({name.rpartition(".")[2] for name in linears_in(model.base_model)})
    unknown = [name for name in targets if name not in known and name != "all-linear"]
    if "all-linear" in targets:
        named = f"name the layers to adapt: adapter.targets = [{', '.join(map(repr, known[:4]))}, …]"
        refuse_experts(model, "adapters would leave them out", named)
    if unknown:
        near = suggest(unknown[0], known)
        raise UserError(f"adapter.targets: the model has no linear layer '{unknown[0]}'{near} (known: {', '.join(known)})")
    return known


def add_lora(model: Model, *, r: int, alpha: float, dropout: float, targets: Sequence[str], seed: int) -> Callable[[], None]:
    """Put x ↦ Wx + (alpha / r)·B·A·x in the place of linear layers, in place; only A and B train, and B is 0 at first.

    The model keeps its class, so that all else works on it unchanged.

    Args:
        targets: last names of linear layers of the body, or "all-linear". The head stays: the fused head reads its weight.

    Returns:
        What merges B·A into W and makes the model plain again, once.

    Raises:
        UserError: no peft, or no such linear layer.
    """
    check_peft()
    import torch
    from peft import LoraConfig, LoraModel
    from transformers.pytorch_utils import Conv1D

    found = linears_in(model.base_model)
    known = _known(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # a float works as well
        lora_dropout=dropout,
        target_modules=known if "all-linear" in targets else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in found.values()),  # stored [in, out]
    )
    torch.manual_seed(seed)
    tuner: Any = LoraModel(model, {"default": config}, "default")

    def merge() -> None:
        tuner.merge_and_unload()

    return merge


@contextmanager
def switched_off(model: Model) -> Iterator[None]:
    """While inside, a model with adapters computes without them: as it was before they were trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
