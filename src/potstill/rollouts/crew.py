"""Threads that work on jobs as they are given; the results come in the order in which they are done."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from potstill.core.errors import UserError

J = TypeVar("J")
R = TypeVar("R")


class Stopped(UserError):
    """A job was not begun, or not tried again, because another one has failed and says why."""

    def __init__(self) -> None:
        super().__init__("stopped")


class Stop:
    """Whether nothing more is to begin. A stop that is part of another is set with it, but not the other way round."""

    def __init__(self, of: "Stop | None" = None) -> None:
        self._of, self._said = of, False
        self._changed: threading.Condition = of._changed if of is not None else threading.Condition()

    def __bool__(self) -> bool:
        return self._said or bool(self._of)

    def set(self, above: bool = False) -> None:
        """Set it, and all that it is part of where `above`."""
        with self._changed:
            stop: Stop | None = self
            while stop is not None:
                stop._said = True
                stop = stop._of if above else None
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, at most so long; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self), seconds)


class Crew(Generic[J, R]):
    """Some daemon threads: a process that ends does not wait for a server that does not answer them.

    Once a job has failed no other one is begun.

    Args:
        stop: is set when a job has failed or the crew is closed; nothing is begun from then on.

    Attributes:
        busy: jobs that were given and whose results were not taken.
    """

    def __init__(self, work: Callable[[J], R], size: int, stop: Stop) -> None:
        self.busy = 0
        self._work, self._stop, self._not_begun = work, stop, 0
        self._jobs: queue.SimpleQueue[tuple[J] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[J, R | None, BaseException | None]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True, name=f"potstill-{i}") for i in range(size)]
        for thread in self._threads:
            thread.start()

    def give(self, job: J) -> None:
        self.busy += 1
        self._jobs.put((job,))

    def take(self) -> tuple[J, R]:
        """The next job that is done, and its result. Raises what the work raised.

        Raises:
            Stopped: what is left of the jobs was not done; why, was raised before or elsewhere.
        """
        while self._not_begun < self.busy:
            job, result, error = self._done.get()
            if isinstance(error, Stopped):
                self._not_begun += 1
                continue
            self.busy -= 1
            if error is not None:
                raise error
            return job, result  # pyright: ignore[reportReturnType]  # there is a result where there is no error
        raise Stopped

    def rest(self) -> Iterator[tuple[J, R]]:
        """After a job has failed: those that were in work then and are done well, as they are done."""
        while self._not_begun < self.busy:
            with suppress(UserError):  # the first failure is the one that is told
                yield self.take()

    def close(self) -> None:
        """Let the threads end once they have done what they are at; what nobody has begun is not done."""
        self._stop.set()
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._stop:
                    raise Stopped
                self._done.put((job[0], self._work(job[0]), None))
            except BaseException as error:
                self._stop.set()  # before anybody hears of it: this thread is the first that could begin another job
                self._done.put((job[0], None, error))


class Alone(Generic[J, R]):
    """A crew of nobody: jobs are done by whoever takes their results, one after the other."""

    def __init__(self, work: Callable[[J], R]) -> None:
        self._work, self._jobs = work, list[J]()

    @property
    def busy(self) -> int:
        return len(self._jobs)

    def give(self, job: J) -> None:
        self._jobs.append(job)

    def take(self) -> tuple[J, R]:
        job = self._jobs.pop(0)
        return job, self._work(job)

    def rest(self) -> Iterator[tuple[J, R]]:
        """None: after a failure nothing is in work."""
        yield from ()

    def close(self) -> None:
        self._jobs.clear()
