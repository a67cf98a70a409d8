"""Models that several benchmarks measure."""

import os
from pathlib import Path
from typing import Any

REAL_MODELS = "POTSTILL_REAL_MODELS"  # names a folder that holds `smollm2`
SHAPES: dict[str, dict[str, Any]] = {
    "quick": {"vocab": 32_768, "student": (256, 4), "teacher": (512, 6)},
    "cpu": {"vocab": 151_936, "student": (512, 2), "teacher": (1024, 8)},
    "gpu": {"vocab": 151_936, "student": (896, 24), "teacher": (2048, 36)},
    # SmolLM2-135M and every other of its first 24 layers: keys, values and inner units as they are there
    "real": {"vocab": 49_152, "student": (576, 12), "teacher": (576, 30), "kv": 192, "inner": 1536},
}


def real_model() -> str | None:
    """`path:…` of SmolLM2-135M-Instruct; None where it is not there."""
    folder = os.environ.get(REAL_MODELS)
    return f"path:{folder}/smollm2" if folder and (Path(folder) / "smollm2" / "config.json").is_file() else None


def model_of(shape: str) -> str | None:
    """`path:…` of the pretrained model that a shape measures; None where weights are random.

    Raises:
        SystemExit: it is not there.
    """
    if "inner" not in SHAPES.get(shape, {}):
        return None
    where = real_model()
    if where is None:
        raise SystemExit(f"--shape {shape} needs the folder that {REAL_MODELS} names, with `smollm2` in it; see `make models`")
    return where


def real(which: str) -> Any:
    """SmolLM2, or a student of 12 of its layers, in float32."""
    from potstill.edges.models import load_model
    from potstill.inits.layers import Layers

    where = real_model()
    assert where is not None
    model = load_model(where)
    return model if which == "teacher" else Layers(keep=tuple(range(0, 24, 2)))(model).requires_grad_(True)


def build(shape: dict[str, Any], which: str, seed: int) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if "inner" in shape:
        return real(which)
    width, layers = shape[which]
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape["vocab"],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        intermediate_size=4 * width,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)
