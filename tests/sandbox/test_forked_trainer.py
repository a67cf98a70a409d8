"""A process forked from one that holds a sandbox runs programs in a sandbox of its own; the parent's goes on."""

import os
import traceback

import psutil
import pytest

from potstill.core.types import Case
from potstill.sandbox.backend import Job
from potstill.sandbox.grader import Grader, Task
from potstill.sandbox.trial import made
from potstill.sandbox.verdict import Limits

ROOMY = Limits(time_s=20)


def in_a_fork(act) -> None:
    """Do it in a forked process; an error there is an error here."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def prints(backend, word: str) -> bool:
    return backend.run(Job(f"import time; time.sleep(0.05); print({word!r})"), ROOMY).stdout.decode() == f"{word}\n"


@pytest.fixture
def own(backend):
    """A backend that no other test has used."""
    own = made(backend.name)
    yield own
    own.close()


def test_parent_and_child_run_at_the_same_time(own):
    assert prints(own, "before")

    def child():
        for number in range(20):
            assert prints(own, f"child {number}")
        own.close()

    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    found = [prints(own, f"parent {number}") for number in range(20)]
    _, status = os.waitpid(pid, 0)
    assert (all(found), status) == (True, 0)
    assert prints(own, "after")


def test_a_child_holds_nothing_of_its_parents(own):
    """Neither processes nor sockets: what the child closes stays open in the parent."""
    assert prints(own, "before")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    in_a_fork(own.close)
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before
    assert prints(own, "after")


def test_a_grader_has_threads_after_a_fork(own):
    with Grader(own, ROOMY, workers=2) as grader:
        tasks = [Task(f"print({number})", (Case("", str(number)),)) for number in range(4)]
        assert {grade.outcome for grade in grader.grade(tasks)} == {"pass"}

        def child():
            assert {grade.outcome for grade in grader.grade(tasks)} == {"pass"}
            grader.close()

        in_a_fork(child)
        assert {grade.outcome for grade in grader.grade(tasks)} == {"pass"}
