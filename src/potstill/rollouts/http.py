"""One JSON question to a server, over the standard library: whatever goes wrong is one of three exceptions."""

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

MOST_BYTES = 64 << 20  # of a body; more is no answer to a question of ours


class Failed(Exception):
    """No usable answer came, and another try may bring one: no connection, a timeout, a cut or a garbled body."""


class Refused(Exception):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
        code: the error's own code, `insufficient_quota` for one; "" where the body names none.
        wait_s: seconds after which the server wants to be asked again; None where it does not say.
    """

    def __init__(self, status: int, message: str, code: str = "", wait_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.wait_s = status, code, wait_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected question would lose its body, and would take its key along to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def post_json(url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout_s: float) -> Any:
    """What a server answers, as JSON.

    Args:
        timeout_s: longest silence, and longest time for the whole answer once it has begun.

    Raises:
        Failed, Refused.
    """
    data = json.dumps(body, ensure_ascii=True, allow_nan=False).encode("ascii")
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", "User-Agent": "potstill", **headers})
    try:
        with _OPENER.open(asked, timeout=timeout_s) as answer:
            text = _body(answer, timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, timeout_s) from None
    except TimeoutError:
        raise Failed(f"no answer within {timeout_s:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise Failed(f"no answer within {timeout_s:g} s") from None
        raise Failed(f"no connection ({_in_words(error.reason)})") from None
    except (http.client.HTTPException, OSError) as error:
        raise Failed(f"the connection broke off ({_in_words(error)})") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failed(f"the answer is no JSON ({_excerpt(text)})") from None


def _body(answer: Any, timeout_s: float) -> bytes:
    """All bytes of a body.

    Raises:
        Failed: it is shorter than its header says, too large, or takes too long.
    """
    ends, parts, length = time.monotonic() + timeout_s, [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        length += len(part)
        if length > MOST_BYTES:
            raise Failed(f"the answer has more than {MOST_BYTES:,} bytes")
        if time.monotonic() > ends:
            raise Failed(f"the answer did not end within {timeout_s:g} s")
    announced = answer.headers.get("Content-Length", "")
    if announced.isdecimal() and length < int(announced):
        raise Failed(f"the answer broke off after {length:,} of {int(announced):,} bytes")
    return b"".join(parts)


def _refused(error: urllib.error.HTTPError, timeout_s: float) -> Refused:
    message, code = "", ""
    try:
        text = _body(error, timeout_s)
        said = json.loads(text)
        said = said.get("error", said) if isinstance(said, dict) else said
        if isinstance(said, dict):
            message = str(said.get("message") or said.get("detail") or "")
            code = str(said.get("code") or "")
        elif isinstance(said, str):
            message = said
    except (Failed, ValueError, RecursionError, OSError, http.client.HTTPException):
        pass  # the status says enough
    return Refused(error.code, _excerpt(message), code, _wait_s(error.headers.get("Retry-After")))


def _wait_s(said: str | None) -> float | None:
    """Seconds that `Retry-After` names, as a number or as a date; None where it is missing or means nothing."""
    if said is None:
        return None
    try:
        return max(0.0, float(said)) if float(said) < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _in_words(error: Any) -> str:
    if isinstance(error, socket.gaierror):
        return "the host's name is not known"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _excerpt(text: str | bytes) -> str:
    plain = " ".join((text.decode("utf-8", "replace") if isinstance(text, bytes) else text).split())
    return plain[:300] + ("…" if len(plain) > 300 else "")
