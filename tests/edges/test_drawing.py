"""Which token is drawn: the cuts, the probabilities that they leave, and the number that draws, against sorted loops."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from potstill.core.errors import UserError
from potstill.edges.drawing import BLOCK, Drawing

GRID_U = [n / 64 for n in range(64)] + [1 - 2**-53]


def plain(logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float) -> dict[int, float]:
    """Probabilities of the tokens that the cuts leave, in the order of the vocabulary."""
    top = max(logits)
    weight = [math.exp((z - top) / temperature) for z in logits]
    left = sorted(range(len(logits)), key=lambda v: (-logits[v], v))[: top_k or len(logits)]
    if top_p < 1:
        whole, reached, nucleus = math.fsum(weight[v] for v in left), 0.0, list[int]()
        for v in left:
            if reached >= top_p:
                break
            nucleus.append(v)
            reached += weight[v] / whole
            assume(abs(reached - top_p) > 1e-9)  # where a sum lies on the edge see the law of equals
        left = nucleus
    assume(min_p == 0 or all(abs(weight[v] - min_p) > 1e-12 for v in left))
    left = sorted(v for v in left if weight[v] >= min_p and weight[v] > 0)
    whole = math.fsum(weight[v] for v in left)
    return {v: weight[v] / whole for v in left}


def drawn(drawing: Drawing, logits: list[float], us: list[float]) -> tuple[list[int], list[float]]:
    token_B, logp_B = drawing(torch.tensor([logits] * len(us)), torch.tensor(us, dtype=torch.float64))
    assert logp_B is not None
    assert logp_B.dtype == torch.float32
    return token_B.tolist(), logp_B.tolist()


LOGITS = st.one_of(
    st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=40),  # many equals
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 2.5]), min_size=1, max_size=20).filter(lambda z: max(z) > -math.inf),
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=BLOCK - 1, max_size=2 * BLOCK + 9),
)
CUTS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.5, 0.05, 1.7, 30.0]),
        "top_k": st.one_of(st.none(), st.integers(1, 60)),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
        "min_p": st.sampled_from([0.0, 1e-6, 0.01, 0.2, 0.999]),
    }
)


@settings(max_examples=60, deadline=None)
@given(LOGITS, CUTS)
def test_what_is_drawn_is_what_sorted_loops_draw(logits: list[float], cuts: dict[str, Any]) -> None:
    expected = plain(logits, **cuts)
    likely_V = Drawing(**cuts).weights(torch.tensor([logits]))[0] > 1e-30  # float32 has no much smaller ones
    assert likely_V.nonzero().flatten().tolist() == [v for v in expected if expected[v] > 1e-30 * max(expected.values())]
    upto = dict(zip(expected, itertools.accumulate(expected.values()), strict=True))
    tokens, logps = drawn(Drawing(**cuts), logits, GRID_U)
    for u, token, logp in zip(GRID_U, tokens, logps, strict=True):
        assert logp == pytest.approx(math.log(expected[token]), abs=2e-5)
        before = upto[token] - expected[token]
        assert before - 1e-5 <= u <= before + expected[token] + 1e-5


@pytest.mark.parametrize("equals", [1, 2, 3, 7, 10, 49, 300])
def test_of_equals_exactly_as_many_are_kept_as_reach_it_and_the_first_ones(equals: int) -> None:
    logits_BV = torch.full((1, equals), 0.3)
    for count in {1, (equals + 1) // 2, max(1, equals - 1), equals}:
        for drawing in (Drawing(1.3, top_p=count / equals), Drawing(1.3, top_k=count)):
            kept_V = drawing.weights(logits_BV)[0] > 0
            assert kept_V.tolist() == [v < count for v in range(equals)]
    assert bool((Drawing(1.3, min_p=0.999).weights(logits_BV) > 0).all())


def test_min_p_is_a_share_of_the_likeliest_after_tempering() -> None:
    """At this temperature logit z has the weight 2^z."""
    kept_BV = Drawing(1 / math.log(2.0), min_p=0.25).weights(torch.tensor([[0.0, -1.0, -1.99, -2.01]])) > 0
    assert kept_BV.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("cuts", [{"top_k": 5}, {"top_k": 500}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_cuts_that_are_wider_than_the_vocabulary_cut_nothing(cuts: dict[str, Any]) -> None:
    logits = [0.0, 1.0, -2.0, 1.0, 0.5]
    assert drawn(Drawing(0.7, **cuts), logits, GRID_U) == drawn(Drawing(0.7), logits, GRID_U)


def test_rows_of_a_batch_have_nothing_to_do_with_each_other() -> None:
    logits_BV, u_B = torch.randn(9, 300, generator=torch.Generator().manual_seed(0)), torch.arange(9, dtype=torch.float64) / 9
    drawing = Drawing(0.8, top_k=40, top_p=0.9, min_p=0.01)
    before = logits_BV.clone()
    token_B, logp_B = drawing(logits_BV, u_B)
    assert logp_B is not None
    assert torch.equal(logits_BV, before)  # they are the caller's
    for b in range(9):
        token_1, logp_1 = drawing(logits_BV[b : b + 1], u_B[b : b + 1])
        assert logp_1 is not None
        assert (token_1.item(), logp_1.item()) == (token_B[b].item(), logp_B[b].item())


def test_greedy_takes_the_first_of_the_likeliest_and_gives_the_models_own_log_probability() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0, -1.0], [3.0, -torch.inf, 3.0, 0.0]])
    token_B, logp_B = Drawing()(logits_BV, None)
    assert token_B.tolist() == [1, 0]
    assert logp_B is not None
    torch.testing.assert_close(logp_B, logits_BV.log_softmax(-1).gather(-1, token_B[:, None]).squeeze(-1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("u", [None, 0.5])
def test_logits_that_are_no_numbers_are_one_error(bad: float, u: float | None) -> None:
    with pytest.raises(UserError, match="not numbers"):
        Drawing(0.0 if u is None else 1.0)(
            torch.tensor([[0.0, bad, 1.0]]), None if u is None else torch.tensor([u], dtype=torch.float64)
        )


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-60])
def test_a_temperature_near_0_takes_the_likeliest(temperature: float) -> None:
    tokens, logps = drawn(Drawing(temperature, top_p=0.9, min_p=0.1), [0.0, 3.0, 2.0, -1.0], GRID_U)
    assert set(tokens) == {1}
    assert logps == [0.0] * len(GRID_U)
