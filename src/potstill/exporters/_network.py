"""A decoder as llama.cpp builds it: architecture, hyper-parameters, and every weight under its name there."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from potstill.core.errors import UserError
from potstill.edges.models import head_width
from potstill.exporters._keys import Keys

BLOCK = 32  # weights in a block of Q4_0 or Q8_0
_INSTEAD = "export 'safetensors' instead"
_ROPE_FREQS = "rope_freqs.weight"


def network_problems(config: Any) -> list[str]:
    """Why llama.cpp would not compute what this model computes; empty where it would."""
    match config.model_type:
        case "qwen2" | "llama":
            found = [*_llama_problems(config)]
        case "gpt2":
            found = [*_gpt2_problems(config)]
        case other:
            return [f"the gguf exporter knows qwen2, llama and gpt2, not '{other}'; {_INSTEAD}"]
    return [f"the gguf exporter cannot express {what}; {_INSTEAD}" for what in found]


def _llama_problems(config: Any) -> Iterator[str]:
    rope = config.rope_parameters
    if _rope_type(config) not in ("default", "linear", "llama3", "yarn"):
        yield f"rotary embeddings of type '{_rope_type(config)}'"
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        yield "rotary embeddings of a part of each head"
    if _rope_type(config) == "yarn" and rope.get("truncate") is False:
        yield "yarn without truncate"
    if _rope_type(config) in ("linear", "yarn") and (rope.get("factor") or 1) < 1:
        yield f"positions stretched by a factor below 1 ({rope['factor']:g})"
    if config.hidden_act not in ("silu", "swish"):
        yield f"the activation '{config.hidden_act}'"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield "sliding-window attention"


def _gpt2_problems(config: Any) -> Iterator[str]:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        yield f"the activation '{config.activation_function}'"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        yield "attention scaled in another way"
    if config.add_cross_attention:
        yield "cross-attention"


def architecture_of(config: Any) -> str:
    """llama.cpp's name of the network.

    llama.cpp's qwen2 demands heads as wide together as the hidden state, and knows no `rope_freqs`. Its llama knows both,
    and biases: the same network once the rows of q and k stand in pairs (`row_order`).
    """
    if config.model_type == "qwen2":
        wide = config.num_attention_heads * head_width(config)
        return "llama" if wide != config.hidden_size or _rope_type(config) == "llama3" else "qwen2"
    return str(config.model_type)


def network_keys(config: Any) -> Keys:
    """Hyper-parameters that llama.cpp builds the network from; the config is one in which `network_problems` finds none."""
    own = _gpt2_keys(config) if config.model_type == "gpt2" else _llama_keys(config)
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
    }
    return {f"{architecture_of(config)}.{key}": value for key, value in (keys | own).items()}


def _llama_keys(config: Any) -> Keys:
    return {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_width(config),
        **_rope_scaling_keys(config),
    }


def _gpt2_keys(config: Any) -> Keys:
    return {
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count_kv": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _rope_type(config: Any) -> str:
    return config.rope_parameters.get("rope_type", "default")


def _rope_scaling_keys(config: Any) -> Keys:
    """Keys of positions that are stretched; `llama3` is a tensor instead, see `rope_factors`."""
    rope = config.rope_parameters
    match _rope_type(config):
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            factor = float(rope.get("factor") or config.max_position_embeddings / original)
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": factor,
                "rope.scaling.original_context_length": int(original),
                # llama.cpp multiplies what it finds here by 1 + 0.1·ln(factor)
                "rope.scaling.attn_factor": _yarn_attention(rope, factor) / (1 + 0.1 * math.log(factor)),
                "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
                "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
            }
    return {}


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

    if config.model_type == "gpt2" or _rope_type(config) != "llama3":
        return None
    rope, width = config.rope_parameters, head_width(config)
    original, low, high = (
        float(rope[name]) for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    frequency = 1 / float(rope["rope_theta"]) ** (np.arange(0, width, 2) / width)
    turns = original * frequency / (2 * np.pi)
    smooth = ((turns - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).astype(np.float32)


def tensors(model: Any, packed: Mapping[str, Any], type: str, embeddings: str) -> list[tuple[str, Any, Any]]:
    """Every parameter under llama.cpp's name, as (name, array, raw type).

    Raises:
        UserError: llama.cpp has no place for a parameter, or float16 no room for its values.
    """
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
    from gguf.quants import dequantize, quantize

    config = model.config
    architecture = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture_of(config)]
    renamed = get_tensor_name_map(architecture, config.num_hidden_layers)
    input_outputs = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    transposed = {f"{name}.weight" for name, module in model.named_modules() if module.__class__.__name__ == "Conv1D"}
    written = []
    factors = rope_factors(config)
    if factors is not None:
        written.append((_ROPE_FREQS, factors, GGMLQuantizationType.F32))
    for name, parameter in model.named_parameters():  # names a tied head once, as the embedding: llama.cpp ties it again
        new_name = renamed.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UserError(f"the gguf exporter has no place for the tensor '{name}'; {_INSTEAD}")
        rows = row_order(name, config)
        matrix = packed.get(name.removesuffix(".weight"))
        if matrix is not None:
            written.append((new_name, rows(q4_0_bytes(matrix, name)), GGMLQuantizationType.Q4_0))
            continue
        values = rows((parameter.T if name in transposed else parameter).detach().float().cpu().contiguous().numpy())
        is_embedding = any(parameter is weight for weight in input_outputs)
        if type == "f32" or values.ndim == 1 or new_name.startswith("position_embd"):
            written.append((new_name, values, GGMLQuantizationType.F32))
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            if is_embedding and type == "q4_0" and embeddings == "q8_0":
                stored, raw = quantize(values, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
                _check_range(name, values, dequantize(stored, raw))
            else:
                stored, raw = values.astype(np.float16), GGMLQuantizationType.F16
                _check_range(name, values, stored)
        written.append((new_name, stored, raw))
    return written


def _check_range(name: str, values: Any, stored: Any) -> None:
    """Refuse what float16 overflows or flushes to zero; rounding alone stays far below the limit."""
    import numpy as np

    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(stored).all():
        raise UserError(f"the tensor '{name}' is too large for float16; set types = ['f32']")
    if largest > 0 and np.linalg.norm((stored - values) / largest) > 0.05 * np.linalg.norm(values / largest):
        raise UserError(f"the tensor '{name}' is too small for float16; set types = ['f32']")


def row_order(name: str, config: Any) -> Callable[[Any], Any]:
    """How the rows of this tensor are reordered: q and k of llama.cpp's llama from halves to pairs, all else as it stands.

    transformers rotates entry i of a head with entry i + d/2; llama.cpp's llama, 2i with 2i + 1. Matrices, their packed
    rows and biases alike.
    """
    import numpy as np

    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    layer = name.split(".")[-2]
    if architecture_of(config) != "llama" or layer not in heads:
        return lambda array: array

    def reorder(array: Any) -> Any:
        order = np.arange(len(array)).reshape(heads[layer], 2, -1).swapaxes(1, 2).reshape(-1)
        return np.ascontiguousarray(array[order])

    return reorder


def q4_0_bytes(matrix: Any, name: str) -> Any:
    """A `quant.Packed` as the bytes of Q4_0, uint8 [out, in / 32 · 18].

    A block of 32 weights is its scale d in float16, then 16 bytes: byte j holds element j in its low nibble and j + 16
    in its high one, each stored as code + 8. Weight = d · code. A group wider than a block repeats its scale.
    """
    import numpy as np

    if matrix.group % BLOCK:
        raise UserError(f"Q4_0 stores groups of {BLOCK}, and '{name}' has {matrix.group}; quantise with group = {BLOCK}")
    outputs, inputs = matrix.codes_OI.shape
    stored_OBK = (matrix.codes_OI.cpu().numpy() + 8).astype(np.uint8).reshape(outputs, inputs // BLOCK, BLOCK)
    nibbles_OBJ = stored_OBK[..., : BLOCK // 2] | (stored_OBK[..., BLOCK // 2 :] << 4)
    scales_OB = np.repeat(matrix.scales_OG.cpu().numpy().astype("<f2"), matrix.group // BLOCK, axis=1)
    scales_OBJ = scales_OB[..., None].view(np.uint8)
    return np.concatenate([scales_OBJ, nibbles_OBJ], axis=-1).reshape(outputs, -1)
