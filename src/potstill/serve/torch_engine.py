"""Answers of a transformers model in this process: those on their way are continued together, token by token."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from potstill.core.errors import UserError
from potstill.edges.llamacpp_drafts import Drafts
from potstill.edges.llamacpp_stream import Wish
from potstill.edges.models import Model, Tokenizer
from potstill.edges.spelling import Spelling
from potstill.serve.engine import End, Piece, Say

STOPPED = "the server is stopping"
READ_TOKENS = 2048  # of prompts that are read in one pass, padding included


@dataclass(eq=False)
class _Row:
    """An answer on its way."""

    prompt: list[int]
    wish: Wish
    say: Say
    spelling: Spelling
    uniform_N: np.ndarray | None
    ids: list[int] = field(default_factory=list)  # without the one that ends it
    told: int = 0  # of these, those that were said
    gone: bool = False  # ended, or stopped by who asked

    def end(self, reason: str, why: str = "") -> None:
        """Say what is left, and why there is no more."""
        if self.gone:
            return
        rest = self.spelling.end()
        if rest or self.told < len(self.ids):
            self._tell(rest)
        self.gone = True
        self.say(End(reason, len(self.ids) + (reason == "stop"), why))

    def add(self, token: int, stops: frozenset[int]) -> None:
        """One more token of it."""
        if token in stops:
            self.end("stop")
            return
        self.ids.append(token)
        text = self.spelling.add(token)
        if text:
            self._tell(text)
        if len(self.ids) >= self.wish.max_new_tokens:
            self.end("length")

    def _tell(self, text: str) -> None:
        told, self.told = self.told, len(self.ids)
        if not self.gone:
            self.say(Piece(text, tuple(self.ids[told:]), len(self.ids)))


@dataclass(eq=False)
class _Group:
    """Rows that take each step together."""

    batch: Any
    rows: list[_Row]


class TorchEngine:
    """An `Engine` whose thread reads prompts when they come and continues all rows in one pass.

    Rows of a cache that others cannot join (see `in_rooms`) take their steps in turn. An answer does not depend on the others,
    to rounding. A failing pass ends the answers that were in it and no others.

    Args:
        tokenizer: used by the engine's thread, and by no others.
        stop_ids: tokens that end an answer.
        hidden: tokens that are not shown.
        most: answers at once.
        positions: tokens of a prompt and its answer together.
    """

    runtime = "torch"
    drafts: Drafts | None = None

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, stop_ids: Sequence[int], hidden: frozenset[int], most: int, positions: int
    ) -> None:
        self.model, self.most, self.positions = model, most, positions
        self._tokenizer, self._stops, self._hidden = tokenizer, frozenset(stop_ids), hidden
        self._vocab = max(tokenizer.get_vocab().values()) + 1  # rows beyond pad the output layer
        self._inbox: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._groups: list[_Group] = []
        self._waiting: list[_Row] = []
        self._guard = threading.Lock()  # a forward pass of ours, or one that scores
        self._trouble = ""
        self._thread = threading.Thread(target=self._work, name="potstill-torch", daemon=True)
        self._thread.start()

    def begin(self, prompt: list[int], wish: Wish, say: Say) -> Callable[[], None]:
        """See `Engine`."""
        from potstill.rollouts.local import uniforms

        uniform_N = uniforms(wish.seed, prompt, 0, wish.max_new_tokens) if wish.temperature > 0 else None
        row = _Row(prompt, wish, say, Spelling(self._tokenizer, self._hidden), uniform_N)

        def stop() -> None:
            row.gone = True

        self._inbox.put(row)
        if self._trouble:  # its thread may have looked into the inbox for the last time
            row.end("failed", self._trouble)
        return stop

    def trouble(self) -> str:
        """See `Engine`."""
        return self._trouble or ("" if self._thread.is_alive() else "its thread ended")

    def resident_bytes(self) -> int:
        """Of its weights; an embedding that is the head too counts once."""
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        return sum(weights.values())

    @contextmanager
    def paused(self) -> Iterator[Model]:
        """The model for another forward pass, while answers wait between two tokens."""
        with self._guard:
            yield self.model

    def close(self) -> None:
        """See `Engine`."""
        self._trouble = self._trouble or STOPPED
        self._inbox.put(None)
        self._thread.join()

    # in its own thread

    def _work(self) -> None:
        from potstill.edges.decoding import undisturbed

        try:
            with undisturbed(self.model):
                while self._admit():
                    with self._guard:
                        for group in self._groups:
                            self._advance(group)
                    self._groups = [group for group in self._groups if group.rows]
        except Exception as error:
            self._trouble = _in_words(error)
            raise
        finally:
            self._trouble = self._trouble or STOPPED
            waiting = [row for group in self._groups for row in group.rows] + self._waiting
            while not self._inbox.empty():
                row = self._inbox.get()
                waiting += [row] if row is not None else []
            for row in waiting:
                row.end("failed", self._trouble)

    def _admit(self) -> bool:
        """Let some of what has come in, so that others go on in between; wait while there is nothing. Whether to go on."""
        while True:
            idle = not (self._groups or self._waiting)
            try:
                row = self._inbox.get(block=idle)
            except queue.Empty:
                break
            if row is None:
                return False
            self._waiting.append(row)
        rows = self._next_rows()
        if rows:
            with self._guard:
                self._read(rows)
        return True

    def _next_rows(self) -> list[_Row]:
        """Of those that wait the first, and the next ones that can be read beside it."""
        self._waiting = [row for row in self._waiting if not row.gone]
        count = longest = 0
        for row in self._waiting:
            longest = max(longest, len(row.prompt))
            if count and (count + 1) * longest > READ_TOKENS:
                break
            count += 1
        rows, self._waiting = self._waiting[:count], self._waiting[count:]
        return rows

    def _read(self, rows: list[_Row]) -> None:
        """Read prompts together, and let their rows join those on their way where they can."""
        from potstill.edges.decoding import Batch

        try:
            batch = Batch(self.model, [row.prompt for row in rows])
        except Exception as error:
            if len(rows) == 1:
                rows[0].end("failed", _in_words(error))
                return
            for row in rows:  # one of them is at fault
                self._read([row])
            return
        group = next((group for group in self._groups if group.batch.joins and batch.joins), None)
        if group is None:
            self._groups.append(_Group(batch, rows))
            return
        with self._failing(group, rows):
            begin = len(group.rows)
            group.batch.pick([*range(begin), *([0] * len(rows))])  # places, which the new rows take
            group.batch.join(batch, [*range(begin, begin + len(rows))], [*range(len(rows))])
            group.rows = [*group.rows, *rows]

    def _advance(self, group: _Group) -> None:
        """One token for each of its rows, and the rows that have ended leave."""
        import torch

        with self._failing(group):
            drawn = [self._draw(row, group.batch.logits_BV[b : b + 1]) for b, row in enumerate(group.rows)]
            kept = [b for b, row in enumerate(group.rows) if not row.gone]
            if not kept:
                group.rows = []
                return
            if group.batch.moves and len(kept) < len(group.rows):
                group.batch.pick(kept)
                group.rows, drawn = [group.rows[b] for b in kept], [drawn[b] for b in kept]
            live_B = torch.tensor([not row.gone for row in group.rows], device=self.model.device)
            group.batch.step(torch.tensor(drawn, device=self.model.device), live_B)

    def _draw(self, row: _Row, logits_1V: Any) -> int:
        """The row's next token, said; any, where the row is gone."""
        import torch

        from potstill.edges.drawing import Drawing

        if row.gone:
            return 0
        wish, u_1 = row.wish, None
        if row.uniform_N is not None:
            u_1 = torch.tensor([row.uniform_N[len(row.ids)]], dtype=torch.float64, device=logits_1V.device)
        drawing = Drawing(wish.temperature, wish.top_k, wish.top_p, wish.min_p, self._vocab)
        try:
            token = int(drawing(logits_1V, u_1, scored=False)[0])
        except UserError as error:  # not numbers
            row.end("failed", str(error))
            return 0
        row.add(token, self._stops)
        return token

    @contextmanager
    def _failing(self, group: _Group, more: Sequence[_Row] = ()) -> Iterator[None]:
        """What fails while inside ends the answers of the group, and no others."""
        try:
            yield
        except Exception as error:
            for row in [*group.rows, *more]:
                row.end("failed", _in_words(error))
            group.rows = []


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"
