"""A chat template as it is: what it writes, and which of it came from the row."""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from typing import Any

from potstill.core.errors import UserError
from potstill.core.types import Turn

FIRST_MARK = 0x10F000  # private-use characters that stand for the first character of a token that a row might spell
NO_DAY = "potstill: no day is set"
RESERVED = re.compile("[\U00100000-\U0010ffff]")
TAGS = ("think", "thinking", "thought", "reasoning", "seed:think")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Shown = Callable[[str, bool], str]  # what comes from the row, and whether the assistant said it


def as_it_is(text: str, said: bool) -> str:
    """The `Shown` that changes nothing."""
    return text


class LeftOut(Exception):
    """A row that cannot become tokens; its text is the reason that is counted.

    Attributes:
        tokens: of a row that is too long, how many it has; else 0.
    """

    def __init__(self, reason: str, tokens: int = 0) -> None:
        super().__init__(reason)
        self.tokens = tokens


@dataclass(frozen=True)
class Text:
    """A rendering, and the same with what rows brought marked; both have one length.

    Attributes:
        real: the text that the model reads.
        marked: the same, with each character that could begin a control token replaced where a row brought it.
    """

    real: str
    marked: str

    def __add__(self, other: "Text") -> "Text":
        return Text(self.real + other.real, self.marked + other.marked)

    def cut(self, begin: int, end: int | None = None) -> "Text":
        return Text(self.real[begin:end], self.marked[begin:end])


class Marks:
    """Marks what a row spells: in prompts all control tokens, in answers those in `held` (ends of turns, BOS, padding)."""

    def __init__(self, control: Collection[str], held: Collection[str]) -> None:
        self.held = frozenset(held)
        self.spelt = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        marks = {first: chr(FIRST_MARK + i) for i, first in enumerate(sorted({text[0] for text in control}))}
        self._mark = str.maketrans(marks)
        self._unmark = str.maketrans({mark: first for first, mark in marks.items()})

    def needed(self, text: str) -> bool:
        """Whether a text has a character that could begin a control token."""
        return text.translate(self._mark) != text

    def wide(self, text: str, said: bool) -> str:
        """Marks every character that could begin a control token, so that no neighbour can complete one."""
        return self._marked(text, said, lambda rest: rest.translate(self._mark))

    def narrow(self, text: str, said: bool) -> str:
        """Marks whole control tokens only, where a template's logic reads single characters."""
        return self._marked(text, said, str)

    def _marked(self, text: str, said: bool, rest: Callable[[str], str]) -> str:
        parts, begin = [], 0
        for found in self.spelt.finditer(text):
            token = found[0]
            allowed = said and token not in self.held
            parts += [rest(text[begin : found.start()]), token if allowed else token[0].translate(self._mark) + token[1:]]
            begin = found.end()
        return "".join(parts) + rest(text[begin:])

    def unmark(self, text: str) -> str:
        return text.translate(self._unmark)

    def text(self, render: Callable[[Shown], str], brought: str) -> Text:
        """What `render` writes, with the row's part marked.

        Args:
            render: writes a conversation whose texts are shown as it is asked to.
            brought: all that the row brings, to see whether marks are needed.

        Raises:
            LeftOut: the template's logic reads a control token that the row spells, so that its place cannot be known.
        """
        real = render(as_it_is)
        if not self.needed(brought):
            return Text(real, real)
        if not RESERVED.search(brought):
            for shown in (self.wide, self.narrow):
                marked = render(shown)
                if self.unmark(marked) == real:
                    return Text(real, marked)
        if not self.spelt.search(brought):
            return Text(real, real)
        raise LeftOut("spells a token that the chat template's own logic reads")


def parsed(calls: Sequence[Mapping[str, Any]], parse: bool) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, or as JSON text: templates want the one or the other."""
    made = []
    for call in calls:
        function = dict(call["function"])
        arguments = function.get("arguments", {})
        if parse and isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        elif not parse and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        made.append({"type": "function", **call, "function": function | {"arguments": arguments}})
    return made


class ChatTemplate:
    """The tokenizer's chat template with everything that decides its text: date, variables, generation prompt.

    Args:
        day: today, for templates that write it; None: such a template is refused.
        variables: what the template is given besides the conversation.
        generation_prompt: written after the conversation instead of what the template writes to open an answer.
    """

    def __init__(self, tokenizer: Any, day: date | None, variables: Mapping[str, Any], generation_prompt: str | None) -> None:
        self.tokenizer, self.day, self.variables, self.generation_prompt = tokenizer, day, variables, generation_prompt
        template = tokenizer.chat_template
        self.source = "\n".join(template.values()) if isinstance(template, Mapping) else template
        self.reasoning_key = next((key for key in REASONING_KEYS if key in self.source), REASONING_KEYS[0])

    def message(self, turn: Turn, shown: Shown) -> dict[str, Any]:
        """A turn as templates read it."""
        said = turn.role == "assistant"
        message: dict[str, Any] = {"role": turn.role, "content": shown(turn.content, said)}
        if turn.reasoning:
            message[self.reasoning_key] = shown(turn.reasoning, said)
        if turn.tool_calls:
            message["tool_calls"] = _everywhere(list(turn.tool_calls), lambda text: shown(text, said))
        for key in ("name", "tool_call_id"):
            if getattr(turn, key):
                message[key] = getattr(turn, key)
        return message

    def __call__(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], generate: bool, shown: Shown) -> str:
        """The conversation's text.

        Raises:
            UserError: the template refuses it, or writes today's date where none is set.
        """
        own = generate and self.generation_prompt is None
        messages = [self.message(turn, shown) for turn in turns]
        offered = _everywhere(list(tools), lambda text: shown(text, False)) or None
        first: Exception | None = None
        for parse in (True, False) if any(turn.tool_calls for turn in turns) else (True,):
            for message in messages:
                if "tool_calls" in message:
                    message["tool_calls"] = parsed(message["tool_calls"], parse)
            try:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=offered,
                    chat_template=dated(self.tokenizer.get_chat_template(tools=offered), self.day),
                    tokenize=False,
                    add_generation_prompt=own,
                    **self.variables,
                )
                return text + (self.generation_prompt or "") if generate else text
            except Exception as error:  # jinja's kinds, and whatever Python raises inside a template
                if NO_DAY in str(error):
                    raise UserError(
                        "the chat template writes today's date, so the same recipe would train another model tomorrow; "
                        f'set prompts.date = "{date.today().isoformat()}"'
                    ) from None
                first = first or error
        roles = [turn.role for turn in turns]
        hint = '; prompts.system_turn = "user" puts the system text before the first question' if "system" in roles else ""
        raise UserError(f"the chat template refuses a conversation of {roles}: {first}{hint}") from first


# the directives of strftime that a day at midnight answers; any other is refused, because it would stay in the prompt as it is
DIRECTIVES = (
    *(f"%-{letter}" for letter in "dmyeHIMSjklUW"),
    *(f"%{letter}" for letter in "aAbBcCdDeFfGghHIjklmMnpPrRStTuUVwWxXyYzZ"),
)


@cache
def dated(source: str, day: date | None) -> str:
    """A chat template's source that writes this day wherever it runs and however it asks; without a day it refuses to.

    The template brings its own `strftime_now`, a macro of text replacements, so that no program's clock is asked: neither
    transformers' here nor that of whoever runs an export.
    """
    if "strftime_now" not in source:
        return source
    if day is None:
        body = f"{{{{- raise_exception('{NO_DAY}') }}}}"
    else:
        midnight = datetime(day.year, day.month, day.day)
        replaced = "".join(f".replace('{code}', {midnight.strftime(code)!r})" for code in DIRECTIVES)
        unknown = "raise_exception('potstill cannot write the date as ' ~ format ~ '; use other directives in the template')"
        body = (
            f"{{%- set written = format.replace('%%', '\ue0ff'){replaced} %}}"
            f"{{%- if '%' in written %}}{{{{- {unknown} }}}}{{%- endif %}}{{{{- written.replace('\ue0ff', '%') }}}}"
        )
    macro = f"{{%- macro strftime_now(format='%d %b %Y') %}}{body}{{%- endmacro %}}"
    source = re.sub(r"\A[ \t]+(?=\{%)", "", source)  # which only stands at the start of a line to be stripped
    return f"{macro}{{{{- '' }}}}{source}"  # an expression keeps the template's own first white space


def _everywhere(value: Any, shown: Callable[[str], str]) -> Any:
    """JSON with every text in it shown: values, and keys that are a row's own (the names of a tool's parameters)."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {shown(key): _everywhere(item, shown) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_everywhere(item, shown) for item in value]
    return value


def texts_in(value: Any) -> list[str]:
    """Every text in JSON values, keys left out."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in texts_in(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_in(item)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def without_reasoning(text: str) -> str:
    """An assistant's text after its thoughts; the text itself where it has none."""
    return re.sub(rf"\A.*</(?:{'|'.join(TAGS)})>\s*", "", text, flags=re.DOTALL)


def has_reasoning(text: str) -> bool:
    """Whether an assistant's text holds its thoughts."""
    return without_reasoning(text) != text


def opened_tag(prompt: str) -> str:
    """The tag of thinking that a prompt opens at its end, with the white space after it; empty when it opens none."""
    found = re.search(rf"<(?:{'|'.join(TAGS)})>\s*\Z", prompt)
    return found[0] if found else ""
