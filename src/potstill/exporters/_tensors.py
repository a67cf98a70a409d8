"""Every weight of a model under its name in llama.cpp, in the type of the file."""

from collections.abc import Mapping
from typing import Any

from potstill.core.errors import UserError
from potstill.exporters._networks import INSTEAD, architecture_of, network_of
from potstill.exporters._rope import rope_factors, row_order

BLOCK = 32  # weights in a block of Q4_0 or Q8_0
_ROPE_FREQS = "rope_freqs.weight"


def tensors(model: Any, packed: Mapping[str, Any], type: str, embeddings: str) -> list[tuple[str, Any, Any]]:
    """Every parameter under llama.cpp's name, as (name, array, raw type).

    Raises:
        UserError: llama.cpp has no place for a parameter, or float16 no room for its values.
    """
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
    from gguf.quants import dequantize, quantize

    config, architecture, network = model.config, architecture_of(model.config), network_of(model.config)
    renamed = get_tensor_name_map(
        {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    input_outputs = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    transposed = {f"{name}.weight" for name, module in model.named_modules() if module.__class__.__name__ == "Conv1D"}
    written = []
    factors = rope_factors(config)
    if factors is not None:
        written.append((_ROPE_FREQS, factors, GGMLQuantizationType.F32))
    for name, parameter in model.named_parameters():  # names a tied head once, as the embedding: llama.cpp ties it again
        new_name = renamed.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UserError(f"the gguf exporter has no place for the tensor '{name}'; {INSTEAD}")
        rows = row_order(name, config, architecture)
        matrix = packed.get(name.removesuffix(".weight"))
        if matrix is not None:
            four = matrix.bits == 4
            raw = GGMLQuantizationType.Q4_0 if four else GGMLQuantizationType.Q8_0
            written.append((new_name, rows((q4_0_bytes if four else q8_0_bytes)(matrix, name)), raw))
            continue
        as_linear = parameter.T if name in transposed else parameter
        values = network.stored(name, rows(as_linear.detach().float().cpu().contiguous().numpy()), config)
        is_embedding = any(parameter is weight for weight in input_outputs)
        if type == "f32" or values.ndim == 1 or new_name.startswith("position_embd"):
            written.append((new_name, values, GGMLQuantizationType.F32))
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            wanted = (embeddings if is_embedding else "f16") if packed else type
            raw = GGMLQuantizationType.F16
            if wanted == "bf16" or (wanted == "q8_0" and values.shape[-1] % BLOCK == 0):
                raw = GGMLQuantizationType[wanted.upper()]
            stored = quantize(values, raw)
            _check_range(name, values, dequantize(stored, raw))
        written.append((new_name, stored, raw))
    return written


def _check_range(name: str, values: Any, stored: Any) -> None:
    """Refuse what float16, alone or as a block's scale, overflows or flushes to zero; rounding stays far below the limit."""
    import numpy as np

    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(stored).all():
        raise UserError(f"the tensor '{name}' is too large for float16; set types = ['f32']")
    if largest > 0 and np.linalg.norm((stored - values) / largest) > 0.05 * np.linalg.norm(values / largest):
        raise UserError(f"the tensor '{name}' is too small for float16; set types = ['f32']")


def q4_0_bytes(matrix: Any, name: str) -> Any:
    """A `quant.Packed` as the bytes of Q4_0, uint8 [out, in / 32 · 18].

    A block of 32 weights is its scale d in float16, then 16 bytes: byte j holds element j in its low nibble and j + 16
    in its high one, each stored as code + 8. Weight = d · code. A group wider than a block repeats its scale.
    """
    import numpy as np

    outputs, inputs = matrix.codes_OI.shape
    scales_OBJ = _scale_bytes(matrix, "Q4_0", name)
    stored_OBK = (matrix.codes_OI.cpu().numpy() + 8).astype(np.uint8).reshape(outputs, inputs // BLOCK, BLOCK)
    nibbles_OBJ = stored_OBK[..., : BLOCK // 2] | (stored_OBK[..., BLOCK // 2 :] << 4)
    return np.concatenate([scales_OBJ, nibbles_OBJ], axis=-1).reshape(outputs, -1)


def q8_0_bytes(matrix: Any, name: str) -> Any:
    """A `quant.Packed` of 8 bits as the bytes of Q8_0, uint8 [out, in / 32 · 34]: d in float16, then 32 codes in int8."""
    import numpy as np

    outputs, inputs = matrix.codes_OI.shape
    codes_OBJ = matrix.codes_OI.cpu().contiguous().numpy().view(np.uint8).reshape(outputs, inputs // BLOCK, BLOCK)
    return np.concatenate([_scale_bytes(matrix, "Q8_0", name), codes_OBJ], axis=-1).reshape(outputs, -1)


def _scale_bytes(matrix: Any, format: str, name: str) -> Any:
    """uint8 [out, in / 32, 2]: each block's scale."""
    import numpy as np

    if matrix.group % BLOCK:
        raise UserError(f"{format} stores groups of {BLOCK}, and '{name}' has {matrix.group}; quantise with group = {BLOCK}")
    scales_OB = np.repeat(matrix.scales_OG.cpu().numpy().astype("<f2"), matrix.group // BLOCK, axis=1)
    return scales_OB[..., None].view(np.uint8)
