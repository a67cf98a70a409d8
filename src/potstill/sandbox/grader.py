"""Many programs, judged at once: workers, second tries, and a stop when the sandbox itself fails."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from potstill.core.errors import UserError
from potstill.core.types import Case, Tests
from potstill.sandbox.asserts import assert_verdict, prepared
from potstill.sandbox.backend import Backend, renewed
from potstill.sandbox.judge import NEAR_LIMIT, case_verdict, clipped
from potstill.sandbox.verdict import Limits, Verdict

ABSTAIN_AT_MOST = 0.01
ABSTAIN_COUNTED_FROM = 100  # programs: below that one failure is already more than 1 %


@dataclass(frozen=True)
class Task:
    """A program and how it is judged.

    Attributes:
        program: Python source.
        cases: of which all must pass.
        asserts: statements that must hold, "" for none; see `asserts.prepared`.
        limits: of each run; None for the grader's.

    Raises:
        UserError: when there is nothing to judge the program by, or the asserts cannot be run.
    """

    program: str
    cases: tuple[Case, ...] = ()
    asserts: str = ""
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if not self.cases and not self.asserts.strip():
            raise UserError("a program without tests cannot be judged; give it cases or asserts")
        if self.asserts.strip():
            prepared(self.asserts)

    @classmethod
    def of(cls, program: str, tests: Tests, limits: Limits | None = None) -> "Task":
        """A program judged by a row's tests."""
        return cls(program, tests.cases, tests.asserts, limits)


@dataclass(frozen=True)
class Grade(Verdict):
    """What a program was worth: `pass` where all of its runs pass, else the first other outcome; an abstention before all.

    Attributes:
        share: runs that pass, of all runs, between 0 and 1; None with an abstention.
        runs: the verdict of each case, then that of the asserts.
    """

    share: float | None
    runs: tuple[Verdict, ...]


@dataclass(frozen=True)
class _Run:
    """One program and one test."""

    task: int
    place: int
    limits: Limits
    judge: Callable[[], Verdict]


class Grader:
    """Judges programs by their tests, in several workers.

    A run that the sandbox could not judge is tried once more. A run that took more than 80 % of its time is run again when no
    other run of this grader is left, and that verdict counts: the load that other runs make must not decide.

    Args:
        backend: where programs run; closed with the grader.
        limits: of each run, but for tasks that bring their own.
        workers: runs at once; None for the processor's cores less one, at least one.
    """

    def __init__(self, backend: Backend, limits: Limits | None = None, workers: int | None = None) -> None:
        self.backend, self.limits = backend, limits or Limits()
        self.workers = workers or max(1, _cores() - 1)
        self.judged = 0
        self.abstained = 0
        self.after_fork()
        renewed(self)

    def after_fork(self) -> None:
        """Threads of its own."""
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="grader")
        self._one_batch = threading.Lock()

    def grade(self, tasks: Sequence[Task], on_done: Callable[[int, Grade], None] | None = None) -> list[Grade]:
        """The grades, in the order of the tasks.

        Args:
            tasks: what to judge.
            on_done: hears of each grade when it stands, in any order, with the task's index; called in the caller's thread.

        Raises:
            UserError: when more than 1 % of at least 100 runs could not be judged.
        """
        runs = [run for index, task in enumerate(tasks) for run in self._runs(index, task)]
        verdicts = [[None] * self._count(task) for task in tasks]  # type: list[list[Verdict | None]]
        grades: list[Grade | None] = [None] * len(tasks)
        with self._one_batch:
            for run, verdict in self._verdicts(runs):
                self._count_abstention(verdict)
                verdicts[run.task][run.place] = verdict
                done = [found for found in verdicts[run.task] if found is not None]
                if len(done) == len(verdicts[run.task]):
                    grade = grades[run.task] = _graded(done)
                    if on_done is not None:
                        on_done(run.task, grade)
        return [grade for grade in grades if grade is not None]

    def close(self) -> None:
        """End the workers and the backend."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.backend.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs(self, index: int, task: Task) -> list[_Run]:
        limits = task.limits or self.limits
        judges = [self._case(task.program, case, limits) for case in task.cases]
        if task.asserts.strip():
            judges.append(lambda: assert_verdict(self.backend, task.program, task.asserts, limits))
        return [_Run(index, place, limits, judge) for place, judge in enumerate(judges)]

    def _case(self, program: str, case: Case, limits: Limits) -> Callable[[], Verdict]:
        return lambda: case_verdict(self.backend, program, case.stdin, case.expected, limits)

    def _verdicts(self, runs: list[_Run]):
        """Each run with the verdict that counts: first those that end early, then, one at a time, those near their limit."""
        waiting: dict[Future[Verdict], _Run] = {self._pool.submit(_tried_twice, run.judge): run for run in runs}
        near: list[_Run] = []
        try:
            for future in as_completed(waiting):
                run, verdict = waiting[future], future.result()
                if verdict.outcome != "abstain" and verdict.wall_s > NEAR_LIMIT * run.limits.time_s:
                    near.append(run)
                else:
                    yield run, verdict
        finally:
            for future in waiting:
                future.cancel()
        for run in near:
            yield run, _tried_twice(run.judge)

    def _count_abstention(self, verdict: Verdict) -> None:
        self.judged += 1
        self.abstained += verdict.outcome == "abstain"
        if self.judged >= ABSTAIN_COUNTED_FROM and self.abstained > ABSTAIN_AT_MOST * self.judged:
            raise UserError(
                f"the sandbox {self.backend.name!r} could not judge {self.abstained} of {self.judged} runs "
                f"(last: {verdict.reason or 'an earlier one'}); `potstill doctor` says what is wrong here"
            )

    @staticmethod
    def _count(task: Task) -> int:
        return len(task.cases) + bool(task.asserts.strip())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tried_twice(judge: Callable[[], Verdict]) -> Verdict:
    first = _guarded(judge)
    return _guarded(judge) if first.outcome == "abstain" else first


def _guarded(judge: Callable[[], Verdict]) -> Verdict:
    """A failure of the grader itself is no score, and must not end a training run."""
    try:
        return judge()
    except Exception as error:
        return Verdict("abstain", clipped(f"grader: {type(error).__name__}: {error}"), 0.0)


def _graded(runs: list[Verdict]) -> Grade:
    wall_s = sum(run.wall_s for run in runs)
    worst = next((run for run in runs if run.outcome == "abstain"), None)
    first = worst or next((run for run in runs if run.outcome != "pass"), runs[0])
    share = None if worst else sum(run.outcome == "pass" for run in runs) / len(runs)
    return Grade(first.outcome, _which(runs, first), wall_s, share, tuple(runs))


def _which(runs: list[Verdict], run: Verdict) -> str:
    place = next(place for place, other in enumerate(runs, 1) if other is run)
    return run.reason if len(runs) == 1 or not run.reason else f"test {place} of {len(runs)}: {run.reason}"
