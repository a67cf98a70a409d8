"""SentencePiece's BPE of a GGUF file: its merges follow from the scores of its tokens."""

import math
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from potstill.edges.gguf_files.entries import BLANK, GIVEN_BLANKS, NORMAL, listed, vocabulary_of
from potstill.edges.gguf_files.header import Gguf


def sentencepiece(file: Gguf, names: list[str], types: list[int], unknown: str | None) -> tuple[Any, bool]:
    """BPE over text whose blanks are written ▁, with a token for each byte, and whether texts begin with BOS by themselves.

    llama.cpp merges two pieces whenever their joined text is a token, the token of the highest score first and the leftmost of
    these. All ways to make a token of two others, in the order of the tokens' scores, do the same: where one token could be
    made in two places, both hold the same two pieces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, scores = vocabulary_of(names, types), listed(file, "scores")
    lost = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if lost or len(scores) != len(names):
        what = f"no token for {len(lost)} of 256 bytes" if lost else f"{len(scores):,} scores for {len(names):,} tokens"
        raise file.refuse(f"its tokenizer has {what}; download the file again")
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(file, vocabulary, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = bool(file.keys.get("tokenizer.ggml.add_space_prefix", True))
    written = normalizers.Replace(" ", BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), written]) if prefixed else written
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend, True


def _merges(file: Gguf, vocabulary: Mapping[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All ways to make a token of two others, the token of the highest score first.

    Raises:
        UserError: two tokens that could be made have one score, so that the place in a text decides between them.
    """
    plain = {name: id for name, id in vocabulary.items() if types[id] in (NORMAL, GIVEN_BLANKS)}
    # given blanks are found in the raw text, so before anything else
    score = {name: math.inf if types[id] == GIVEN_BLANKS else scores[id] for name, id in plain.items()}
    ways = {
        name: pairs
        for name in plain
        if len(name) > 1
        and (pairs := [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in plain and name[i:] in plain])
    }
    shared = {value for value, count in Counter(map(score.__getitem__, ways)).items() if count > 1}
    ways = {name: pairs for name, pairs in ways.items() if score[name] not in shared or _made(name, score)}
    order = sorted(ways, key=lambda name: -score[name])
    tied = (pair for pair in pairwise(order) if score[pair[0]] == score[pair[1]] < math.inf)
    for one, other in tied:
        raise file.refuse(
            f"its tokens {one!r} and {other!r} have one score, so that no rank can say which is merged first; "
            "name the model's transformers folder or hub name instead"
        )
    return [pair for name in order for pair in ways[name]]


def _made(name: str, score: Mapping[str, float]) -> bool:
    """Whether llama.cpp merges a token's own text into that token."""
    pieces = list(name)
    while len(pieces) > 1:
        joined = [left + right for left, right in pairwise(pieces)]
        able = [place for place, text in enumerate(joined) if text in score]
        if not able:
            return False
        place = max(able, key=lambda place: (score[joined[place]], -place))
        pieces[place : place + 2] = [joined[place]]
    return True
