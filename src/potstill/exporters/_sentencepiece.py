"""BPE over text whose blanks are written ▁, with tokens for bytes: SentencePiece's, as Gemma, Llama 2 and Mistral have it.

llama.cpp keeps no merges of such a tokenizer: it merges two pieces whenever their joined text is a token, the token of the
highest score first and the leftmost of these. The tokenizer merges the pair of the lowest rank, and the leftmost of these.
With minus the rank of its last merge as a token's score both do the same to every text: two places where one token could
be made hold the same pair of pieces, because within each place the token's own text was merged alone, and that goes one way.
So it is enough to merge every token's own text down to two pieces, and to see that the tokenizer joins these two.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from potstill.exporters._bpe import Merge, bpe_problems, merges_of, steps
from potstill.exporters._keys import Keys
from potstill.exporters._networks import INSTEAD

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_BLANK = "▁"
_WRITTEN = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
_PREPENDED = {"type": "Prepend", "prepend": _BLANK}
_DOUBLED = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": _BLANK * 2}
_NO_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_NEVER, _ALWAYS = (
    {"type": "Metaspace", "replacement": _BLANK, "prepend_scheme": scheme, "split": False} for scheme in ("never", "always")
)
# Normalizer, pre-tokenizer -> whether they put a blank before every piece of text between added tokens, or before none.
# Metaspace alone puts one before those that begin with none, or ("first") before the text's first piece: llama.cpp cannot.
_BLANKS = (
    ([_WRITTEN], [_NO_CUT], False),  # Gemma's
    ([_WRITTEN], [], False),
    ([_WRITTEN], [_NEVER], False),
    ([], [_NEVER], False),
    ([_PREPENDED, _WRITTEN], [], True),  # Llama 2's and Mistral's first
    ([_WRITTEN, _DOUBLED], [_ALWAYS], True),  # as transformers 5 makes it of a SentencePiece file
)


def sentencepiece_problems(backend: Mapping[str, Any], added: Sequence[Any], tokens: Sequence[str]) -> Iterator[str]:
    """Why llama.cpp could not tokenise as this tokenizer does, apart from where it finds added tokens.

    Args:
        added: tokens that are cut out of a text before it is merged.
        tokens: of the file, by id.
    """
    model = backend["model"]
    prepends = _prepends(backend)
    if prepends is None:
        yield (
            f"the gguf exporter cannot express how this tokenizer prepares text ({_steps_in_words(backend)}): llama.cpp writes "
            f"blanks as {_BLANK}, and puts one before every piece of text between special tokens or before none; {INSTEAD}"
            f"{_REBUILT if _is_rebuilt(backend) else ''}"
        )
    yield from bpe_problems(model)
    if model.get("ignore_merges"):
        yield f"the gguf exporter cannot express ignore_merges of a tokenizer with byte_fallback; {INSTEAD}"
    merges = merges_of(model)
    lost = [byte for byte in BYTES if byte not in model["vocab"]]
    if lost or not set(BYTES).isdisjoint(piece for merge in merges for piece in merge):
        yield f"the gguf exporter needs a token for every byte, never merged, and the tokenizer lacks {len(lost)}; {INSTEAD}"
    for token in added:
        if token.normalized and (prepends or _looked_for_among_blanks(backend, token.content)):
            yield (
                f"the added token {token.content!r} is looked for after blanks are written as {_BLANK}, and llama.cpp "
                f"looks for it before; add it with normalized = False, or {INSTEAD}"
            )
    cut_out = {token.content for token in added}
    yield from _merged_otherwise(_ranks(merges), [token for token in tokens if token not in cut_out])


_REBUILT = (
    ", or write tokenizer_class = 'PreTrainedTokenizerFast' in the tokenizer_config.json of the model that you begin with, "
    "before it is trained: for LlamaTokenizer transformers builds this tokenizer in place of the one in tokenizer.json"
)


def _is_rebuilt(backend: Mapping[str, Any]) -> bool:
    """Whether it is what transformers 5 builds for the class LlamaTokenizer, whatever tokenizer.json says.

    Of " a" llama.cpp makes "▁▁", "a" and this tokenizer "▁", "a"; with the scheme "first" it makes "<s>", "a" of "<s>a", and
    llama.cpp "<s>", "▁", "a".
    """
    match steps(backend["normalizer"]), steps(backend["pre_tokenizer"]):
        case [], [{"type": "Metaspace", "prepend_scheme": "first" | "always", "split": False}]:
            return True
    return False


def is_blanks(token: Any) -> bool:
    """Whether an added token is text with blanks, such as Gemma's runs of them.

    The tokenizer looks for the sign ▁ itself and finds it in no ordinary text: it merges such tokens like any other. llama.cpp
    would print the sign.
    """
    return not token.special and not token.normalized and _BLANK in token.content


def _looked_for_among_blanks(backend: Mapping[str, Any], content: str) -> bool:
    return bool(steps(backend["normalizer"])) and (" " in content or _BLANK in content)


def _merged_otherwise(ranks: Mapping[Merge, int], tokens: Sequence[str]) -> Iterator[str]:
    """Tokens that llama.cpp would make of two pieces that the tokenizer leaves apart."""
    pairs = (last_pair(token, ranks) for token in tokens)
    found = [pair for pair in pairs if pair is not None and pair not in ranks]
    if found:
        left, right = found[0]
        yield (
            f"llama.cpp would merge {left!r} and {right!r}, because {left + right!r} is a token, and this tokenizer does not "
            f"({len(found):,} such tokens); {INSTEAD}"
        )


def sentencepiece_keys(backend: Mapping[str, Any], tokens: Sequence[str]) -> Keys:
    """Scores of the tokens, and where blanks are put; `sentencepiece_problems` finds none in the description."""
    ranks = _ranks(merges_of(backend["model"]))
    last_pairs = (last_pair(token, ranks) for token in tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks[pair] if pair in ranks else len(ranks)) for pair in last_pairs],
        "tokenizer.ggml.add_space_prefix": bool(_prepends(backend)),
    }


def _ranks(merges: Sequence[Merge]) -> dict[Merge, int]:
    return {pair: rank for rank, pair in enumerate(merges)}


def last_pair(text: str, ranks: Mapping[Merge, int]) -> Merge | None:
    """The two pieces that a text is merged into before it is whole; None where merging ends before, or it has one character."""
    pieces = list(text)
    while len(pieces) > 2:
        place, lowest = -1, len(ranks)
        for i in range(len(pieces) - 1):  # in the plainest words: Gemma has 262,144 tokens
            rank = ranks.get((pieces[i], pieces[i + 1]), lowest)
            if rank < lowest:
                place, lowest = i, rank
        if place < 0:
            return None
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _prepends(backend: Mapping[str, Any]) -> bool | None:
    """Whether a blank is put before every piece of text between added tokens, before none (False), or otherwise (None)."""
    own = steps(backend["normalizer"]), steps(backend["pre_tokenizer"])
    return next((prepends for normalizer, cut, prepends in _BLANKS if own == (normalizer, cut)), None)


def _steps_in_words(backend: Mapping[str, Any]) -> str:
    found = [*steps(backend["normalizer"]), *steps(backend["pre_tokenizer"])]
    named = [step["type"] + (f" {step['prepend_scheme']}" if "prepend_scheme" in step else "") for step in found]
    return ", ".join(named) or "as they are"
