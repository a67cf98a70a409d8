"""A row as a model sees it: prompt tokens, response tokens, and where a turn ends."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.data.templates import (
    ChatTemplate,
    LeftOut,
    Marks,
    Shown,
    Text,
    as_it_is,
    has_reasoning,
    opened_tag,
    texts_in,
    without_reasoning,
)
from potstill.edges.tokens import Unspellable, beginning, begun, control_tokens, decode, encode, end_tokens, turn_tokens

TOO_LONG = "prompt too long"  # why a row does not enter; `to_raise` knows its field
PLAIN = {
    # Taori et al., Stanford Alpaca, 2023: the template that MiniLLM and the paper use for Dolly
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n",
    ),
    "alpaca_es": (
        "A continuación hay una instrucción que describe una tarea. "
        "Escribe una respuesta que complete adecuadamente la petición.\n\n"
        "### Instrucción:\n{instruction}\n\n### Respuesta:\n",
        "A continuación hay una instrucción que describe una tarea, junto con un texto que da más contexto. "
        "Escribe una respuesta que complete adecuadamente la petición.\n\n"
        "### Instrucción:\n{instruction}\n\n### Texto:\n{context}\n\n### Respuesta:\n",
    ),
}


class Prompts(Settings):
    """How rows become tokens; the same in training, calibration and evaluation."""

    format: Literal["chat", "alpaca", "alpaca_es"] = Field(
        default="chat", description="the tokenizer's chat template, or a plain template"
    )
    system: str | None = Field(default=None, description="system message, where a row brings none of its own")
    system_turn: Literal["own", "user"] = Field(
        default="own",
        description="own: a turn of role system; user: before the first question, for templates without that role",
    )
    date: str | None = Field(default=None, description="today, as YYYY-MM-DD, for chat templates that write the date")
    thinking: Literal["keep", "strip"] | None = Field(
        default=None,
        description="an assistant's reasoning: keep (after the tag that the prompt opens), or strip from answers and history",
    )
    answers: Literal["row", "template"] | None = Field(
        default=None,
        description="what is learned where the template writes a finished answer otherwise than prompt + answer: "
        "the row's text, or what the template writes after the prompt; default: such templates are refused",
    )
    generation_prompt: str | None = Field(
        default=None, description="text that opens an answer, where the template writes none or another than in history"
    )
    variables: dict[str, bool | int | float | str] = Field(
        default={}, description="variables of the chat template, such as enable_thinking = false"
    )
    max_tokens: int = Field(
        default=512, ge=8, description="longest prompt + response, in tokens; longer rows are left out and counted"
    )
    max_prompt_tokens: int = Field(default=256, ge=4, description="longest prompt, in tokens; the context is shortened to fit")
    most_left_out: float = Field(
        default=0.5, ge=0, le=1, description="largest share of a split's rows that may be too long; more is refused"
    )

    @model_validator(mode="after")
    def _leave_room(self) -> "Prompts":
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens = {self.max_prompt_tokens} leaves no room for a response in max_tokens = {self.max_tokens}"
            )
        if self.system is not None and self.format != "chat":
            raise ValueError(f"a system message needs format = 'chat', not '{self.format}'")
        for name in ("date", "answers", "generation_prompt", "variables"):
            if getattr(self, name) and self.format != "chat":
                raise ValueError(f"{name} is for chat templates, and format = '{self.format}' has none; leave {name} out")
        taken = sorted(set(self.variables) & {"messages", "tools", "add_generation_prompt", "strftime_now"})
        if taken:
            raise ValueError(f"variables.{taken[0]} is set for each row; leave it out")
        return self

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str | None) -> str | None:
        try:
            return value and date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError(f"'{value}' is no day of the form YYYY-MM-DD, such as 2026-11-28") from None


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        ids: its tokens, ready to be continued by the response; None when the row is left out.
        shortened: whether the context lost its end to fit.
        reason: why there are no tokens.
    """

    ids: list[int] | None
    shortened: bool = False
    reason: str = TOO_LONG


@dataclass(frozen=True)
class Row:
    """A row as it is trained.

    Attributes:
        prompt: its prompt's tokens.
        response: the tokens that are learned, the end of turn included.
        shortened: whether the context lost its end to fit.
        end_removed: whether the answer brought an end of turn of its own, which was taken off.
    """

    prompt: list[int]
    response: list[int]
    shortened: bool
    end_removed: bool


MARK = "potstill-probe"  # an answer that no template writes of itself


class Renderer:
    """Turns rows into tokens for one tokenizer, so that the training prompt is the inference prompt, token for token.

    Prompt and response are what the template itself writes for the finished conversation; where it writes another text,
    `Prompts` says which of the two is learned.

    Attributes:
        end_of_turn_id: the token that ends an answer.
        stop_ids: tokens at which generation stops: the end of turn and the end of sequence.
        begins_with: the BOS that every prompt begins with, as text; empty when there is none.

    Raises:
        UserError: `chat` without a chat template, no token that ends a turn, or a habit of the template that loses the
            question, the system message, the answer or the opening of the answer.
    """

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        if prompts.format == "chat" and not tokenizer.chat_template:
            raise UserError(
                "prompts.format = 'chat', but the tokenizer has no chat template (a base model such as GPT-2); "
                f"choose a plain one: {', '.join(PLAIN)}"
            )
        self._control = control_tokens(tokenizer)
        held_ids = turn_tokens(tokenizer) | end_tokens(tokenizer)
        held = {text for text, id in self._control.items() if id in held_ids}
        self._marks = Marks(self._control, held)
        self._unspellable: Unspellable | None = None
        self._template: ChatTemplate | None = None
        if prompts.format == "chat":
            day = date.fromisoformat(prompts.date) if prompts.date else None
            self._template = ChatTemplate(tokenizer, day, prompts.variables, prompts.generation_prompt)
        self._own_end = re.compile(r"(?!)")  # until the end of turn is known
        self._text_end = ""  # what the template writes after an answer where no token ends it
        self._left_off = ""  # the end that the template writes after an answer in history, but not after the last turn
        self._placed: set[str] = set()  # the forms of conversation whose turns all have a place
        self._closing = self._probe() if prompts.format == "chat" else ""
        last = list(self._marks.spelt.finditer(self._closing))
        self.end_of_turn_id = self._control[last[-1][0]] if last else self._end_of_sequence()
        eos = tokenizer.eos_token_id
        self.stop_ids = [self.end_of_turn_id] + ([eos] if eos is not None and eos != self.end_of_turn_id else [])
        ends = {text for text, id in self._control.items() if id in self.stop_ids}
        self._own_end = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(ends, key=len, reverse=True)))})\s*\Z")
        self.begins_with = self._begins_with()

    def _end_of_sequence(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer names no end-of-sequence token, so no answer could ever end; set eos_token")
        return self.tokenizer.eos_token_id

    def _probe(self) -> str:
        """What the template writes after an answer, up to the first control token, empty where it writes none.

        Raises:
            UserError: the template loses a part of the simplest conversation; names the field that helps.
        """
        template = self._template
        assert template is not None
        asked, said = "potstill-question", MARK
        turns = self._turns(Example("", asked, said), "")
        prompt = template(turns, (), True, as_it_is)
        finished = template([*turns, Turn("assistant", said)], (), False, as_it_is)
        if asked not in prompt:
            raise UserError(
                "the chat template leaves out the user's text when it is plain text; choose prompts.format = 'alpaca'"
            )
        self._check_kept(turns, prompt)
        self._check_places(turns, (), True)
        at = finished.lower().rfind(said)  # a template that writes answers in capitals keeps them
        if at < 0:
            if self.prompts.answers != "row":
                raise UserError(
                    "the chat template leaves out what the assistant says, so it cannot tell where an answer ends; "
                    'set prompts.answers = "row" to learn the row\'s text up to the end-of-sequence token'
                )
            return ""
        header = finished[len(prompt) : at] if finished.startswith(prompt) else ""
        if self.prompts.generation_prompt is None and header.strip() and prompt == template(turns, (), False, as_it_is):
            raise UserError(
                f"the chat template writes nothing for add_generation_prompt, so answers would come without their header; "
                f"set prompts.generation_prompt = {json.dumps(header, ensure_ascii=False)}"
            )
        after = finished[at + len(said) :]
        end = self._marks.spelt.search(after)
        if end is None:
            self._left_off = _end_in_history(template, turns, self._marks.spelt)
            self._text_end = after.strip() if not self._left_off else ""
            if self._text_end and self.prompts.answers is None:
                raise UserError(
                    f"the chat template ends an answer with text ({json.dumps(after, ensure_ascii=False)}) and not with a "
                    'token that ends a turn; set prompts.answers = "template" to learn that text before the end-of-sequence '
                    'token, or "row" to learn the end-of-sequence token alone'
                )
        return self._left_off if end is None else after[: end.end()]

    def _begins_with(self) -> str:
        habit, bos = beginning(self.tokenizer), self.tokenizer.bos_token_id
        try:
            first = self._ids(self._text(Example("", "x", "x"), "", generate=True))[:1]
        except LeftOut as left:
            raise UserError(f"prompts.system {left}; write it otherwise") from None
        shown = habit or (first if first == [bos] else [])
        return "".join(self.tokenizer.convert_ids_to_tokens(shown))

    # --- text

    def _turns(self, example: Example, context: str) -> list[Turn]:
        """The conversation up to the answer, as the settings want it."""
        turns = conversation(example, context, self.prompts)
        return [self._as_said(turn) if turn.role == "assistant" else turn for turn in turns]

    def _as_said(self, turn: Turn) -> Turn:
        """An assistant's turn without an end of its own, and without reasoning where that is stripped."""
        content = self._own_end.sub("", turn.content)
        if self.prompts.thinking == "strip":
            return replace(turn, content=without_reasoning(content), reasoning="")
        return replace(turn, content=content)

    def text(self, example: Example, context: str) -> str:
        """The prompt as text, with this context in place of the row's own."""
        return self._written(example, context, True, as_it_is)

    def _written(self, example: Example, context: str, generate: bool, shown: Shown, answer: Turn | None = None) -> str:
        if self._template is None:
            return self._plain(example, context, shown)
        turns = self._turns(example, context) + ([answer] if answer else [])
        return self._template(turns, example.tools, generate, shown)

    def _plain(self, example: Example, context: str, shown: Shown) -> str:
        if example.tools or example.since or any(turn.tool_calls or turn.reasoning for turn in example.history):
            raise UserError(
                f"prompts.format = '{self.prompts.format}' cannot write tools, tool calls and reasoning; use format = 'chat'"
            )
        history = tuple(self._as_said(turn) if turn.role == "assistant" else turn for turn in example.history)
        return in_plain_text(replace(example, history=history), self.prompts.format, context, shown)

    def _text(self, example: Example, context: str, generate: bool, answer: Turn | None = None) -> Text:
        turns = [*example.history, *example.since, *([answer] if answer else [])]
        calls = [turn.tool_calls for turn in turns]
        brought = [example.instruction, context, self.prompts.system or "", *texts_in([calls, example.tools])]
        brought += [part for turn in turns for part in (turn.content, turn.reasoning)]
        return self._marks.text(lambda shown: self._written(example, context, generate, shown, answer), "\n".join(brought))

    def _check_places(self, turns: Sequence[Turn], tools: Sequence[Any], generate: bool) -> None:
        """Refuse a template that has no place for a turn, although its words happen to stand elsewhere.

        Each form of conversation is asked once, with words that stand nowhere else in place of the row's.

        Raises:
            UserError: as `_check_kept`, with the row's own words.
        """
        assert self._template is not None
        marked = [_with_marks(turn, i) for i, turn in enumerate(turns)]
        marked_tools = [_named(tool, f"potstill_tool_{i}_") for i, tool in enumerate(tools)]
        form = repr((marked, marked_tools, generate))
        if form in self._placed:
            return
        with contextlib.suppress(_Refuses):
            self._check_kept(marked, self._rendered(marked, marked_tools, generate), marked_tools, own=(turns, tools))
        self._placed.add(form)

    def _rendered(self, turns: Sequence[Turn], tools: Sequence[Any], generate: bool) -> str:
        """Raises: _Refuses: the template refuses these words, which says nothing of the row's own."""
        assert self._template is not None
        try:
            return self._template(turns, tools, generate, as_it_is)
        except UserError as error:
            raise _Refuses from error

    def _check_kept(
        self,
        turns: Sequence[Turn],
        prompt: str,
        tools: Sequence[Any] = (),
        own: tuple[Sequence[Turn], Sequence[Any]] | None = None,
    ) -> None:
        """Refuse a template that loses what a turn says.

        Args:
            own: turns and tools to quote, where others stand for them.

        Raises:
            UserError: names the turn's role and the field that helps.
        """
        own_turns, own_tools = own or (turns, tools)
        for turn, own_turn in zip(turns, own_turns, strict=True):
            if not _stands_in(_seen(turn), prompt):
                if turn.role == "system":
                    raise UserError(
                        "the chat template leaves out or changes the system text; "
                        'set prompts.system_turn = "user" to put it before the first question'
                    )
                raise UserError(
                    f"the chat template leaves out or changes what a turn of role '{turn.role}' says "
                    f"({_excerpt(_seen(own_turn))}); take such rows out, or choose another format"
                )
            for call, own_call in zip(turn.tool_calls, own_turn.tool_calls, strict=True):
                for text in texts_in(_function(call)):
                    if not _stands_in(text, prompt):
                        quoted = text if own is None else own_call["function"]["name"]
                        raise UserError(f"the chat template leaves out tool_calls ({_excerpt(quoted)}); take such rows out")
            if turn.reasoning and not self._renders_reasoning():
                raise UserError(
                    'the chat template leaves out reasoning_content; set prompts.thinking = "strip" to train without it, '
                    "or write it into the content"
                )
        for tool, own_tool in zip(tools, own_tools, strict=True):
            if not _stands_in(_tool_name(tool), prompt):
                raise UserError(f"the chat template leaves out tools ({_excerpt(_tool_name(own_tool))}); take such rows out")

    def _renders_reasoning(self) -> bool:
        assert self._template is not None
        turns = [Turn("user", "x"), Turn("assistant", "y", reasoning=MARK)]
        return MARK in self._template(turns, (), False, as_it_is)

    # --- tokens

    def _ids(self, text: Text) -> list[int]:
        return begun(self.tokenizer, self._part(text))

    def _part(self, text: Text) -> list[int]:
        """Tokens of a text: control tokens where template or answer wrote them, plain text where a prompt spells them."""
        spelt = self._marks.spelt
        if spelt.sub("", text.real) == self._marks.unmark(spelt.sub("", text.marked)):
            return encode(self.tokenizer, text.real)
        if self._unspellable is None:
            self._unspellable = Unspellable(self.tokenizer, self._control)
        names = self._unspellable.names
        return self._unspellable.encode(self._marks.unmark(spelt.sub(lambda found: names[found[0]], text.marked)))

    def prompt(self, example: Example) -> Prompt:
        """The prompt's tokens; when too long, the context gives up its end, never the instruction.

        Raises:
            UserError: the template refuses the row, or loses what it says.
        """
        try:
            prompt, _, _ = self._fitted(example)
        except LeftOut as left:
            return Prompt(None, reason=str(left))
        return prompt

    def _fitted(self, example: Example) -> tuple[Prompt, Text, str]:
        """The prompt, its text, and as much of the context as fits."""
        limit = self.prompts.max_prompt_tokens
        context = example.context
        text = self._text(example, context, generate=True)
        if self._template is not None:
            turns = self._turns(example, context)
            self._check_kept(turns, text.real, example.tools)
            self._check_places(turns, example.tools, True)
        ids = self._ids(text)
        whole = len(ids)
        if whole <= limit:
            return Prompt(ids), text, context
        tokens = encode(self.tokenizer, example.context)
        keep = len(tokens)
        while tokens and keep > 0:
            keep = max(0, keep - max(1, len(ids) - limit))
            context = decode(self.tokenizer, tokens[:keep]).rstrip("\ufffd")
            text = self._text(example, context, generate=True)
            ids = self._ids(text)
            if len(ids) <= limit:
                return Prompt(ids, shortened=True), text, context
        raise LeftOut(TOO_LONG, whole)

    def row(self, example: Example) -> Row:
        """Prompt and response of a row.

        Raises:
            LeftOut: the row is too long, or cannot be learned; says why.
            UserError: the template's finished conversation is not prompt + answer, and no field says what to learn.
        """
        prompt, asked, context = self._fitted(example)
        assert prompt.ids is not None
        answer, removed = self._answer(example)
        if not answer.content.strip() and not answer.tool_calls:
            raise LeftOut("empty response")
        response = self._continued(prompt.ids, asked, self._response(example, context, asked, answer))
        if self.end_of_turn_id in response[:-1]:
            raise LeftOut("the template ends the turn inside the answer")
        length = len(prompt.ids) + len(response)
        if length > self.prompts.max_tokens:
            raise LeftOut("response too long", length)
        return Row(prompt.ids, response, prompt.shortened, removed)

    def _continued(self, prompt: list[int], asked: Text, answer: Text) -> list[int]:
        """The answer's tokens as they follow the prompt's; apart where the tokenizer would merge across the boundary."""
        whole = self._ids(asked + answer)
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._part(answer)
        return ids if ids and ids[-1] == self.end_of_turn_id else [*ids, self.end_of_turn_id]

    def _answer(self, example: Example) -> tuple[Turn, bool]:
        """The answer without an end of its own, and whether it had one."""
        turn = Turn("assistant", example.response, example.reasoning, example.tool_calls)
        return self._as_said(turn), bool(self._own_end.search(example.response))

    def _closed(self, text: str) -> Text:
        return Text(text, self._marks.wide(text, True)) + Text(self._closing, self._closing)

    def response(self, text: str) -> list[int]:
        """Tokens of a text as an answer by itself, the end of turn included."""
        ids = self._part(self._closed(self._as_said(Turn("assistant", text)).content))
        return ids if ids[-1:] == [self.end_of_turn_id] else [*ids, self.end_of_turn_id]

    def _response(self, example: Example, context: str, asked: Text, answer: Turn) -> Text:
        """The text to learn after the prompt."""
        if self._template is None:
            if answer.tool_calls or answer.reasoning:
                self._plain(replace(example, since=(answer,)), context, as_it_is)  # refuses
            return self._closed(answer.content)
        opened = opened_tag(asked.real)
        if (answer.reasoning and self.prompts.thinking == "keep" and opened) and not self._renders_reasoning():
            tag = opened.strip()
            content = f"{tag}\n{answer.reasoning}\n{tag.replace('<', '</', 1)}\n\n{answer.content}"
            answer = replace(answer, content=content, reasoning="")
        if answer.tool_calls or answer.reasoning:
            return self._as_template(example, context, asked, answer)
        said = self._after_opened(opened, answer.content) if opened and self.prompts.answers != "template" else answer.content
        finished = self._written(example, context, False, as_it_is, answer) + self._left_off
        as_is = finished.startswith(asked.real + said + self._closing)
        if as_is and not (self._text_end and self.prompts.answers == "template"):
            return self._closed(said)
        if self.prompts.answers == "template":
            return self._as_template(example, context, asked, answer)
        if self.prompts.answers == "row" or self._thoughts_deleted(finished, answer.content):
            return self._closed(said)
        raise UserError(self._habit(asked.real, finished, said))

    def _after_opened(self, opened: str, said: str) -> str:
        """An answer after a prompt that opens its thinking: the opened tag is the answer's own."""
        tag, space = opened.strip(), opened[len(opened.rstrip()) :]
        own = said.lstrip().startswith(tag)
        if self.prompts.thinking == "keep":
            if not own and not has_reasoning(said):
                raise LeftOut(f"no reasoning, where the prompt opens {tag}")
            rest = said.lstrip().removeprefix(tag)
            return rest.removeprefix(space) if own else said
        if self.prompts.thinking is None and self.prompts.answers == "row" and not own:
            return said
        keep = "" if self.prompts.thinking == "strip" else 'prompts.thinking = "keep" for answers with their reasoning, or '
        raise UserError(
            f"the chat template's generation prompt opens {tag}, and an answer would be learned inside it; set {keep}"
            f"prompts.generation_prompt = {json.dumps(self._header(), ensure_ascii=False)} for plain answers"
        )

    def _header(self) -> str:
        """What the template writes before an answer in a finished conversation."""
        assert self._template is not None
        user = Turn("user", "x")
        before, finished = (self._template(turns, (), False, as_it_is) for turns in ([user], [user, Turn("assistant", MARK)]))
        return finished[len(before) : finished.index(MARK)] if finished.startswith(before) and MARK in finished else ""

    def _thoughts_deleted(self, finished: str, said: str) -> bool:
        """Whether the finished conversation lacks nothing of the answer but its thoughts, which the settings keep."""
        seen = without_reasoning(said)
        return self.prompts.thinking == "keep" and seen != said and f"{seen}{self._closing}" in finished

    def _as_template(self, example: Example, context: str, asked: Text, answer: Turn) -> Text:
        """What the template writes after the prompt, up to the last end of turn.

        Raises:
            UserError: the finished conversation does not begin with the prompt, or loses a part of the answer.
        """
        finished = self._text(example, context, False, answer) + Text(self._left_off, self._left_off)
        if not finished.real.startswith(asked.real):
            raise UserError(self._habit(asked.real, finished.real, answer.content))
        rest = finished.cut(len(asked.real))
        forced = bool(answer.tool_calls or answer.reasoning)  # else the settings want whatever the template makes of it
        if forced:
            self._check_kept([answer], rest.real)
            self._check_places([*self._turns(example, context), answer], example.tools, False)
        if answer.reasoning and not _stands_in(answer.reasoning, rest.real):
            raise UserError(
                'the chat template leaves out reasoning_content; set prompts.thinking = "strip" to train without it'
            )
        ends = [found.end() for found in self._marks.spelt.finditer(rest.marked) if found[0] in self._closing]
        return rest.cut(0, ends[-1] if ends else None)

    def _habit(self, prompt: str, finished: str, said: str) -> str:
        """The template's habit that breaks prompt + answer, and the field that names what to do."""
        row = '"row" to learn the row\'s text after the generation prompt'
        if not finished.startswith(prompt):
            there = "opens or precedes a finished answer otherwise than its generation prompt does"
            own = self._header()
            other = ', or prompts.thinking = "keep" or "strip"' if has_reasoning(said) else ""
            other += f", or prompts.generation_prompt = {json.dumps(own, ensure_ascii=False)}" if own else ""
            return f"the chat template {there} ({_excerpt(said)}); set prompts.answers = {row}{other}"
        rest = finished[len(prompt) :]
        if said and said in rest:
            at = rest.rfind(said + self._closing) if said + self._closing in rest else rest.rfind(said)
            before, after = rest[:at], rest[at + len(said) :]
            place = (f"before an answer {json.dumps(before, ensure_ascii=False)}") if before else f"after it {after[:20]!r}"
            habit = f"writes {place}"
        elif said.strip() and said.strip() in rest:
            habit = "trims answers"
        elif has_reasoning(said):
            habit = 'changes an answer\'s reasoning (prompts.thinking = "keep" or "strip" says whether it is learned)'
        else:
            habit = "changes an answer's text"
        learn = '"template" to learn what it writes'
        return f"the chat template {habit} ({_excerpt(said)}); set prompts.answers = {learn}, or {row}"

    # --- for scores and checks

    def scored(self, example: Example) -> Example:
        """The row with its accepted answers as a model that learned it would write them; for metrics on text.

        An end of turn at their end, a token or text, is taken off, reasoning is treated as `thinking` says, and an answer
        that only the template can write (tool calls, `answers = "template"`) is what the template writes.
        """
        _, asked, context = self._fitted(example)

        def written(reference: str) -> str:
            of = replace(example, response=reference, references=(reference,))
            answer, _ = self._answer(of)
            try:
                text = self._response(of, context, asked, answer)
            except (LeftOut, UserError):  # only what is learned must be what the template writes
                return answer.content.strip()
            hidden = turn_tokens(self.tokenizer) | end_tokens(self.tokenizer)
            named = self._marks.spelt.sub(lambda found: "" if self._control[found[0]] in hidden else found[0], text.marked)
            return self.said(self._marks.unmark(named))

        references = tuple(dict.fromkeys(map(written, example.references)))
        return replace(example, response=written(example.response), references=references)

    def said(self, answer: str) -> str:
        """An answer for metrics: up to the end that the template writes as text, where no token ends it."""
        return (answer.partition(self._text_end)[0] if self._text_end else answer).strip()

    def problem(self, example: Example) -> str | None:
        """What keeps a row from being trained and asked alike, in words; None when nothing does. Its length is no matter."""
        try:
            asked = self._text(example, example.context, generate=True)
            if self._template is not None:
                turns = self._turns(example, example.context)
                self._check_kept(turns, asked.real, example.tools)
                self._check_places(turns, example.tools, True)
            self._response(example, example.context, asked, self._answer(example)[0])
        except UserError as error:
            return str(error)
        except LeftOut:
            return None
        return None


def conversation(example: Example, context: str, prompts: Prompts) -> list[Turn]:
    """The turns up to the answer, with their system message where the settings want it; no template is asked."""
    turns = [*example.history]
    if prompts.system is not None and not (turns and turns[0].role == "system"):
        turns.insert(0, Turn("system", prompts.system))
    asked = f"{context}\n\n{example.instruction}" if context else example.instruction
    turns += [Turn("user", asked), *example.since]
    if prompts.system_turn == "user" and turns[0].role == "system":
        system, *turns = turns
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")  # not an assistant's greeting
        turns[first] = replace(turns[first], content=f"{system.content}\n\n{turns[first].content}")
    return turns


def in_plain_text(example: Example, format: str, context: str, shown: Callable[[str, bool], str] = lambda text, _: text) -> str:
    """A prompt in one of the plain templates.

    Args:
        shown: what stands for a text; the second argument says whether a model wrote it.
    """
    bare, with_context = PLAIN[format]
    earlier = "".join(f"{shown(turn.content, turn.role == 'assistant')}\n\n" for turn in example.history)
    # one pass and no str.format: a row's own braces, even "{instruction}", must stay as they are
    fields = {"{instruction}": shown(example.instruction, False), "{context}": shown(context, False)}
    return earlier + re.sub(r"\{instruction\}|\{context\}", lambda m: fields[m[0]], with_context if context else bare)


def end_of_turn(tokenizer: Any) -> int | None:
    """The first control token that the chat template writes after an answer, whatever its other habits; None: it writes none.

    For models that were not trained here: a template that breaks the law of prompts still says where its turns end.
    """
    if not tokenizer.chat_template:
        return None
    control = control_tokens(tokenizer)
    spelt = Marks(control, set()).spelt
    try:
        template = ChatTemplate(tokenizer, date(2000, 1, 1), {}, None)
        finished = template([Turn("user", "x"), Turn("assistant", MARK)], (), False, as_it_is)
    except UserError:
        return None
    at = finished.lower().rfind(MARK)
    found = spelt.search(finished, at + len(MARK)) if at >= 0 else None
    found = found or spelt.search(_end_in_history(template, [Turn("user", "potstill-question")], spelt))
    return control[found[0]] if found is not None else None


def _end_in_history(template: ChatTemplate, turns: Sequence[Turn], spelt: re.Pattern[str]) -> str:
    """What the template writes after an answer that is not the last turn, up to the end of turn; empty where it writes no end.

    The first control token after the answer is no end where it opens the next turn: where it also opens answers, or where
    it stands before a question and what follows a question is another.

    Args:
        turns: a conversation whose last turn is a user's, which stands nowhere else in the template's text.
    """
    try:
        later = template([*turns, Turn("assistant", MARK), Turn("user", "potstill-next")], (), False, as_it_is)
        opened, unopened = (template(turns, (), generate, as_it_is) for generate in (True, False))
    except UserError:
        return ""
    asked = turns[-1].content
    before, _, rest = later.partition(asked)
    between, _, rest = rest.partition(MARK)
    gap, _, _ = rest.partition("potstill-next")
    end = spelt.search(gap)
    if not rest or end is None:
        return ""
    opening = opened[len(unopened) :] if opened.startswith(unopened) else opened
    after_question = spelt.search(between)
    opens_a_turn = end[0] in before and (after_question is None or after_question[0] != end[0])
    return "" if end[0] in opening or opens_a_turn else gap[: end.end()]


def template_problems(tokenizer: Any, prompts: Prompts, examples: Iterable[Example]) -> list[str]:
    """Each habit of the template that breaks the law of prompts on these rows, once, with the number of rows it touches.

    Renders text and tokenises nothing, so that all rows of a split can be asked.
    """
    try:
        renderer = Renderer(tokenizer, prompts)
    except UserError as error:
        return [str(error)]
    found: dict[str, tuple[str, int]] = {}
    for example in examples:
        problem = renderer.problem(example)
        if problem is not None:
            kind = re.sub(r" \([^()]*\)|\"[^\"]*\"", "", problem)
            first, count = found.get(kind, (problem, 0))
            found[kind] = first, count + 1
    return [f"{problem} [{count:,} row{'s' if count > 1 else ''}]" for problem, count in found.values()]


def _stands_in(text: str, written: str) -> bool:
    """Whether a text stands in a rendering: trimmed, as it is or as JSON."""
    text = text.strip()
    return text in written or json.dumps(text, ensure_ascii=False)[1:-1] in written or json.dumps(text)[1:-1] in written


class _Refuses(Exception):
    """A template refuses words that stand for a row's."""


def _seen(turn: Turn) -> str:
    """What of a turn's content every template must write: of an assistant's, what comes after its thoughts."""
    return without_reasoning(turn.content) if turn.role == "assistant" else turn.content


def _with_marks(turn: Turn, place: int) -> Turn:
    """The turn with a mark of its place for all that it says; what it says not at all stays empty."""
    content = f"potstill-said-{place}." if _seen(turn).strip() else turn.content
    calls = tuple(_call_with_marks(call, f"potstill_{place}_{i}_") for i, call in enumerate(turn.tool_calls))
    return replace(turn, content=content, reasoning=turn.reasoning and MARK, tool_calls=calls)


def _call_with_marks(call: dict[str, Any], mark: str) -> dict[str, Any]:
    function = _function(call)
    arguments = function["arguments"]
    if isinstance(arguments, dict):
        arguments = {key: f"{mark}{key}." for key in arguments}
    return {**call, "function": {**call["function"], "name": mark, "arguments": arguments}}


def _named(tool: dict[str, Any], name: str) -> dict[str, Any]:
    """The tool by another name, without what it is for: forms of conversation differ by their tools' number."""
    if "function" in tool:
        return {**tool, "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}}
    return {**tool, "name": name}


def _function(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {"name": call["function"]["name"], "arguments": arguments}


def _tool_name(tool: dict[str, Any]) -> str:
    return str((tool.get("function") or tool).get("name", ""))


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return f"for example {json.dumps(text[:40] + ('…' if len(text) > 40 else ''), ensure_ascii=False)}"
