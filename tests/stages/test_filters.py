"""Each filter leaves out what it names, counts it, and can be off."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.types import Case, Example
from potstill.core.types import Tests as RowTests
from potstill.metrics.rouge_l import RougeL
from potstill.rollouts.journal import Answer
from potstill.scorers.rouge import repeated
from potstill.stages.filters import Filters, Sieve

ROW = Example(key="k", instruction="What is it?", response="It is a still.", language="en")
SPANISH = "El agua de la olla es la que se usa para la destilación y por eso no se debe tirar."
ENGLISH = "The water in the pot is what we use for the still and so it should not be thrown away."
LOOP = "a still and " * 12
OFF: dict[str, Any] = {"finished": False, "repetition": False, "duplicates": "keep"}


def said(text: str, finished: bool = True, logp: float | None = None) -> Answer:
    return Answer(text, finished, 3, 5, logp)


def reasons(filters: dict[str, Any], *answers: Answer, example: Example = ROW) -> list[str]:
    return [one.reason for one in Sieve(Filters(**filters))(example, answers)]


@pytest.mark.parametrize(
    "on, bad, good, reason",
    [
        ({"finished": True}, said("It is", False), said("It is"), "cut at max_new_tokens"),
        ({"min_characters": 4}, said("abc"), said("abcd"), "too short"),
        ({"max_characters": 4}, said("abcde"), said("abcd"), "too long"),
        ({"repetition": {}}, said(LOOP), said(ENGLISH), "repeats itself"),
        ({"repetition": {"n": 1, "most": 0.4}}, said("! ! ! !"), said("! ? . ,"), "repeats itself"),
        ({"repetition": {}}, said("哈" * 20), said("它是一个蒸馏器"), "repeats itself"),
        ({"language": "row"}, said(SPANISH), said(ENGLISH), "another language"),
        ({"language": "es"}, said(ENGLISH), said(SPANISH), "another language"),
        ({"references": "drop"}, said("It  is a still."), said("It is a Still."), "equals a reference"),
        ({"least": 80}, said("It is a pot."), said("It is a still!"), "below filters.least"),
    ],
)
def test_a_filter_leaves_out_what_it_names(on: dict[str, Any], bad: Answer, good: Answer, reason: str) -> None:
    assert reasons(OFF | on, bad, good) == [reason, ""]
    assert reasons(OFF, bad, good) == ["", ""]


def test_rejection_sampling_keeps_programs_that_pass_and_counts_those_that_cannot_be_judged() -> None:
    row = Example(
        key="k", instruction="Double it.", response="", tests=RowTests(cases=(Case("2\n", "4\n"), Case("3\n", "6\n")))
    )
    passing = OFF | {"metric": "pass_at_1", "least": 100}
    right, wrong = said("```python\nprint(2 * int(input()))\n```"), said("```python\nprint(4)\n```")
    assert reasons(passing, wrong, right, said("no program"), example=row) == ["below filters.least", "", "below filters.least"]
    assert reasons(passing, right) == ["could not be scored"]  # ROW has no tests
    best = reasons(passing | {"best": "metric"}, wrong, right, right, example=row)
    assert best == ["below filters.least", "", "not the best"]


def test_least_is_the_most_of_a_metric_that_is_better_when_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RougeL, "higher_is_better", False)
    assert reasons(OFF | {"least": 80}, said("It is a pot."), said("It is a still!")) == ["", "below filters.least"]


def test_empty_answers_are_never_kept() -> None:
    assert reasons(OFF, said(" \n"), said("x")) == ["empty", ""]


def test_an_answer_too_short_to_tell_its_language_is_kept() -> None:
    assert reasons(OFF | {"language": "row"}, said("Sí.")) == [""]
    assert reasons(OFF | {"language": "row"}, said(SPANISH), example=Example("k", "q", "r", language="und")) == [""]


def test_a_duplicate_is_one_of_the_same_question_alone() -> None:
    sieve = Sieve(Filters(**OFF | {"duplicates": "drop"}))
    other = Example(key="k", instruction="And what is that?", response="x")
    assert [one.reason for one in sieve(ROW, [said("a b"), said("c"), said("a \u00a0 b")])] == ["", "", "said before"]
    assert [one.reason for one in sieve(other, [said("a b")])] == [""]
    assert [one.reason for one in sieve(ROW, [said("c"), said("C")])] == ["said before", ""]  # a row that asks the same


def test_what_was_left_out_was_not_said() -> None:
    sieve = Sieve(Filters(**OFF | {"duplicates": "drop", "best": "likelihood"}))
    assert [one.reason for one in sieve(ROW, [said("a", logp=-2.0), said("b", logp=-1.0)])] == ["not the best", ""]
    assert [one.reason for one in sieve(ROW, [said("a", logp=-1.0), said("b", logp=-0.5)])] == ["", "said before"]


@pytest.mark.parametrize(
    "best, answers, kept",
    [
        ({"best": "likelihood"}, [said("a", logp=-2.0), said("b", logp=-1.0), said("c", logp=-1.0)], 1),
        ({"best": "likelihood"}, [said("a", logp=None), said("b", logp=-9.0)], 1),
        ({"best": "metric"}, [said("a pot"), said("It is a pot."), said("It is the still.")], 1),
        ({"best": "metric", "metric": "exact_match"}, [said("a"), said("it is a still"), said("x")], 1),
    ],
)
def test_the_best_one_is_kept(best: dict[str, Any], answers: list[Answer], kept: int) -> None:
    found = Sieve(Filters(**OFF | best))(ROW, answers)
    assert [one.sample for one in found if not one.reason] == [kept]
    assert {one.reason for one in found if one.sample != kept} <= {"not the best", "could not be scored"}


def test_without_a_reference_no_metric_chooses() -> None:
    alone = Example(key="k", instruction="q", response="")
    assert reasons(OFF | {"best": "metric"}, said("a"), said("b"), example=alone) == ["could not be scored"] * 2


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b c", LOOP, SPANISH]), st.booleans()), max_size=6), st.booleans())
def test_no_answer_vanishes(drawn: list[tuple[str, bool]], best: bool) -> None:
    answers = [said(text, finished, -1.0) for text, finished in drawn]
    found = Sieve(Filters(language="row", best="likelihood" if best else None))(ROW, answers)
    assert [(one.sample, one.answer) for one in found] == [*enumerate(answers)]


@pytest.mark.parametrize("text, n, share", [("a b a b a b", 2, 3 / 5), ("a b c", 4, 0.0), ("", 1, 0.0), ("a, a, a", 1, 3 / 5)])
def test_the_share_that_repeats(text: str, n: int, share: float) -> None:
    assert repeated(text, n) == pytest.approx(share)
