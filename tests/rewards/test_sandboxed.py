"""Rewards in the sandbox of this machine."""

from collections.abc import Iterator

import pytest
from judged import judging

from potstill.rewards import Answered, Reward
from potstill.rewards.probes import beating, probes
from potstill.rewards.tests import Tests as Passing
from potstill.sandbox.trial import NoSandbox
from potstill.scorers import programs
from potstill.sources.programs import Programs

ROWS = list(Programs(families=6, new_families=2, instances=5).rows())[::9]


@pytest.fixture(autouse=True)
def judge() -> Iterator[None]:
    """Instead of that of the folder."""
    programs.use(None)
    try:
        programs.sandbox()
    except NoSandbox as error:
        pytest.skip(f"no sandbox here: {error}")
    yield
    programs.use(None)


def test_references_pass_and_probes_do_not() -> None:
    assert programs.failing_references(ROWS) == {}
    for row in ROWS[:3]:
        assert set(Passing(count="share")([Answered(row, probe.text, 9, True) for probe in probes(row, 50)])) == {0.0}
    rewards = [Reward.parse(kind) for kind in ("tests", "think_format", "tag_count", "steps", "length", "repetition")]
    assert beating(rewards, ROWS[:3], len, 50) == []  # pyright: ignore[reportArgumentType]


def test_verdicts_are_those_of_an_interpreter_without_walls() -> None:
    """Of harmless programs: the sandbox must not change what they are worth."""
    answers = [ROWS[0].response, "```python\nprint(1)\n```", "```python\n1 / 0\n```", "```python\nimport sys\nsys.exit(3)\n```"]
    inside = [getattr(grade, "outcome", "") for grade in programs.grades_of(answers, ROWS[:1] * 4)]
    with judging():
        outside = [getattr(grade, "outcome", "") for grade in programs.grades_of(answers, ROWS[:1] * 4)]
    assert inside == outside == ["pass", "fail", "crash", "crash"]
