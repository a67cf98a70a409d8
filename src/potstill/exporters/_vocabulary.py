"""A byte-level BPE tokenizer as llama.cpp stores it, and what llama.cpp would tokenise otherwise."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from potstill.exporters._keys import Keys

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer cuts text before merging -> llama.cpp's name for it. llama.cpp holds the expressions themselves, and
# takes a wrong name without a word, so a tokenizer is exported only where its own expression is one of these.
PRE_TOKENIZERS = {
    ("split", _CONTRACTIONS + r"\p{N}" + _REST): "qwen2",
    ("split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST): "llama-bpe",
    ("bytes", ""): "gpt-2",
    ("digits", ""): "smollm",
}
MOST_ENDS = 3  # a file's places for them: end of sequence, of turn, of message; llama.cpp stops at each
_INSTEAD = "export 'safetensors' instead"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def vocabulary_problems(tokenizer: Any, rows: int) -> list[str]:
    """Why llama.cpp could not tokenise as this tokenizer does; empty where it can. `rows`: of the model's embedding."""
    backend = _backend(tokenizer)
    if backend.get("model", {}).get("type") != "BPE" or backend["model"].get("byte_fallback"):
        return [f"the gguf exporter knows byte-level BPE tokenizers, not SentencePiece; {_INSTEAD}"]
    found = [*_bpe_problems(backend), *_added_token_problems(tokenizer, backend)]
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        found.append(
            f"the tokenizer has token {last}, but the model's embeddings have {rows} rows; "
            "resize the embeddings to the tokenizer before training"
        )
    if tokenizer.eos_token_id is None:
        found.append("the gguf exporter needs the tokenizer to have an end-of-sequence token; set tokenizer.eos_token")
    if _around(tokenizer) is None:
        found.append(
            "the gguf exporter cannot express the tokens that this tokenizer puts around a text: llama.cpp adds the beginning "
            f"of sequence before it, the end of sequence after it, and nothing else; {_INSTEAD}"
        )
    named = [key for key, _ in _named_templates(tokenizer)]
    if len(named) > len(set(named)):
        found.append(f"the gguf exporter cannot tell the chat templates apart: their names differ in signs only; {_INSTEAD}")
    return found


def vocabulary_keys(tokenizer: Any, rows: int, ends: Sequence[int] = ()) -> Keys:
    """Vocabulary, merges and special tokens, the vocabulary padded to the model's `rows` with unused entries.

    Args:
        tokenizer: one in which `vocabulary_problems` finds none.
        ends: ids that end an answer, the end of turn first.
    """
    backend = _backend(tokenizer)
    tokens, types = _tokens(tokenizer, rows)
    pre = _pre_tokenizer(backend)
    assert pre is not None
    begins, stops = _around(tokenizer) or (False, False)
    keys: Keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [p if isinstance(p, str) else " ".join(p) for p in backend["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": stops,
    }
    assert len({*ends, tokenizer.eos_token_id}) <= MOST_ENDS
    others = [end for end in dict.fromkeys(ends) if end != tokenizer.eos_token_id]
    keys |= dict(zip(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"), others, strict=False))
    if tokenizer.bos_token_id is not None:
        keys["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    if tokenizer.pad_token_id is not None:
        keys["tokenizer.ggml.padding_token_id"] = tokenizer.pad_token_id
    return keys | _template_keys(tokenizer)


def _backend(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}


def _bpe_problems(backend: Mapping[str, Any]) -> Iterator[str]:
    model = backend["model"]
    if _pre_tokenizer(backend) is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        yield (
            f"the gguf exporter does not recognise how this tokenizer cuts text (known: {known}), and a wrong guess would "
            f"change its tokens silently; {_INSTEAD}"
        )
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            yield f"the gguf exporter cannot express the tokenizer's {field} = {model[field]!r}; {_INSTEAD}"
    lost = [byte for byte, sign in _alphabet().items() if sign not in model["vocab"]]
    if any(byte in _IN_TEXT for byte in lost) or (lost and model.get("unk_token")):
        yield f"the gguf exporter needs a token for every byte, and the tokenizer lacks {len(lost)}; {_INSTEAD}"


_IN_TEXT = {9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}  # bytes of printable text in UTF-8


def _alphabet() -> dict[int, str]:
    """The sign that byte-level BPE writes for each byte that UTF-8 knows: itself where printable, else from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    signs = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: sign for byte, sign in signs.items() if byte not in (0xC0, 0xC1) and byte <= 0xF4}


def _pre_tokenizer(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way this tokenizer cuts text, read off its own description; None where it has none."""
    outer = backend["pre_tokenizer"] or {}
    match outer.get("pretokenizers", [outer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            cut = ("bytes", "")
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            cut = ("digits", "")
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            cut = ("split", regex)
        case _:
            return None
    pre = PRE_TOKENIZERS.get(cut)
    # llama.cpp takes whole words from the vocabulary before merging under this one name, and under no other.
    whole_words = bool(backend["model"].get("ignore_merges"))
    return pre if whole_words == (pre == "llama-bpe") and _normaliser(backend) in (None, "NFC") else None


def _normaliser(backend: Mapping[str, Any]) -> str | None:
    return (backend["normalizer"] or {}).get("type")


def _added_token_problems(tokenizer: Any, backend: Mapping[str, Any]) -> Iterator[str]:
    """llama.cpp looks for added tokens in the raw text, the longest first, and knows none of their flags."""
    added = list(tokenizer.added_tokens_decoder.values())
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(token, flag):
                yield (
                    f"the gguf exporter cannot express {flag} of the added token {token.content!r}: llama.cpp would give "
                    f"other token ids; add the token without {flag}, or {_INSTEAD}"
                )
        composed = unicodedata.normalize("NFC", token.content)
        if _normaliser(backend) == "NFC" and token.normalized and token.content != composed:
            yield (
                f"the added token {token.content!r} is not in Unicode's NFC, to which this tokenizer normalises: "
                f"llama.cpp would not find it in normalised text; {_INSTEAD}"
            )
    for one, other in _overlapping(added):
        yield (
            f"the added tokens {one.content!r} and {other.content!r} can overlap in a text, and llama.cpp would choose the "
            f"longer where this tokenizer chooses the first; {_INSTEAD}"
        )


def _overlapping(added: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs that llama.cpp and the tokenizer tell apart otherwise, in some text that both could stand in."""
    for one in added:
        for other in added:
            if one is other or not (other.content[:1] in one.content[1:] or one.content in other.content):
                continue
            joints = [k for k in range(1, len(one.content)) if other.content.startswith(one.content[-k:])]
            texts = [one.content + other.content[k:] for k in joints] + [other.content]
            if any(_as_tokenizer(text, one, other) != _as_llamacpp(text, one, other) for text in texts):
                yield one, other


def _as_tokenizer(text: str, one: Any, other: Any) -> list[str]:
    """Leftmost first, then the longest; tokens that are not normalised before those that are."""
    pieces = [text]
    for normalised in (False, True):
        pieces = _cut(pieces, [token.content for token in (one, other) if token.normalized == normalised])
    return pieces


def _as_llamacpp(text: str, one: Any, other: Any) -> list[str]:
    """The longest first, wherever it stands; of equal ones that which comes second in the text: their order is open."""
    pieces = [text]
    for token in sorted((other.content, one.content), key=lambda content: -len(content.encode())):
        pieces = _cut(pieces, [token])
    return pieces


def _cut(pieces: list[str], tokens: list[str]) -> list[str]:
    """Pieces of raw text with the tokens cut out of them; what is a token already is marked by a NUL and left alone."""
    if not tokens:
        return pieces
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    made: list[str] = []
    for piece in pieces:
        if piece.startswith("\0"):
            made.append(piece)
            continue
        raw, found = pattern.split(piece), pattern.findall(piece)
        for i, text in enumerate(raw):
            made += [text] if text else []
            made += [f"\0{found[i]}"] if i < len(found) else []
    return made


def _around(tokenizer: Any) -> tuple[bool, bool] | None:
    """Whether the tokenizer puts its beginning before a text and its end after it; None where it puts anything else."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer("a").input_ids
    for begins in (False, True):
        for stops in (False, True):
            before = [tokenizer.bos_token_id] if begins else []
            if full == [*before, *plain, *([tokenizer.eos_token_id] if stops else [])]:
                return begins, stops
    return None


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    names = tokenizer.get_vocab()
    vocabulary = {index: token for token, index in names.items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(rows):
        if index not in vocabulary:
            tokens.append(_unclashing(f"[PAD{index}]", names))
            types.append(_UNUSED)
            continue
        tokens.append(vocabulary[index])
        types.append(_NORMAL if index not in added else _CONTROL if added[index].special else _USER_DEFINED)
    return tokens, types


def _unclashing(name: str, names: Mapping[str, int]) -> str:
    """A name that no token has: llama.cpp aborts on two tokens of one name."""
    while name in names:
        name = f"[{name}]"
    return name


def _template_keys(tokenizer: Any) -> Keys:
    templates = tokenizer.chat_template
    if not templates:
        return {}
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    keys: Keys = {f"tokenizer.chat_template.{name}": template for name, template in _named_templates(tokenizer)}
    if keys:
        keys["tokenizer.chat_templates"] = [name for name, _ in _named_templates(tokenizer)]
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates["default"]
    return keys


def _named_templates(tokenizer: Any) -> list[tuple[str, str]]:
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return []
    return [(re.sub(r"[^A-Za-z0-9]", "_", name), text) for name, text in templates.items() if name != "default"]
