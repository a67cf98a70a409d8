"""Tiny models and tokenizers built in code, and the facts about them that tests rely on."""

from typing import Any

QWEN2_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = ["The still heats the wash until its spirit rises, and the spirit is drawn off.", "It's 12 o'clock: don't wait!"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ROWS = 320  # of the models' embeddings; the tokenizer has fewer tokens


def train_tokenizer(pre_tokenizers: list[Any], normalizer: Any = None, ignore_merges: bool = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers[0] if len(pre_tokenizers) == 1 else pre.Sequence(pre_tokenizers)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def split_then_bytes(regex: str) -> list[Any]:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def tiny_model(family: str, *, tied: bool = False, width: int = 64, **config: Any) -> Any:
    import torch
    import transformers as t

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": ROWS, "tie_word_embeddings": tied, "max_position_embeddings": 128}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "bos_token_id": None, "eos_token_id": None}
    match family:
        case "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**(shape | rope | config)))
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**(shape | rope | {"attention_bias": True} | config)))
        case "mistral":
            model = t.MistralForCausalLM(t.MistralConfig(**(shape | rope | {"sliding_window": None} | config)))
        case "qwen3":
            model = t.Qwen3ForCausalLM(t.Qwen3Config(**(shape | rope | {"head_dim": 32} | config)))
        case "smollm3":
            model = t.SmolLM3ForCausalLM(
                t.SmolLM3Config(**(shape | rope | {"num_hidden_layers": 5, "pad_token_id": 0} | config))
            )
        case "gemma3":
            own = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7}
            own |= {"rope_parameters": {"full_attention": rope["rope_parameters"]}}  # the window's base is its default
            model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**(shape | rope | own | config)))
        case "gpt2":
            shape = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": ROWS}
            shape |= {"tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None}
            model = t.GPT2LMHeadModel(t.GPT2Config(**(shape | config)))
        case _:
            raise AssertionError(family)
    for parameter in model.parameters():  # biases too: at their initial zero, a lost one would go unseen
        torch.nn.init.normal_(parameter, std=0.2)
    for name, parameter in model.named_parameters():  # Gemma's: a tenth of the inner layer and so of its rounding, because
        if name.endswith("post_feedforward_layernorm.weight"):  # llama.cpp looks its GELU up in a table of float16
            parameter.data -= 0.9
    return model.eval()
