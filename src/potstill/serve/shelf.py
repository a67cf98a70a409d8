"""Models that are open, as many as fit into memory."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.templates import opened_tag
from potstill.edges import tokens
from potstill.edges.llamacpp import THREADS, runtime_problem
from potstill.serve.engine import Engine
from potstill.serve.offers import Offer, checked
from potstill.serve.protocol import Refusal

EngineName = Literal["auto", "llama.cpp", "torch"]
UNBOUNDED = 1 << 30  # tokens of a prompt; its length is checked where all figures are known
SPARE = 1.15  # of the memory that a model needs
REPACKED = 2.0  # llama.cpp may keep a second form of a file's weights


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    Attributes:
        engine: auto is llama.cpp where it is installed and the model has a file of it.
        context: tokens of a prompt and its answer, at most; a model may have fewer.
        streams: answers of a model at once.
        threads: of llama.cpp.
    """

    engine: EngineName = "auto"
    context: int = 2048
    streams: int = 4
    threads: int = THREADS

    def file_of(self, offer: Offer) -> Path | None:
        """The file that llama.cpp is to open; None: torch computes.

        Raises:
            UserError: llama.cpp is asked for and cannot be.
        """
        problem = runtime_problem() if self.engine != "torch" else None
        if self.engine == "llama.cpp":
            if problem is not None:
                raise UserError(f"--engine llama.cpp: {problem}")
            if offer.file is None:
                raise UserError(
                    f"--engine llama.cpp: the run has no .gguf file of {offer.id}; add a stage of kind 'export' for it "
                    "(a file that failed `potstill verify` does not count), or leave --engine out"
                )
        return offer.file if self.engine != "torch" and problem is None else None


@dataclass(frozen=True)
class Drafter:
    """A smaller model that writes ahead of the served one.

    Attributes:
        ahead: tokens that it writes before the served one looks.
    """

    offer: Offer
    file: Path
    ahead: int


def drafter_of(served: Offer, draft: Offer, opening: Opening, ahead: int) -> Drafter:
    """The draft model of a served one, once both are known to have files whose token ids mean the same.

    Raises:
        UserError: llama.cpp is not there, one of them has no file of it, or their tokens differ.
    """
    from potstill.edges.llamacpp_drafts import check_draft

    if opening.engine == "torch":
        raise UserError("--draft: llama.cpp alone writes with a draft model here; leave --engine torch out")
    if (problem := runtime_problem()) is not None:
        raise UserError(f"--draft: {problem}")
    for offer in (served, draft):
        if offer.file is None:
            raise UserError(
                f"--draft: the run has no .gguf file of {offer.id}, and llama.cpp needs one of both models; add a stage of "
                "kind 'export' for it (a file that failed `potstill verify` does not count), or leave --draft out"
            )
    assert served.file is not None
    assert draft.file is not None
    checked(draft, file=True)  # the served one is checked when it is opened
    check_draft(served.file, draft.file)
    return Drafter(draft, draft.file, ahead)


@dataclass(eq=False)
class Opened:
    """A model that answers.

    Attributes:
        tokenizer: for one thread at once, which holds `tokenizing`; the engine has a copy of its own.
        file_bytes: of its weights on disk, in the form that is served.
        drafter: what writes ahead of it; None: nothing does.
    """

    offer: Offer
    tokenizer: Any
    renderer: Renderer
    engine: Engine
    file_bytes: int
    drafter: Drafter | None = None
    used: int = 0  # requests that hold it now
    _plain: tokens.Unspellable | None = None
    _longest: int | None = None  # characters of a token
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def tokenizing(self) -> Iterator[Any]:
        """The tokenizer, which no other thread uses while inside: it keeps settings and caches of its own."""
        with self._lock:
            yield self.tokenizer

    def prompt(self, example: Example) -> tuple[list[int], str]:
        """A conversation's tokens, as in training, and the tag of thinking that they open.

        Raises:
            UserError: the model's form cannot hold it.
        """
        self._check_length(sum(len(turn.content) for turn in example.history) + len(example.instruction), "messages")
        with self.tokenizing():
            found = self.renderer.prompt(example)
            if found.ids is None:
                raise UserError(found.reason)
            return found.ids, opened_tag(self.renderer.text(example, ""))

    def text(self, text: str) -> list[int]:
        """The tokens of a text without a template, begun as the tokenizer begins texts; it spells no control token."""
        self._check_length(len(text), "prompt")
        with self.tokenizing() as tokenizer:
            if self._plain is None:
                self._plain = tokens.Unspellable(tokenizer, tokens.control_tokens(tokenizer))
            return tokens.begun(tokenizer, self._plain.encode(text))

    def _check_length(self, characters: int, param: str) -> None:
        """Refuse what cannot fit before it is cut into tokens, which takes seconds.

        Raises:
            Refusal: 400, with the figures.
        """
        if self._longest is None:
            with self.tokenizing() as tokenizer:
                self._longest = max(map(len, tokenizer.get_vocab()))
        most = self.engine.positions * self._longest
        if characters > most:
            raise Refusal(
                400,
                f"this model's context is {self.engine.positions:,} tokens, which spell at most {most:,} characters; "
                f"the prompt has {characters:,}; shorten it",
                "context_length_exceeded",
                param,
            )

    def room(self, prompt: Sequence[int], asked: int | None, most: int, param: str = "prompt") -> int:
        """Tokens that the answer may have.

        Args:
            param: the request's field that holds the prompt.

        Raises:
            Refusal: 400: they are more than the server allows, or than fit behind the prompt; with the figures.
        """
        if not prompt:
            raise Refusal(400, "the prompt has no tokens", "invalid_value", param)
        if asked is not None and asked > most:
            raise Refusal(
                400, f"max_tokens = {asked:,} is more than this server allows, {most:,}", "invalid_value", "max_tokens"
            )
        positions = self.engine.positions
        left = positions - len(prompt)
        wanted = asked if asked is not None else min(most, left)
        if left < 1 or wanted > left:
            raise Refusal(
                400,
                f"this model's context is {positions:,} tokens; the prompt has {len(prompt):,}"
                + (f" and max_tokens is {wanted:,}" if asked is not None else "")
                + "; shorten the prompt"
                + (" or max_tokens" if asked is not None else ""),
                "context_length_exceeded",
                param,
            )
        return wanted

    def close(self) -> None:
        """Free it."""
        self.engine.close()


@dataclass(eq=False)
class Weights:
    """A model that only scores what others wrote."""

    model: Any
    used: int = 0

    def close(self) -> None:
        """Free it."""
        self.model = None


@dataclass(frozen=True)
class Need:
    """Memory of a model that answers, in bytes.

    Attributes:
        positions: tokens of a prompt and its answer.
        cache: keys and values of all answers at once, each of so many tokens.
    """

    weights: int
    positions: int
    cache: int


def need_of(offer: Offer, opening: Opening, file: Path | None) -> Need:
    """What a model takes: by llama.cpp a file as it is and a cache in float16, by torch both in float32.

    Raises:
        UserError: its config.json cannot be read.
    """
    from potstill.edges.models import config_of, positions_of, size_of

    config = config_of(offer.where)
    positions = min(opening.context, positions_of(config) or opening.context)
    if file is not None:
        return Need(file.stat().st_size, positions, keys_and_values(config, positions, 2) * opening.streams)
    weights = 4 * (offer.parameters or size_of(config).parameters)
    return Need(weights, positions, keys_and_values(config, positions, 4) * opening.streams)


def keys_and_values(config: Any, positions: int, width: int) -> int:
    """Bytes that a row of so many tokens keeps in all layers; of a layer that looks back through a window those in it.

    Args:
        width: bytes of a number.
    """
    from potstill.edges.models import head_width

    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0  # no attention
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = min(positions, getattr(config, "sliding_window", None) or positions)
    kept = (window if "sliding" in kind else positions for kind in kinds if "attention" in kind and "linear" not in kind)
    return 2 * heads * head_width(config) * width * sum(kept)


def _free(file: Path | None) -> int:
    """Bytes that are free where the model would be: llama.cpp computes on the processor."""
    import torch

    from potstill.edges.machine import free_memory
    from potstill.edges.models import device

    return free_memory(torch.device("cpu") if file is not None else device())


def _with_drafter(need: Need, drafter: Drafter, opening: Opening) -> Need:
    """What both take together; the draft model has a cache of its own of as many tokens."""
    own = need_of(drafter.offer, opening, drafter.file)
    positions = min(need.positions, own.positions)  # what neither has read cannot be drafted
    cache = (need.cache * positions) // need.positions + (own.cache * positions) // own.positions
    return Need(need.weights + own.weights, positions, cache)


def _check_fits(offer: Offer, opening: Opening, need: Need, free: int) -> None:
    """Refuse what cannot fit before it is loaded.

    Raises:
        UserError: with the figures.
    """
    if need.weights + need.cache > free:
        raise UserError(
            f"{offer.id} needs {need.weights / 1e9:.1f} GB for its weights and {need.cache / 1e9:.1f} GB for keys and values "
            f"of {opening.streams:,} answers of {need.positions:,} tokens, and {free / 1e9:.1f} GB are free; lower --streams "
            "or --context, or end other programs"
        )


def open_offer(offer: Offer, opening: Opening, drafter: Drafter | None = None) -> Opened:
    """Load a model and start what computes its answers.

    Args:
        drafter: what writes ahead of it, of `drafter_of`.

    Raises:
        UserError: its files are damaged or gone, it does not fit into memory, its template loses text, llama.cpp does not
            take it.
    """
    from potstill.edges.hub import files_of
    from potstill.edges.models import bytes_of, load_model, load_tokenizer
    from potstill.edges.sampling import hidden_tokens, stops_of
    from potstill.serve.llamacpp_engine import LlamaCppEngine
    from potstill.serve.torch_engine import TorchEngine

    file = opening.file_of(offer)
    checked(offer, file=file is not None)
    need = need_of(offer, opening, file)
    if drafter is not None:
        need = _with_drafter(need, drafter, opening)
    _check_fits(offer, opening, need, _free(file))
    tokenizer = load_tokenizer(offer.where)
    renderer = renderer_of(tokenizer, offer.prompts)
    hidden = frozenset(hidden_tokens(tokenizer, renderer.stop_ids))
    own = deepcopy(tokenizer)  # spells answers in other threads
    most, positions = opening.streams, need.positions
    if file is not None:
        doubted = offer.doubted() or (drafter is not None and drafter.offer.doubted())
        drafting = {"draft": drafter.file, "ahead": drafter.ahead} if drafter is not None else {}
        engine: Engine = LlamaCppEngine(
            file, own, hidden=hidden, most=most, positions=positions, threads=opening.threads, doubted=doubted, **drafting
        )
        return Opened(offer, tokenizer, renderer, engine, file.stat().st_size, drafter)
    model = load_model(offer.where)
    stops = stops_of(model, tokenizer, renderer.stop_ids)
    engine = TorchEngine(model, own, stop_ids=stops, hidden=hidden, most=most, positions=positions)
    path = Path(offer.where.removeprefix("path:")).expanduser() if offer.where.startswith("path:") else files_of(offer.where)
    return Opened(offer, tokenizer, renderer, engine, bytes_of(path))


def renderer_of(tokenizer: Any, prompts: Prompts) -> Renderer:
    """Renders prompts as in training, of any length."""
    return Renderer(tokenizer, prompts.model_copy(update={"max_prompt_tokens": UNBOUNDED - 8, "max_tokens": UNBOUNDED}))


class Shelf:
    """Opens models when they are asked for and closes those that nobody uses when memory runs short; for one event loop.

    Args:
        offers: all that can be opened.
        served: the first to be opened, which stays.
    """

    def __init__(self, offers: Sequence[Offer], opening: Opening, served: Opened) -> None:
        self.offers = {offer.id: offer for offer in offers}
        self.opening, self._served = opening, served
        self.open: dict[str, Opened] = {served.offer.id: served}  # the one used last comes last
        self.weights: dict[str, Weights] = {}
        self._tokenizers: dict[str, Any] = {}
        self._tokenizing = threading.Lock()
        self._turn = asyncio.Lock()  # models are opened one after the other, so that memory is counted right
        self._begun: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def using(self, id: str) -> AsyncIterator[Opened]:
        """A model, which stays open while inside.

        Raises:
            Refusal: 404: there is no such model; 503: it cannot be opened or is gone.
        """
        if id not in self.offers:
            known = ", ".join(self.offers)
            raise Refusal(404, f"no model {id[:100]!r}; there are: {known}", "model_not_found", "model")
        await self._bury(id)
        while id not in self.open:
            await self._once(f"open {id}", lambda: self._open(self.offers[id]))
        opened = self.open[id] = self.open.pop(id)
        opened.used += 1
        try:
            trouble = opened.engine.trouble()
            if trouble:
                raise Refusal(503, f"{id} does not answer any more: {trouble}", "model_unavailable")
            yield opened
        finally:
            opened.used -= 1

    @asynccontextmanager
    async def scoring(self, id: str) -> AsyncIterator[Any]:
        """A context manager that gives a model's weights in torch, to be entered in the thread that scores.

        Raises:
            Refusal: 503: they cannot be opened.
        """
        from potstill.serve.torch_engine import TorchEngine

        opened = self.open.get(id)
        if opened is not None and isinstance(opened.engine, TorchEngine):
            held: Opened | Weights = opened
            entered: Any = opened.engine.paused()
        else:
            while id not in self.weights:
                await self._once(f"read {id}", lambda: self._read(self.offers[id]))
            weights = self.weights[id] = self.weights.pop(id)
            held, entered = weights, nullcontext(weights.model)
        held.used += 1
        try:
            yield entered
        finally:
            held.used -= 1

    @contextmanager
    def tokenizer(self, id: str) -> Iterator[Any]:
        """A model's tokenizer, which no other thread uses while inside, whether the model is open or not.

        Raises:
            UserError: its files are gone.
        """
        from potstill.edges.models import load_tokenizer

        with self._tokenizing:
            if id not in self._tokenizers:
                self._tokenizers[id] = load_tokenizer(self.offers[id].where)
            yield self._tokenizers[id]

    def trouble(self) -> dict[str, str]:
        """Of each open model that cannot answer, why."""
        found = {id: opened.engine.trouble() for id, opened in self.open.items()}
        return {id: why for id, why in found.items() if why}

    def close(self) -> None:
        """Close all."""
        for opened in self.open.values():
            opened.close()
        self.open.clear()
        self.weights.clear()

    async def _once(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for a work that all who ask for it share, and that goes on when one of them leaves."""
        task = self._begun.get(what)
        if task is None:
            task = self._begun[what] = asyncio.ensure_future(work())

            def ended(task: asyncio.Task[None]) -> None:
                del self._begun[what]
                if not task.cancelled():
                    task.exception()  # looked at, for the case that nobody waits any more

            task.add_done_callback(ended)
        await asyncio.shield(task)

    async def _bury(self, id: str) -> None:
        """Close a model that cannot answer any more, once nobody uses it, so that it is opened again; the served one stays."""
        opened = self.open.get(id)
        if opened is not None and opened is not self._served and not opened.used and opened.engine.trouble():
            del self.open[id]
            await asyncio.to_thread(opened.close)

    async def _open(self, offer: Offer) -> None:
        async with self._turn:
            with _unavailable(offer):
                file = self.opening.file_of(offer)
                await asyncio.to_thread(checked, offer, file=file is not None)
                await self._make_room(offer, file)
                self.open[offer.id] = await asyncio.to_thread(open_offer, offer, self.opening)

    async def _read(self, offer: Offer) -> None:
        from potstill.edges.models import load_model

        async with self._turn:
            with _unavailable(offer):
                await asyncio.to_thread(checked, offer, file=False)
                await self._make_room(offer, None, answers=False)
                self.weights[offer.id] = Weights(await asyncio.to_thread(load_model, offer.where))

    async def _make_room(self, offer: Offer, file: Path | None, *, answers: bool = True) -> None:
        """Close models that nobody uses, the one unused for longest first, until another fits.

        Args:
            answers: whether the model is to answer, and so keeps keys and values.

        Raises:
            Refusal: 503: it does not fit beside those in use.
        """
        from potstill.edges.machine import give_back_memory

        need = await asyncio.to_thread(need_of, offer, self.opening, file)
        weights = REPACKED * need.weights if file is not None else need.weights
        needed = SPARE * (weights + need.cache * answers)
        while _free(file) < needed:
            idle: list[tuple[dict[str, Any], str]] = [(self.weights, id) for id, held in self.weights.items() if not held.used]
            idle += [(self.open, id) for id, held in self.open.items() if not held.used and held is not self._served]
            if not idle:
                raise Refusal(
                    503, f"{offer.id} needs {needed / 1e9:.1f} GB, and other models in use leave less", "out_of_memory"
                )
            where, id = idle[0]
            await asyncio.to_thread(where.pop(id).close)
            give_back_memory()


@contextmanager
def _unavailable(offer: Offer) -> Iterator[None]:
    """A model that cannot be opened is a refusal of the request."""
    try:
        yield
    except UserError as error:
        raise Refusal(503, f"{offer.id} cannot be opened: {error}", "model_unavailable") from error
    except (MemoryError, OSError) as error:
        raise Refusal(503, f"{offer.id} cannot be opened: {error}", "model_unavailable") from error


def resident(opened: Opened) -> int:
    """Memory of a model that answers; 0 where it cannot be told."""
    with suppress(Exception):
        return opened.engine.resident_bytes()
    return 0
