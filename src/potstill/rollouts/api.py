"""Answers from any server that speaks OpenAI's API: vLLM's, llama.cpp's, a provider's."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator, model_validator

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.core.types import Turn
from potstill.data.rollout import Asked, Rollout, Sampling, Usage
from potstill.rollouts.crew import Crew, Stop, Stopped
from potstill.rollouts.http import Failed, Refused, post_json

AGAIN = (408, 409, 425, 429)  # statuses after which another try may succeed; so may all from 500 on
LONGEST_BACKOFF_S = 60.0
LONGEST_WAIT_S = 600.0  # that a server may ask for by Retry-After before this gives up
NOT_REPORTED = -9999.0  # what some servers write where they do not know a log-probability
TOO_LONG = ("context length", "context_length", "context size", "too long", "too many tokens", "maximum length")


class TooLong(UserError):
    """The server refuses a prompt because it and its answer are too long for the model."""


class OpenAI(Settings):
    """A model behind an OpenAI-compatible endpoint, as an `Engine`: each sample is one request with its own seed.

    A prompt with turns goes to `/chat/completions`, one without to `/completions`, as text or as token ids of the server's own
    tokenizer. Cuts are sent even where they are off, because servers have cuts of their own by default. In what order a server
    tempers and cuts is its own affair (llama.cpp cuts first), and so is whether equal seeds give equal answers.

    Log-probabilities are given only at temperature 1 without cuts, where a server's figures and the distribution that was drawn
    from are the same, and at temperature 0, where both are the model's own; see `Rollout`. Where a server gives reasoning apart
    from the answer, they are left out too, because they may be of both; the text is the answer alone.
    """

    url: str = Field(description='where the API begins, such as "http://127.0.0.1:8080/v1"')
    model: str = Field(min_length=1, description="its name there")
    key_env: str | None = Field(
        default=None,
        pattern="^[A-Za-z_][A-Za-z0-9_]*$",
        description="name of the environment variable that holds the key; the key is kept nowhere. Default: no key is sent",
    )
    in_flight: int = Field(default=8, ge=1, le=256, description="requests at the same time, at most")
    timeout_s: float = Field(default=300.0, gt=0, description="longest wait for an answer, in seconds")
    retries: int = Field(default=6, ge=0, description="further tries after 429, 5xx, a timeout, a cut or a garbled answer")
    backoff_s: float = Field(default=1.0, ge=0, description="wait before the first further try, doubled for each one after it")
    extensions: bool = Field(
        default=True,
        description="send top_k and min_p, for which most servers have defaults of their own; false: for OpenAI's service",
    )
    logprobs: bool = Field(default=False, description="ask for log-probabilities, which some servers refuse")

    @field_validator("url")
    @classmethod
    def _where_the_api_begins(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("must hold no key, user or query; name the key's environment variable in key_env")
        for ending in ("/chat/completions", "/completions"):
            if parts.path.rstrip("/").endswith(ending):
                raise ValueError(f"leave '{ending}' out: it is added for each request")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _a_name_and_no_key(self) -> "OpenAI":
        if self.key_env is not None and self.key_env.startswith("sk_"):
            raise ValueError("key_env is the name of a variable, such as OPENAI_API_KEY, not the key")
        return self

    def key(self) -> str | None:
        """The key; None where none is to be sent.

        Raises:
            UserError: the environment variable is not set, or holds what no header can.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise UserError(f"the environment variable {self.key_env} is not set; it must hold the key of {self.url}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"the environment variable {self.key_env} holds something that is no key (blanks, or not ASCII)")
        return key

    def refuses(self, sampling: Sampling) -> str:
        """Why it cannot draw by these settings; "" where it can."""
        if not self.extensions and (sampling.top_k is not None or sampling.min_p):
            return "top_k and min_p are sent only with extensions = true"
        return ""

    def __call__(
        self,
        prompts: Sequence[Asked],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_rollouts: Callable[[int, int], None] | None = None,
        *,
        stop: Stop | None = None,
    ) -> list[Rollout]:
        """As `Engine`; the server draws, from a seed that follows from seed, prompt and sample number.

        Once a request has failed for good none is begun or tried again: each one may cost money.

        Args:
            stop: shared by calls at the same time; from when it is set on no request begins. It is set when one fails for good,
                but for a prompt that is too long, which is the affair of its own call.

        Raises:
            UserError: no key; 401, 403, 404 and other refusals, at once; no usable answer after all tries.
            TooLong: the server has no room for a prompt and its answer.
            Stopped: `stop` was set before all answers were there.
        """
        if refused := self.refuses(sampling):
            raise UserError(refused)
        headers = {"Authorization": f"Bearer {key}"} if (key := self.key()) is not None else {}
        jobs = _numbered(prompts, samples, seed)
        own, rollouts = Stop(of=stop), dict[int, Rollout]()
        crew = Crew[int, Rollout](
            lambda place: self._one(jobs[place], sampling, headers, own), min(self.in_flight, max(1, len(jobs))), own
        )
        try:
            for place in range(len(jobs)):
                crew.give(place)
            while crew.busy:
                place, rollout = crew.take()
                rollouts[place] = rollout
                if on_rollouts is not None:
                    on_rollouts(len(rollouts), len(jobs))
        finally:
            crew.close()
        return [rollouts[place] for place in range(len(jobs))]

    def _one(self, job: tuple[int, Asked, int], sampling: Sampling, headers: Mapping[str, str], stop: Stop) -> Rollout:
        try:
            return self._tried(job, sampling, headers, stop)
        except BaseException as error:
            stop.set(above=not isinstance(error, TooLong | Stopped))
            raise

    def _tried(self, job: tuple[int, Asked, int], sampling: Sampling, headers: Mapping[str, str], stop: Stop) -> Rollout:
        number, asked, seed = job
        chat = bool(asked.turns)
        body = self._body(asked, sampling, seed)
        url = f"{self.url}/chat/completions" if chat else f"{self.url}/completions"
        for tried in range(self.retries + 1):
            if stop:
                raise Stopped
            try:
                return _read(post_json(url, body, headers, self.timeout_s), number, chat, self._knows_logp(sampling))
            except Refused as error:
                if error.code == "insufficient_quota" or (error.status not in AGAIN and error.status < 500):
                    kind = TooLong if _is_length(error) else UserError
                    raise kind(self._clean(self._refusal(error, url), headers)) from None
                why, wait_s = f"HTTP {error.status} {error}".strip(), error.wait_s
            except Failed as error:
                why, wait_s = str(error), None
            if wait_s is not None and wait_s > LONGEST_WAIT_S:
                raise UserError(
                    self._clean(f"{url} asks to wait {wait_s:,.0f} s ({why}); run the same command again then", headers)
                )
            if tried < self.retries:
                stop.wait(self._wait_s(tried, wait_s))
        raise UserError(self._clean(f"{url}: no usable answer in {_times(self.retries + 1)}: {why}", headers))

    def _wait_s(self, tried: int, asked_s: float | None) -> float:
        """Seconds until the next try: what the server asks for, or doubled each time, with jitter."""
        if asked_s is not None:
            return asked_s
        return min(LONGEST_BACKOFF_S, self.backoff_s * 2**tried) * random.uniform(0.75, 1.0)

    def _knows_logp(self, sampling: Sampling) -> bool:
        return self.logprobs and sampling.temperature in (0, 1) and sampling.whole

    def _body(self, asked: Asked, sampling: Sampling, seed: int) -> dict[str, Any]:
        limit = (
            "max_completion_tokens" if asked.turns and not self.extensions else "max_tokens"
        )  # the newer name is OpenAI's own
        body: dict[str, Any] = {"model": self.model, "seed": seed, limit: sampling.max_new_tokens, "stream": False, "n": 1}
        if asked.turns:
            body["messages"] = [_message(turn) for turn in asked.turns]
        elif asked.text or asked.ids:
            body["prompt"] = asked.text or [*asked.ids]
        else:
            raise UserError("a prompt has neither turns nor text nor tokens")
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if self.extensions:
            body |= {"top_k": sampling.top_k or 0, "min_p": sampling.min_p}
        if self._knows_logp(sampling):
            body["logprobs"] = True if asked.turns else 1
        return body

    def _refusal(self, error: Refused, url: str) -> str:
        """What is wrong and what helps."""
        said = f": {error}" if str(error) else ""
        key = f"the key in {self.key_env}" if self.key_env is not None else "no key was sent; name its variable in key_env"
        if error.status == 401:
            return f"{self.url} does not accept the request (HTTP 401): {key}"
        if error.status == 403:
            return f"{self.url} forbids model '{self.model}' (HTTP 403): {key}"
        if error.status == 404:
            return f"{url}: no such address, or no model '{self.model}' there (HTTP 404){said}"
        if 300 <= error.status < 400:
            return f"{url} is somewhere else (HTTP {error.status}); give the address that it moved to"
        if _is_length(error):
            return f"{url}: a prompt and its answer are too long for '{self.model}' (HTTP {error.status}){said}"
        if error.code == "insufficient_quota":
            return f"{self.url}: nothing is left of the account's quota (HTTP {error.status})"
        if self.extensions and any(name in str(error) for name in ("top_k", "min_p")):
            return f"{url} refuses top_k or min_p (HTTP {error.status}){said}; set extensions = false"
        if self.logprobs and "logprobs" in str(error):
            return f"{url} refuses logprobs (HTTP {error.status}){said}; set logprobs = false"
        return f"{url} refuses the request (HTTP {error.status}){said}"

    def _clean(self, message: str, headers: Mapping[str, str]) -> str:
        """A message without the key, which a server may have repeated."""
        key = headers.get("Authorization", "").removeprefix("Bearer ")
        return message.replace(key, "…") if key else message


def _is_length(error: Refused) -> bool:
    return error.status == 413 or (error.status in (400, 422) and any(mark in str(error).lower() for mark in TOO_LONG))


def _numbered(prompts: Sequence[Asked], samples: int, seed: int) -> list[tuple[int, Asked, int]]:
    """Number, prompt and own seed of each sample; a prompt that occurs again counts its samples on."""
    drawn: Counter[Asked] = Counter()
    jobs = []
    for number, asked in enumerate(prompts):
        for _ in range(samples):
            jobs.append((number, asked, sample_seed(seed, asked, drawn[asked])))
            drawn[asked] += 1
    return jobs


def sample_seed(seed: int, asked: Asked, sample: int) -> int:
    """31 bits from seed, prompt and sample number, by BLAKE2b."""
    data = repr((seed, asked.ids, asked.turns, asked.text, sample)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big") >> 1


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["tool_calls"] = [*turn.tool_calls]
    if turn.name:
        message["name"] = turn.name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _read(answer: Any, number: int, chat: bool, with_logp: bool) -> Rollout:
    """The rollout that an answer holds.

    Raises:
        Failed: it is JSON of another shape.
    """
    if isinstance(answer, dict) and answer.get("error"):
        said = answer["error"]
        raise Failed(f"an error in place of an answer: {str(said.get('message') if isinstance(said, dict) else said)[:300]}")
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, dict):
        raise Failed("the answer is not of OpenAI's shape: it needs one choice")
    message = choice.get("message")
    text = (message.get("content", False) if isinstance(message, dict) else False) if chat else choice.get("text", False)
    text = "" if text is None and chat else text  # where a model calls a tool and says nothing
    if not isinstance(text, str):
        raise Failed(f"the answer is not of OpenAI's shape: it needs choices[0].{'message.content' if chat else 'text'}")
    ended = choice.get("finish_reason")
    if not isinstance(ended, str):
        raise Failed("the answer is not of OpenAI's shape: it needs choices[0].finish_reason")
    reasoned = chat and isinstance(message, dict) and _reasons(message)
    return Rollout(
        prompt=number,
        ids=[],
        logp_N=_logp(choice.get("logprobs")) if with_logp and not reasoned else np.zeros(0, np.float32),
        text=_whole(text).strip(),
        finished=ended == "stop",
        usage=_usage(answer.get("usage")),
        reasoned=reasoned,
    )


def _reasons(message: Mapping[str, Any]) -> bool:
    """Whether reasoning stands beside the answer; servers name it in two ways."""
    return any(isinstance(said := message.get(name), str) and said.strip() for name in ("reasoning_content", "reasoning"))


def _logp(said: Any) -> np.ndarray:
    """float32 [N]; empty where the server does not say all of them."""
    said = said if isinstance(said, dict) else {}
    content, old = said.get("content"), said.get("token_logprobs")
    if isinstance(content, list):
        values = [one.get("logprob") if isinstance(one, dict) else None for one in content]
    else:
        values = old if isinstance(old, list) else []
    known = all(
        isinstance(value, int | float) and not isinstance(value, bool) and NOT_REPORTED < value <= 0 for value in values
    )
    return np.array(values if known else [], dtype=np.float32)


def _usage(said: Any) -> Usage:
    said = said if isinstance(said, dict) else {}
    return Usage(_count(said.get("prompt_tokens")), _count(said.get("completion_tokens")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _whole(text: str) -> str:
    """Text without halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _times(count: int) -> str:
    return "one try" if count == 1 else f"{count} tries"
