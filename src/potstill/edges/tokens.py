"""Text to tokens and back: which tokens control a conversation, where a text begins, and text that spells a token."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from potstill.edges.models import Tokenizer

FIRST_NAME = 0x100000  # private-use plane 16: one character stands for each control token
THINKING = r"(?i)think|thought|reason"  # in the names of tags around an assistant's thoughts

_TURNS: WeakKeyDictionary[Tokenizer, tuple[str, set[int]]] = WeakKeyDictionary()


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Every token that is matched before text is cut, with its id."""
    return {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Added tokens that could steer a conversation: the special ones, and those that the chat template writes or looks for.

    Not the rest of a vocabulary's own added tokens (HTML tags, runs of line ends), which are text like any other.
    """
    source = _source(tokenizer)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    added = added_tokens(tokenizer) | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: id for text, id in added.items() if text.strip() and (text in special or text in source)}


def _source(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else template or ""


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids that begin, end or pad a text: BOS, EOS and padding."""
    return {id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if id is not None}


def turn_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids of the control tokens that the chat template puts around turns, the tags of thinking left out; none without one."""
    template = _source(tokenizer)
    if tokenizer not in _TURNS or _TURNS[tokenizer][0] != template:
        _TURNS[tokenizer] = template, _turn_tokens(tokenizer) if template else set()
    return _TURNS[tokenizer][1]


MARKS = ("potstill-one", "potstill-two", "potstill-three", "potstill-four")


def _turn_tokens(tokenizer: Tokenizer) -> set[int]:
    """Control tokens that stand beside what turns say, with nothing between but white space and single words such as roles.

    A token that the template only names in a sentence of its own is not one of them. Therefore the text before a first turn
    counts only for a system turn, which never comes later: what a user's turn begins with also stands before the second.
    """
    control = control_tokens(tokenizer)
    turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant") * 2, MARKS, strict=True)]
    system = [{"role": "system", "content": MARKS[3]}]
    rendered = ((turns, False), (turns[:2], False), (turns[:1], True), ([*system, *turns[:2]], False))
    gaps = [_gaps(tokenizer, messages, generate) for messages, generate in rendered]
    several = len(gaps[0]) > 2  # else the template writes one turn, and no second header shows what the first is
    found: set[str] = set()
    for (messages, _), (before, *after) in zip(rendered, gaps, strict=True):
        if messages[0]["role"] == "system" or not several:
            found |= _run(before, control, backwards=True)
        for gap in after:
            found |= _run(gap, control, backwards=False) | _run(gap, control, backwards=True)
    return {control[text] for text in found if not re.search(THINKING, text)}


def _gaps(tokenizer: Tokenizer, messages: list[dict[str, str]], generate: bool) -> list[str]:
    """What the template writes before, between and after the turns; one empty text where it refuses the form."""
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except Exception:  # a template may refuse a form, which says nothing of the others
        return [""]
    return re.split("|".join(MARKS), written)


def _run(gap: str, control: Collection[str], backwards: bool) -> set[str]:
    """The control tokens at one end of a gap, up to the first that is not beside it."""
    spelt = re.compile(f"({'|'.join(map(re.escape, sorted(control, key=len, reverse=True)))})")
    found: set[str] = set()
    pieces = spelt.split(gap) if control else []
    for piece in reversed(pieces) if backwards else pieces:
        if piece in control:
            found.add(piece)
        elif not re.fullmatch(r"\s*[\w-]*\s*", piece):
            break
    return found


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a part of a text: added tokens are matched, nothing is put before or after."""
    return tokenizer.encode(text, add_special_tokens=False)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What `tokenizer(text)` puts before a text: [BOS], or nothing."""
    bare = encode(tokenizer, "a")
    whole = list(tokenizer("a").input_ids)
    return next((whole[:n] for n in range(len(whole) + 1) if bare and whole[n : n + len(bare)] == bare), [])


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The tokens with the tokenizer's own beginning, exactly once."""
    before = beginning(tokenizer)
    return ids if ids[: len(before)] == before else [*before, *ids]


def decode(tokenizer: Tokenizer, ids: Iterable[int], hidden: Collection[int] = ()) -> str:
    """Text of tokens, added ones kept, those in `hidden` left out; white space as the tokens have it."""
    shown = [id for id in ids if id not in hidden]
    return tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Unspellable:
    """A tokenizer in which control tokens go by private names of one character, so that no ordinary text can spell them.

    Everything else (normalising, cutting, merging, prefix spaces, white space around tokens) is the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, control: Mapping[str, int]) -> None:
        self.tokenizer = tokenizer
        self.names = {text: chr(FIRST_NAME + i) for i, text in enumerate(control)}
        self._ids = {self.names[text]: id for text, id in control.items()}
        self._backend = _renamed(tokenizer, self.names, self._ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text in which control tokens are written by their names."""
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        begin = 0
        for end, character in enumerate(text):
            if character in self._ids:
                ids += [*self._as_text(text[begin:end]), self._ids[character]]
                begin = end + 1
        return ids + self._as_text(text[begin:])

    def _as_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def _renamed(tokenizer: Tokenizer, names: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    """A copy of the fast tokenizer with other names for some tokens; None where it cannot be made."""
    from tokenizers import Tokenizer as Backend

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec = json.loads(backend.to_str())
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): id for text, id in vocab.items()}
    else:  # Unigram: pairs of text and score, by id
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    try:
        made = Backend.from_str(json.dumps(spec))
    except Exception:  # merges that make a control token: the library names no kind of its own
        return None
    return made if all(made.token_to_id(name) == id for name, id in ids.items()) else None
