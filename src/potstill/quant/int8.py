"""Eight-bit weights for a model that is only read: a frozen teacher in a quarter of the memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.core.errors import UserError
from potstill.edges.codes import weight_of
from potstill.edges.experts import refuse_experts
from potstill.edges.models import linears_in, skeleton

LARGEST = 127


class Int8Linear(nn.Module):
    """y = scale ∘ (codes · x) + bias: weights rounded to nearest, one scale per output row, inputs as they come.

    scale[o] = max |w[o, :]| / 127, so that no weight is off by more than scale / 2. The absmax rule of LLM.int8
    (Dettmers et al., arXiv:2208.07339), for weights alone.
    """

    codes_OI: Tensor
    scale_O: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        weight_OI = weight_OI.detach().float()
        scale_O = weight_OI.abs().amax(1) / LARGEST
        codes_OI = (weight_OI / scale_O.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        self.register_buffer("codes_OI", codes_OI.to(torch.int8).contiguous())
        self.register_buffer("scale_O", scale_O)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.codes_OI.to(x.dtype))  # codes are exact in bfloat16; the scale is applied in float32
        y = (y * self.scale_O).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def check_int8(model: Any) -> None:
    """Refuse a model most of whose weights would stay as they are; a skeleton will do.

    Raises:
        UserError: it is a mixture of experts.
    """
    refuse_experts(model, "int8 would leave them at full precision", "set teacher_precision = 'bf16'")


def int8_problems(config: Any) -> list[str]:
    """Why a model of this config cannot be held in eight bits."""
    try:
        check_int8(skeleton(config))
    except UserError as error:
        return [str(error)]
    return []


@torch.no_grad()
def int8_body(model: Any) -> Any:
    """Replace every linear layer of the body, in place and one at a time; embeddings and head keep their precision.

    Raises:
        UserError: as `check_int8`.
    """
    check_int8(model)
    body = model.base_model
    for name, layer in linears_in(body).items():
        owner, _, last = name.rpartition(".")
        setattr(body.get_submodule(owner), last, Int8Linear(weight_of(layer), layer.bias))
    return model
