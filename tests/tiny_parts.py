"""Tiny models of three families, tokenizers and rows, built in code; and Work folders that report to nobody."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "amber barley copper draff ester foreshot grist heads kiln lauter malt neck oak peat reflux spirit tun vapour wash yeast"
)


def rows(count: int) -> list[dict[str, Any]]:
    """Questions with distinct keys, answers of several lengths, some with context, two languages."""
    words = WORDS.split()
    made = []
    for i in range(count):
        first, second = words[i % len(words)], words[(i * 7 + 3) % len(words)]
        row = {
            "instruction": f"Say {first} and {second}, number {i}.",
            "response": " ".join([first, second] * (1 + i % 3)) + ".",
        }
        row["context"] = f"The {second} comes before the {first}." if i % 2 else ""
        row["language"] = "en" if i % 3 else "es"
        made.append(row)
    return made


def write_rows(path: Path, count: int = 60) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
    return path


def texts() -> list[str]:
    return [f"{row['context']}\n{row['instruction']}\n{row['response']}" for row in rows(60)]


def chat_tokenizer(vocab_size: int = 400) -> Any:
    from potstill.edges.bpe import train_tokenizer

    return train_tokenizer(texts(), vocab_size)


def gpt2_tokenizer(vocab_size: int = 400) -> Any:
    """Byte-level BPE as GPT-2 has it: no chat template, and one token that begins, ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    vocab = bpe.get_vocab()
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    end = "<|endoftext|>"
    return GPT2Tokenizer(vocab=vocab, merges=merges, eos_token=end, bos_token=end, unk_token=end, pad_token=end)


def tiny_model(
    family: str, vocab: int, *, width: int = 32, seed: int = 0, eos: int | None = 0, std: float = 0.1, **more: Any
) -> Any:
    """Two layers, weights large enough that answers and gradients are not all alike."""
    import transformers as t

    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 256, "tie_word_embeddings": True}
    ids = {"eos_token_id": eos, "bos_token_id": None, "pad_token_id": None}
    match family:
        case "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**(shape | ids | more)))
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**(shape | ids | more)))
        case "gpt2":
            shape = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": vocab}
            model = t.GPT2LMHeadModel(t.GPT2Config(**(shape | ids | more)))
        case _:
            config = t.AutoConfig.for_model(family, **(shape | {"head_dim": width // 4} | ids | more))
            model = t.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def save_pair(folder: Path, student: int = 16, teacher: int = 32) -> None:
    """Models of these widths with one tokenizer, in the folders `student` and `teacher`."""
    from potstill.edges.models import save_model

    tokenizer = chat_tokenizer(320)
    for name, width, seed in (("student", student, 1), ("teacher", teacher, 2)):
        save_model(tiny_model("qwen2", len(tokenizer), width=width, seed=seed), tokenizer, folder / name)
