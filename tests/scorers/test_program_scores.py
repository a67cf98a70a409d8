"""The process's grader, references that fail, and the estimate of pass@k."""

from collections.abc import Iterator
from itertools import combinations

import pytest
from judged import judging
from scipy.special import comb

from potstill.core.types import Abstain, Case, Example
from potstill.core.types import Tests as RowTests
from potstill.scorers import programs

ECHO = RowTests(cases=(Case("a\n", "a\n"), Case("b\n", "b\n")))


@pytest.fixture(autouse=True)
def judge() -> Iterator[None]:
    with judging():
        yield


@pytest.mark.parametrize(("samples", "passed", "k"), [(1, 1, 1), (5, 0, 5), (5, 2, 1), (5, 2, 3), (8, 3, 4), (8, 8, 1)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass(samples: int, passed: int, k: int) -> None:
    """Against every choice of k of the samples, and the paper's formula."""
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    found = programs.pass_at_k(samples, passed, k)
    assert found == pytest.approx(sum(map(any, draws)) / len(draws))
    assert found == pytest.approx(1 - comb(samples - passed, k) / comb(samples, k))


def test_pass_at_k_needs_k_samples() -> None:
    for wrong in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass@"):
            programs.pass_at_k(*wrong)


def test_references_that_fail_are_named() -> None:
    rows = [
        Example("right", "q", "```python\nprint(input())\n```", tests=ECHO),
        Example("wrong", "q", "```python\nprint('a')\n```", tests=ECHO),
        Example("broken", "q", "```python\nprint(\n```", tests=ECHO),
        Example("untested", "q", "nothing"),
        Example("a question", "q", "", tests=ECHO),
    ]
    found = programs.failing_references(rows)
    assert list(found) == [1, 2]
    assert found[1].startswith("fail: test 2 of 2")
    assert "SyntaxError" in found[2]


def test_grades_come_in_the_order_of_the_answers() -> None:
    rows = [Example("k", "q", "r", tests=ECHO), Example("k", "q", "r"), Example("k", "q", "r", tests=ECHO)]
    first, second, third = programs.grades_of(["```python\nprint('a')\n```", "x", "print(input())"], rows)
    assert (getattr(first, "share", None), second, getattr(third, "share", None)) == (0.5, Abstain(programs.NO_TESTS), 1)


def test_closing_lets_the_next_use_open_it_again() -> None:
    assert programs.sandbox() == "bare"
    programs.close()
    assert programs.grades([("print(input())", ECHO)])[0].outcome == "pass"


def test_the_limits_are_those_that_were_asked_for() -> None:
    from potstill.scorers.programs import Judging

    slow = "import time\ntime.sleep(3)\nprint(input())"
    limits = Judging(time_s=0.1).limits()
    assert (limits.time_s, limits.memory_mb) == (0.1, 512)
    assert programs.grades([(slow, ECHO)], limits)[0].outcome == "timeout"
