"""Assert tests: what data sets ask in them works, and every failure has its own words."""

import json

import pytest
from asserted import FAILS, PASSES
from bare import Bare

from potstill.core.errors import UserError
from potstill.sandbox.asserts import assert_verdict, prepared
from potstill.sandbox.backend import Ended
from potstill.sandbox.verdict import Limits

LIMITS = Limits(time_s=4.0)


def verdict(program: str, tests: str):
    return assert_verdict(Bare(), program, tests, LIMITS)


@pytest.mark.parametrize("name", PASSES)
def test_what_tests_may_use(name):
    found = verdict(*PASSES[name])
    assert (found.outcome, found.reason) == ("pass", "")


@pytest.mark.parametrize("name", FAILS)
def test_how_tests_fail(name):
    program, tests, outcome, reason = FAILS[name]
    found = verdict(program, tests)
    assert (found.outcome, found.reason) == (outcome, reason)


def test_tests_that_never_end_are_no_abstention():
    found = assert_verdict(Bare(), "def f(): return True", "while f():\n    pass", Limits(time_s=0.2))
    assert found.outcome == "timeout"


def test_tests_that_compute_for_ever_are_no_abstention(monkeypatch):
    monkeypatch.setattr("potstill.sandbox.asserts._SPARE_S", 0.2)
    found = assert_verdict(Bare(), "def f(): return 10**9", "n = f()\nwhile n:\n    n -= 0\nassert f()", Limits(time_s=0.4))
    assert found.outcome == "timeout"


class Silent:
    """A sandbox that fails before the program can be asked."""

    name = "silent"

    def run(self, job, limits):
        return Ended(True, None, 0, None, b"", b"", 0.1)


def test_a_judge_that_was_not_asked_abstains():
    assert assert_verdict(Silent(), "", "assert f(1)", LIMITS).outcome == "abstain"


@pytest.mark.parametrize(
    "tests, names, modules",
    [
        ("assert f(1) == g(2)", ["f", "g"], []),
        ("x = Node(1)\nassert max(x.value, f(x)) == 2", ["Node", "f"], []),
        ("import math\nfrom os import path\nassert math.floor(f(1)) == path", ["f"], []),
        ("def check(c):\n    y = 1\n    assert c(y) == helper(y)\ncheck(f)", ["f", "helper"], []),
        ("assert [f(i) for i in range(3)] == {k: v for k, v in g().items()}", ["f", "g"], []),
        ("class T:\n    def test(self): assert f(self)\nT().test()", ["f"], []),
        ("assert f(1) == sys.getsizeof(1)", ["f"], ["sys"]),
        ("assert calendar(1) == 3", ["calendar"], []),
        ("assert pow(2, 3) == 9", ["pow"], []),
        ("try:\n    f()\nexcept ValueError as e:\n    assert e", ["f"], []),
        ("with open_it() as g:\n    assert g", ["open_it"], []),
        ("def f(x): return x\nassert f(1) == h(1)", ["h"], []),
    ],
    ids=str,
)
def test_what_tests_take_from_the_program(tests, names, modules):
    found = prepared(tests)
    assert (found.names, found.modules) == (names, modules)


@pytest.mark.parametrize(
    "tests, message",
    [
        ("assert f(1 ==", "tests: line 1: '(' was never closed; they must be Python statements"),
        ("x = 1\nassert f(2", "tests: line 2: '(' was never closed; they must be Python statements"),
        ("assert 1 == 1", "tests: they take nothing from the program; call what it defines, as `assert f(1) == 2` does"),
        ("", "tests: they take nothing from the program; call what it defines, as `assert f(1) == 2` does"),
        ("assert sum(set(1)) == 1", "tests: which of set, sum does the program define? They call built-in names alone"),
        ("assert f(1) == '\0'", "tests: source code string cannot contain null bytes; they must be Python statements"),
    ],
    ids=str,
)  # fmt: skip
def test_tests_that_cannot_be_run(tests, message):
    with pytest.raises(UserError) as raised:
        prepared(tests)
    assert str(raised.value) == message


def test_the_judge_decides_by_values_not_by_who_asked_first():
    """The expected value never crosses: a program that logs all it hears has not heard it."""
    program = "import os\nheard = []\ndef f(x):\n    heard.append(x)\n    return 1\ndef g(): return heard"
    found = verdict(program, "assert f(5) == 1\nassert f([6]) == 1\nsecret = 7341\nassert g() == [5, [6]]")
    assert found.outcome == "pass"


def test_real_rows(shared):
    """Every 40th reference solution of MBPP passes its own tests, and fails those of the row after it."""
    rows = [json.loads(line) for line in (shared / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()]
    tests = ["\n".join([row["test_setup_code"], *row["test_list"]]) for row in rows]
    for index in range(6, len(rows), 80):
        assert verdict(rows[index]["code"], tests[index]).outcome == "pass", rows[index]["task_id"]
        assert verdict(rows[index]["code"], tests[index - 1]).outcome in ("fail", "crash")


test_real_rows = pytest.mark.shared(test_real_rows)
