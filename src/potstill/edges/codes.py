"""Whether the codes beside a model still stand for its weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from potstill.core.errors import UserError
from potstill.edges.models import Model, matrices_in

_REMEDY = "quantise the model again, or delete packed.safetensors to use its weights"


def weight_of(layer: Any) -> Tensor:
    """A view of a linear layer's matrix as [out, in]; GPT-2 stores it [in, out]. Of an embedding a row is a token."""
    return layer.weight if isinstance(layer, nn.Linear | nn.Embedding) else layer.weight.T


def bits_in(packed: Mapping[str, Any]) -> int:
    """Of the weights of quantised layers, of which embeddings may have more; 0 where there are none."""
    return min((matrix.bits for matrix in packed.values()), default=0)


def check_codes(model: Model, packed: Mapping[str, Any]) -> None:
    """Refuse codes whose dequantised matrices are not exactly the model's weights.

    Args:
        packed: `{layer's name: quant.Packed}`.

    Raises:
        UserError: a layer does not exist, has another shape, or was changed after it was quantised; names the first.
    """
    layers = matrices_in(model)
    for name, matrix in packed.items():
        if name not in layers:
            raise UserError(f"the quantised layer '{name}' is not in the model; {_REMEDY}")
        weight_OI, codes_OI = weight_of(layers[name]).detach().float().cpu(), matrix.dequantise().cpu()
        if weight_OI.shape != codes_OI.shape:
            shapes = f"{tuple(codes_OI.shape)} in its codes and {tuple(weight_OI.shape)} in the model"
            raise UserError(f"the quantised layer '{name}' is {shapes}; {_REMEDY}")
        if not weight_OI.equal(codes_OI):
            raise UserError(f"the weights of '{name}' were changed after they were quantised; {_REMEDY}")
