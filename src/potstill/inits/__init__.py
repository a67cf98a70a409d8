"""What a student starts as, when it is cut out of a larger model. One file per way of cutting."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from potstill.core.component import Component, discover
from potstill.edges.models import Model, with_weights


class Init(Component):
    """Makes a smaller model out of a trained one, which stays as it is."""

    @abstractmethod
    def shape(self, config: Any) -> Any:
        """The config of the smaller model, a copy; so that what cannot be cut is refused before weights are read.

        Raises:
            UserError: a model of this config cannot be cut so.
        """

    @abstractmethod
    def weights(self, model: Model, config: Any) -> dict[str, Tensor]:
        """Every parameter of the smaller model, copied, by the name it has there.

        Args:
            config: what `shape` gave for this model.
        """

    def __call__(self, model: Model) -> Model:
        """The smaller model; a tied output head stays tied."""
        config = self.shape(model.config)
        return with_weights(model, config, self.weights(model, config))


discover(__name__, __path__)
