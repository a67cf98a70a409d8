"""Values of each reward, computed by hand."""

import math
from typing import Any

import pytest

from potstill.core.types import Abstain, Case, Example
from potstill.core.types import Tests as RowTests
from potstill.rewards import Answered, Reward
from potstill.rewards.length import Length
from potstill.rewards.tests import Tests as Passing

SUM = Example("k", "Sum?", "r", tests=RowTests(cases=(Case("1 2\n", "3\n"), Case("4 5\n", "9\n"), Case("1\n", "1\n"))))
PLAIN = Example("k", "q", "r")
RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"
CONSTANT = "```python\nprint(3)\n```"


def value(kind: str, text: str, of: Example = PLAIN, tokens: int = 1, **fields: Any) -> float | Abstain:
    return Reward.parse({"kind": kind, **fields})([Answered(of, text, tokens, True)])[0]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("text", "strict", "partial"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1, 1),
        ("<think></think><answer>b</answer>", 0, 1),
        ("<think>a</think><answer> </answer>", 0, 1),
        ("so <think>a</think><answer>b</answer>", 0, 1),
        ("<think>a</think> thus <answer>b</answer>", 0, 1),
        ("<think>a</think><answer>b</answer>!", 0, 1),
        ("<think>a</think><answer>b", 0, 0.75),
        ("<think>a</think>b", 0, 0.5),
        ("<think>a<think>b</think><answer>c</answer>", 0, 0.75),
        ("<answer>b</answer><think>a</think>", 0, 0.5),
        ("</answer></think><answer><think>", 0, 0.25),
        ("no tag", 0, 0),
        ("<THINK>a</THINK><answer>b</answer>", 0, 0.5),
    ],
)
def test_format(text: str, strict: float, partial: float) -> None:
    assert (value("think_format", text), value("tag_count", text)) == (strict, partial)


def test_a_prompt_may_open_the_thought() -> None:
    text = "a</think><answer>b</answer>"
    assert (value("think_format", text), value("think_format", text, opened=True)) == (0, 1)
    assert (value("tag_count", text), value("tag_count", text, opened=True)) == (0.75, 1)


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("", 0),
        ("I add them.", 0),
        ("Step 1: a\nStep 2: b\nStep 3: c", 3),
        ("Paso 1: a\nPaso 2: b", 2),
        ("**Step 1:** a\n### Step 2. b\n- Step 3: c", 3),
        ("Step 1: a\nStep 1: b\nStep 1: c", 1),
        ("Step 1: Step 2: Step 3:", 1),
        ("Step 1:\nStep 2:\nStep 3:", 0),
        ("1. a\n2) b\n(3) c", 3),
        ("- a\n* b\n• c\n- a", 3),
        ("First, read. Then, add. Finally, print.", 3),
        ("Primero, leer. Luego, sumar. Por último, imprimir.", 3),
        ("Primero: leer\nA continuación, sumar\nFinalmente, imprimir", 3),
        ("the first, the second, the next, finally, done", 0),
        ("```python\n- 1\n- 2\n- 3\n```", 0),
        ("1.5 is a number\n3.25 too", 0),
    ],
)
def test_steps(thought: str, steps: int) -> None:
    assert value("steps", f"<think>\n{thought}\n</think>\n<answer>\n1. x\n2. y\n</answer>") == (
        pytest.approx(min(1, steps / 3)) if thought else pytest.approx(2 / 3)  # without a thought the whole is searched
    )


def test_tests_all_or_share() -> None:
    assert value("tests", RIGHT, SUM) == 1
    assert value("tests", CONSTANT, SUM) == 0
    assert value("tests", CONSTANT, SUM, count="share") == pytest.approx(1 / 3)
    assert value("tests", "", SUM) == 0
    assert value("tests", f"<think>{RIGHT}", SUM) == 0  # it was cut while it thought
    assert value("tests", f"<think>\n{CONSTANT}\n</think>\n{RIGHT}", SUM) == 1
    assert value("tests", RIGHT, Example("k", "q", "r")) == Abstain("the row has no tests")


def test_asserts_judge_too() -> None:
    of = Example("k", "q", "r", tests=RowTests(asserts="assert add(2, 3) == 5"))
    assert value("tests", "```python\ndef add(a, b):\n    return a + b\n```", of) == 1
    assert value("tests", "```python\ndef add(a, b):\n    return a * b\n```", of) == 0


def test_what_stands_before_the_program_is_run_before_it() -> None:
    of = Example("k", "q", "r", tests=RowTests(asserts="assert f() == 2", before="from math import sqrt"))
    assert value("tests", "```python\ndef f():\n    return sqrt(4)\n```", of) == 1


@pytest.mark.parametrize(
    ("tokens", "right", "wrong"),
    [
        (0, 1.0, -0.5),
        (50, 0.9, -0.3),
        (100, 0.8, -0.1),
        (110, 0.8 - 0.25, -0.1 - 0.25),
        (120, 0.8 - 0.5, -0.1 - 0.5),
        (9999, 0.8 - 0.5, -0.1 - 0.5),
        (25, 0.8 + 0.1 * (1 + math.cos(math.pi / 4)), -0.1 - 0.2 * (1 + math.cos(math.pi / 4))),
    ],
)
def test_length(tokens: int, right: float, wrong: float) -> None:
    length = Length(longest=100, window=20, penalty=0.5)
    values = length([Answered(SUM, RIGHT, tokens, True), Answered(SUM, CONSTANT, tokens, True)])
    assert values == [pytest.approx(right), pytest.approx(wrong)]
    by_answer = Length(longest=100, window=20, penalty=0.5, right="answer")
    twelve = Example("k", "q", "#### 12")
    assert by_answer([Answered(twelve, "12", tokens, True), Answered(twelve, "11", tokens, True)]) == [
        pytest.approx(right),
        pytest.approx(wrong),
    ]


def test_a_right_answer_of_any_length_is_worth_more_than_any_wrong_one() -> None:
    length = Length(longest=50, window=10, penalty=0.8)
    right, wrong = ([length._value(kind, tokens) for tokens in range(200)] for kind in (True, False))
    assert min(right) > max(wrong)


def test_repetition() -> None:
    assert value("repetition", "a b c d e") == 0
    assert value("repetition", "a b a b a b") == pytest.approx(-0.1 * (1 - 2 / 4))  # aba bab aba bab
    assert value("repetition", "a b") == value("repetition", "") == -0.1
    assert value("repetition", "日日日日") == pytest.approx(-0.1 * (1 - 1 / 2))


def test_rouge_l() -> None:
    of = Example("k", "q", "the cat sat", references=("the cat sat", "a dog ran"), language="en")
    assert value("rouge_l", "a dog sat", of) == pytest.approx(2 / 3)
    assert isinstance(value("rouge_l", "x", Example("k", "q", "!?")), Abstain)


def test_answer_abstains_where_it_cannot_judge() -> None:
    assert isinstance(value("answer", "3", Example("k", "q", "")), Abstain)
    assert isinstance(value("answer", "3", SUM), Abstain)


def test_a_run_that_could_not_be_judged_is_no_zero() -> None:
    from potstill.sandbox.backend import Ended, Job
    from potstill.sandbox.grader import Grader
    from potstill.sandbox.verdict import Limits
    from potstill.scorers import programs

    class Broken:
        name = "broken"

        def run(self, job: Job, limits: Limits) -> Ended:
            return Ended(False, None, None, None, b"", b"", 0.0, trouble="no room")

        def close(self) -> None:
            pass

    programs.use(lambda: Grader(Broken(), workers=1))
    for reward in (Passing(), Length()):
        (found,) = reward([Answered(SUM, RIGHT, 5, True)])
        assert isinstance(found, Abstain)
        assert "no room" in found.reason


def test_equal_programs_are_run_once_for_all_rewards() -> None:
    from sandbox.bare import Bare

    from potstill.sandbox.grader import Grader
    from potstill.scorers import programs

    grader = Grader(Bare(), workers=1)
    programs.use(lambda: grader)
    answers = [Answered(SUM, RIGHT, 5, True)] * 4
    Passing()(answers)
    Length()(answers)
    assert grader.judged == 3  # one program, three cases
