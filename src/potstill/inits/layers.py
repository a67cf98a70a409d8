"""A student of some of a model's layers."""

import re
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.checked import cut_layers
from potstill.edges.models import Model, blocks_name
from potstill.inits import Init


class Layers(Init, kind="layers"):
    """Keep these decoder layers, with embeddings, final norm and head; DistilBERT's start, Sanh et al., arXiv:1910.01108."""

    keep: tuple[int, ...] = Field(min_length=1, description="layers to keep, counted from 0, in the order they have")

    @field_validator("keep")
    @classmethod
    def _rises(cls, keep: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in zip((-1, *keep), keep, strict=False)):
            raise ValueError("must be layers counted from 0, each after the one before it, such as [0, 2, 4]")
        return keep

    def shape(self, config: Any) -> Any:
        count = config.num_hidden_layers
        if self.keep[-1] >= count:
            raise UserError(
                f"init.keep = {list(self.keep)}: the model has {count} layers, 0 to {count - 1}; name some of these"
            )
        return cut_layers(config, self.keep)

    def weights(self, model: Model, config: Any) -> dict[str, Tensor]:
        place = {layer: i for i, layer in enumerate(self.keep)}
        within = re.compile(rf"({re.escape(blocks_name(model))})\.(\d+)\.(.+)")
        found = {}
        for name, parameter in model.named_parameters():
            layer = within.fullmatch(name)
            if layer is None:
                found[name] = parameter.detach().clone()
            elif int(layer[2]) in place:
                found[f"{layer[1]}.{place[int(layer[2])]}.{layer[3]}"] = parameter.detach().clone()
        return found
