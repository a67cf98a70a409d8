"""What draws answers, and how a request hears of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from potstill.edges.llamacpp_drafts import NO_DRAFTS, Drafts
from potstill.edges.llamacpp_stream import Wish
from potstill.edges.spelling import UNFINISHED, Stops


@dataclass(frozen=True)
class Piece:
    """Text that can be shown, and the tokens that spell it; see `Heard` for when they are not known, and which is not one."""

    text: str
    ids: tuple[int, ...]
    count: int
    drafts: Drafts = NO_DRAFTS


@dataclass(frozen=True)
class End:
    """Why an answer ended.

    Attributes:
        reason: stop, which a token brought; length; or failed.
        count: tokens drawn, that token included.
        why: of one that failed.
        drafts: of the engine's draft model.
    """

    reason: str
    count: int = 0
    why: str = ""
    drafts: Drafts = NO_DRAFTS


Say = Callable[[Piece | End], None]


class Engine(Protocol):
    """A model that answers several prompts at once.

    Attributes:
        runtime: what computes, for people: "llama.cpp", "torch".
        most: answers at once.
        positions: tokens that a prompt and its answer may have together.
        drafts: of its draft model in all answers so far; None: it has none.
    """

    runtime: str
    most: int
    positions: int
    drafts: Drafts | None

    def begin(self, prompt: list[int], wish: Wish, say: Say) -> Callable[[], None]:
        """Begin an answer and return at once.

        Args:
            say: called from another thread, for each piece and at the end; not any more once the answer was stopped.

        Returns:
            What stops it: the engine stops computing, at its next token.
        """
        ...

    def trouble(self) -> str:
        """Why it cannot answer; "" when it can."""
        ...

    def resident_bytes(self) -> int:
        """Memory that it holds now."""
        ...

    def close(self) -> None:
        """Stop all answers and free the model."""
        ...


class EngineFailed(Exception):
    """An engine could not give an answer or go on with one."""


@dataclass
class Answer:
    """One answer on its way.

    Attributes:
        opened: the tag of thinking that the prompt opened; comes before the first text, or at the end of an answer without any,
            so that nothing is shown before the model has begun.
        finish: "stop" or "length", once it has ended.
        ids: its tokens that are known, without the one that ended it.
        all_known: whether these are all, and spell its text; once it has ended.
        count: tokens drawn, with the one that ended it.
        first_s: from the request to the first piece; `seconds` to the end.
        drafts: of the engine's draft model.
    """

    engine: Engine
    prompt: list[int]
    wish: Wish
    stops: Sequence[str] = ()
    opened: str = ""
    finish: str = ""
    ids: list[int] = field(default_factory=list)
    all_known: bool = False
    count: int = 0
    first_s: float = 0.0
    seconds: float = 0.0
    drafts: Drafts = NO_DRAFTS

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer's pieces as they come; leaving early stops the engine.

        Raises:
            EngineFailed: it cannot be given.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece | End]()

        def say(what: Piece | End) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, what)

        stops, began, broken = Stops(self.stops), time.perf_counter(), False
        tag = [Piece(self.opened, (), 0)] if self.opened else []
        stop = self.engine.begin(self.prompt, self.wish, say)
        try:
            while not stops.met:
                what = await heard.get()
                self.seconds = time.perf_counter() - began
                self.count = max(self.count, what.count)
                self.drafts = what.drafts
                if isinstance(what, End):
                    if what.reason == "failed":
                        raise EngineFailed(what.why)
                    self.finish = what.reason
                    self.all_known = not broken and len(self.ids) == self.count - (what.reason == "stop")
                    break
                self.first_s = self.first_s or self.seconds
                broken |= UNFINISHED in what.text
                self.ids += what.ids
                shown = stops.add(what.text)
                if shown:
                    while tag:
                        yield tag.pop()
                    yield Piece(shown, what.ids, what.count)
            while tag:
                yield tag.pop()
            rest = stops.end()
            if rest:
                yield Piece(rest, (), self.count)
            self.finish = "stop" if stops.met else self.finish
        finally:
            stop()
