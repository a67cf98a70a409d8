"""Byte-level BPE as llama.cpp stores it: GPT-2's, Llama 3's, Qwen's."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from potstill.exporters._bpe import bpe_problems, merges_of, steps
from potstill.exporters._keys import Keys
from potstill.exporters._networks import INSTEAD

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How a tokenizer cuts text before merging -> llama.cpp's name for it. llama.cpp holds the expressions themselves, and
# takes a wrong name without a word, so a tokenizer is exported only where its own expression is one of these.
PRE_TOKENIZERS = {
    ("split", _CONTRACTIONS + r"\p{N}" + _REST): "qwen2",
    ("split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST): "llama-bpe",
    ("split", r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"): "default",  # of files that named no way
    ("bytes",): "gpt-2",
    ("digits",): "smollm",
}


def byte_level_problems(backend: Mapping[str, Any], added: Sequence[Any]) -> Iterator[str]:
    """Why llama.cpp could not tokenise as this tokenizer does, apart from where it finds added tokens."""
    model = backend["model"]
    if _pre_tokenizer(backend) is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        yield (
            f"the gguf exporter does not recognise how this tokenizer cuts text (known: {known}), and a wrong guess would "
            f"change its tokens silently; {INSTEAD}"
        )
    yield from bpe_problems(model)
    lost = [byte for byte, sign in _alphabet().items() if sign not in model["vocab"]]
    if any(byte in _IN_TEXT for byte in lost) or (lost and model.get("unk_token")):
        yield f"the gguf exporter needs a token for every byte, and the tokenizer lacks {len(lost)}; {INSTEAD}"
    for token in added:
        composed = unicodedata.normalize("NFC", token.content)
        if _composes(backend) and token.normalized and token.content != composed:
            yield (
                f"the added token {token.content!r} is not in Unicode's NFC, to which this tokenizer normalises: "
                f"llama.cpp would not find it in normalised text; {INSTEAD}"
            )


def byte_level_keys(backend: Mapping[str, Any]) -> Keys:
    """Merges, and llama.cpp's name for the way text is cut; `byte_level_problems` finds none in the description."""
    pre = _pre_tokenizer(backend)
    assert pre is not None
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges_of(backend["model"])],
    }


_IN_TEXT = {9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}  # bytes of printable text in UTF-8


def _alphabet() -> dict[int, str]:
    """The sign that byte-level BPE writes for each byte that UTF-8 knows: itself where printable, else from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    signs = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: sign for byte, sign in signs.items() if byte not in (0xC0, 0xC1) and byte <= 0xF4}


def _pre_tokenizer(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way this tokenizer cuts text, read off its own description; None where it has none."""
    match steps(backend["pre_tokenizer"]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            cut = ("bytes",)
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            cut = ("digits",)
        case [*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            cut = ("split", *map(_expression, splits))
        case _:
            return None
    pre = PRE_TOKENIZERS.get(cut)
    # llama.cpp takes whole words from the vocabulary before merging under this one name, and under no other.
    whole_words = bool(backend["model"].get("ignore_merges"))
    plain = not steps(backend["normalizer"]) or _composes(backend)
    return pre if plain and whole_words == (pre == "llama-bpe") else None


def _expression(step: Mapping[str, Any]) -> str | None:
    """The expression by which a step cuts, each match apart; None where it does anything else."""
    match step:
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
    return None


def _composes(backend: Mapping[str, Any]) -> bool:
    return steps(backend["normalizer"]) == [{"type": "NFC"}]
