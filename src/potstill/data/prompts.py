"""A row as a model sees it: prompt tokens, response tokens, and where a turn ends."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.core.types import Example

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
    system: str | None = Field(default=None, description="system message, where the chat template has one")
    max_tokens: int = Field(
        default=512, ge=8, description="longest prompt + response, in tokens; longer rows are left out and counted"
    )
    max_prompt_tokens: int = Field(default=256, ge=4, description="longest prompt, in tokens; the context is shortened to fit")

    @model_validator(mode="after")
    def _leave_room(self) -> "Prompts":
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens = {self.max_prompt_tokens} leaves no room for a response in max_tokens = {self.max_tokens}"
            )
        if self.system is not None and self.format != "chat":
            raise ValueError(f"a system message needs format = 'chat', not '{self.format}'")
        return self


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        ids: its tokens, ready to be continued by the response; None when it does not fit even without context.
        shortened: whether the context lost its end to fit.
    """

    ids: list[int] | None
    shortened: bool = False


class Renderer:
    """Turns rows into tokens for one tokenizer. Prompt and response are tokenised apart, so the boundary is exact.

    Raises:
        UserError: `chat` without a chat template, or no token that ends a turn.
    """

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        if prompts.format == "chat" and not tokenizer.chat_template:
            raise UserError(
                "prompts.format = 'chat', but the tokenizer has no chat template (a base model such as GPT-2); "
                f"choose a plain one: {', '.join(PLAIN)}"
            )
        special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)")
        self.end_of_turn_id = self._end_of_turn()
        eos = tokenizer.eos_token_id
        self.stop_ids = [self.end_of_turn_id] + ([eos] if eos is not None and eos != self.end_of_turn_id else [])

    def _end_of_turn(self) -> int:
        """The first special token after an assistant's words in the chat template; else the end of sequence."""
        if self.prompts.format == "chat":
            words = "MARK"
            text = self._chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": words}], generate=False)
            after = self._encode(text[text.rindex(words) + len(words) :])
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            for token in after:
                if token in special:
                    return token
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer names no end-of-sequence token, so no answer could ever end; set eos_token")
        return self.tokenizer.eos_token_id

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _chat(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:
            raise UserError(f"the chat template refuses a conversation of {[m['role'] for m in messages]}: {error}") from error

    def text(self, example: Example, context: str, shown: Callable[[str], str] = str) -> str:
        """The prompt as text, with this context in place of the row's own; `shown` changes what comes from the row."""
        history = [{"role": turn.role, "content": shown(turn.content)} for turn in example.history]
        if self.prompts.format == "chat":
            if self.prompts.system is not None and not (history and history[0]["role"] == "system"):
                history.insert(0, {"role": "system", "content": self.prompts.system})
            asked = f"{shown(context)}\n\n{shown(example.instruction)}" if context else shown(example.instruction)
            return self._chat([*history, {"role": "user", "content": asked}], generate=True)
        bare, with_context = PLAIN[self.prompts.format]
        earlier = "".join(f"{turn['content']}\n\n" for turn in history)
        # one pass and no str.format: a row's own braces, even "{instruction}", must stay as they are
        fields = {"{instruction}": shown(example.instruction), "{context}": shown(context)}
        return earlier + re.sub(r"\{instruction\}|\{context\}", lambda m: fields[m[0]], with_context if context else bare)

    def _ids(self, example: Example, context: str) -> list[int]:
        """The prompt's tokens. Where a row spells out a special token, it stays text: no row may end a turn or begin one."""
        told = [example.instruction, context, *(turn.content for turn in example.history)]
        if not any(self._special.search(text) for text in told):
            return self._encode(self.text(example, context))
        rows: list[str] = []

        def aside(text: str) -> str:
            rows.append(text)
            return f"\ue000{len(rows) - 1}\ue001"  # private-use characters, which no template touches

        ids = []
        for i, part in enumerate(re.split("\ue000(\\d+)\ue001", self.text(example, context, aside))):
            ids += self._as_text(rows[int(part)]) if i % 2 else self._encode(part)
        return ids

    def _as_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def prompt(self, example: Example) -> Prompt:
        """The prompt's tokens; when too long, the context gives up its end, never the instruction."""
        limit = self.prompts.max_prompt_tokens
        ids = self._ids(example, example.context)
        if len(ids) <= limit:
            return Prompt(ids)
        context = self._as_text(example.context)
        keep = len(context)
        while context and keep > 0:
            keep = max(0, keep - max(1, len(ids) - limit))
            shorter = self.tokenizer.decode(context[:keep]).rstrip("\ufffd")
            ids = self._ids(example, shorter)
            if len(ids) <= limit:
                return Prompt(ids, shortened=True)
        return Prompt(None)

    def response(self, text: str) -> list[int]:
        """The response's tokens, the end of turn included; a special token that the text spells out stays text."""
        return [*self._as_text(text), self.end_of_turn_id]
