"""From how a run ended to its verdict."""

import pytest

from potstill.sandbox.backend import Ended
from potstill.sandbox.judge import case_verdict, clipped, difference_of, shown
from potstill.sandbox.verdict import Limits

LIMITS = Limits(time_s=2.0, memory_mb=100, stdout_kb=10)


class Fixed:
    """Answers with one end."""

    name = "fixed"

    def __init__(self, ended):
        self.ended = ended

    def run(self, job, limits):
        assert b"secret" not in job.stdin
        assert "secret" not in job.program
        return self.ended

    def close(self):
        pass


def ended(**changes):
    fields = {"started": True, "limit": None, "status": 0, "signal": None, "stdout": b"secret\n", "stderr": b"", "wall_s": 0.5}
    return Ended(**fields | changes)


@pytest.mark.parametrize(
    "changes, outcome, reason",
    [
        ({}, "pass", ""),
        ({"stdout": b"secret"}, "pass", ""),
        ({"stdout": b"secret  \t\r\n"}, "pass", ""),
        ({"stdout": b" secret\n"}, "fail", "line 1: expected 'secret', printed ' secret'"),
        ({"stdout": b"secret\n\n"}, "fail", "line 2: expected nothing more, printed ''"),
        ({"stdout": b""}, "fail", "line 1: expected 'secret', printed nothing"),
        ({"stdout": b"secret\xff"}, "fail", "line 1: printed bytes that are not UTF-8"),
        ({"status": 1}, "crash", "status 1"),
        ({"status": 1, "stderr": b"Traceback\nValueError: \x1b[31mno\n"}, "crash", "status 1: 'ValueError: \\x1b[31mno'"),
        ({"status": None, "signal": 11}, "crash", "ended by SIGSEGV"),
        ({"status": None, "signal": 99}, "crash", "ended by signal 99"),
        ({"status": None, "signal": 9}, "crash", "ended by SIGKILL"),
        ({"status": 137}, "crash", "status 137"),
        ({"limit": "timeout", "status": None, "signal": 9}, "timeout", "ran longer than 2 s"),
        ({"limit": "memory", "status": 1}, "memory", "needed more than 100 MiB"),
        ({"limit": "output_limit", "status": None, "signal": 9}, "output_limit", "printed more than 10 KiB"),
        ({"status": None, "signal": 31, "denied": "socket"}, "denied", "ended for the system call socket"),
        ({"started": False}, "abstain", "sandbox: the program did not start"),
        ({"trouble": "the worker was killed"}, "abstain", "sandbox: the worker was killed"),
        ({"status": None}, "abstain", "sandbox: the sandbox did not say how the program ended"),
    ],
    ids=str,
)
def test_verdicts(changes, outcome, reason):
    verdict = case_verdict(Fixed(ended(**changes)), "print(1)", "3", "secret\n", LIMITS)
    assert (verdict.outcome, verdict.reason, verdict.wall_s) == (outcome, reason, 0.5)


def test_a_limit_counts_whatever_was_printed():
    for limit in ("timeout", "memory", "output_limit"):
        assert case_verdict(Fixed(ended(limit=limit)), "", "", "secret", LIMITS).outcome == limit


def test_the_first_difference_is_shown_with_what_is_around_it():
    long = "x" * 500
    assert difference_of(b"1\n2\n8\n", "1\n2\n7\n") == "line 3: expected '7', printed '8'"
    reason = difference_of(f"{long}a{long}".encode(), f"{long}b{long}")
    assert "b" in reason
    assert "a" in reason
    assert len(reason) < 220
    assert difference_of(b"", "") == ""
    assert difference_of(b"\n", "") == ""
    assert difference_of(b"x", "") == "line 1: expected '', printed 'x'"


def test_reasons_are_one_line_without_control_characters():
    assert clipped("a\nb\x1b\ud800") == "a\\nb\\x1b\\ud800"
    assert len(clipped("x" * 5000)) == 400
    assert shown("a\x00\u202eb") == "'a\\x00\\u202eb'"
