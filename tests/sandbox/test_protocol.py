"""Whatever a program says on its descriptors, a test passes by the right value alone, and the judge itself never breaks."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.sandbox._tests import Link, judged
from potstill.sandbox.asserts import prepared

TAGS = [
    "ok",
    "raise",
    "missing",
    "exception",
    "held",
    "known",
    "list",
    "tuple",
    "dict",
    "set",
    "int",
    "float",
    "bytes",
    "NotPlain",
]
WORDS = ["f", "StopIteration", "AssertionError", "SystemExit", "KeyboardInterrupt", "MemoryError", "ExceptionGroup", "pass", ""]
NAMES = st.sampled_from([*TAGS, *WORDS])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=8,
)
ANSWERS = (
    st.tuples(st.just("ok"), JSON, JSON)
    | st.tuples(st.just("ok"), st.just(["held", [0, "function"]]), st.none())
    | st.tuples(st.just("raise"), NAMES, NAMES, JSON, NAMES, JSON)
    | st.tuples(st.just("exception"), NAMES)
    | JSON
)
LINES = ANSWERS.map(lambda answer: json.dumps(answer).encode() + b"\n") | st.binary(max_size=20)
TESTS = [
    "assert f(1) == ('swordfish', 7341)",
    "x = [1]\ntry:\n    y = f(x, key=x)\nexcept Exception:\n    y = None\nassert y == ('swordfish', 7341)",
    "assert ('swordfish', 7341) in [*f(1)]",
    "assert abs(f(1) - 7341.5) < 1e-9",
    "assert all(f(i) == 7341 for i in range(2)) and len(f(1)) == 7341",
]


def said(tests: str, *lines: bytes):
    asked = prepared(tests)
    link = Link(io.BytesIO(b"".join(lines)), io.BytesIO())
    return judged(asked.code, asked.lines, asked.names, asked.modules, link)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(TESTS), st.lists(LINES, max_size=8))
def test_no_words_pass(tests, lines):
    found = said(tests, b'["ok",null,null]\n', b'["ok",["held",[0,"function"]],null]\n', *lines)
    assert found.outcome in ("fail", "crash", "memory", "gone")
    assert isinstance(found.reason, str)


def test_the_right_value_passes():
    answers = [b'["ok",null,null]\n', b'["ok",["held",[0,"function"]],null]\n', b'["ok",["tuple",["swordfish",7341]],null]\n']
    assert said(TESTS[0], *answers).outcome == "pass"
    assert said(TESTS[0], *answers[:2]).outcome == "gone"


@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration", "GeneratorExit", "KeyboardInterrupt", "BaseException"])
def test_no_exception_ends_a_loop_of_the_tests(name):
    raised = json.dumps(["raise", name, name, [], "", None]).encode() + b"\n"
    head = [b'["ok",null,null]\n', b'["ok",["held",[0,"function"]],null]\n']
    for tests in ("assert list(map(f, [1])) == []", "assert all(f(x) for x in [1])", "assert [*iter(f, 3)] == []"):
        assert said(tests, *head, raised).outcome == "crash"


def test_an_answer_cannot_change_what_the_test_did_not_pass():
    answers = [b'["ok",null,null]\n', b'["ok",["held",[0,"function"]],null]\n']
    after = b'["ok",1,[["held",[0,"function"]],["list",[1]],["list",[2]]]]\n'
    assert said("x = [5]\nf(x)\nassert x == [5]", *answers, after).reason.endswith("an answer of no known form")
    after = b'["ok",1,[["held",[0,"function"]],["list",[1]]]]\n'
    assert said("x = [5]\nf(x)\nassert x == [1]", *answers, after).outcome == "pass"
    assert said("x = (5,)\nf(x)\nassert x == (5,)", *answers, after.replace(b'"list",[1]', b'"tuple",[1]')).outcome == "pass"
    assert said("x = 5\nf(x)\nassert x == 5", *answers, after).outcome == "pass"
