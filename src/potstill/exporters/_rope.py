"""Rotary positions as llama.cpp reads them: keys, frequency factors, and the order of the rows that are rotated."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from potstill.edges.models import head_width
from potstill.exporters._keys import Keys

# llama.cpp's architectures that rotate entries 2i and 2i + 1 of a head; transformers and the others rotate i and i + d/2
PAIRED = ("llama", "smollm3")


def rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", "default")


def rope_problems(rope: Mapping[str, Any], types: Collection[str]) -> Iterator[str]:
    """What of these `rope_parameters` an architecture with positions of these types could not compute."""
    if rope_type(rope) not in types:
        yield f"rotary embeddings of type '{rope_type(rope)}'"
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        yield "rotary embeddings of a part of each head"
    if rope_type(rope) == "yarn" and rope.get("truncate") is False:
        yield "yarn without truncate"
    if rope_type(rope) in ("linear", "yarn") and (rope.get("factor") or 1) < 1:
        yield f"positions stretched by a factor below 1 ({rope['factor']:g})"


def rope_keys(config: Any, rope: Mapping[str, Any]) -> Keys:
    """Base and stretching of the positions; `llama3` stretches by a tensor instead, see `rope_factors`."""
    keys: Keys = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": head_width(config)}
    match rope_type(rope):
        case "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            factor = float(rope.get("factor") or config.max_position_embeddings / original)
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": factor,
                "rope.scaling.original_context_length": int(original),
                # llama.cpp multiplies what it finds here by 1 + 0.1·ln(factor)
                "rope.scaling.attn_factor": _yarn_attention(rope, factor) / (1 + 0.1 * math.log(factor)),
                "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
                "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
            }
    return keys


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """What cosines and sines are multiplied by, as transformers derives it (Peng et al., arXiv:2309.00071)."""

    def scaled(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(rope["mscale"]) / scaled(rope["mscale_all_dim"])
    return scaled(1.0)


def rope_factors(config: Any) -> Any:
    """float32 [head_dim / 2]: by what llama.cpp must divide each frequency of a `llama3` model; None for other models.

    Default frequency f over Llama 3.1's: 1 where the wavelength w = 2π / f is below original / high, `factor` where it is
    above original / low, and 1 / ((1 − s) / factor + s) with s = (original / w − low) / (high − low) between.
    """
    import numpy as np

    rope, width = getattr(config, "rope_parameters", None) or {}, head_width(config)
    if rope_type(rope) != "llama3":
        return None
    original, low, high = (
        float(rope[name]) for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    frequency = 1 / float(rope["rope_theta"]) ** (np.arange(0, width, 2) / width)
    turns = original * frequency / (2 * np.pi)
    smooth = ((turns - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).astype(np.float32)


def row_order(name: str, config: Any, architecture: str) -> Callable[[Any], Any]:
    """How the rows of this tensor are reordered: q and k from halves to pairs where llama.cpp rotates pairs, else not.

    Matrices, their packed rows and biases alike.
    """
    import numpy as np

    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    layer = name.split(".")[-2]
    if architecture not in PAIRED or layer not in heads:
        return lambda array: array

    def reorder(array: Any) -> Any:
        order = np.arange(len(array)).reshape(heads[layer], 2, -1).swapaxes(1, 2).reshape(-1)
        return np.ascontiguousarray(array[order])

    return reorder
