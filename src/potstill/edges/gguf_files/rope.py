"""Rotary positions of a GGUF file as transformers' `rope_parameters`."""

import math
from collections.abc import Iterator
from typing import Any

from potstill.edges.gguf_files.header import Gguf, values, whole_number

ROPE_FREQS = "rope_freqs.weight"


def short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-06 and not 9.999999974752427e-07."""
    import numpy as np

    return float(str(np.float32(value)))


def rope_of(file: Gguf, width: int) -> dict[str, Any]:
    """Rotary settings; llama.cpp's defaults where the file names none."""
    base = {"rope_theta": short(file.own.get("rope.freq_base", 10_000.0))}
    factor = short(file.own.get("rope.scaling.factor", 0.0)) or 1.0
    scaling = str(file.own.get("rope.scaling.type", "none" if factor == 1 else "linear"))
    if ROPE_FREQS in file.tensors:
        if scaling != "none":
            raise file.refuse(f"it has both rope.scaling.type = '{scaling}' and {ROPE_FREQS}, which is not read here")
        return {"rope_type": "llama3", **base, **_llama3(file, base["rope_theta"], width)}
    match scaling:
        case "none":
            return {"rope_type": "default", **base}
        case "linear":
            return {"rope_type": "linear", **base, "factor": factor}
        case "yarn":
            own = file.own
            attention = own.get("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
            return {
                "rope_type": "yarn",
                **base,
                "factor": factor,
                "original_max_position_embeddings": whole_number(file, "rope.scaling.original_context_length"),
                "attention_factor": attention,
                "beta_fast": short(own.get("rope.scaling.yarn_beta_fast", 32.0)),
                "beta_slow": short(own.get("rope.scaling.yarn_beta_slow", 1.0)),
            }
    raise file.refuse(f"rotary embeddings of type '{scaling}' are not read from GGUF files")


def _llama3(file: Gguf, theta: float, width: int) -> dict[str, Any]:
    """The settings of Llama 3.1's stretched positions, from what the file divides each frequency by.

    1 where the wavelength is below original / high, `factor` above original / low, and between 1 / ((1 − s) / factor + s) with
    s = (original · frequency / 2π − low) / (high − low). Only original / low and original / high can be told from them.

    Raises:
        UserError: they are not of that form.
    """
    import numpy as np

    divisors = values(file, ROPE_FREQS).astype(np.float64)
    frequency = 1 / theta ** (np.arange(0, width, 2) / width)
    factor = short(divisors.max())
    if len(divisors) == len(frequency) and factor > 1:
        for original, low, high in _bands(divisors, frequency, factor):
            smooth = ((original * frequency / (2 * np.pi) - low) / (high - low)).clip(0, 1)
            if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-5):
                names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
                return dict(zip(names, (factor, original, low, high), strict=True))
    raise file.refuse(f"its {ROPE_FREQS} stretches positions in a way that is not known here")


def _bands(divisors: Any, frequency: Any, factor: float) -> Iterator[tuple[int, float, float]]:
    """Settings that the divisors may come from: those of Meta's models, then the line through the rising part."""
    import numpy as np

    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32):
        yield original, 1.0, 4.0
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    rising = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    if rising.sum() >= 2:
        slope, height = np.polyfit(frequency[rising], smooth[rising], 1)
        low = 1.0
        high = low + low / -height if height < 0 else math.inf
        original = 2 * math.pi * slope * (high - low)
        if math.isfinite(original) and original > 1:
            yield round(original), low * round(original) / original, high * round(original) / original
