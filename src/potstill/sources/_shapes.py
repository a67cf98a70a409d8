"""Shapes in which people keep rows: chats of OpenAI and ShareGPT, and pairs under other names."""

import json
from collections.abc import Sequence
from typing import Any

from potstill.core.errors import UserError
from potstill.sources._cells import Row, text, unpacked

ROLES = ("system", "user", "assistant", "tool")
OPENAI, SHAREGPT = ("role", "content"), ("from", "value")
# of ShareGPT's speakers, and of those that LLaMA-Factory adds for tools
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# what columns are called elsewhere, the likeliest name first
INSTRUCTIONS = ("instruction", "prompt", "question", "query", "input", "user")
RESPONSES = ("response", "output", "answer", "completion", "reply", "target", "assistant")
CONTEXTS = ("context", "input", "passage", "document")


def from_sharegpt(messages: Sequence[Any], ignored: tuple[str, ...], here: str) -> bool:
    """Whether messages are ShareGPT's `from` and `value` rather than OpenAI's `role` and `content`.

    Raises:
        UserError: some of them are the one and some the other.
    """
    seen: set[tuple[str, str]] = set()
    for number, message in enumerate(messages):
        seen |= _shapes_of(message, ignored)
        if len(seen) > 1:
            raise UserError(
                f"{here}[{number}]: 'role' and 'content' are mixed with 'from' and 'value'; write a row's messages in one shape"
            )
    return SHAREGPT in seen


def as_openai(message: Row, here: str) -> Row:
    """A message of ShareGPT with OpenAI's keys; every other key stays.

    Raises:
        UserError: the speaker is unknown, or `function_call` holds no call.
    """
    speaker, value = text(message, "from", here), text(message, "value", here)
    if speaker not in SPEAKERS:
        raise UserError(f"{here} is from '{speaker}'; speakers are {', '.join(SPEAKERS)}")
    others = {key: other for key, other in message.items() if key not in (*SHAREGPT, *OPENAI)}
    if speaker != "function_call":
        return {"role": SPEAKERS[speaker], "content": value, **others}
    return {"role": "assistant", "content": None, "tool_calls": _called(value, here), **others}


def joined(content: Any, ignored: tuple[str, ...], here: str) -> Any:
    """The texts of OpenAI's content parts, one below the other as llama.cpp and vLLM join them; other content as it is.

    Raises:
        UserError: a part is no text, or has a key that is not read.
    """
    if not isinstance(content, list):
        return content
    return "\n".join(_part(part, ignored, f"{here}: content[{number}]") for number, part in enumerate(content))


def remedy(row: Row, instruction: str, response: str, context: str | None) -> str:
    """The fields that would read a row of a shape that is known, as "; set data.…"; empty where none is.

    Args:
        instruction, response, context: the columns that fields name now.
    """
    if chat := next((name for name, value in row.items() if _is_chat(value)), None):
        return f"; set data.messages = {_quoted(chat)}"
    texts = {name.lower(): name for name, value in reversed(row.items()) if value is None or isinstance(value, str)}
    used = {instruction, response, context} & set(row)
    found: dict[str, str] = {}
    for field, now, names in (
        ("instruction", instruction, INSTRUCTIONS),
        ("response", response, RESPONSES),
        ("context", context or "", CONTEXTS),
    ):
        wanted = now not in row and not (field == "context" and context)
        if wanted and (column := next((texts[name] for name in names if name in texts and texts[name] not in used), None)):
            found[field] = column
            used.add(column)
    missing = {field for field, now in (("instruction", instruction), ("response", response)) if now not in row}
    if not missing <= set(found):
        return ""
    return "; set " + " and ".join(f"data.{field} = {_quoted(column)}" for field, column in found.items())


def _shapes_of(message: Any, ignored: tuple[str, ...]) -> set[tuple[str, str]]:
    held = {key for key, value in message.items() if value is not None} if isinstance(message, dict) else set()
    return {shape for shape in (OPENAI, SHAREGPT) if held & set(shape) - set(ignored)}


def _called(value: str, here: str) -> list[Any]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{here} is from 'function_call', and its value is not JSON; write name and arguments") from None
    return calls if isinstance(calls, list) else [calls]


def _part(part: Any, ignored: tuple[str, ...], here: str) -> str:
    if not isinstance(part, dict):
        raise UserError(f"{here} must be an object with type and text")
    held = {key: value for key, value in part.items() if value is not None}
    if held.get("type") != "text":
        raise UserError(f"{here} is of type {held.get('type')!r}; only parts of type 'text' are read")
    if unknown := [key for key in held if key not in ("type", "text", *ignored)]:
        raise unread(unknown, here)
    return text(held, "text", here)


def unread(keys: list[str], here: str) -> UserError:
    """That an object has keys which are not read, and the field that passes them over."""
    told = json.dumps(list(dict.fromkeys(keys)), ensure_ascii=False)
    return UserError(f"{here} has a key '{keys[0]}' that is not read; take it out, or set data.ignored = {told}")


def _is_chat(value: Any) -> bool:
    messages = unpacked(value)
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and (set(OPENAI) <= set(first) or set(SHAREGPT) <= set(first))


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
