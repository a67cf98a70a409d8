"""Tiny models and tokenizers built in code, and the facts about them that tests rely on."""

import json
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


CORPUS = [
    *TEXT,
    "a  b   c    d",
    "no, no, no: banana bandana",
    "=====  -----",
    "aaaa aaaaaa",
    "def f(x):\n    return x + 1\n\n",
]


def sentencepiece(blanks: str = "gemma", *, whole: bool = True, order: Any = None, extra: tuple[str, ...] = ()) -> Any:
    """A byte-fallback BPE tokenizer, trained on the spot.

    Args:
        blanks: how they are written: "gemma", "never", "llama" (one before each piece), "converted" (likewise, as transformers
            writes it), or a prepend scheme of Metaspace that llama.cpp does not have.
        whole: every way to make a token of two others is a merge, as where SentencePiece trained it; else one of them.
        order: reorders the merges in place.
        extra: tokens that no merge makes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=180, show_progress=False, special_tokens=[]))
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: id for id, token in enumerate([*special, *model["vocab"], *extra])}
    merges = [tuple(pair) for pair in model["merges"]]
    if whole:
        made = [left + right for left, right in merges]
        pairs = [(token[:i], token[i:]) for token in made for i in range(len(token) - 1, 0, -1)]
        merges = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    if order is not None:
        order(merges)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    written = normalizers.Replace(" ", "▁")
    match blanks:
        case "gemma":
            backend.normalizer, backend.pre_tokenizer = written, pre.Split(" ", "merged_with_previous")
        case "llama":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), written])
        case "converted":
            backend.normalizer = normalizers.Sequence([written, normalizers.Replace(Regex(r"\A▁"), "▁▁")])
            backend.pre_tokenizer = pre.Sequence([pre.Metaspace("▁", prepend_scheme="always", split=False)])
        case scheme:
            backend.pre_tokenizer = pre.Metaspace("▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


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
