"""What a student starts as, when it is cut out of a larger model. One file per way of cutting."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from potstill.core.component import Component, discover
from potstill.core.errors import UserError
from potstill.edges.models import Model, with_weights

Read = Callable[[Model, int], float]  # a model and how many calibration rows it reads -> nats per response token


@dataclass(frozen=True)
class Calibration:
    """What it takes to choose what stays.

    Attributes:
        rows: that the model reads each time; 0: no rows decide.
        reads: how often it reads them.
        passes: these, in passes of the full model: a part of it may be skipped.
    """

    rows: int = 0
    reads: int = 0
    passes: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What stays of a model.

    Attributes:
        keep: what an `Init` makes of its own choice, such as the numbers of layers.
        figures: what decided, for the artifact and the report; JSON.
    """

    keep: Any = None
    figures: dict[str, Any] = field(default_factory=dict)


class Init(Component):
    """Makes a smaller model out of a trained one, which stays as it is."""

    @abstractmethod
    def shape(self, config: Any) -> Any:
        """The config of the smaller model, a copy; so that what cannot be cut is refused before weights are read.

        Where rows decide what stays, the config has the sizes of the smaller model and stands for every choice.

        Raises:
            UserError: a model of this config cannot be cut so.
        """

    @abstractmethod
    def weights(self, model: Model, choice: Choice) -> tuple[Any, dict[str, Tensor]]:
        """The config of the smaller model, and its parameters, copied, by the name that each has there."""

    def calibration(self, config: Any) -> Calibration:
        """What it takes to choose what stays of a model of this config."""
        return Calibration()

    def choose(self, model: Model, nll: Read) -> Choice:
        """What stays, by what calibration rows show."""
        return Choice()

    def chosen(self, model: Model, nll: Read | None = None) -> Choice:
        """`choose`, where rows decide.

        Args:
            nll: lets a model read calibration rows.

        Raises:
            UserError: the model cannot be cut so; rows decide, and there are none.
        """
        self.shape(model.config)  # what cannot be cut is refused before rows are read
        if not self.calibration(model.config).rows:
            return Choice()
        if nll is None:
            raise UserError(f"init: rows decide what stays; give `nll`, or {self.without_rows()}")
        return self.choose(model, nll)

    def layers_kept(self, config: Any, choice: Choice) -> tuple[int, ...]:
        """Which layers of a model of this config stay."""
        return tuple(range(config.num_hidden_layers))

    def without_rows(self) -> str:
        """How to ask for a cut that no rows decide."""
        return "name what stays"

    def cut(self, model: Model, choice: Choice) -> Model:
        """The smaller model; a tied output head stays tied."""
        config, weights = self.weights(model, choice)
        return with_weights(model, config, weights)

    def __call__(self, model: Model, nll: Read | None = None) -> Model:
        """`cut` of what is `chosen`."""
        return self.cut(model, self.chosen(model, nll))


discover(__name__, __path__)
