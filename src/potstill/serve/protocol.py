"""OpenAI's forms: what a request may hold, and how answers and errors are written."""

import json
import secrets
import time
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from potstill.core.component import suggest
from potstill.core.types import Example, Turn
from potstill.edges.llamacpp_drafts import Drafts

MOST_STOPS = 4
REFUSED = {  # field: values that change nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),  # 0 asks for those of the answer's own tokens
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "tool_calls": ([],),
    "function_call": ("none", "auto"),
    "repetition_penalty": (1,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
}
IGNORED = (  # fields that change no answer: marks, storing, caching
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "prediction",
    "include_obfuscation",
    "cache_control",
    "annotations",
)


class Refusal(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        code: for programs.
        param: the field that is wrong.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


R = TypeVar("R", bound=BaseModel)
Number = StrictFloat | StrictInt
Strings = Annotated[list[StrictStr], Field(max_length=MOST_STOPS)]


class _Known(BaseModel):
    """A field that is not known is refused: it may change the answer. Not so one that changes nothing, or holds null."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        return {name: one for name, one in value.items() if name in known or not (name in IGNORED or _harmless(name, one))}


def _harmless(name: str, value: Any) -> bool:
    """Whether a field of `REFUSED` has a value that changes nothing; any field where it is null."""
    same = (value == one and isinstance(value, bool) == isinstance(one, bool) for one in REFUSED.get(name, ()))
    return value is None or any(same)


class TextPart(_Known):
    type: Literal["text"]
    text: StrictStr


class Message(_Known):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart] | None = None

    def text(self) -> str:
        """Its parts as one text."""
        if isinstance(self.content, str) or self.content is None:
            return self.content or ""
        return "".join(part.text for part in self.content)


class StreamOptions(_Known):
    include_usage: StrictBool = False


class _Request(_Known):
    prompted_by: ClassVar[str]  # the field that holds what the model reads

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=10)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StrictStr | Strings | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """Stop strings, empty ones left out."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    def most(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_tokens

    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """Of /v1/chat/completions."""

    prompted_by = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Request):
    """Of /v1/completions."""

    prompted_by = "prompt"
    prompt: StrictStr | list[StrictStr] | list[StrictInt]


class AskRequest(_Known):
    """Of the playground."""

    prompted_by: ClassVar[str] = "prompt"
    model: StrictStr
    prompt: StrictStr
    temperature: Annotated[Number, Field(ge=0, le=10)] = 0
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = 0


def parsed(kind: type[R], body: bytes) -> R:
    """A request's body as its form.

    Raises:
        Refusal: 400: it is no JSON in UTF-8, or a field is wrong; says which.
    """
    value = json_of(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = next((one for one in errors if one["type"] == "extra_forbidden"), None) or _meant(errors)
        words = [str(part) for part in first["loc"]]
        place = ".".join(word for word in words if "[" not in word and word not in ("str", "int", "float"))
        if first["type"] == "extra_forbidden":
            near = "" if words[-1] in REFUSED else suggest(words[-1], list(kind.model_fields))
            raise Refusal(
                400, f"{place[:100]} is not supported here{near or '; leave it out'}", "unsupported_parameter", place[:100]
            ) from None
        rule = first["msg"].lower().replace(" after validation", "")
        raise Refusal(400, f"{place}: {rule}", "invalid_value", place or None) from None


def _meant(errors: list[Any]) -> Any:
    """Of a field that can be of several kinds, what is wrong with the kind that was given."""
    same = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    return next((one for one in same if not one["type"].endswith("_type")), errors[0])


def json_of(body: bytes) -> dict[str, Any]:
    """A JSON object of text that can be written in UTF-8.

    Raises:
        Refusal: 400.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}", "invalid_utf8") from None
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise Refusal(400, "the body is JSON nested too deeply", "invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(value).__name__}", "invalid_json")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(400, "the body holds half of a surrogate pair, which is no character", "invalid_utf8") from None
    except RecursionError:
        raise Refusal(400, "the body is JSON nested too deeply", "invalid_json") from None
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def example_of(messages: list[Message]) -> Example:
    """A conversation as a row whose answer is wanted.

    Raises:
        Refusal: 400: it does not end with a user's message.
    """
    *earlier, last = messages
    if last.role != "user":
        raise Refusal(400, "the last message must be the user's", "invalid_value", "messages")
    role = {"developer": "system"}
    history = tuple(Turn(role.get(turn.role, turn.role), turn.text()) for turn in earlier)  # type: ignore[arg-type]
    return Example(key="", instruction=last.text(), response="", history=history)


def usage(prompt: int, completion: int, drafts: Drafts | None = None) -> dict[str, Any]:
    """Tokens of a request; those of a draft model in OpenAI's fields for predicted outputs."""
    found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if drafts is not None:
        found["completion_tokens_details"] = {
            "accepted_prediction_tokens": drafts.accepted,
            "rejected_prediction_tokens": drafts.drafted - drafts.accepted,
        }
    return found


class Form:
    """How one answer is written: whole, or in chunks.

    Args:
        chat: of /v1/chat/completions; else of /v1/completions.
        used: whether a chunk with the usage comes in the end; the others say then that they have none.
    """

    def __init__(self, chat: bool, model: str, used: bool = False) -> None:
        self.chat = chat
        self._usage = {"usage": None} if used else {}
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str, used: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        object = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": object, "choices": [self._choice(said, finish)], "usage": used}

    def first(self) -> dict[str, Any] | None:
        """The chunk before any text."""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)]) if self.chat else None

    def part(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk([self._choice({"delta": {"content": text}} if self.chat else {"text": text}, None)])

    def last(self, finish: str) -> dict[str, Any]:
        """The chunk that says why there is no more."""
        return self._chunk([self._choice({"delta": {}} if self.chat else {"text": ""}, finish)])

    def used(self, used: dict[str, Any]) -> dict[str, Any]:
        """The chunk of `include_usage`."""
        return self._chunk([]) | {"usage": used}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        object = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": object, "choices": choices, **self._usage}

    @staticmethod
    def _choice(said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}
