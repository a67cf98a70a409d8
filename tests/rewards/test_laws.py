"""What holds for every reward; a new kind inherits these."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.core.types import Abstain, Case, Example
from potstill.core.types import Tests as RowTests
from potstill.rewards import Answered, Reward
from potstill.rewards.probes import beating, probes
from potstill.rewards.repetition import Repetition

KINDS = sorted(Reward.kinds)
PROGRAM = "xs = [int(x) for x in input().split()]\nprint(sum(xs))"
THOUGHT = {
    "en": "Step 1: Read the numbers.\nStep 2: Add them.\nStep 3: Print.",
    "es": "Paso 1: Leer los números.\nPaso 2: Sumarlos.\nPaso 3: Imprimir.",
}
REFERENCE = {
    language: f"<think>\n{thought}\n</think>\n<answer>\n```python\n{PROGRAM}\n```\n</answer>"
    for language, thought in THOUGHT.items()
}
TESTS = RowTests(cases=(Case("1 2\n", "3\n"), Case("4\n", "4\n")))
ASKED = {"en": "Print the sum of the integers on a line.", "es": "Imprime la suma de los enteros de una línea."}

# Neither judges the answer nor its form by itself: an empty answer repeats nothing and is short.
ALONE = sorted(set(KINDS) - {"repetition"})


def example(language: str = "en", tests: RowTests | None = TESTS) -> Example:
    return Example("k", ASKED[language], REFERENCE[language], language=language, tests=tests)


def words_and_numbers(language: str) -> Example:
    thought = {"en": "Step 1: Add.\nStep 2: Carry.\nStep 3: Done.", "es": "Paso 1: Sumar.\nPaso 2: Llevar.\nPaso 3: Listo."}
    return Example("n", "7 + 5?", f"<think>\n{thought[language]}\n</think>\n<answer>\n12\n</answer>", language=language)


def answered(text: str, of: Example, *, tokens: int | None = None) -> Answered:
    return Answered(of, text, len(text) // 4 + 1 if tokens is None else tokens, True)


def reward(kind: str, **fields: Any) -> Reward:
    made = Reward.kinds[kind].model_validate(fields)
    assert isinstance(made, Reward)
    return made


def fine(values: Sequence[float | Abstain], count: int) -> bool:
    """Each answer has a finite value or a reason."""
    return len(values) == count and all(
        bool(value.reason) if isinstance(value, Abstain) else math.isfinite(value) for value in values
    )


ODD = (
    "",
    " \n\t ",
    "\x00",
    "\ud800 half of a pair",
    "<think>",
    "</think></think>",
    "<think><think>a</think></think><answer><answer>b</answer></answer>",
    "</answer><answer></think><think>",
    "```",
    "```python\n",
    "```python\nprint(1",
    "````\n```python\nprint(1)\n```\n````",
    "\\boxed{",
    "#### ",
    "9" * 5000,
    "1e999 1/0 -- 1,,2 ..",
    "Step 1: " * 2000,
    "\u202e٣٫١٤ 三 ½",
    "a" * 100_000,
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_answer_has_a_finite_value_or_a_reason(kind: str) -> None:
    rows = (example(), example("es"), example(tests=None), words_and_numbers("es"), Example("e", "?", ""))
    odd = [answered(text, of) for text in ODD for of in rows]
    assert fine(reward(kind)(odd), len(odd))
    assert reward(kind)([]) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=40), st.sampled_from(ODD[:14])), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"tests", "length"}))
def test_any_text_has_a_finite_value_or_a_reason(kind: str, parts: list[str]) -> None:
    text = "".join(parts)
    given = [answered(text, of) for of in (example(), words_and_numbers("en"))]
    assert fine(reward(kind)(given), 2)


def test_the_law_rejects_a_reward_that_divides_by_nothing() -> None:
    class Share(Repetition, kind="share"):
        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [math.inf if not answer.text else 1.0 for answer in answers]

    del Reward.kinds["share"]
    assert not fine(Share()([answered("", example())]), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_answers_does_not_matter(kind: str) -> None:
    rows = (example(), example("es"), words_and_numbers("en"), example(tests=None))
    texts = ["", "12", REFERENCE["en"], REFERENCE["es"], "```python\nprint(3)\n```", "<think>a</think><answer>12</answer>"]
    given = [answered(text, of) for of in rows for text in texts]
    order = random.Random(1).sample(range(len(given)), len(given))
    values = reward(kind)(given)
    assert reward(kind)([given[i] for i in order]) == [values[i] for i in order]


@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize("kind", ALONE)
def test_no_probe_is_worth_more_than_the_reference(kind: str, language: str) -> None:
    of = words_and_numbers(language) if kind == "answer" else example(language)
    answers = [answered(of.response, of), *(answered(probe.text, of, tokens=probe.tokens) for probe in probes(of, 300))]
    reference, *others = reward(kind)(answers)
    assert not isinstance(reference, Abstain)
    for probe, value in zip(probes(of, 300), others, strict=True):
        assert not isinstance(value, Abstain)
        assert value <= reference, probe.name


@pytest.mark.parametrize("kind", KINDS)
def test_correctness_tells_right_from_wrong(kind: str) -> None:
    """What says that it judges correctness does, and what says so of form does not."""
    right, wrong = ("12", "13") if kind == "answer" else (f"```python\n{PROGRAM}\n```", "```python\nprint(3)\n```")
    of = words_and_numbers("en") if kind == "answer" else example()
    values = reward(kind)([answered(right, of, tokens=9), answered(wrong, of, tokens=9)])
    if reward(kind).correctness:
        assert not isinstance(values[0], Abstain)
        assert not isinstance(values[1], Abstain)
        assert values[0] > values[1]


@pytest.mark.parametrize("language", ["en", "es"])
def test_all_rewards_together_pay_no_probe_more_than_the_reference(language: str) -> None:
    rewards = [reward(kind) for kind in KINDS]
    rows = [example(language), words_and_numbers(language)]
    assert beating(rewards, rows, lambda text: len(text) // 4 + 1, 400) == []
