"""What a family of models needs beyond the path that all share. One file per family that needs something.

A model whose type no file names has a plain head and blocks where most have them. Nothing is taken on trust: `checked` asks a
small random copy of every model, named here or not, before it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from potstill.core.component import discover


@dataclass(frozen=True)
class Logits:
    """What a network does to its head's products z: c · tanh(scale · z / c), or scale · z without a softcap c."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Any) -> Any:
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()

    @property
    def plain(self) -> bool:
        """Whether logits are the head's products themselves."""
        return self.scale == 1 and self.softcap is None


PLAIN = Logits()


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        types: transformers' `model_type`s of it.
        logits: what its network does to the head's products, by its config.
    """

    types: tuple[str, ...]
    logits: Callable[[Any], Logits] = lambda config: PLAIN


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Let models of these types be treated so."""
    FAMILIES.update(dict.fromkeys(family.types, family))


def logits_of(config: Any) -> Logits:
    """What a model of this config does to its head's products."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return family.logits(config) if family is not None else PLAIN


discover(__name__, __path__)
