"""One answer of llama.cpp's server, token by token, to a prompt of token ids."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from potstill.edges import tokens
from potstill.edges.llamacpp import SILENT_S, Refused
from potstill.edges.llamacpp_drafts import NO_DRAFTS, Drafts, drafts_in
from potstill.edges.models import Tokenizer

SAMPLERS = ("temperature", "top_k", "top_p", "min_p")  # in the order of ours; no penalties


@dataclass(frozen=True)
class Wish:
    """How an answer is drawn; the fields of `Drawing`, and where it ends."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def body(self, prompt: list[int], *, drafting: bool = False) -> dict[str, Any]:
        """What the server is asked.

        Args:
            drafting: each piece is to come with its drafts so far, because an answer may be left before its end.
        """
        return {
            "prompt": prompt,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "n_predict": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": self.seed % 2**32,
            "samplers": list(SAMPLERS),
            "repeat_penalty": 1.0,
            "timings_per_token": drafting,
        }


@dataclass(frozen=True)
class Heard:
    """A piece of an answer.

    Attributes:
        text: "" of tokens that are not shown.
        ids: the tokens that spell it; empty where they are not known, as the server does not tell the first tokens of a
            character of several. Not the token that ends an answer.
        count: tokens drawn so far, of an answer that a token ended with that one.
        end: "stop", which a token brought, or "length" with the last piece.
        drafts: of a draft model so far.
    """

    text: str
    ids: tuple[int, ...]
    count: int = 0
    end: str = ""
    drafts: Drafts = NO_DRAFTS


class TokenStream:
    """One request; can be closed from another thread, and then the server stops computing.

    Args:
        url: of the server, as `Served` has it.
        key: which the server asks for; "": none.
        hidden: tokens that are not shown.
        alone: held while the tokenizer is used; of streams that share one.
        drafting: whether the server has a draft model, whose figures each piece then tells.
    """

    def __init__(
        self,
        url: str,
        prompt: list[int],
        wish: Wish,
        tokenizer: Tokenizer,
        *,
        key: str = "",
        hidden: frozenset[int],
        alone: "threading.Lock | None" = None,
        drafting: bool = False,
    ) -> None:
        where = urlsplit(url)
        self._tokenizer, self._hidden, self._alone = tokenizer, hidden, alone or threading.Lock()
        self._connection = http.client.HTTPConnection(where.hostname or "127.0.0.1", where.port, timeout=SILENT_S)
        self._body = json.dumps(wish.body(prompt, drafting=drafting))
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._closed = False

    def close(self) -> None:
        """End the answer; safe from any thread, and more than once."""
        self._closed = True
        sock = self._connection.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __iter__(self) -> Iterator[Heard]:
        """The pieces; none any more once it is closed.

        Raises:
            Refused: the server is gone, did not take the request, or answers in a form that we do not know.
        """
        try:
            yield from self._pieces()
        except Refused:
            raise
        except Exception as error:  # also what a socket that is closed under its reader brings; somebody waits for an end
            if not self._closed:
                raise Refused(f"{type(error).__name__}: {error}") from error
        finally:
            self._connection.close()

    def _pieces(self) -> Iterator[Heard]:
        self._connection.request("POST", "/completion", self._body, self._headers)
        if self._closed:
            return
        answer = self._connection.getresponse()
        if answer.status != 200:
            raise Refused(_message(answer.read(20_000)))
        count, held = 0, Heard("", ())  # a hidden token, which may be the one that ends the answer
        for line in answer:
            if not line.startswith((b"data:", b"error:")):
                continue
            told = json.loads(line.partition(b":")[2])
            if line.startswith(b"error:") or "error" in told:
                raise Refused(_message(line.partition(b":")[2]))
            drafts = drafts_in(told.get("timings", {}))
            if told.get("stop"):
                ended = told["stop_type"] != "limit"
                if held.ids and not ended:
                    yield held
                yield Heard("", (), told["tokens_predicted"], "stop" if ended else "length", drafts)
                return
            with self._alone:
                text, ids = self._spelt(told["content"], told["tokens"], first=count == 0)
            count = told.get("tokens_predicted", count + max(1, len(ids)))
            if held.ids:
                yield held
            held = Heard("", ids if not text and ids[-1:] and ids[-1] in self._hidden else (), count, drafts=drafts)
            if text or (ids and not held.ids):
                yield Heard(text, ids, count, drafts=drafts)
        if not self._closed:
            raise Refused("the answer broke off")

    def _spelt(self, text: str, ids: list[int], first: bool) -> tuple[str, tuple[int, ...]]:
        """The text as our tokenizer has it, with its tokens where they are known."""
        own = tokens.decode(self._tokenizer, ids, self._hidden)
        if not text or own == text or (first and own == text.removeprefix(" ")):
            return own, tuple(ids)
        whole = tokens.encode(self._tokenizer, text)
        known = whole[len(whole) - len(ids) :] == ids and tokens.decode(self._tokenizer, whole) == text
        return text, tuple(whole) if known else ()


def _message(body: bytes) -> str:
    try:
        error = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:200]
    error = error.get("error", error) if isinstance(error, dict) else error
    return str(error.get("message", error) if isinstance(error, dict) else error)[:400]
