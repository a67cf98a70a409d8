"""Threads that work on jobs as they are given; the results come in the order in which they are done."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Crew(Generic[J, R]):
    """Some daemon threads: a process that ends does not wait for a server that does not answer them.

    Attributes:
        busy: jobs that were given and whose results were not taken.
    """

    def __init__(self, work: Callable[[J], R], size: int) -> None:
        self.busy = 0
        self._work = work
        self._jobs: queue.SimpleQueue[tuple[J] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[J, R | None, BaseException | None]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True, name=f"potstill-{i}") for i in range(size)]
        for thread in self._threads:
            thread.start()

    def give(self, job: J) -> None:
        self.busy += 1
        self._jobs.put((job,))

    def take(self) -> tuple[J, R]:
        """The next job that is done, and its result. Raises what the work raised."""
        job, result, error = self._done.get()
        self.busy -= 1
        if error is not None:
            raise error
        return job, result  # pyright: ignore[reportReturnType]  # there is a result where there is no error

    def close(self) -> None:
        """Let the threads end once they have done what they are at; what nobody has begun is not done."""
        while not self._jobs.empty():
            self._jobs.get()
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._done.put((job[0], self._work(job[0]), None))
            except BaseException as error:
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

    def close(self) -> None:
        self._jobs.clear()
