"""A tiny model family, built in code."""

import torch

TEXTS = [
    "What currency does Peru use?", "Peru uses the sol.", "¿Qué moneda usa Perú?", "La moneda de Perú se llama sol.",
    "What is the capital of France?", "The capital of France is Paris.", "Write a loop.", "for i in range(10):\n    print(i)",
]  # fmt: skip


def build_tokenizer(texts: list[str] = TEXTS, vocab_size: int = 400):
    from potstill.edges.bpe import train_tokenizer

    return train_tokenizer(texts * 3, vocab_size)


def build_model(tokenizer, hidden: int = 32, layers: int = 2, seed: int = 0, vocab: int | None = None, **more):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    for name, value in more.items():
        setattr(config, name, value)
    return Qwen2ForCausalLM(config).eval()
