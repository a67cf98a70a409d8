"""Models that several benchmarks measure."""

from typing import Any

SHAPES = {
    "quick": {"vocab": 32_768, "student": (256, 4), "teacher": (512, 6)},
    "cpu": {"vocab": 151_936, "student": (512, 2), "teacher": (1024, 8)},
    "gpu": {"vocab": 151_936, "student": (896, 24), "teacher": (2048, 36)},
}


def build(shape: dict[str, Any], which: str, seed: int) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

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
