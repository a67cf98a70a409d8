"""The probes find rewards that can be hacked."""

from collections.abc import Sequence

import pytest

from potstill.core.errors import UserError
from potstill.core.types import Abstain, Case, Example
from potstill.core.types import Tests as RowTests
from potstill.rewards import Answered, Reward
from potstill.rewards.probes import beating, probes
from potstill.rewards.tag_count import TagCount
from potstill.rewards.tests import Tests as Passing

PROGRAM = "<think>\nStep 1: Print.\n</think>\n<answer>\n```python\nprint(input())\n```\n</answer>"
ROW = Example("echo", "Print the line.", PROGRAM, tests=RowTests(cases=(Case("a\n", "a\n"), Case("b\n", "b\n"))))


def words(text: str) -> int:
    return len(text.split()) + 1


class Longest(Reward, kind="longest"):
    """Broken on purpose: the longer the better."""

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [float(answer.tokens) for answer in answers]


class Prompt(Reward, kind="prompt"):
    """Broken on purpose: likeness to the question."""

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [float(answer.example.instruction in answer.text) for answer in answers]


class Passed(Reward, kind="passed"):
    """Broken on purpose: it believes what a program prints."""

    def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
        return [float("passed" in answer.text) for answer in answers]


for broken in (Longest, Prompt, Passed):
    del Reward.kinds[str(broken.kind)]


@pytest.mark.parametrize(
    ("broken", "probe"), [(Longest, "very long"), (Prompt, "the prompt again"), (Passed, "a program that leaves early")]
)
def test_a_reward_that_can_be_hacked_is_found(broken: type[Reward], probe: str) -> None:
    found = beating([broken()], [ROW], words, 50)
    assert probe in {beaten.probe for beaten in found}
    assert all(beaten.value > beaten.reference for beaten in found)
    assert "the probe '" in found[0].sentence()
    assert "row 'echo'" in found[0].sentence()


def test_weights_decide() -> None:
    honest = Passing(weight=3)
    assert beating([honest, Prompt(weight=1)], [ROW], words, 50) == []
    assert {b.probe for b in beating([honest, Prompt(weight=4)], [ROW], words, 50)} == {
        "the prompt again",
        "the prompt in the format",
    }


def test_form_alone_beats_nothing_but_correctness_is_not_asked() -> None:
    assert beating([TagCount()], [ROW], words, 50) == []


def test_programs_that_cheat_do_not_pass() -> None:
    asserts = Example("f", "Write f.", "```python\ndef f(x):\n    return x\n```", tests=RowTests(asserts="assert f(3) == 3"))
    for row in (ROW, asserts):
        assert beating([Passing()], [row], words, 50) == []
        answers = [Answered(row, probe.text, 5, True) for probe in probes(row, 20)]
        assert set(Passing()(answers)) == {0.0}


def test_rows_that_no_reward_can_judge_are_refused() -> None:
    with pytest.raises(UserError, match="no reward judges the reference of any row: the row has no tests"):
        beating([Passing()], [Example("k", "q", "r")], words, 50)


def test_a_reference_with_its_reasoning_apart_is_judged_as_written() -> None:
    row = Example("k", "q", "<answer>\n12\n</answer>", reasoning="7 and 5")
    assert beating([Reward.parse({"kind": "think_format"})], [row], words, 50) == []  # pyright: ignore[reportArgumentType]
