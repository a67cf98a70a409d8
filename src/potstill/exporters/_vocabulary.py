"""A tokenizer as llama.cpp stores it, and what llama.cpp would tokenise otherwise."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from potstill.exporters._added_tokens import added_token_problems
from potstill.exporters._bpe import steps
from potstill.exporters._byte_level import byte_level_keys, byte_level_problems
from potstill.exporters._keys import Keys
from potstill.exporters._networks import INSTEAD
from potstill.exporters._sentencepiece import BYTES, is_blanks, sentencepiece_keys, sentencepiece_problems

MOST_ENDS = 3  # a file's places for them: end of sequence, of turn, of message; llama.cpp stops at each
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # llama.cpp's token types


def vocabulary_problems(tokenizer: Any, rows: int) -> list[str]:
    """Why llama.cpp could not tokenise as this tokenizer does; empty where it can. `rows`: of the model's embedding."""
    backend = _backend(tokenizer)
    model = backend.get("model", {}).get("type", type(tokenizer).__name__)
    if model != "BPE":
        return [f"the gguf exporter knows BPE tokenizers, not {model}; {INSTEAD}"]
    added = list(tokenizer.added_tokens_decoder.values())
    if _falls_back(backend):
        added = [token for token in added if not is_blanks(token)]
        found = [*sentencepiece_problems(backend, added, _tokens(tokenizer, backend, rows)[0])]
    else:
        found = [*byte_level_problems(backend, added)]
    found += added_token_problems(added)
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
            f"of sequence before it, the end of sequence after it, and nothing else; {INSTEAD}"
        )
    named = [key for key, _ in _named_templates(tokenizer)]
    if len(named) > len(set(named)):
        found.append(f"the gguf exporter cannot tell the chat templates apart: their names differ in signs only; {INSTEAD}")
    return found


def vocabulary_keys(tokenizer: Any, rows: int, ends: Sequence[int] = ()) -> Keys:
    """Vocabulary, merges and special tokens, the vocabulary padded to the model's `rows` with unused entries.

    Args:
        tokenizer: one in which `vocabulary_problems` finds none.
        ends: ids that end an answer, the end of turn first.
    """
    backend = _backend(tokenizer)
    tokens, types = _tokens(tokenizer, backend, rows)
    begins, stops = _around(tokenizer) or (False, False)
    keys: Keys = {
        **(sentencepiece_keys(backend, tokens) if _falls_back(backend) else byte_level_keys(backend)),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
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
    if tokenizer.unk_token_id is not None and _falls_back(backend):
        keys["tokenizer.ggml.unknown_token_id"] = tokenizer.unk_token_id
    return keys | _template_keys(tokenizer)


def _backend(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}


def composes(tokenizer: Any) -> bool:
    """Whether the tokenizer brings text to Unicode's NFC first, which llama.cpp leaves to its caller."""
    return steps(_backend(tokenizer).get("normalizer")) == [{"type": "NFC"}]


def _falls_back(backend: Mapping[str, Any]) -> bool:
    """Whether unknown characters become tokens of their bytes, as SentencePiece's do; byte-level BPE knows no unknown ones."""
    return bool(backend["model"].get("byte_fallback"))


def _around(tokenizer: Any) -> tuple[bool, bool] | None:
    """Whether the tokenizer puts its beginning before a text and its end after it; None where it puts anything else."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer("a").input_ids
    for begins in (False, True):
        for stops in (False, True):
            before = [tokenizer.bos_token_id] if begins else []
            if full == [*before, *plain, *([tokenizer.eos_token_id] if stops else [])]:
                return begins, stops
    return None


def _tokens(tokenizer: Any, backend: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The file's tokens by id, and their types, padded to `rows`."""
    names = tokenizer.get_vocab()
    vocabulary = {index: token for token, index in names.items()}
    types = {id: _CONTROL if token.special else _USER_DEFINED for id, token in tokenizer.added_tokens_decoder.items()}
    if _falls_back(backend):
        types |= {id: _NORMAL for id, token in tokenizer.added_tokens_decoder.items() if is_blanks(token)}
        types |= {names[byte]: _BYTE for byte in BYTES if byte in names}
    tokens = [vocabulary[i] if i in vocabulary else _unclashing(f"[PAD{i}]", names) for i in range(rows)]
    return tokens, [types.get(i, _NORMAL) if i in vocabulary else _UNUSED for i in range(rows)]


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
