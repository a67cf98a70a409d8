"""Chats in rows: messages, tools, and what of them is learned."""

import json
import re
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import UserError
from potstill.core.types import Turn
from potstill.sources._cells import Row, column, text, unpacked
from potstill.sources._shapes import OPENAI, ROLES, SHAREGPT, as_openai, from_sharegpt, joined, unread

KNOWN = (
    "role",
    "content",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_calls",
    "name",
    "tool_call_id",
    "weight",
    "train",
)
REASONING = ("reasoning_content", "reasoning", "thinking")
_NAME = re.compile(r"[\w.:/-]+")


@dataclass(frozen=True)
class Chat:
    """A conversation up to its last answer.

    Attributes:
        history: turns before the last question.
        instruction: the last question.
        since: tool calls and their results between the question and the answer.
        answer: what is learned.
        weight: of the answer, as its message says: 0 where `weight` is 0 or `train` is false.
        tools: on offer.
    """

    history: tuple[Turn, ...]
    instruction: str
    since: tuple[Turn, ...]
    answer: Turn
    weight: float = 1.0
    tools: tuple[dict[str, Any], ...] = ()


def read_chat(row: Row, name: str, tools: str, ignored: tuple[str, ...], place: str) -> Chat:
    """The conversation of a row: perhaps a system turn, then user and assistant by turns, tools after a call of them.

    Messages have OpenAI's keys or ShareGPT's. In ShareGPT's a call can stand in the words of an assistant.

    Raises:
        UserError: names file, line and message where roles are out of order, or a key is of another kind or unknown.
    """
    messages = unpacked(column(row, name, place))
    if not isinstance(messages, list):
        raise UserError(f"{place}: column '{name}' must hold a list of messages with role and content, or that list as JSON")
    sharegpt = from_sharegpt(messages, ignored, f"{place}: {name}")
    turns: list[Turn] = []
    weights: list[float] = []
    for number, message in enumerate(messages):
        here = f"{place}: {name}[{number}]"
        turn, weight = _turn(message, sharegpt, ignored, here)
        _check_order(turn, turns, sharegpt, here)
        turns.append(turn)
        weights.append(weight)
    questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not questions or turns[-1].role != "assistant":
        raise UserError(f"{place}: column '{name}' must end with a question of the user and an answer of the assistant")
    last = questions[-1]
    between, answer = turns[last + 1 : -1], turns[-1]
    return Chat(tuple(turns[:last]), turns[last].content, tuple(between), answer, weights[-1], _tools(row, tools, place))


def _check_order(turn: Turn, before: list[Turn], calls_in_text: bool, here: str) -> None:
    previous = before[-1] if before else None
    if previous is None:
        allowed = ["user", "system"]
    elif previous.role == "system":
        allowed = ["user"]
    elif previous.role == "user":
        allowed = ["assistant"]
    elif previous.role == "tool":
        allowed = ["assistant", "tool"]
    else:
        allowed = ["tool"] if previous.tool_calls else ["user", "tool"] if calls_in_text else ["user"]
    if turn.role not in allowed:
        raise UserError(
            f"{here} is of role '{turn.role}', not '{allowed[0]}'; user and assistant take turns after an optional system"
            + (", and tools answer calls" if "tool" in (turn.role, *allowed) else "")
        )


def _turn(message: Any, sharegpt: bool, ignored: tuple[str, ...], here: str) -> tuple[Turn, float]:
    """A message as a turn, and the weight of its tokens."""
    if not isinstance(message, dict):
        raise UserError(f"{here} must be an object with role and content")
    shape = SHAREGPT if sharegpt else OPENAI
    message = {key: value for key, value in message.items() if value is not None or key in shape}
    if sharegpt:
        message = as_openai(message, here)
    role = text(message, "role", here)
    unknown = [key for key in message if key not in KNOWN and key not in ignored]
    if unknown:
        raise unread(unknown, here)
    if role not in ROLES:
        raise UserError(f"{here} is of role '{role}'; roles are system, user, assistant and tool")
    calls = _calls(message, here)
    reasoning = next((text(message, key, here) for key in REASONING if message.get(key)), "")
    if role != "assistant" and (calls or reasoning):
        raise UserError(f"{here} is of role '{role}', and only an assistant has tool_calls and reasoning")
    if "content" in message:
        message["content"] = joined(message["content"], ignored, here)
    content = text(message, "content", here) if "content" in message or not calls else ""
    names = {key: _named(message, key, here) for key in ("name", "tool_call_id")}
    return Turn(role, content, reasoning, calls, **names), _weight(message, here)


def _named(message: Row, key: str, here: str) -> str:
    value = text(message, key, here) if key in message else ""
    if value and not _NAME.fullmatch(value):
        raise UserError(f"{here}: '{key}' is {value!r}, and may hold letters, digits and . : / _ - only")
    return value


def _weight(message: Row, here: str) -> float:
    train, weight = message.get("train", True), message.get("weight", 1)
    if not isinstance(train, bool):
        raise UserError(f"{here}: 'train' must be true or false")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise UserError(f"{here}: 'weight' must be a number of 0 or more")
    return float(weight) if train else 0.0


def _calls(message: Row, here: str) -> tuple[dict[str, Any], ...]:
    """Tool calls in OpenAI's form."""
    calls = _json(message.get("tool_calls") or [], f"{here}: 'tool_calls'")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _NAME.fullmatch(str(function.get("name") or "")):
            raise UserError(f"{here}: 'tool_calls' must hold objects with function.name and function.arguments")
        known = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
        arguments = function.get("arguments") if function.get("arguments") is not None else {}
        made.append({"type": "function", **known, "function": {"name": function["name"], "arguments": arguments}})
    return tuple(made)


def _tools(row: Row, name: str, place: str) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools; a text holds them as JSON."""
    tools = _json(row.get(name) or [], f"{place}: column '{name}'")
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: column '{name}' must hold a list of objects, each the description of a tool")
    return tuple(tools)


def _json(value: Any, here: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{here} is a text that is not JSON; write a list of objects") from None
    if not isinstance(value, list):
        raise UserError(f"{here} must hold a list of objects")
    return value
