"""Models at equal budgets: exact on straight lines, silent where nothing is known, and never between unlike models."""

from typing import Any

import pytest

from potstill.study.budget import Budget, budgets, interpolated

X = "validation_nll"


def curve(
    name: str, ends: list[float], height: Any, *, seed: int | None = 1, began: str = "one", **more: Any
) -> dict[str, Any]:
    """A model validated where it had read and written so many tokens, at ten FLOP each, `height(tokens)` high."""
    points = [
        {"step": n, "epoch": n, "read": 0.75 * x, "written": 0.25 * x, "flops": 10 * x, X: height(x), **more}
        for n, x in enumerate(ends)
    ]
    return {"name": name, "role": "kd", "seed": seed, "began": began, "points": points}


def at_equal(axis: str, curves: list[dict[str, Any]]) -> Budget:
    (found,) = [one for one in budgets(curves) if one.axis == axis]
    return found


def values(found: Budget, figure: str = X) -> dict[str, Any]:
    return {arm.name: arm.reached[figure] and arm.reached[figure].mean for arm in found.arms}


def test_straight_lines_are_met_exactly_whatever_their_lengths() -> None:
    lines = {"short": (3.0, -0.01), "long": (2.5, -0.003), "steep": (9.0, 0.02)}
    ends = {"short": [0, 31, 97.5], "long": [0, 250, 400], "steep": [0, 10, 20, 90, 130]}
    curves = [curve(name, ends[name], lambda x, ab=ab: ab[0] + ab[1] * x) for name, ab in lines.items()]
    for axis, budget in (("tokens", 97.5), ("flops", 975.0)):
        found = at_equal(axis, curves)
        assert found.budget == budget
        assert found.differ
        assert values(found) == pytest.approx({name: a + b * 97.5 for name, (a, b) in lines.items()})
        assert {arm.name: arm.share for arm in found.arms} == pytest.approx(
            {"short": 1.0, "long": 97.5 / 400, "steep": 97.5 / 130}
        )


def test_seeds_are_interpolated_each_and_then_averaged() -> None:
    """Their lengths differ where students write; the shortest of all bounds the budget."""
    a = [curve("a", [0, end], lambda x, s=seed: s * x, seed=seed) for seed, end in ((1, 100), (2, 80), (3, 120))]
    b = [curve("b", [0, 200], lambda x: 5.0, seed=seed) for seed in (1, 2, 3)]
    found = at_equal("tokens", a + b)
    assert found.budget == 80
    (arm,) = [arm for arm in found.arms if arm.name == "a"]
    reached = arm.reached[X]
    assert reached is not None
    assert (reached.mean, reached.low, reached.high) == pytest.approx((160, 80, 240))
    assert arm.whole == pytest.approx(100)


def test_a_figure_that_was_not_measured_has_no_value() -> None:
    def with_kl(x: float) -> float:
        return x

    a, b = curve("a", [0, 100], with_kl, validation_kl_to_teacher=0.5), curve("b", [0, 100], with_kl)
    assert values(at_equal("tokens", [a, b]), "validation_kl_to_teacher") == {"a": 0.5, "b": None}
    a["points"][-1]["validation_kl_to_teacher"] = None  # and no further than it was measured
    assert values(at_equal("tokens", [a, b]), "validation_kl_to_teacher") == {"a": None, "b": None}
    one, two = (curve("a", [0, 100], with_kl, seed=seed, validation_kl_to_teacher=0.5) for seed in (1, 2))
    del two["points"][0]["validation_kl_to_teacher"], two["points"][1]["validation_kl_to_teacher"]
    mixed = at_equal("tokens", [one, two, b])
    assert values(mixed, "validation_kl_to_teacher") == {"a": None, "b": None}  # not the mean of some seeds


def test_what_nobody_knows_is_compared_with_nothing() -> None:
    known = [curve(name, [0, 100], lambda x: x) for name in ("a", "b")]
    unknown = curve("c", [0, 10], lambda x: x)
    for point in unknown["points"]:
        point["flops"] = None
    by_flops, by_tokens = (at_equal(axis, [*known, unknown]) for axis in ("flops", "tokens"))
    assert by_flops.budget == 1000
    assert values(by_flops) == {"a": 100, "b": 100, "c": None}
    assert by_tokens.budget == 10
    assert values(by_tokens) == {"a": 10, "b": 10, "c": 10}
    assert [one.axis for one in budgets([known[0], unknown])] == ["tokens"]


def test_only_models_of_one_beginning_are_compared() -> None:
    a, b, c = (curve(name, [0, 100], lambda x: x, began=began) for name, began in (("a", "x"), ("b", "x"), ("c", "y")))
    assert {arm.name for one in budgets([a, b, c]) for arm in one.arms} == {"a", "b"}
    assert budgets([a, c]) == []
    per_seed = [curve(n, [0, 100], lambda x: x, seed=seed, began=f"s{seed}") for n in ("a", "b") for seed in (1, 2)]
    assert len(budgets(per_seed)) == 2  # each seed from a start of its own, alike in both models
    unlike = [curve(n, [0, 100], lambda x: x, seed=seed, began=f"{n}{seed}") for n in ("a", "b") for seed in (1, 2)]
    assert budgets(unlike) == []
    assert budgets([{**a, "began": None}, {**b, "began": None}]) == []  # as older versions wrote it


def test_equal_amounts_are_told_to_be_equal() -> None:
    assert not at_equal("tokens", [curve("a", [0, 100], lambda x: x), curve("b", [0, 100.5], lambda x: x)]).differ


@pytest.mark.parametrize(("x", "expected"), [(-1, None), (0, 1.0), (5, 2.0), (10, 4.0), (15, 5.0), (20, 6.0), (20.001, None)])
def test_nothing_is_said_outside_of_what_was_measured(x: float, expected: float | None) -> None:
    assert interpolated([(0, 1.0), (10, 3.0), (10, 4.0), (20, 6.0)], x) == expected


def test_one_point_is_a_line_at_its_place_alone() -> None:
    assert interpolated([(3, 1.0)], 3) == 1.0
    assert interpolated([(3, 1.0)], 4) is None
    assert interpolated([], 4) is None
