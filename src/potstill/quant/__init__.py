"""Four-bit weights: the mathematics, their one packed form, and the walk through a model's blocks."""

from potstill.quant.packed import Packed

__all__ = ["Packed"]
