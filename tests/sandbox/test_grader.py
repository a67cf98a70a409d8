"""Many programs at once: order, shares, second tries, runs near their limit, and a sandbox that fails."""

import threading
import time

import pytest
from bare import Bare

from potstill.core.errors import UserError
from potstill.core.types import Case
from potstill.core.types import Tests as RowTests
from potstill.sandbox.backend import Ended
from potstill.sandbox.grader import Grader, Task
from potstill.sandbox.verdict import Limits, Verdict

ECHO = (Case("a", "a\n"),)


class Scripted:
    """Ends as its programs say: `program` is a Python expression for the fields of Ended."""

    name = "scripted"

    def __init__(self):
        self.runs: list[str] = []
        self.at_once = 0
        self.most_at_once: dict[str, int] = {}
        self.closed = False
        self._lock = threading.Lock()

    def run(self, job, limits):
        with self._lock:
            self.runs.append(job.program)
            nth = self.runs.count(job.program)
            self.at_once += 1
            self.most_at_once[job.program] = self.at_once
        try:
            fields = eval(job.program, {"nth": nth, "sleep": time.sleep, "stdin": job.stdin})
            if fields is None:
                raise OSError("no room")
            defaults = {"started": True, "limit": None, "status": 0, "signal": None, "stdout": job.stdin, "stderr": b""}
            return Ended(**defaults | {"wall_s": 0.1} | fields)
        finally:
            with self._lock:
                self.at_once -= 1

    def close(self):
        self.closed = True


def grades(*programs, workers=2, limits=None, cases=ECHO):
    backend = Scripted()
    with Grader(backend, limits, workers) as grader:
        found = grader.grade([Task(program, cases) for program in programs])
    assert backend.closed
    return found, backend


def test_grades_stand_in_the_order_of_the_tasks():
    found, _ = grades("sleep(0.05) or {}", "{'status': 1}", "{'stdout': b'b'}", "{}", workers=4)
    assert [grade.outcome for grade in found] == ["pass", "crash", "fail", "pass"]
    assert [grade.share for grade in found] == [1, 0, 0, 1]


def test_on_done_hears_of_each_grade_once_in_the_callers_thread():
    heard = []
    with Grader(Scripted(), workers=3) as grader:
        tasks = [Task("{}", ECHO) for _ in range(20)]
        found = grader.grade(tasks, lambda index, grade: heard.append((index, grade, threading.current_thread())))
    assert sorted(index for index, _, _ in heard) == [*range(20)]
    assert all(grade is found[index] and thread is threading.main_thread() for index, grade, thread in heard)


def test_all_cases_must_pass_and_the_share_is_of_those_that_do():
    cases = (Case("a", "a"), Case("b", "c"), Case("d", "d"), Case("e", "f"))
    (found,), backend = grades("{}", cases=cases)
    assert (found.outcome, found.share) == ("fail", 0.5)
    assert found.reason == "test 2 of 4: line 1: expected 'c', printed 'b'"
    assert [run.outcome for run in found.runs] == ["pass", "fail", "pass", "fail"]
    assert found.wall_s == pytest.approx(0.4)
    assert len(backend.runs) == 4


def test_an_abstention_is_tried_once_more():
    (passes, twice), backend = grades("{'trouble': 'killed'} if nth == 1 else {}", "{'trouble': 'killed'}")
    assert (passes.outcome, passes.share) == ("pass", 1)
    assert (twice.outcome, twice.share, twice.reason) == ("abstain", None, "sandbox: killed")
    assert len(backend.runs) == 4


def test_a_failure_of_the_sandbox_abstains():
    (found,), backend = grades("None")
    assert (found.outcome, found.reason) == ("abstain", "grader: OSError: no room")
    assert len(backend.runs) == 2


def test_an_abstention_outweighs_what_else_was_found():
    cases = (Case("a", "b"), Case("x", "x"))
    (found,), _ = grades("{'trouble': 'killed'} if stdin == b'x' else {}", cases=cases)
    assert (found.outcome, found.share) == ("abstain", None)


def test_what_a_program_does_is_not_tried_again():
    _, backend = grades("{'status': 1}", "{'status': None, 'signal': 9}", "{'stdout': b'x'}")
    assert len(backend.runs) == 3


def test_runs_near_their_limit_are_run_again_alone_and_that_counts():
    slow = "{'wall_s': 1.0, 'limit': 'timeout'} if nth == 1 else sleep(0.02) or {'wall_s': 0.5}"
    lost = "{'wall_s': 0.81} if nth == 1 else {'wall_s': 1.0, 'limit': 'timeout'}"
    others = [f"sleep(0.01) or {{'status': {i}}}" for i in range(10)]
    found, backend = grades(slow, lost, *others, workers=4, limits=Limits(time_s=1.0))
    assert [grade.outcome for grade in found[:3]] == ["pass", "timeout", "pass"]
    assert backend.runs.count(slow) == backend.runs.count(lost) == 2
    assert backend.most_at_once[slow] == backend.most_at_once[lost] == 1
    assert all(backend.runs.count(other) == 1 for other in others)


def test_a_run_at_eighty_percent_is_not_run_again():
    _, backend = grades("{'wall_s': 0.8}", limits=Limits(time_s=1.0))
    assert len(backend.runs) == 1


def test_tasks_may_bring_their_own_limits():
    backend = Scripted()
    with Grader(backend, Limits(time_s=1.0)) as grader:
        grader.grade([Task("{'wall_s': 3.0}", ECHO, limits=Limits(time_s=9.0))])
    assert len(backend.runs) == 1


def test_a_sandbox_that_fails_often_stops_the_run():
    backend = Scripted()
    with Grader(backend, workers=2) as grader:
        few = [Task("{'trouble': 'killed'}", ECHO), *[Task("{}", ECHO)] * 98]
        assert [grade.outcome for grade in grader.grade(few)].count("abstain") == 1
        grader.grade([Task("{}", ECHO)] * 101)
        assert (grader.judged, grader.abstained) == (200, 1)
        grader.grade([Task("{'trouble': 'killed'}", ECHO)])  # 2 of 201
        with pytest.raises(UserError) as raised:
            grader.grade([Task("{'trouble': 'killed'}", ECHO)])
    assert str(raised.value) == (
        "the sandbox 'scripted' could not judge 3 of 202 runs (last: sandbox: killed); "
        "`potstill doctor` says what is wrong here"
    )


def test_a_sandbox_that_never_works_is_not_asked_for_ever():
    backend = Scripted()
    with Grader(backend, workers=2) as grader, pytest.raises(UserError, match="could not judge 100 of 100 runs"):
        grader.grade([Task("sleep(0.003) or {'trouble': 'killed'}", ECHO)] * 1000)
    assert len(backend.runs) < 300


def test_cases_and_asserts_of_a_row():
    task = Task.of("def f(x): return x\nprint(input())", RowTests((Case("a", "a"),), "assert f(1) == 2"))
    with Grader(Bare(), workers=1) as grader:
        (found,) = grader.grade([task])
    assert [run.outcome for run in found.runs] == ["pass", "crash"]  # asserts load it, and there is nothing to read
    assert (found.outcome, found.share) == ("crash", 0.5)


def test_asserts_are_judged_at_once():
    tasks = [Task(f"def f(x): return x + {i}", asserts="assert f(1) == 3") for i in range(4)]
    with Grader(Bare(), workers=2) as grader:
        assert [grade.outcome for grade in grader.grade(tasks)] == ["fail", "fail", "pass", "fail"]


def test_nothing_to_grade():
    with Grader(Scripted()) as grader:
        assert grader.grade([]) == []


@pytest.mark.parametrize("asserts", ["", "  \n"])
def test_a_task_without_tests(asserts):
    with pytest.raises(UserError, match="without tests cannot be judged"):
        Task("print(1)", asserts=asserts)


def test_a_task_with_tests_that_cannot_be_run():
    with pytest.raises(UserError, match="tests: line 1"):
        Task("print(1)", asserts="assert f(")


def test_a_grade_is_a_verdict():
    (found,), _ = grades("{}")
    assert isinstance(found, Verdict)


def test_one_worker_at_least(monkeypatch):
    monkeypatch.setattr("potstill.sandbox.grader._cores", lambda: 1)
    with Grader(Scripted()) as grader:
        assert grader.workers == 1
