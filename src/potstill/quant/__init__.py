"""Four-bit weights as pure tensor mathematics: knows no model and no file."""

from potstill.quant.packed import Packed

__all__ = ["Packed"]
