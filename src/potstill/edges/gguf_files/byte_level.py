"""Byte-level BPE of a GGUF file: merges, and how text is cut before it is merged."""

from dataclasses import dataclass
from typing import Any

from potstill.edges.gguf_files.entries import listed, vocabulary_of
from potstill.edges.gguf_files.header import Gguf

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Cut:
    """How text is cut before it is merged, under one of llama.cpp's names.

    Attributes:
        splits: expressions, each cutting what the one before it left; none: GPT-2's, which ByteLevel has itself.
        digits: whether each digit is apart before GPT-2's expression.
        composes: whether the models of that name normalise to NFC; the file does not say, llama.cpp does not do it.
        whole_words: whether a word that is a token is taken as it is, before merging.
        begins: whether texts begin with BOS where the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    composes: bool = False
    whole_words: bool = False
    begins: bool = False


_QWEN2 = _Cut((_CONTRACTIONS + r"\p{N}" + _REST,), composes=True)
_LLAMA3 = _Cut((_CONTRACTIONS + r"\p{N}{1,3}" + _REST,), whole_words=True, begins=True)
_DEFAULT = "default"
_CUTS = {
    _DEFAULT: _Cut((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smollm": _Cut(digits=True),
    "gpt-2": _Cut(),
}


def byte_level(file: Gguf, names: list[str], types: list[int]) -> tuple[Any, bool]:
    """GPT-2's kind of BPE, and whether texts begin with BOS where the file does not say."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = _cut_of(file)
    merges = [tuple(merge.split(" ", 1)) for merge in listed(file, "merges")]
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary_of(names, types), merges=merges, ignore_merges=cut.whole_words))
    except Exception as error:
        raise file.refuse(f"its tokens and merges do not fit together ({str(error)[:160]}); download it again") from error
    before = _before(cut)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.splits)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, by_bytes]) if before else by_bytes
    backend.decoder = decoders.ByteLevel()
    if cut.composes:
        backend.normalizer = normalizers.NFC()
    return backend, cut.begins


def byte_level_note(file: Gguf) -> str:
    """What a person must know of how a file's text is cut, in one line; "" where the file names the way.

    llama.cpp warns too where the key is absent.
    """
    if file.keys.get("tokenizer.ggml.model") != "gpt2" or _cut_name(file) != _DEFAULT:
        return ""
    return (
        f"{file.where}: does not name how its tokenizer cuts text (tokenizer.ggml.pre), so text is cut in llama.cpp's default "
        "way; a model that was trained with another way answers worse: a file that a newer llama.cpp converted names the way"
    )


def _cut_of(file: Gguf) -> _Cut:
    name = _cut_name(file)
    if name in _CUTS:
        return _CUTS[name]
    raise file.refuse(
        f"it names '{name}' for how its tokenizer cuts text (tokenizer.ggml.pre; known: {', '.join(sorted(_CUTS))}), and a "
        "guess would change its tokens silently; name the model's transformers folder or hub name instead"
    )


def _cut_name(file: Gguf) -> str:
    return str(file.keys.get("tokenizer.ggml.pre") or _DEFAULT)


def _before(cut: _Cut) -> list[Any]:
    """What cuts text before its bytes are written as signs."""
    from tokenizers import Regex, pre_tokenizers

    digits = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    return [*digits, *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in cut.splits)]
