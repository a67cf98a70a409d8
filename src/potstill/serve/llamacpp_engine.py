"""Answers of a GGUF file by llama.cpp, which runs in a process of its own."""

import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from potstill.core.errors import UserError
from potstill.edges.llamacpp import AHEAD, Refused, served
from potstill.edges.llamacpp_drafts import NO_DRAFTS, Drafts
from potstill.edges.llamacpp_stream import TokenStream, Wish
from potstill.edges.models import Tokenizer
from potstill.serve.engine import End, Piece, Say


class LlamaCppEngine:
    """An `Engine` that asks llama.cpp's server with token ids, so that template and normalisation are ours.

    Args:
        file: in GGUF.
        tokenizer: used by the engine's threads, and by no others.
        hidden: tokens that are not shown.
        most: answers at once; each has its own cache of `positions` keys and values.
        positions: tokens of a prompt and its answer together.
        threads: of computing.
        draft: a file of a smaller model with the same token ids, which writes `ahead` tokens before this one looks.
        doubted: nobody knows the hash of a file, see `Opening`.

    Raises:
        UserError: llama.cpp does not take the file.
    """

    runtime = "llama.cpp"

    def __init__(
        self,
        file: Path,
        tokenizer: Tokenizer,
        *,
        hidden: frozenset[int],
        most: int,
        positions: int,
        threads: int,
        draft: Path | None = None,
        ahead: int = AHEAD,
        doubted: bool = False,
    ) -> None:
        self.file, self.most, self.positions = file, most, positions
        self._tokenizer, self._hidden = tokenizer, hidden
        self._alone = threading.Lock()  # streams share the tokenizer
        self._key = secrets.token_urlsafe(24)  # its port is open to every user of the machine
        self.drafts = NO_DRAFTS if draft is not None else None
        self._counting = threading.Lock()
        self._streams: dict[TokenStream, threading.Thread] = {}
        self._closed = False
        self._held = ExitStack()
        try:
            self._server = self._held.enter_context(
                served(
                    file,
                    context=positions * most,
                    threads=threads,
                    parallel=most,
                    draft=draft,
                    ahead=ahead,
                    keys=[self._key],
                    doubted=doubted,
                )
            )
        except Refused as error:
            which = f"{file} with the draft {draft}" if draft is not None else str(file)
            remedy = "leave --draft out or export it again" if draft is not None else "export it again, or leave it to torch"
            raise UserError(f"{which}: llama.cpp does not take it ({error}); {remedy}") from error

    def begin(self, prompt: list[int], wish: Wish, say: Say) -> Callable[[], None]:
        """See `Engine`."""
        stream = TokenStream(
            self._server.url,
            prompt,
            wish,
            self._tokenizer,
            key=self._key,
            hidden=self._hidden,
            alone=self._alone,
            drafting=self.drafts is not None,
        )
        thread = threading.Thread(target=self._hear, args=(stream, say), name="potstill-llamacpp", daemon=True)
        self._streams[stream] = thread
        thread.start()
        return stream.close

    def trouble(self) -> str:
        """See `Engine`."""
        if self._closed:
            return "the server is stopping"
        return "" if self._server.alive() else f"llama.cpp ended: {self._server.last_words()}"

    def resident_bytes(self) -> int:
        """Of its process."""
        import psutil

        with suppress(psutil.Error):
            return int(psutil.Process(self._server.pid).memory_info().rss)
        return 0

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        streams = list(self._streams.items())
        for stream, _ in streams:
            stream.close()
        for _, thread in streams:
            thread.join(5.0)
        self._held.close()

    def _count(self, more: Drafts) -> None:
        if self.drafts is not None:
            with self._counting:
                self.drafts += more

    def _hear(self, stream: TokenStream, say: Say) -> None:
        count, drafts = 0, NO_DRAFTS
        try:
            for heard in stream:
                self._count(heard.drafts - drafts)
                count, drafts = heard.count, heard.drafts
                say(End(heard.end, count, drafts=drafts) if heard.end else Piece(heard.text, heard.ids, count, drafts))
                if heard.end:
                    return
            say(End("failed", count, "the answer was stopped"))
        except Refused as error:
            say(End("failed", count, self.trouble() or str(error)))
        except RuntimeError:  # the server's loop is closed: nobody hears
            pass
        finally:
            self._streams.pop(stream, None)
