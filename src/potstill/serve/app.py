"""The server's paths: OpenAI's, the playground's, and its health."""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.edges.llamacpp_stream import Wish
from potstill.serve import tint
from potstill.serve.admission import Admission
from potstill.serve.engine import Answer, EngineFailed, Piece
from potstill.serve.guard import Guard, Receive, Scope, Send, Vanished, body_of, refuse
from potstill.serve.page import CSP, page
from potstill.serve.protocol import AskRequest, ChatRequest, Form, Refusal, TextRequest, example_of, parsed, usage
from potstill.serve.shelf import Opened, Shelf, resident

STALLED_S = 60.0  # a client that takes nothing for so long is gone
MADE_BY = "potstill"


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Attributes:
        max_tokens: of an answer.
        body_bytes: of a request.
        queue: requests that wait while all places are taken.
    """

    max_tokens: int = 1024
    body_bytes: int = 1 << 20
    queue: int = 32


@dataclass(eq=False)
class State:
    """What the paths share.

    Attributes:
        served: the model that the target names.
        picked: models that the playground compares at first.
        teacher: the model that others are compared with; "" where there is none.
        stopping: why nothing more is taken; "" while the server runs.
        tasks: answers on their way, which a stop cuts in the end.
    """

    shelf: Shelf
    limits: Limits
    served: str
    picked: Sequence[str] = ()
    teacher: str = ""
    stopping: str = ""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _admissions: dict[str, Admission] = field(default_factory=dict)

    def admission(self) -> Admission:
        """Of the loop that runs."""
        return self._admissions.setdefault("all", Admission(self.shelf.opening.streams, self.limits.queue))

    def cut(self) -> None:
        """End all answers that are on their way."""
        for task in list(self.tasks):
            task.cancel()


def application(state: State, *, key: str = "", names: Sequence[str] = ()) -> Guard:
    """The server as an ASGI application.

    Args:
        key: that requests must carry; "": none.
        names: hosts, besides addresses, under which it is known.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def home(request: Request) -> Response:
        return Response(page(), media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": CSP})

    async def health(request: Request) -> Response:
        trouble = state.shelf.trouble()
        status = "stopping" if state.stopping else "failed" if state.served in trouble else "ok"
        body = {
            "status": status,
            "model": state.served,
            "running": state.admission().running,
            "waiting": state.admission().waiting,
            # the reasons hold paths of this machine, and this answer needs no key
            "unavailable": dict.fromkeys(trouble, "a request with the key says why") if key else trouble,
            **_drafting(state),
        }
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def models(request: Request) -> Response:
        data = [{"id": id, "object": "model", "created": 0, "owned_by": MADE_BY} for id in state.shelf.offers]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        id = request.path_params["id"]
        if id not in state.shelf.offers:
            refusal = Refusal(404, f"no model {id[:100]!r}", "model_not_found", "model")
            return JSONResponse(refusal.body(), refusal.status)
        return JSONResponse({"id": id, "object": "model", "created": 0, "owned_by": MADE_BY})

    async def compared(request: Request) -> Response:
        return JSONResponse(_playground(state))

    async def wrong(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail.lower()}")
        return JSONResponse(refusal.body(), error.status_code, headers=error.headers)

    async def failed(request: Request, error: Exception) -> Response:  # the library prints its traceback
        return JSONResponse(Refusal(500, f"the server failed: {type(error).__name__}", "internal_error").body(), 500)

    posts: dict[str, Handler] = {"/v1/chat/completions": _chat, "/v1/completions": _text, "/playground/ask": _ask}
    app = Starlette(
        routes=[
            Route("/", home),
            Route("/healthz", health),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", model),
            Route("/playground/models", compared),
            *(Route(path, _Posted(state, handler), methods=["POST"]) for path, handler in posts.items()),
        ],
        exception_handlers={HTTPException: wrong, Exception: failed},
    )
    return Guard(app, key=key, names=names, most_bytes=state.limits.body_bytes)


def _drafting(state: State) -> dict[str, Any]:
    """What the draft model of the served one did so far; empty where it has none."""
    opened = state.shelf.open.get(state.served)
    if opened is None or opened.drafter is None or opened.engine.drafts is None:
        return {}
    drafts = opened.engine.drafts
    acceptance = round(drafts.acceptance, 1) if drafts.acceptance is not None else None
    told = {"drafted": drafts.drafted, "accepted": drafts.accepted, "acceptance_percent": acceptance}
    return {"draft": {"model": opened.drafter.offer.id, **told}}


Handler = Callable[[State, bytes, "Reply"], Awaitable[None]]


class Reply:
    """What a handler answers with: one JSON body, or events as they come.

    A client that takes nothing for `STALLED_S` counts as gone.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def json(self, body: dict[str, Any]) -> None:
        """The whole answer."""
        raw = json.dumps(body, ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        self.begun = True
        await self._write({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write({"type": "http.response.body", "body": raw})

    async def event(self, value: dict[str, Any] | str) -> None:
        """One more event of a stream."""
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await self._write({"type": "http.response.start", "status": 200, "headers": headers})
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        await self._write({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def end(self) -> None:
        """No more events."""
        await self._write({"type": "http.response.body", "body": b""})

    async def _write(self, message: Any) -> None:
        try:
            async with asyncio.timeout(STALLED_S):
                await self._send(message)
        except (TimeoutError, OSError):
            raise Vanished from None


@dataclass(eq=False)
class _Posted:
    """A path that reads a JSON body and answers it, and gives up when the client does."""

    state: State
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            if self.state.stopping:
                raise Refusal(503, self.state.stopping, "stopping", headers={"Retry-After": "10"})
            body = await body_of(receive, self.state.limits.body_bytes)
            await self._answered(body, reply, receive)
        except Vanished:
            return
        except Refusal as refusal:
            await self._fail(refusal, reply, send)
        except (EngineFailed, UserError) as error:
            await self._fail(Refusal(503, str(error), "model_unavailable"), reply, send)

    async def _answered(self, body: bytes, reply: Reply, receive: Receive) -> None:
        """Answer, and stop where the client goes or the server does."""
        work = asyncio.ensure_future(self.handler(self.state, body, reply))
        gone = asyncio.ensure_future(_until_gone(receive))
        self.state.tasks.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Vanished
            if work.cancelled():
                raise Refusal(503, self.state.stopping or "the answer was cut", "stopping")
            work.result()
        finally:
            self.state.tasks.discard(work)
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _fail(self, refusal: Refusal, reply: Reply, send: Send) -> None:
        with suppress(Vanished, OSError):
            if not reply.begun:
                await refuse(send, refusal)
                return
            await reply.event(refusal.body())  # clients of OpenAI's raise it
            await reply.end()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# --- answers


async def _chat(state: State, body: bytes, reply: Reply) -> None:
    asked = parsed(ChatRequest, body)
    example = example_of(asked.messages)

    def prompt_of(opened: Opened) -> tuple[list[int], str]:
        return opened.prompt(example)

    await _complete(state, reply, asked, Form(True, asked.model, asked.wants_usage()), prompt_of)


async def _text(state: State, body: bytes, reply: Reply) -> None:
    asked = parsed(TextRequest, body)
    prompt = asked.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise Refusal(400, "one prompt a request is supported here", "invalid_value", "prompt")
        prompt = prompt[0]

    def prompt_of(opened: Opened) -> tuple[list[int], str]:
        if isinstance(prompt, str):
            return opened.text(prompt), ""
        with opened.tokenizing() as tokenizer:
            known = len(tokenizer)
        if any(not 0 <= id < known for id in prompt):  # type: ignore[operator]
            raise UserError(f"token ids must lie between 0 and {known - 1:,}")
        return list(prompt), ""  # type: ignore[arg-type]

    await _complete(state, reply, asked, Form(False, asked.model, asked.wants_usage()), prompt_of)


async def _complete(
    state: State,
    reply: Reply,
    asked: ChatRequest | TextRequest,
    form: Form,
    prompt_of: Callable[[Opened], tuple[list[int], str]],
) -> None:
    """Answer in OpenAI's form, whole or streamed."""
    async with _begun(state, asked, prompt_of, asked.most(), asked.stops()) as (opened, answer):

        def used() -> dict[str, Any]:
            drafts = answer.drafts if opened.engine.drafts is not None else None
            return usage(len(answer.prompt), answer.count, drafts)

        if not asked.stream:
            text = "".join([piece.text async for piece in _pieces(answer)])
            await reply.json(form.whole(text, answer.finish, used()))
            return
        first = form.first()
        async for piece in _pieces(answer):
            if first is not None:
                await reply.event(first)  # not before the model has begun: until then a failure has a status of its own
                first = None
            await reply.event(form.part(piece.text))
        if first is not None:
            await reply.event(first)
        await reply.event(form.last(answer.finish))
        if asked.wants_usage():
            await reply.event(form.used(used()))
    await reply.event("[DONE]")
    await reply.end()


@asynccontextmanager
async def _begun(
    state: State,
    asked: ChatRequest | TextRequest | AskRequest,
    prompt_of: Callable[[Opened], tuple[list[int], str]],
    most: int | None,
    stops: Sequence[str] = (),
) -> AsyncIterator[tuple[Opened, Answer]]:
    """An answer that can begin: its model is open, its prompt fits, and there is a place for it.

    Raises:
        Refusal: so it is not.
    """
    if asked.model not in state.shelf.offers:  # before it waits for a place
        async with state.shelf.using(asked.model):
            pass
    async with state.admission().place(), state.shelf.using(asked.model) as opened:
        try:
            prompt, tag = await asyncio.to_thread(prompt_of, opened)
        except UserError as error:
            raise Refusal(400, str(error), "invalid_value", asked.prompted_by) from None
        room = opened.room(prompt, most, state.limits.max_tokens, asked.prompted_by)
        yield opened, Answer(opened.engine, prompt, _wish(asked, room), stops, tag)


def _wish(asked: ChatRequest | TextRequest | AskRequest, room: int) -> Wish:
    seed = asked.seed if asked.seed is not None else secrets.randbits(32)
    if isinstance(asked, AskRequest):
        return Wish(room, float(asked.temperature), seed=seed)
    return Wish(
        room,
        temperature=float(asked.temperature or 0.0),
        top_k=asked.top_k,
        top_p=float(asked.top_p or 1.0),
        min_p=float(asked.min_p or 0.0),
        seed=seed,
    )


async def _pieces(answer: Answer) -> AsyncGenerator[Piece, None]:
    async with aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            yield piece


# --- playground


def _playground(state: State) -> dict[str, Any]:
    """What the page shows before anything is asked."""
    models = [
        {"id": offer.id, "title": offer.title, "role": offer.role, "picked": offer.id in state.picked}
        for offer in state.shelf.offers.values()
    ]
    return {"models": models, "teacher": state.teacher, "max_tokens": state.limits.max_tokens, "served": state.served}


async def _ask(state: State, body: bytes, reply: Reply) -> None:
    """One model's answer, piece by piece; then its figures; then its divergence from the teacher."""
    asked = parsed(AskRequest, body)
    example = Example(key="", instruction=asked.prompt, response="")
    if asked.model in state.shelf.offers and asked.model not in state.shelf.open:
        await reply.event({"loading": True})

    def prompt_of(opened: Opened) -> tuple[list[int], str]:
        return opened.prompt(example)

    async with _begun(state, asked, prompt_of, asked.max_tokens) as (opened, answer):
        said = ""
        async for piece in _pieces(answer):
            said += piece.text
            await reply.event({"text": piece.text})
        await reply.event({"end": _figures(opened, answer)})
        await reply.event(await _tinted(state, opened, answer, said[len(answer.opened) :], example))
    await reply.end()


def _figures(opened: Opened, answer: Answer) -> dict[str, Any]:
    rest_s = answer.seconds - answer.first_s
    return {
        "reason": answer.finish,
        "tokens": answer.count,
        "prompt_tokens": len(answer.prompt),
        "first_s": round(answer.first_s, 3),
        "tokens_per_s": round((answer.count - 1) / rest_s, 2) if answer.count > 1 and rest_s > 0 else None,
        "runtime": opened.engine.runtime,
        "resident_bytes": resident(opened),
        "resident_of": "weights" if opened.engine.runtime == "torch" else "process",
        "file_bytes": opened.file_bytes,
        "acceptance_percent": answer.drafts.acceptance,
    }


async def _tinted(state: State, opened: Opened, answer: Answer, said: str, example: Example) -> dict[str, Any]:
    """The event that tells of divergences, or why there are none."""
    if not state.teacher or opened.offer.id == state.teacher:
        return {"no_tint": "teacher" if state.teacher else "alone"}
    try:
        async with state.shelf.scoring(state.teacher) as teacher, state.shelf.scoring(opened.offer.id) as student:
            found = await asyncio.to_thread(_tint, state, opened, answer, said, example, student, teacher)
    except (Refusal, UserError) as error:
        return {"no_tint": str(error)}
    if answer.opened:
        found.pieces.insert(0, (answer.opened, 0.0))
    return {"tint": {"pieces": found.pieces, "mean": round(found.mean, 4), "note": found.note}}


def _tint(state: State, opened: Opened, answer: Answer, said: str, example: Example, student: Any, teacher: Any) -> tint.Tint:
    from potstill.edges.sampling import hidden_tokens

    with state.shelf.tokenizer(state.teacher) as theirs, opened.tokenizing() as ours:
        vocab, foreign = tint.compared(ours, theirs, opened.offer.prompts, example)
        ids, cut = tint.tokens_of(ours, answer.ids, answer.all_known, said)
    if max(ids) >= vocab:
        raise UserError("the answer has a token that the teacher does not know")
    with student as model, teacher as its_teacher:
        nats = tint.divergences(model, its_teacher, answer.prompt, ids, vocab)
    note = "; ".join(filter(None, (foreign, cut)))
    with opened.tokenizing() as ours:
        hidden = frozenset(hidden_tokens(ours, opened.renderer.stop_ids))
        return tint.tint_of(ours, hidden, ids, nats, note)
