"""How many answers are drawn at once, how many requests wait, and who is sent away."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from potstill.serve.protocol import Refusal

LONGEST_RETRY_S = 60


class Admission:
    """Places for answers, first come, first served; for one event loop.

    Args:
        places: answers at once.
        queue: requests that may wait for a place; one more is refused.
    """

    def __init__(self, places: int, queue: int) -> None:
        self.places, self.queue = places, queue
        self.running = self.waiting = 0
        self._free = asyncio.Semaphore(places)
        self._mean_s = 1.0  # of an answer, over the last ones

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place while inside; wait for one before.

        Raises:
            Refusal: 429: too many wait already.
        """
        if self._free.locked() and self.waiting >= self.queue:
            raise Refusal(
                429,
                f"{self.running} answers are being written and {self.waiting} requests wait; try again later",
                "queue_full",
                headers={"Retry-After": str(self.retry_s())},
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        began = monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._mean_s += 0.2 * (monotonic() - began - self._mean_s)
            self._free.release()

    def retry_s(self) -> int:
        """Seconds until a place in the queue is likely free."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._mean_s / self.places)))
