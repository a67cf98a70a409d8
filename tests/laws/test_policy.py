"""GRPO's objective: by hand, in plain loops, and against the enumeration of every group over a tiny vocabulary, in float64."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from enumerated import PROMPT, Answer, World, gradient, moved, rows_of, same
from torch import Tensor

from potstill.core.errors import UserError
from potstill.data.batches import SAMPLED, SHARE, StepRow, step_batches
from potstill.losses import policy as own
from potstill.losses.head import Loss
from potstill.losses.judging import ADVANTAGE
from potstill.losses.policy import PRESETS, REF, Policy, PolicyGradient, advantages, k3, sampler_weights, shares
from potstill.recipe.parse import parse_recipe
from potstill.teachers.signals import Live

LONGEST = 3
Group = Sequence[Answer]


@pytest.fixture(scope="module")
def world() -> World:
    """A student whose output layer has two rows that are no tokens."""
    return World(vocab=4, longest=LONGEST, padded=2)


@pytest.fixture(scope="module")
def small() -> World:
    return World(vocab=3, longest=2)


def reward_of(y: Answer) -> float:
    """Different for most answers, and longer ones differ more."""
    return math.sin(3.0 + sum((t + 2) * (v + 1) for t, v in enumerate(y))) + 0.3 * len(y)


def rows_of_groups(
    world: World,
    groups: Sequence[Group],
    policy: Policy,
    *,
    reference: Any = None,
    weights: Sequence[float] | None = None,
    whole: float | None = None,
    temperature: float = 1.0,
    longest: int = LONGEST,
) -> list[StepRow]:
    """Groups as the trainer learns them: advantages, judgement, shares."""
    found: list[StepRow] = []
    for n, group in enumerate(groups):
        of = advantages(np.array([reward_of(y) for y in group]), policy.group_std)
        weight = weights[n] if weights else 1.0
        for row, advantage in zip(rows_of(group, sampled_by(world, temperature)), of, strict=True):
            given = {**row.given, ADVANTAGE: np.full(len(row.response), advantage)}
            found.append(replace(row, weight=weight, given=given))
    told = PolicyGradient(policy, world.vocab, temperature, reference=reference).judged(world.student, found, 10_000).rows
    lengths, row_weights = [len(row.response) for row in told], [row.weight for row in told]
    of_rows = shares(lengths, row_weights, policy.normaliser, sum(row_weights) if whole is None else whole, longest)
    return [
        replace(row, given={**row.given, SHARE: np.full(len(row.response), share)})
        for row, share in zip(told, of_rows, strict=True)
    ]


def sampled_by(world: World, temperature: float) -> dict[Answer, list[float]]:
    """log-probabilities of the tokens of every answer at a temperature, from plain forward passes."""
    with torch.no_grad():
        return {
            y: [
                float(F.log_softmax(torch.tensor(world.logq[y][t], dtype=torch.float64) / temperature, -1)[v])
                for t, v in enumerate(y)
            ]
            for y in world.answers
        }


def loss_of(world: World, model: Any, rows: Sequence[StepRow], policy: Policy, tokens: int = 10_000, **more: Any) -> Loss:
    """As the training loop has it: the sum over micro-batches, divided by the weighted response tokens."""
    objective = PolicyGradient(policy, world.vocab, more.get("temperature", 1.0), Live(world.teacher), more.get("reference"))
    losses = [objective(model, batch) for batch in step_batches(rows, tokens)]
    count = sum(row.weight * len(row.response) for row in rows)
    parts = {name: torch.stack([loss.parts[name] for loss in losses]).sum() / count for name in losses[0].parts}
    return Loss(torch.stack([loss.total for loss in losses]).sum() / count, parts)


# --- by hand ---


def test_advantages_by_hand() -> None:
    reward_G = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    assert advantages(reward_G, group_std=False) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])
    spread = math.sqrt((3 * 0.16 + 2 * 0.36) / 4)  # n − 1 degrees of freedom
    assert advantages(reward_G, group_std=True) == pytest.approx(np.array([0.4, -0.6, -0.6, 0.4, 0.4]) / (spread + 1e-4))


@pytest.mark.parametrize("group_std", [False, True])
@pytest.mark.parametrize("rewards", [[0.3] * 7, [0.1 + 0.2, 0.3, 0.3], [5.0], [], [1e9, 1e9 + 1e-3]])
def test_equal_rewards_have_no_advantage_at_all(rewards: list[float], group_std: bool) -> None:
    """Not even that of rounding, which a division by 1e-4 would make ten thousand times larger."""
    assert advantages(np.array(rewards), group_std).tolist() == [0.0] * len(rewards)


def test_rewards_that_differ_a_little_have_one() -> None:
    assert advantages(np.array([0.0, 1e-6]), group_std=False) == pytest.approx([-5e-7, 5e-7])


def test_shares_by_hand() -> None:
    """Two answers of 2 and 6 tokens, weights 1 and 3: the loop divides by 2 + 18 = 20."""
    assert shares([2, 6], [1.0, 3.0], "tokens", 99.0, 99) == [1.0, 1.0]
    assert shares([2, 6], [1.0, 3.0], "sequence", 99.0, 99) == pytest.approx([20 / (2 * 4), 20 / (6 * 4)])
    assert shares([2, 6], [1.0, 3.0], "max_length", 5.0, 10) == pytest.approx([20 / 50, 20 / 50])


def test_k3_by_hand() -> None:
    now_B = torch.tensor([-1.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    found_B = k3(now_B, torch.tensor([-1.0, -1.5, -2.0], dtype=torch.float64))
    assert found_B.tolist() == pytest.approx([0.0, math.exp(0.5) - 0.5 - 1, math.exp(-1) + 1 - 1])
    (slope_B,) = torch.autograd.grad(found_B.sum(), now_B)
    assert slope_B.tolist() == pytest.approx([0.0, 1 - math.exp(0.5), 1 - math.exp(-1)])


def test_k3_pulls_back_a_policy_that_ran_away() -> None:
    """800 nats below the reference: exp overflows, and without its slope the term would push further."""
    now_B = torch.tensor([-801.0], requires_grad=True)
    found_B = k3(now_B, torch.tensor([-1.0]))
    (slope_B,) = torch.autograd.grad(found_B.sum(), now_B)
    assert math.isfinite(found_B.item())
    assert slope_B.item() < -1e6


def test_sampler_weights_by_hand() -> None:
    apart_N = torch.tensor([2.0, 8.0, 0.5, 4.0]).double().log()  # an answer of three tokens and one of one
    for ratio, cap, wanted in (
        ("token", 3.0, [2, 3, 0.5, 3]),
        ("sequence", 100.0, [8, 8, 8, 4]),
        ("sequence", 3.0, [3, 3, 3, 3]),
        ("sequence_mean", 3.0, [2, 2, 2, 3]),
        ("token", 0.0, [1, 1, 1, 1]),
    ):
        assert sampler_weights(apart_N, ratio, cap, [3, 1]).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "learns"),
    [(1.5, 2.0, 2.56, False), (1.5, -2.0, -3.0, True), (0.5, 2.0, 1.0, True), (0.5, -2.0, -1.6, False), (1.1, 2.0, 2.2, True)],
)
@pytest.mark.parametrize("kind", ["token", "sequence", "sequence_mean"])
def test_clipping_by_hand(kind: Any, ratio: float, advantage: float, gain: float, learns: bool, small: World) -> None:
    """One answer of two tokens, each of them `ratio` times as likely as when it was drawn; ε 0.2, ε_high 0.28."""
    policy = Policy(ratio=kind, sampler_cap=0)
    (y,) = [y for y in small.answers if len(y) == 2][:1]
    power = 0.5 if kind == "sequence" else 1.0  # of the product of two
    old = [small.logq[y][t][v] - power * math.log(ratio) for t, v in enumerate(y)]
    given = {"logq": np.array(old), ADVANTAGE: np.full(2, advantage), "importance": np.ones(2)}
    row = StepRow(PROMPT, y, sampled=True, given=given)
    objective = PolicyGradient(policy, small.vocab)
    (batch,) = step_batches([row], 100)
    loss = objective(small.student, batch)
    assert loss.total.item() == pytest.approx(-2 * gain)
    assert objective.ratios == pytest.approx((ratio, ratio))
    assert loss.parts["clipped"].item() == (0 if learns else 2)
    plain = sum(small.logs(small.student, y)[t, v] for t, v in enumerate(y))
    factor = 2 if kind == "sequence" else 1
    wanted = gradient(-ratio * advantage * factor * plain, small.student) if learns else gradient_of_zero(small)  # type: ignore[operator]
    assert same(gradient(loss.total, small.student), wanted)


def gradient_of_zero(world: World) -> Tensor:
    return torch.zeros(sum(p.numel() for p in world.student.parameters()), dtype=torch.float64)


# --- the objective as written, in loops ---


def plain_loss(world: World, now: Any, reference: Any, groups: Sequence[Group], p: Policy, weights: Sequence[float]) -> Tensor:
    """A step's loss from the formulas of the docs page; every answer is read by itself."""
    terms: list[tuple[float, int, Tensor]] = []  # weight, length, sum over tokens
    for group, weight in zip(groups, weights, strict=True):
        rewards = [reward_of(y) for y in group]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) + 1e-4
        for y, reward in zip(group, rewards, strict=True):
            advantage = (reward - mean) / (spread if p.group_std else 1.0)
            terms.append((weight, len(y), plain_answer(world, now, reference, y, advantage, p)))
    if p.normaliser == "sequence":
        return sum(w * t / n for w, n, t in terms) / sum(w for w, _, _ in terms)  # type: ignore[return-value]
    total = sum(w * t for w, _, t in terms)
    if p.normaliser == "tokens":
        return total / sum(w * n for w, n, _ in terms)  # type: ignore[return-value]
    return total / (sum(w for w, _, _ in terms) * LONGEST)  # type: ignore[return-value]


def plain_answer(world: World, now: Any, reference: Any, y: Answer, advantage: float, p: Policy) -> Tensor:
    new_TV, old_TV = world.logs(now, y), torch.tensor(world.logq[y], dtype=torch.float64)
    with torch.no_grad():
        ref_TV = world.logs(reference, y)
    new, old, ref = ([each[t, v] for t, v in enumerate(y)] for each in (new_TV, old_TV, ref_TV))
    total, T = torch.zeros((), dtype=torch.float64), len(y)
    for t in range(T):
        if p.ratio == "token":
            log_ratio, log_r = new[t] - old[t], ref[t] - new[t]
        else:
            log_ratio, log_r = sum(new) - sum(old), sum(ref) - sum(new)  # type: ignore[assignment]
            if p.ratio == "sequence_mean":
                log_ratio, log_r = log_ratio / T, ref[t] - new[t]
        rho = log_ratio.exp()
        gain = rho * advantage
        bounded = max(1 - p.eps_low, min(1 + p.eps_high, rho.item())) * advantage
        total = total - (gain if gain.item() <= bounded else bounded)
        if p.beta:
            total = total + p.beta * (log_r.exp() - log_r - 1)
        if p.beta_kd:
            teacher_V = torch.tensor(world.logp[y][t], dtype=torch.float64)
            total = total + p.beta_kd * (new_TV[t].exp() * (new_TV[t] - teacher_V)).sum()
    return total


WRITTEN: dict[str, Any] = {
    **{name: name for name in PRESETS},
    "paper without clipping in reach": {"preset": "paper", "eps_low": 0.9, "eps_high": 9.0},
    "paper for DAPO's tokens": {"preset": "paper", "normaliser": "tokens"},
    "GSPO": {"ratio": "sequence_mean", "normaliser": "sequence", "group_std": True, "beta": 0.1},
    "near the teacher": {"beta_kd": 0.5},
    "near both": {"beta": 0.2, "beta_kd": 0.3, "normaliser": "max_length"},
}
CHOICE = [0, 5, 11, 30, 7, 7, 2, 39, 18]


def chosen(world: World) -> list[Group]:
    picked = [world.answers[i % len(world.answers)] for i in CHOICE]
    return [picked[:3], picked[3:6], picked[6:]]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("by", [0.0, 0.1])
def test_the_objective_is_the_one_written(name: str, by: float, world: World) -> None:
    """Value and gradient, of groups of answers of all lengths and rows of several weights, in a first and a later update."""
    policy, weights = Policy.model_validate(WRITTEN[name]), [1.0, 2.0, 0.5]
    now, reference = moved(world.student, by), moved(world.student, 0.2, seed=8)
    signal = Live(reference) if policy.beta else None
    rows = rows_of_groups(world, chosen(world), policy, reference=signal, weights=weights)
    found, plain = loss_of(world, now, rows, policy).total, plain_loss(world, now, reference, chosen(world), policy, weights)
    assert found.item() == pytest.approx(plain.item(), rel=1e-9, abs=1e-12)
    wanted = gradient(plain, now)
    assert same(gradient(found, now), wanted)
    assert wanted.norm() > 1e-3


WRONG = {
    "population std": ("advantages", lambda r, std: (r - r.mean()) / (r.std() + 1e-4 if std else 1.0)),
    "advantage of the step, not the group": ("advantages", lambda r, std: r),
    "no normaliser": ("shares", lambda lengths, *more: [1.0] * len(lengths)),
    "a k3 of the other direction": ("k3", lambda now, ref: own._carried((now - ref).detach().exp(), 1.0, now)),
    "one clip on both sides": ("surrogate", lambda q, old, w, a, low, high: surrogate_of(q, old, a, low)),
}


def surrogate_of(logq_B: Tensor, old_B: Tensor, advantage_B: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    ratio_B = (logq_B - old_B).exp()
    gain_B = torch.minimum(ratio_B * advantage_B, ratio_B.clamp(1 - clip, 1 + clip) * advantage_B)
    return gain_B, torch.zeros_like(gain_B, dtype=torch.bool)


@pytest.mark.parametrize("name", WRONG)
def test_the_oracle_rejects_wrong_forms(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    function, wrong = WRONG[name]
    policy = Policy(group_std=True, normaliser="sequence", beta=0.3, eps_low=0.02, eps_high=0.5)
    now, reference = moved(world.student, 0.1), moved(world.student, 0.2, seed=8)
    plain = gradient(plain_loss(world, now, reference, chosen(world), policy, [1.0] * 3), now)
    monkeypatch.setattr(own, function, wrong)
    monkeypatch.setitem(globals(), function, wrong)
    rows = rows_of_groups(world, chosen(world), policy, reference=Live(reference))
    assert not same(gradient(loss_of(world, now, rows, policy).total, now), plain)


@pytest.mark.parametrize("tokens", [10_000, 9])
@pytest.mark.parametrize("name", WRITTEN)
def test_an_only_update_finds_by_itself_what_judging_finds(name: str, tokens: int, world: World) -> None:
    """Loss, gradient and figures, of answers drawn by something else: gap and weights are far from 0 and 1."""
    policy, weights = Policy.model_validate(WRITTEN[name]), [1.0, 2.0, 0.5]
    reference = Live(moved(world.student, 0.2, seed=8)) if policy.beta else None
    drawn_by = sampled_by(world, 0.7)
    fresh = []
    for row in rows_of_groups(world, chosen(world), policy, weights=weights):
        of_row = {**{name: row.given[name] for name in (ADVANTAGE, SHARE)}, SAMPLED: np.array(drawn_by[tuple(row.response)])}
        fresh.append(replace(row, given=of_row))
    objective = PolicyGradient(policy, world.vocab, reference=reference)
    told = objective.judged(world.student, fresh, tokens)
    if policy.sampler_cap:
        assert abs(told.figures["importance"] - 1) > 1e-3
    found, wanted = (loss_of(world, world.student, rows, policy, tokens, reference=reference) for rows in (fresh, told.rows))
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-12, abs=1e-15)
    assert same(gradient(found.total, world.student), gradient(wanted.total, world.student))
    shown = {name: value.item() for name, value in wanted.parts.items()} | told.figures
    assert {name: value.item() for name, value in found.parts.items()} == pytest.approx(shown, rel=1e-12, abs=1e-12)


# --- the expected gradient, every group enumerated ---


def expected_gradient(world: World, policy: Policy, size: int) -> Tensor:
    """Σ over all groups of their probability times the gradient of their loss, in the first update."""
    total = torch.zeros((), dtype=torch.float64)
    probability = {y: math.exp(sum(world.logq[y][t][v] for t, v in enumerate(y))) for y in world.answers}
    for group in product(world.answers, repeat=size):
        rows = rows_of_groups(world, [group], policy, longest=2)
        total = total + math.prod(probability[y] for y in group) * loss_of(world, world.student, rows, policy).total
    return gradient(total, world.student)


def true_gradient(world: World) -> Tensor:
    """Of −E[R], every answer enumerated."""
    total = torch.zeros((), dtype=torch.float64)
    for y in world.answers:
        logq_TV = world.logs(world.student, y)
        total = total - sum(logq_TV[t, v] for t, v in enumerate(y)).exp() * reward_of(y)  # type: ignore[union-attr]
    return gradient(total, world.student)


UNBIASED = {
    "Dr. GRPO": ({"preset": "dr_grpo"}, 2, 2.0),
    "Dr. GRPO in threes": ({"preset": "dr_grpo"}, 3, 2.0),
    "whole sequences, without the std": ({"ratio": "sequence", "normaliser": "sequence"}, 2, 1.0),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_is_the_true_one_times_the_share_of_the_others(name: str, small: World) -> None:
    """(G − 1)/G, because the mean that is taken off includes the answer itself; divided by what the sum is divided by."""
    fields, size, divided = UNBIASED[name]
    found = expected_gradient(small, Policy.model_validate(fields), size)
    assert same(found * divided, (size - 1) / size * true_gradient(small))


BIASED = {
    "the group's std": {"preset": "dr_grpo", "group_std": True},
    "means of answers": {"preset": "dr_grpo", "normaliser": "sequence"},
    "mean over tokens": {"preset": "dr_grpo", "normaliser": "tokens"},
    "the mean of a sequence's logarithms": {"preset": "dr_grpo", "ratio": "sequence_mean", "normaliser": "sequence"},
}


@pytest.mark.parametrize("name", BIASED)
def test_each_biased_part_points_elsewhere(name: str, small: World) -> None:
    """No factor makes it the true gradient: the law above would notice it."""
    found, true = expected_gradient(small, Policy.model_validate(BIASED[name]), 2), true_gradient(small)
    assert F.cosine_similarity(found, true, dim=0) < 0.9999


def test_k3_is_the_kl_in_expectation(small: World) -> None:
    """In the first update, over whole answers, with its sequence form; the gradient's expectation is not the KL's."""
    reference = moved(small.student, 0.3, seed=8)
    policy, total, wanted = Policy(preset="paper", beta=1.0), 0.0, 0.0
    for y in small.answers:
        row = rows_of([y], sampled_by(small, 1.0))[0]
        row = replace(row, given={**row.given, ADVANTAGE: np.zeros(len(y))})
        told = PolicyGradient(policy, small.vocab, reference=Live(reference)).judged(small.student, [row], 100)
        (batch,) = step_batches(told.rows, 100)
        loss = PolicyGradient(policy, small.vocab)(small.student, batch)
        with torch.no_grad():
            logq, logref = (sum(small.logs(m, y)[t, v].item() for t, v in enumerate(y)) for m in (small.student, reference))
        total += math.exp(logq) * loss.total.item() / len(y)
        wanted += math.exp(logq) * (logq - logref)
    assert total == pytest.approx(wanted, rel=1e-9)


# --- laws ---


@pytest.mark.parametrize("name", PRESETS)
def test_equal_rewards_give_no_policy_gradient(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "reward_of", lambda y: 0.7)
    policy = Policy.model_validate({"preset": name, "beta": 0.0})
    rows = rows_of_groups(world, chosen(world), policy)
    now = moved(world.student, 0.1)
    assert float(gradient(loss_of(world, now, rows, policy).total, now).abs().max()) == 0.0


@pytest.mark.parametrize("name", [*PRESETS, "GSPO", "near both"])
def test_order_and_micro_batches_change_nothing(name: str, world: World) -> None:
    """Neither of groups nor inside a group; micro-batches of one row, of some, of all."""
    policy, now = Policy.model_validate(WRITTEN[name]), moved(world.student, 0.1)
    reference = Live(moved(world.student, 0.2, seed=8)) if policy.beta else None
    groups = chosen(world)
    whole = gradient(loss_of(world, now, rows_of_groups(world, groups, policy, reference=reference), policy).total, now)
    turned = [list(reversed(group)) for group in reversed(groups)]
    for rows, tokens in ((groups, 1), (groups, 14), (turned, 10_000), (turned, 9)):
        told = rows_of_groups(world, rows, policy, reference=reference)
        assert same(gradient(loss_of(world, now, told, policy, tokens).total, now), whole)


def test_a_rows_weight_counts_like_repeating_its_group(world: World) -> None:
    for normaliser in ("sequence", "tokens", "max_length"):
        policy, groups = Policy(normaliser=normaliser, group_std=True), chosen(world)
        now = moved(world.student, 0.1)
        weighted = rows_of_groups(world, groups, policy, weights=[2.0, 1.0, 3.0])
        repeated = rows_of_groups(world, [groups[0]] * 2 + [groups[1]] + [groups[2]] * 3, policy)
        one, many = (gradient(loss_of(world, now, rows, policy).total, now) for rows in (weighted, repeated))
        assert same(one, many)


def test_the_maximal_length_counts_answers_that_are_not_learned(world: World) -> None:
    """So that an answer's gradient does not depend on whether another one was cut."""
    policy, groups = Policy(preset="dr_grpo"), chosen(world)
    all_nine = rows_of_groups(world, groups, policy)
    fewer = rows_of_groups(world, groups, policy, whole=18.0)
    one, half = (gradient(loss_of(world, world.student, rows, policy).total, world.student) for rows in (all_nine, fewer))
    assert same(one, 2 * half)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
def test_the_policy_is_the_distribution_that_is_sampled(ratio: Any, world: World) -> None:
    """At another temperature ratios of the first update are 1, the gap is 0, and the gradient is the tempered policy's."""
    policy = Policy(ratio=ratio)
    rows = rows_of_groups(world, chosen(world), policy, temperature=0.7)
    objective = PolicyGradient(policy, world.vocab, 0.7)
    found = torch.stack([objective(world.student, batch).total for batch in step_batches(rows, 10_000)]).sum()
    assert objective.ratios == pytest.approx((1.0, 1.0), abs=1e-9)
    plain = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logs_TV = F.log_softmax(world.logs(world.student, tuple(row.response)) / 0.7, dim=-1)
        factor = row.given[ADVANTAGE][0] * (len(row.response) if ratio == "sequence" else 1)
        plain = plain - factor * sum(logs_TV[t, v] for t, v in enumerate(row.response))
    assert same(gradient(found, world.student), gradient(plain, world.student))


def test_figures_are_those_of_plain_sums(world: World) -> None:
    policy, reference, now = Policy(beta=0.1, beta_kd=0.1), moved(world.student, 0.2, seed=8), moved(world.student, 0.1)
    groups = chosen(world)
    rows = rows_of_groups(world, groups, policy, reference=Live(reference))
    told = PolicyGradient(policy, world.vocab, reference=Live(reference)).judged(world.student, rows, 10_000)
    parts = loss_of(world, now, rows, policy).parts
    sums = dict.fromkeys(("entropy", "nll", "kl", "reverse_kl", "kl_exact"), 0.0)
    answers = [y for group in groups for y in group]
    for y in answers:
        with torch.no_grad():
            now_TV, ref_TV, old_TV = (world.logs(m, y) for m in (now, reference, world.student))
        for t, v in enumerate(y):
            sums["entropy"] -= float((now_TV[t].exp() * now_TV[t]).sum())
            sums["nll"] -= float(now_TV[t, v])
            sums["kl"] += float((ref_TV[t, v] - now_TV[t, v]).exp() - (ref_TV[t, v] - now_TV[t, v]) - 1)
            sums["reverse_kl"] += float(
                (now_TV[t].exp() * (now_TV[t] - torch.tensor(world.logp[y][t], dtype=torch.float64))).sum()
            )
            sums["kl_exact"] += float((old_TV[t].exp() * (old_TV[t] - ref_TV[t])).sum())
    count = sum(map(len, answers))
    for name in ("entropy", "nll", "kl", "reverse_kl"):
        assert parts[name].item() == pytest.approx(sums[name] / count, rel=1e-6), name
    assert told.figures["kl_exact"] == pytest.approx(sums["kl_exact"] / count, rel=1e-9)
    assert told.figures["gap"] < 1e-9
    assert all(REF in row.given for row in told.rows)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
def test_what_teacher_and_reference_rule_out_stays_finite(ratio: Any, world: World) -> None:
    policy = Policy(ratio=ratio, beta=0.1, beta_kd=0.1)
    barred = moved(world.student, 0.2)
    barred.lm_head = torch.nn.Linear(8, world.vocab + 2, dtype=torch.float64)
    barred.lm_head.bias.data[2] = -math.inf
    rows = rows_of_groups(world, chosen(world), policy, reference=Live(barred))
    objective = PolicyGradient(policy, world.vocab, 1.0, Live(barred))
    assert any(2 in row.response for row in rows)
    loss = torch.stack([objective(world.student, batch).total for batch in step_batches(rows, 10_000)]).sum()
    assert bool(torch.isfinite(gradient(loss, world.student)).all())


# --- presets ---


def test_presets_are_the_table() -> None:
    """Ratio, std, normaliser, ε_high, β, cut answers, redraws, cap."""
    table = {
        "recommended": ("token", False, "tokens", 0.28, 0.0, "masked", 0, 2.0),
        "paper": ("sequence", True, "sequence", 0.2, 0.04, "counted", 0, 0.0),
        "deepseek": ("token", True, "sequence", 0.2, 0.04, "counted", 0, 0.0),
        "dr_grpo": ("token", False, "max_length", 0.2, 0.0, "counted", 0, 0.0),
        "dapo": ("token", True, "tokens", 0.28, 0.0, "masked", 3, 0.0),
    }
    fields = ("ratio", "group_std", "normaliser", "eps_high", "beta", "cut", "redraws", "sampler_cap")
    assert {name: tuple(getattr(Policy.model_validate(name), field) for field in fields) for name in PRESETS} == table


def test_a_field_changes_a_preset_and_a_spec_builds_it_again() -> None:
    policy = Policy.model_validate({"preset": "paper", "beta": 0.0})
    assert (policy.preset, policy.beta, policy.ratio) == ("paper", 0.0, "sequence")
    assert Policy.model_validate(policy.model_dump(mode="json")) == policy
    assert Policy() == Policy.model_validate("recommended") == Policy.model_validate({})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('"papre"', "papre"),
        ("{ preset = 'dapo', eps_low = 1.5 }", "eps_low"),
        ("{ presett = 'dapo' }", "presett"),
        ("{ preset = 3 }", "preset"),
        ("3", "policy"),
    ],
)
def test_a_misspelt_policy_is_refused_at_its_place(value: str, told: str) -> None:
    import tomllib

    stage = f'[[stage]]\nname = "it"\nkind = "grpo"\nmodel = "path:/x"\nrewards = []\npolicy = {value}'
    text = f'name = "x"\ndata = {{ kind = "dolly" }}\n{stage}'
    with pytest.raises(UserError) as error:
        parse_recipe(tomllib.loads(text))
    assert told in str(error.value)
    assert "it.policy" in str(error.value)
    assert "it.rewards" in str(error.value)
