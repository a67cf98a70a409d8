"""Shapes of the models that the shipped recipes name, so that `plan` works without a network.

From each model's published `config.json`. There is no Qwen2-3B, and Qwen2.5-3B cannot
stand in for it: Qwen2.5's tokenizer has tokens that Qwen2's lacks. Where the paper says so, Qwen2-1.5B is used.
"""

from typing import Any


def _qwen(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int = 151_936, tied: bool = True
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": hidden, "n_layer": layers, "n_head": heads}


KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-0.5B": _qwen(896, 24, 14, 2, 4864),
    "Qwen/Qwen2-1.5B": _qwen(1536, 28, 12, 2, 8960),
    "Qwen/Qwen2-7B": _qwen(3584, 28, 28, 4, 18_944, vocab=152_064, tied=False),
    "Qwen/Qwen2.5-0.5B": _qwen(896, 24, 14, 2, 4864),
    "Qwen/Qwen2.5-1.5B": _qwen(1536, 28, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": _qwen(2048, 36, 16, 2, 11_008),
    "Qwen/Qwen2.5-7B": _qwen(3584, 28, 28, 4, 18_944, vocab=152_064, tied=False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "google/gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 2048,
        "sliding_window": 512,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
        "tie_word_embeddings": True,
    },
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
}
for _name in [name for name in KNOWN if name.startswith("Qwen/")]:
    KNOWN[f"{_name}-Instruct"] = KNOWN[_name]
