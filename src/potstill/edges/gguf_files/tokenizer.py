"""The tokenizer of a GGUF file: its kind of BPE, added tokens, what stands around a text, and the chat template."""

from collections.abc import Mapping
from typing import Any

from potstill.edges.gguf_files.byte_level import byte_level
from potstill.edges.gguf_files.entries import CONTROL, UNKNOWN, USER_DEFINED, tokens_of
from potstill.edges.gguf_files.header import Gguf
from potstill.edges.gguf_files.networks import embedding_rows
from potstill.edges.gguf_files.sentencepiece import sentencepiece


def tokenizer_of(file: Gguf) -> Any:
    """The tokenizer of a file, with its chat template.

    Raises:
        UserError: it holds none, or one that cuts text in a way that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    names, types = tokens_of(file)
    special = _special(file, names)
    match kind := file.keys.get("tokenizer.ggml.model"):
        case "gpt2":
            backend, begins = byte_level(file, names, types)
        case "llama":
            backend, begins = sentencepiece(file, names, types, special.get("unk_token"))
        case None:
            raise file.refuse("it holds no tokenizer; take a file that has one")
        case _:
            raise file.refuse(
                f"its tokenizer is of llama.cpp's kind '{kind}', and only byte-level BPE ('gpt2') and SentencePiece's BPE "
                "('llama') are read; name the model's transformers folder or hub name instead"
            )
    _add_tokens(backend, names, types)
    _add_ends(file, backend, special, begins=begins)
    if len(names) > embedding_rows(file):
        raise file.refuse(f"it has {len(names):,} tokens and {embedding_rows(file):,} embeddings; download it again")
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **_template(file))


def _add_tokens(backend: Any, names: list[str], types: list[int]) -> None:
    """Tokens that are found in the raw text, before it is cut; each keeps its id, because the vocabulary has it already."""
    from tokenizers import AddedToken

    special = [name for name, type in zip(names, types, strict=True) if type in (UNKNOWN, CONTROL)]
    others = [name for name, type in zip(names, types, strict=True) if type == USER_DEFINED]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in others])


def _add_ends(file: Gguf, backend: Any, special: Mapping[str, str], *, begins: bool) -> None:
    """BOS before a text and EOS after it, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    named = {"bos": special.get("bos_token"), "eos": special.get("eos_token")}
    wanted = {
        "bos": file.keys.get("tokenizer.ggml.add_bos_token", begins and named["bos"] is not None),
        "eos": file.keys.get("tokenizer.ggml.add_eos_token", False),
    }
    around = {end: named[end] or "" for end, put in wanted.items() if put}
    lost = next((end for end, name in around.items() if not name), None)
    if lost is not None:
        raise file.refuse(f"it asks for {lost.upper()} around texts and names no such token; convert the model again")
    if around:
        pieces = [name for name in (around.get("bos"), "$A", around.get("eos")) if name]
        ids = [(name, backend.token_to_id(name)) for name in around.values()]
        backend.post_processor = TemplateProcessing(single=pieces, special_tokens=ids)


def _special(file: Gguf, names: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {token: file.keys.get(f"tokenizer.ggml.{key}_token_id") for token, key in keys.items()}
    wrong = next((token for token, id in found.items() if id is not None and not 0 <= id < len(names)), None)
    if wrong is not None:
        raise file.refuse(f"its {wrong} has id {found[wrong]}, and there are {len(names):,} tokens; convert the model again")
    return {token: names[id] for token, id in found.items() if id is not None}


def _template(file: Gguf) -> dict[str, Any]:
    """The chat template, or all of them by name."""
    default = file.keys.get("tokenizer.chat_template")
    names = file.keys.get("tokenizer.chat_templates", ())
    named = {name: file.keys.get(f"tokenizer.chat_template.{name}") for name in names}
    for template in [*named.values(), *([default] if default is not None else [])]:
        if not isinstance(template, str) or not _in_utf8(template):
            raise file.refuse("its chat template is not text in UTF-8, so the file is damaged; copy or download it again")
    if named:
        return {"chat_template": ({"default": default} if default is not None else {}) | named}
    return {"chat_template": default} if default is not None else {}


def _in_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that were no UTF-8 were read as halves of surrogate pairs
        return False
    return True
