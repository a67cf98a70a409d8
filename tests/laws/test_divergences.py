"""What holds for every divergence; a new kind inherits these, and adds one line to ORACLES."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor

from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.divergences.generalised_jsd import GeneralisedJSD
from potstill.divergences.reverse_kl import ReverseKL
from potstill.divergences.skew_kl import SkewKL
from potstill.divergences.skew_reverse_kl import SkewReverseKL
from potstill.divergences.total_variation import TotalVariation
from potstill.divergences.weighted_sum import WeightedSum

OfLogits = Callable[[Tensor, Tensor], Tensor]
INF = math.inf


def of_logits(divergence: Divergence) -> OfLogits:
    return lambda zp_NV, zq_NV: divergence(F.log_softmax(zp_NV, -1), F.log_softmax(zq_NV, -1))


def logits(seed: int, rows: int = 7, vocab: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def finite_with_gradient(d: OfLogits, zp_NV: Tensor, zq_NV: Tensor) -> bool:
    zq_NV = zq_NV.clone().requires_grad_(True)
    value_N = d(zp_NV, zq_NV)
    value_N.sum().backward()
    assert zq_NV.grad is not None
    return bool(value_N.isfinite().all() and zq_NV.grad.isfinite().all())


def zero_of_equals(d: OfLogits) -> bool:
    return all(torch.allclose(d(z, z), torch.zeros(7, dtype=z.dtype), atol=1e-12) for z in (logits(1), 20 * logits(2)))


def never_negative(d: OfLogits) -> bool:
    return all(bool((d(scale * logits(i), scale * logits(i + 9)) > -1e-12).all()) for i in range(5) for scale in (0.01, 1, 30))


def shift_invariant(d: OfLogits) -> bool:
    shift_N1 = 100 * torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = d(logits(1), logits(2))
    return torch.allclose(d(logits(1) + shift_N1, logits(2)), plain) and torch.allclose(
        d(logits(1), logits(2) + shift_N1), plain
    )


def finite_where_masked(d: OfLogits) -> bool:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for masked_p, masked_q in (([2, 5], []), ([], [2, 5]), ([2, 5], [2, 5]), ([1], [4]), (list(range(10)), [10])):
            zp, zq = logits(1, dtype=dtype), logits(2, dtype=dtype)
            zp[:, masked_p], zq[:, masked_q] = -INF, -INF
            if not finite_with_gradient(d, zp, zq):
                return False
    return True


def finite_at_extremes(d: OfLogits) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        up, down = torch.full((1, 5), -1e4, dtype=dtype), torch.full((1, 5), 1e4, dtype=dtype)
        up[0, 0], down[0, 0] = 1e4, -1e4
        flat = torch.zeros(1, 5, dtype=dtype)
        if not all(finite_with_gradient(d, p, q) for p in (up, down, flat) for q in (up, down, flat)):
            return False
    return True


def gradient_is_of_the_value(d: OfLogits) -> bool:
    zq = logits(4, rows=3, vocab=5).requires_grad_(True)
    return torch.autograd.gradcheck(lambda q: d(logits(5, rows=3, vocab=5), q), (zq,), raise_exception=False)


def indifferent_to_the_order_of_tokens(d: OfLogits) -> bool:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    return torch.allclose(d(logits(1)[:, order], logits(2)[:, order]), d(logits(1), logits(2)))


def each_row_by_itself(d: OfLogits) -> bool:
    whole = d(logits(1), logits(2))
    return whole.shape == (7,) and torch.allclose(d(logits(1)[3:4], logits(2)[3:4]), whole[3:4])


LAWS: list[Callable[[OfLogits], bool]] = [
    zero_of_equals,
    never_negative,
    shift_invariant,
    finite_where_masked,
    finite_at_extremes,
    gradient_is_of_the_value,
    indifferent_to_the_order_of_tokens,
    each_row_by_itself,
]


def log_space(f: Callable[[Tensor, Tensor], Tensor]) -> OfLogits:
    return lambda zp_NV, zq_NV: f(F.log_softmax(zp_NV, -1), F.log_softmax(zq_NV, -1))


BROKEN: dict[str, OfLogits] = {
    "zero_of_equals": log_space(lambda p, q: -(p.exp() * q).sum(-1)),  # the cross-entropy keeps the teacher's entropy
    "never_negative": log_space(lambda p, q: (q.exp() * (p - q)).sum(-1)),  # the sign of the reverse KL
    "shift_invariant": lambda zp, zq: ForwardKL()(zp, zq),  # logits taken for log-probabilities
    "finite_where_masked": log_space(lambda p, q: (p.exp() * (p - q)).sum(-1)),  # 0 · -inf
    "finite_at_extremes": log_space(lambda p, q: (p.exp() * (p.exp() / q.exp()).log()).sum(-1)),  # leaves log space
    "gradient_is_of_the_value": log_space(lambda p, q: (q.detach().exp() * (q - p)).sum(-1)),  # half the reverse KL's gradient
    "indifferent_to_the_order_of_tokens": log_space(lambda p, q: (p.exp() * (p - q))[:, :9].sum(-1)),  # a cut vocabulary
    "each_row_by_itself": log_space(lambda p, q: (p.exp() * (p - q)).sum(-1).mean()),  # reduces too early
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", sorted(Divergence.kinds))
def test_every_divergence_keeps_the_law(kind: str, law: Callable[[OfLogits], bool]) -> None:
    assert law(of_logits(Divergence.parse(kind)))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_law_rejects_a_broken_divergence(law: Callable[[OfLogits], bool]) -> None:
    assert not law(BROKEN[law.__name__])


def mixture(beta: float, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)


ORACLES = {
    "forward_kl": lambda p, q: rel_entr(p, q).sum(-1),
    "reverse_kl": lambda p, q: rel_entr(q, p).sum(-1),
    "generalised_jsd": lambda p, q: jensenshannon(p, q, axis=-1) ** 2,
    "skew_kl": lambda p, q: rel_entr(p, 0.1 * p + 0.9 * q).sum(-1),
    "skew_reverse_kl": lambda p, q: rel_entr(q, 0.9 * p + 0.1 * q).sum(-1),
    "total_variation": lambda p, q: 1 - np.minimum(p, q).sum(-1),
    "weighted_sum": lambda p, q: ((p - q) * np.log(p / q)).sum(-1) / 2,  # half of Jeffreys' divergence
}


def distributions() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    logp, logq = F.log_softmax(logits(6), -1), F.log_softmax(logits(7), -1)
    return logp, logq, logp.exp().numpy(), logq.exp().numpy()


@pytest.mark.parametrize("kind", sorted(Divergence.kinds))
def test_scipy_finds_the_same(kind: str) -> None:
    assert kind in ORACLES, f"add an independent derivation of '{kind}' to ORACLES"
    logp, logq, p, q = distributions()
    np.testing.assert_allclose(Divergence.parse(kind)(logp, logq).numpy(), ORACLES[kind](p, q), rtol=1e-11)


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.9])
def test_the_jsd_of_any_weight_is_scipys(beta: float) -> None:
    logp, logq, p, q = distributions()
    np.testing.assert_allclose(GeneralisedJSD(beta=beta)(logp, logq).numpy(), mixture(beta, p, q), rtol=1e-10)


def test_the_jsd_tends_to_the_named_ends() -> None:
    logp, logq, *_ = distributions()
    small = 1e-8
    torch.testing.assert_close(GeneralisedJSD(beta=small)(logp, logq) / small, ForwardKL()(logp, logq), rtol=1e-3, atol=0)
    torch.testing.assert_close(GeneralisedJSD(beta=1 - small)(logp, logq) / small, ReverseKL()(logp, logq), rtol=1e-3, atol=0)
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    far_p, far_q = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    assert GeneralisedJSD(beta=0.3)(far_p, far_q).item() == pytest.approx(entropy, rel=1e-6)


def test_the_skew_divergences_end_in_the_plain_ones_and_are_bounded() -> None:
    logp, logq, *_ = distributions()
    torch.testing.assert_close(SkewKL(alpha=0)(logp, logq), ForwardKL()(logp, logq))
    torch.testing.assert_close(SkewReverseKL(alpha=0)(logp, logq), ReverseKL()(logp, logq))
    far_p, far_q = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    for divergence in (SkewKL(alpha=0.2), SkewReverseKL(alpha=0.2)):
        assert divergence(far_p, far_q).item() == pytest.approx(-math.log(0.2), rel=1e-6)


def test_total_variation_is_one_between_strangers() -> None:
    far_p, far_q = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    assert TotalVariation()(far_p, far_q).item() == 1.0


def test_a_sum_weighs_what_it_is_given() -> None:
    logp, logq, *_ = distributions()
    parts = [{"divergence": "total_variation", "weight": 2.0}, {"divergence": {"kind": "skew_kl", "alpha": 0.3}}]
    found = WeightedSum.model_validate({"parts": parts})
    assert Divergence.parse(found.spec()) == found
    torch.testing.assert_close(found(logp, logq), 2 * TotalVariation()(logp, logq) + SkewKL(alpha=0.3)(logp, logq))
