"""No word of a program on its own verdict: forged passes, feigned abstentions, and honest programs that must pass."""

import pytest
from bare import Bare
from forging import FEIGNED, FORGERIES, PRINTED
from honest import SOLVED

from potstill.sandbox.asserts import assert_verdict
from potstill.sandbox.backend import Job
from potstill.sandbox.judge import case_verdict
from potstill.sandbox.verdict import Limits

LIMITS = Limits(time_s=2.0, memory_mb=256)
ANSWER = "7341\n"


def naive_asserts(program: str, tests: str) -> bool:
    """Program and tests in one interpreter; a pass is status 0."""
    return Bare().run(Job(program=f"{program}\n{tests}"), LIMITS).status == 0


def naive_case(program: str) -> bool:
    """The answer is somewhere in what was printed."""
    ended = Bare().run(Job(program=program), LIMITS)
    shown = ended.stdout.decode("utf-8", "replace") + ended.stderr.decode("utf-8", "replace")
    return "".join(str(int(c)) if c.isdigit() else c for c in shown if c.isprintable()).find("7341") >= 0


def naive_abstains(program: str) -> bool:
    """Whatever is unexpected is the grader's own trouble."""
    ended = Bare().run(Job(program=program), Limits(time_s=1.0))
    try:
        ended.stdout.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return ended.status != 0


@pytest.mark.parametrize("name", [name for name, forgery in FORGERIES.items() if forgery.naive])
def test_a_naive_judge_of_asserts_is_fooled(name):
    assert naive_asserts(FORGERIES[name].program, FORGERIES[name].tests)


@pytest.mark.parametrize("name", FORGERIES)
def test_asserts_cannot_be_forged(name, backend):
    verdict = assert_verdict(backend, FORGERIES[name].program, FORGERIES[name].tests, LIMITS)
    assert verdict.outcome in ("fail", "crash"), verdict


@pytest.mark.parametrize("name", [name for name in PRINTED if name not in ("a word to the judge", "nothing")])
def test_a_naive_judge_of_output_is_fooled(name):
    assert naive_case(PRINTED[name])


@pytest.mark.parametrize("name", PRINTED)
def test_output_cannot_be_forged(name, backend):
    verdict = case_verdict(backend, PRINTED[name], "", ANSWER, LIMITS)
    assert verdict.outcome in ("fail", "crash", "memory"), verdict
    assert "\n" not in verdict.reason
    assert verdict.reason.isprintable()


@pytest.mark.parametrize("name", FEIGNED)
def test_a_naive_judge_abstains(name):
    if name == "out of memory":
        pytest.skip("a weak sandbox would fill this machine")
    assert naive_abstains(FEIGNED[name])


@pytest.mark.parametrize("name", FEIGNED)
def test_abstention_cannot_be_feigned(name, backend):
    verdict = case_verdict(backend, FEIGNED[name], "", ANSWER, LIMITS)
    assert verdict.outcome in ("fail", "crash", "memory", "timeout", "denied"), verdict
    asserted = assert_verdict(backend, f"def f(x):\n    exec({FEIGNED[name]!a})", "assert f(1) == 7341", LIMITS)
    assert asserted.outcome in ("fail", "crash", "memory", "timeout", "denied"), asserted


@pytest.mark.parametrize("name", SOLVED)
def test_honest_programs_pass(name, backend):
    program, stdin, expected = SOLVED[name]
    verdict = case_verdict(backend, program, stdin, expected, Limits())
    assert verdict.outcome == "pass", verdict


def test_a_wrong_answer_fails(backend):
    program, stdin, expected = SOLVED["one line"]
    assert case_verdict(backend, program, stdin, expected + "x", Limits()).outcome == "fail"
