"""A student of some of a model's layers."""

import copy
import re
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.models import Model
from potstill.inits import Init

_LAYER = re.compile(r"(model\.layers|transformer\.h)\.(\d+)\.(.+)")


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
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = len(self.keep)
        if getattr(config, "layer_types", None) is not None:
            cut.layer_types = [config.layer_types[layer] for layer in self.keep]
        return cut

    def weights(self, model: Model, config: Any) -> dict[str, Tensor]:
        place = {layer: i for i, layer in enumerate(self.keep)}
        found = {}
        for name, parameter in model.named_parameters():
            within = _LAYER.fullmatch(name)
            if within is None:
                found[name] = parameter.detach().clone()
            elif int(within[2]) in place:
                found[f"{within[1]}.{place[int(within[2])]}.{within[3]}"] = parameter.detach().clone()
        return found
