"""A chat template as the texts that stand around what is said, for programs that cannot run Jinja."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from potstill.data.templates import without_reasoning

Message = dict[str, str]

_ASKED, _SAID, _SYSTEM = "potstill-question-{}", "potstill-answer-{}", "potstill-system"
# What a conversation may hold; no control token, whose place is not for the template to say.
_HARD = ("<b>\"two\" & 'one'</b>", "{{ .System }} {% if x %}", "one\ntwo\n\nthree", "¿Qué tal? 日本語 👍", "\\n $HOME `x`")
_BLANKS = " \n blanks around \n "
_THOUGHT = "<think>\nfirst\n</think>\n\nthen"


@dataclass(frozen=True)
class Opening:
    """What stands before the first question.

    Attributes:
        bare: all of it, where the conversation has no system message.
        system: before and after the system message; None where the template refuses or loses one.
    """

    bare: str
    system: tuple[str, str] | None


@dataclass(frozen=True)
class Pieces:
    """What a template writes around a conversation of an optional system message, questions and answers.

    Attributes:
        alone: the opening where there is one question.
        several: the opening where there are more.
        answered: between a question and its answer.
        again: between an answer and a later question that is not the last.
        last: between an answer and the last question.
        closing: after the last question; it opens the answer.
        trims: white space around questions and answers is left out.
        trims_system: so it is around the system message.
        forgets_thoughts: an earlier answer's thoughts are left out.
    """

    alone: Opening
    several: Opening
    answered: str
    again: str
    last: str
    closing: str
    trims: bool = False
    trims_system: bool = False
    forgets_thoughts: bool = False

    def text(self, messages: Sequence[Message]) -> str:
        """What the template writes for a conversation, the opening of the next answer included."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        asked = sum(turn["role"] == "user" for turn in turns)
        opening = self.alone if asked == 1 else self.several
        written = opening.bare
        if system and opening.system:
            shown = system[0].strip() if self.trims_system else system[0]
            written = opening.system[0] + shown + opening.system[1]
        for turn in turns:
            said = turn["role"] == "assistant"
            content = without_reasoning(turn["content"]) if said and self.forgets_thoughts else turn["content"]
            asked -= not said
            around = (self.last if asked == 1 else self.again) if said else (self.answered if asked else self.closing)
            written += (content.strip() if self.trims else content) + around
        return written

    def system_text(self) -> str:
        """The system message that the template writes where there is none of the user's; empty where it writes none."""
        if self.alone.system is None:
            return ""
        before, after = self.alone.system
        inside = self.alone.bare.startswith(before) and self.alone.bare.endswith(after)
        return self.alone.bare[len(before) : len(self.alone.bare) - len(after)] if inside else ""


def pieces_of(tokenizer: Any) -> Pieces | None:
    """The pieces of a tokenizer's chat template; None where no fixed texts around what is said write what it writes."""
    try:
        found = _cut(tokenizer)
    except Exception:  # whatever a template raises: it refuses a plain conversation
        return None
    if found is None:
        return None
    forms = (
        replace(found, trims=trims, trims_system=trims_system, forgets_thoughts=forgets)
        for trims, trims_system, forgets in product((False, True), repeat=3)
    )
    return next((form for form in forms if _writes_the_same(form, tokenizer)), None)


def _cut(tokenizer: Any) -> Pieces | None:
    alone, several, longer = (_gaps(tokenizer, asked, system=False) for asked in (1, 2, 3))
    if alone is None or several is None or longer is None:
        return None
    return Pieces(
        alone=Opening(alone[0], _system_opening(tokenizer, 1)),
        several=Opening(several[0], _system_opening(tokenizer, 2)),
        answered=several[1],
        again=longer[2],
        last=several[2],
        closing=alone[1],
    )


def _system_opening(tokenizer: Any, asked: int) -> tuple[str, str] | None:
    try:
        gaps = _gaps(tokenizer, asked, system=True)
    except Exception:  # a template without a place for a system message says so in its own way
        return None
    return None if gaps is None else (gaps[0], gaps[1])


def _gaps(tokenizer: Any, asked: int, *, system: bool) -> list[str] | None:
    """What stands before, between and after what is said; None where something said is lost or moved."""
    marks = [_SYSTEM] if system else []
    for i in range(asked):
        marks += [_ASKED.format(i)] + ([_SAID.format(i)] if i < asked - 1 else [])
    rest, gaps = _written(tokenizer, _conversation(marks, system=system)), []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        gaps.append(before)
    return [*gaps, rest]


def _conversation(texts: Sequence[str], *, system: bool) -> list[Message]:
    """Texts as turns: the system message where there is one, then questions and answers in turn."""
    messages = [{"role": "system", "content": texts[0]}] if system else []
    for i, text in enumerate(texts[system:]):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return messages


def _written(tokenizer: Any, messages: list[Message]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _writes_the_same(pieces: Pieces, tokenizer: Any) -> bool:
    systems = [False, True] if pieces.alone.system and pieces.several.system else [False]
    for system in systems:
        for count in (1, 3, 5, 7):
            for shift in range(len(_HARD) + 2):
                texts = (*_HARD, _BLANKS, _THOUGHT)
                messages = _conversation([texts[(shift + i) % len(texts)] for i in range(count + system)], system=system)
                if pieces.text(messages) != _written(tokenizer, messages):
                    return False
    return True
