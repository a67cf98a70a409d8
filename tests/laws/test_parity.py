"""What comparing two models position by position must give."""

import math

import numpy as np
import pytest

from potstill.study.parity import LIMITS, compare_ids, distance, limit, verdict

RNG = np.random.default_rng(0)


def logp(*shape: int) -> np.ndarray:
    logits = RNG.normal(size=shape)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_model_lies_at_no_distance_from_itself() -> None:
    same = logp(5, 40)
    found = distance(same, same)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert (found.kl_max, found.agreement, found.positions) == (pytest.approx(0, abs=1e-12), 1.0, 5)


def test_figures_are_those_of_the_definition() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    each = [0.5 * math.log(2) - 0.25 * math.log(2), 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.5)]
    found = distance(np.log(p), np.log(q))
    assert found.kl == pytest.approx(sum(each) / 2)
    assert found.kl_max == pytest.approx(max(each))
    assert found.agreement == 0.5


def test_digits_that_are_cut_are_normalised_and_told() -> None:
    ours = logp(3, 40)
    found = distance(ours, ours + 2e-4)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.total == pytest.approx(math.exp(2e-4))


def test_a_token_that_the_runtime_does_not_name_is_impossible_there() -> None:
    ours = logp(1, 40)
    theirs = ours.copy()
    theirs[0, ours[0].argmax()] = np.nan
    found = distance(ours, theirs)
    assert found.kl > 1
    assert found.agreement == 0
    assert np.isfinite(found.kl)
    theirs = ours.copy()
    theirs[0, ours[0].argmin()] = -3.4e38  # a runtime's zero
    assert np.isfinite(distance(ours, theirs).kl)


def test_known_differences_are_named_and_others_count() -> None:
    found = compare_ids(["a", "x</s>", "b"], [[1], [2], [3]], [[1], [9], [4]])
    assert (found.texts, found.differ, list(found.known)) == (3, ("b",), ["x</s>"])
    near = distance(logp(1, 4), logp(1, 4)).__class__(1, 0.0, 0.0, 1.0, 1.0)
    assert "token ids of 1 of 3 texts differ, such as 'b'" in verdict("f16", found, near)
    assert verdict("f16", compare_ids(["</s>"], [[1]], [[2]]), near) == ""


def test_nothing_excuses_a_models_own_control_token() -> None:
    """Of Llama `</s>` is the end: a file that spells it letter by letter is wrong."""
    found = compare_ids(["</s>a"], [[2, 5]], [[40, 41, 5]], own=["<s>", "</s>"])
    assert (found.differ, found.known) == (("</s>a",), {})


@pytest.mark.parametrize("type", [*LIMITS, "q4_k"])
def test_the_limit_grows_with_what_rounding_itself_cost_and_nan_fails(type: str) -> None:
    none = compare_ids([], [], [])
    at = distance(logp(1, 4), logp(1, 4)).__class__
    assert limit(type, 10.0) == 1.0
    assert limit(type, 0.0) == limit(type)
    assert verdict(type, none, at(1, limit(type), 1.0, 1.0, 1.0)) == ""
    assert "is above" in verdict(type, none, at(1, 1.01 * limit(type), 1.0, 1.0, 1.0))
    assert "is above" in verdict(type, none, at(1, math.nan, 1.0, 1.0, 1.0))
    assert verdict(type, none, at(1, 0.5, 1.0, 1.0, 1.0), own_kl=6.0) == ""
    assert "sum to 0.500" in verdict(type, none, at(1, 0.0, 0.0, 1.0, 0.5))
