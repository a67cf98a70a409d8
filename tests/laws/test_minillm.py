"""MiniLLM's estimator against the enumeration of every answer over a tiny vocabulary and length, in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from statistics import fmean, pvariance
from typing import Any

import numpy as np
import pytest
import torch
from enumerated import PROMPT, Answer, World, gradient, moved, rows_of, same
from torch import Tensor

from potstill.data.batches import SAMPLED, SHARE, StepRow, step_batches
from potstill.losses import minillm
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.head import Loss
from potstill.losses.minillm import ADVANTAGE, Estimator, MiniLLM, judged
from potstill.teachers.signals import Live

EXACT = {"alpha": 0.0, "importance": "sequence", "gamma": 1.0, "length_norm": False, "whiten": False}
EXACT |= {"reward_clip": 0.0, "clip": 0.0}


def loss_of(world: World, model: Any, rows: Sequence[StepRow], estimator: Estimator, tokens: int = 10_000) -> Loss:
    objective = MiniLLM(Live(world.teacher), estimator, world.vocab)
    losses = [objective(model, batch) for batch in step_batches(rows, tokens)]
    parts = {name: torch.stack([loss.parts[name] for loss in losses]).sum() for name in losses[0].parts}
    return Loss(torch.stack([loss.total for loss in losses]).sum(), parts)


Change = Callable[[StepRow], StepRow]


def expected_gradient(world: World, estimator: Estimator, change: Change = lambda row: row) -> Tensor:
    """Σ over all answers of their probability times the gradient of their loss, summed over tokens.

    Args:
        change: what becomes of a row before it is judged.
    """
    sampled = world.sampler(estimator.alpha)
    rows = [change(row) for row in rows_of(world.answers, sampled)]
    told = judged(world.student, Live(world.teacher), rows, estimator, world.vocab, 10_000).rows
    counted = [
        replace(row, given={**row.given, SHARE: np.full(len(row.response), math.exp(sum(sampled[y])))})
        for y, row in zip(world.answers, told, strict=True)
    ]
    return gradient(loss_of(world, world.student, counted, estimator).total, world.student)


def exact_gradient(world: World) -> Tensor:
    """Of KL(q ‖ p) between whole answers, each enumerated."""
    kl = torch.zeros((), dtype=torch.float64)
    for y in world.answers:
        logq = sum(world.logs(world.student, y)[t, v] for t, v in enumerate(y))
        logp = sum(world.logp[y][t][v] for t, v in enumerate(y))
        kl = kl + logq.exp() * (logq - logp)  # pyright: ignore[reportAttributeAccessIssue]
    return gradient(kl, world.student)


@pytest.fixture(scope="module")
def world() -> World:
    found = World(vocab=4, longest=3, padded=2)
    assert len(found.answers) == 1 + 3 + 9 * 4
    for alpha in (0.0, 0.3):
        total = sum(math.exp(sum(logs)) for logs in found.sampler(alpha).values())
        assert total == pytest.approx(1, abs=1e-12), "the enumeration is complete"
    return found


@pytest.fixture(scope="module")
def exact(world: World) -> Tensor:
    return exact_gradient(world)


UNBIASED = {
    "the student alone": {},
    "the student alone, weights of tokens": {"importance": "token"},
    "a teacher in the sampler": {"alpha": 0.3},
    "a sampler that is mostly the teacher": {"alpha": 0.9},
    "single step not weighted, as alpha is 0": {"single_step": "unweighted"},
    "returns with their own reward, no single step": {"returns": "from", "single_step": "off", "alpha": 0.3},
    "a baseline of rewards so far out that none is clipped": {"reward_clip": 1e4, "alpha": 0.3},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_without_its_biased_parts_the_gradient_is_that_of_the_reverse_kl(name: str, world: World, exact: Tensor) -> None:
    assert same(expected_gradient(world, Estimator.model_validate(EXACT | UNBIASED[name])), exact)


BIASED = {
    "weights of tokens": {"alpha": 0.3, "importance": "token"},
    "no weights": {"alpha": 0.3, "importance": "off"},
    "a discount": {"gamma": 0.9},
    "length norm": {"length_norm": True},
    "clipped rewards": {"reward_clip": 0.1},
    "scaled rewards": {"reward_scaling": 0.5},
    "the authors' returns beside the single step": {"returns": "from"},
    "no single step": {"single_step": "off"},
    "single step not weighted": {"alpha": 0.3, "single_step": "unweighted"},
    "clipped weights": {"alpha": 0.3, "importance": "token", "clip": 0.1},
}


@pytest.mark.parametrize("name", BIASED)
def test_each_biased_part_is_seen_to_be_one(name: str, world: World, exact: Tensor) -> None:
    """So that the law above would notice it."""
    found = expected_gradient(world, Estimator.model_validate(EXACT | BIASED[name]))
    assert (found - exact).norm() > 1e-3 * exact.norm()


def test_the_law_rejects_forgotten_weights(world: World, exact: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minillm, "importance_weights", lambda logq_R, sampled_R: np.ones_like(logq_R))
    assert not same(expected_gradient(world, Estimator.model_validate(EXACT | {"alpha": 0.3})), exact)


def test_the_law_rejects_the_papers_product_that_ends_at_the_token(
    world: World, exact: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation 5 as printed: what comes after the token is the sampler's, not the student's."""
    own = minillm.returns_after
    monkeypatch.setattr(minillm, "returns_after", lambda reward, weight, gamma: own(reward, np.ones_like(weight), gamma))
    assert not same(expected_gradient(world, Estimator.model_validate(EXACT | {"alpha": 0.3})), exact)


WRONG_ROWS = {
    "the end masked, as where pad = eos": lambda row: replace(row, response=row.response[:-1] or row.response),
    "the prompt's last token learned": lambda row: replace(
        row, prompt=row.prompt[:-1], response=(row.prompt[-1], *row.response)
    ),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_the_law_rejects_a_wrong_mask(name: str, world: World, exact: Tensor) -> None:
    def wrong(row: StepRow) -> StepRow:
        found = WRONG_ROWS[name](row)
        return replace(found, given={SAMPLED: np.resize(row.given[SAMPLED], len(found.response))})

    assert not same(expected_gradient(world, Estimator.model_validate(EXACT), wrong), exact)


@pytest.mark.parametrize("kind", ["weighted", "unweighted"])
def test_the_single_step_is_the_sum_of_kl_over_the_vocabulary(kind: Any, world: World) -> None:
    """Value and gradient, of answers of all lengths, from a plain double loop."""
    estimator = Estimator(alpha=0.3, single_step=kind)
    sampled = world.sampler(0.3)
    for y in world.answers[::7]:
        rows = judged(world.student, Live(world.teacher), rows_of([y], sampled), estimator, world.vocab, 10_000).rows
        alone = [replace(row, given={**row.given, ADVANTAGE: np.zeros(len(y))}) for row in rows]
        loss, logq = loss_of(world, world.student, alone, estimator), world.logs(world.student, y)
        wanted, plain = torch.zeros((), dtype=torch.float64), 0.0
        for t, token in enumerate(y):
            for v in range(world.vocab):
                term = logq[t, v].exp() * (logq[t, v] - world.logp[y][t][v])
                weight = math.exp(logq[t, token].item() - sampled[y][t]) if kind == "weighted" else 1.0
                wanted, plain = wanted + weight * term, plain + term.item()
        assert same(loss.total.detach(), wanted.detach())
        assert loss.parts["reverse_kl"].item() == pytest.approx(plain, rel=1e-10)
        assert same(gradient(loss.total, world.student), gradient(wanted, world.student))


# --- the estimator as written, in loops ---


def plain_loss(world: World, now: Any, step: Sequence[Answer], e: Estimator) -> Tensor:
    """A step's loss, summed over its tokens, from the formulas of the docs page and Python's numbers."""
    sampled = world.sampler(e.alpha)
    every: list[tuple[int, int, float, float]] = []  # answer, token, weight, advantage
    for n, y in enumerate(step):
        logq, T = world.logq[y], len(y)
        w = [math.exp(logq[t][y[t]] - sampled[y][t]) if e.importance != "off" else 1.0 for t in range(T)]
        r = [(world.logp[y][t][y[t]] - logq[t][y[t]]) / e.reward_scaling for t in range(T)]
        if e.reward_clip:
            r = [max(-e.reward_clip, min(e.reward_clip, x)) for x in r]
        for t in range(T):
            first = t if e.returns == "from" else t + 1
            total = 0.0
            for i in range(first, T):
                carried = math.prod(w[j] for j in range(t + 1, i + 1)) if e.importance == "sequence" else 1.0
                total += e.gamma ** (i - first) * r[i] * carried
            if e.length_norm and first < T:
                total /= T - first
            every.append((n, t, math.prod(w[: t + 1]) if e.importance == "sequence" else w[t], total))
    if e.whiten:
        all_of_them = [advantage for *_, advantage in every]
        mean, spread = fmean(all_of_them), math.sqrt(pvariance(all_of_them) + 1e-8)
        every = [(n, t, w, (advantage - mean) / spread) for n, t, w, advantage in every]
    loss = torch.zeros((), dtype=torch.float64)
    logs = [(world.logs(now, y), torch.tensor(world.logq[y], dtype=torch.float64)) for y in step]
    for n, t, weight, advantage in every:
        new, old = logs[n][0][t], logs[n][1][t]
        token = step[n][t]
        ratio = (new[token] - old[token]).exp() * weight
        gain = ratio * advantage
        if e.clip and (other := max(1 - e.clip, min(1 + e.clip, ratio.item())) * advantage) < gain.item():
            gain = torch.tensor(other, dtype=torch.float64)  # a constant: a clipped token learns nothing
        loss = loss - gain
        if e.single_step != "off":
            p = torch.tensor(world.logp[step[n]][t], dtype=torch.float64)
            kl = (new.exp() * (new - p)).sum()
            loss = loss + (kl * weight if e.single_step == "weighted" else kl)
    return loss


WRITTEN = BIASED | {
    "as the paper has it": {**Estimator().model_dump(), "gamma": 1.0},
    "the defaults": Estimator().model_dump(),
    "as the authors' code has it": {**Estimator().model_dump(), "returns": "from", "single_step": "unweighted"},
    "whitening": {"whiten": True},
    "everything wild": {"alpha": 0.3, "whiten": True, "gamma": 0.7, "length_norm": True, "returns": "from", "clip": 0.3},
}


@pytest.fixture(scope="module")
def small() -> World:
    return World(vocab=3, longest=2)


def agrees(small: World, estimator: Estimator, updates: float) -> bool:
    """Every step of two answers: loss and gradient, and so their expectation, are those of the plain loops."""
    now = moved(small.student, updates) if updates else small.student
    for step in combinations_with_replacement(small.answers, 2):
        rows = rows_of(step, small.sampler(estimator.alpha))
        told = judged(small.student, Live(small.teacher), rows, estimator, small.vocab, 10_000).rows
        found, plain = loss_of(small, now, told, estimator).total, plain_loss(small, now, step, estimator)
        if not same(found.detach(), plain.detach()) or not same(gradient(found, now), gradient(plain, now)):
            return False
    return True


@pytest.mark.parametrize("name", WRITTEN)
def test_the_estimator_is_the_one_written(name: str, small: World) -> None:
    assert agrees(small, Estimator.model_validate(EXACT | WRITTEN[name]), updates=0.1)


def test_so_it_is_in_the_first_update(small: World) -> None:
    assert agrees(small, Estimator(), updates=0.0)


def from_the_start(reward_R: np.ndarray, weight_R: np.ndarray, gamma: float) -> np.ndarray:
    """γ counted from the answer's beginning."""
    discounted = reward_R * gamma ** np.arange(len(reward_R))
    return np.append(discounted[::-1].cumsum()[::-1][1:], 0.0)


def attached(logq_B: Tensor, old_B: Tensor, weight_B: Tensor, advantage_B: Tensor, clip: Any) -> Any:
    """An advantage that gradients flow through."""
    gain_B = (logq_B - old_B).exp() * weight_B * (advantage_B - (logq_B - logq_B.detach()))
    return gain_B, torch.zeros_like(gain_B, dtype=torch.bool)


def without_ratio(logq_B: Tensor, old_B: Tensor, weight_B: Tensor, advantage_B: Tensor, clip: Any) -> Any:
    """As if each update had samples of its own."""
    gain_B = (logq_B - logq_B.detach()).exp() * weight_B * advantage_B
    return gain_B, torch.zeros_like(gain_B, dtype=torch.bool)


WRONG = {
    "no weight": ({"alpha": 0.3}, "importance_weights", lambda q, s: np.ones_like(q)),
    "the sampler's inverse": ({"alpha": 0.3}, "importance_weights", lambda q, s: np.exp(s - q)),
    "discount from the start": ({"gamma": 0.9, "returns": "after"}, "returns_after", from_the_start),
    "advantage attached": ({"length_norm": True}, "surrogate", attached),
    "no ratio": ({}, "surrogate", without_ratio),
    "every answer whitened alone": (
        {"whiten": True},
        "whitened",
        lambda given, weights: [(a - a.mean()) / np.sqrt(a.var() + 1e-8) for a in given],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_oracle_rejects_wrong_forms(name: str, small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, function, wrong = WRONG[name]
    estimator = Estimator.model_validate(EXACT | fields)
    monkeypatch.setattr(minillm, function, wrong)
    assert not agrees(small, estimator, updates=0.1)


# --- how a step is cut and divided ---


def samples(count: int = 9, weighted: bool = False) -> tuple[World, list[StepRow]]:
    world = World(vocab=5, longest=3)
    chosen = world.answers[:: len(world.answers) // count][:count]
    rows = rows_of(chosen, world.sampler(0.2))
    return world, [replace(row, weight=1.0 + i % 3) for i, row in enumerate(rows)] if weighted else rows


def step_gradient(world: World, rows: list[StepRow], tokens: int, alone: bool = False) -> Tensor:
    """Of a later update, its micro-batches of so many tokens; `alone`: each judged without the others."""
    estimator, now, signal = Estimator(alpha=0.2), moved(world.student, 0.1), Live(world.teacher)
    if alone:
        told = [t for row in rows for t in judged(world.student, signal, [row], estimator, world.vocab, tokens).rows]
    else:
        told = judged(world.student, signal, rows, estimator, world.vocab, tokens).rows
    return gradient(loss_of(world, now, told, estimator, tokens).total, now)


def test_how_a_step_is_cut_changes_nothing() -> None:
    world, rows = samples()
    whole = step_gradient(world, rows, 10_000)
    assert all(same(step_gradient(world, rows, tokens), whole) for tokens in (1, 9, 14))
    assert not same(step_gradient(world, rows, 9, alone=True), whole), "whitening each micro-batch by itself"


def test_a_rows_weight_counts_like_repeating_it() -> None:
    world, rows = samples(weighted=True)
    repeated = [replace(row, weight=1.0) for row in rows for _ in range(int(row.weight))]
    assert same(step_gradient(world, rows, 10_000), step_gradient(world, repeated, 10_000))
    assert not same(
        step_gradient(world, [replace(row, weight=1.0) for row in rows], 10_000), step_gradient(world, repeated, 99)
    )


def test_dividing_by_the_tokens_of_a_step_prefers_short_answers(world: World, exact: Tensor) -> None:
    """The sum over a step is unbiased; divided by its own count of tokens, here of one answer a step, it is another objective.

    With more answers in a step the count varies less, and with it the difference.
    """
    estimator = Estimator.model_validate(EXACT)

    def share(row: StepRow) -> StepRow:
        return replace(row, weight=1 / len(row.response))

    divided = expected_gradient(world, estimator, share)
    mean_length = sum(math.exp(sum(logs)) * len(y) for y, logs in world.sampler(0.0).items())
    assert (divided * mean_length - exact).norm() > 0.01 * exact.norm()


# --- plain text beside it, and what is not finite ---


def test_plain_text_is_cross_entropy_times_its_share() -> None:
    world, rows = samples()
    text = [replace(row, sampled=False, given={SHARE: np.full(len(row.response), 2.5)}) for row in rows]
    (batch,) = step_batches([replace(row, given={}) for row in text], 10_000)
    wanted = CrossEntropy()(world.student, batch)
    found = loss_of(world, world.student, text, Estimator())
    assert same(found.total.detach(), 2.5 * wanted.total.detach())
    assert same(found.parts["ce"], wanted.parts["ce"])
    assert same(gradient(found.total, world.student), 2.5 * gradient(wanted.total, world.student))


@pytest.mark.parametrize("fields", [{}, EXACT], ids=["defaults", "exact"])
def test_what_the_teacher_rules_out_stays_finite(fields: dict[str, Any]) -> None:
    world, rows = samples()
    world.teacher.lm_head = torch.nn.Linear(16, world.vocab, dtype=torch.float64)
    world.teacher.lm_head.bias.data[2] = -math.inf
    estimator = Estimator.model_validate(fields)
    told = judged(world.student, Live(world.teacher), rows, estimator, world.vocab, 10_000)
    loss = loss_of(world, world.student, told.rows, estimator)
    assert any(2 in row.response for row in rows)
    assert all(math.isfinite(value) for value in told.figures.values())
    assert bool(torch.isfinite(gradient(loss.total, world.student)).all())


def test_a_student_that_ran_away_stays_finite() -> None:
    """A token 800 nats likelier than when it was sampled: exp overflows, and its clipped gradient would be 0 · ∞."""
    old_B, now_B = torch.full((2,), -800.0), torch.zeros(2, requires_grad=True)
    gain_B, clipped_B = minillm.surrogate(now_B, old_B, torch.ones(2), torch.tensor([1.0, -1.0]), 0.2)
    gain_B.sum().backward()
    assert bool(torch.isfinite(gain_B).all())
    assert now_B.grad is not None
    assert bool(torch.isfinite(now_B.grad).all())
    assert clipped_B.tolist() == [True, False]


def test_figures_are_those_of_a_hand_count() -> None:
    """Two answers of one token each, sampled with half and with a quarter of the student's probability."""
    world = World(vocab=3, longest=1)
    logq = {y: world.logq[y][0][y[0]] for y in world.answers}
    rows = [
        StepRow(PROMPT, y, sampled=True, given={SAMPLED: np.array([logq[y] - math.log(by)])})
        for y, by in zip(world.answers[:2], (2.0, 4.0), strict=True)
    ]
    figures = judged(world.student, Live(world.teacher), rows, Estimator(alpha=0.0), world.vocab, 100).figures
    gaps = [world.logp[y][0][y[0]] - logq[y] for y in world.answers[:2]]
    assert figures["reward"] == pytest.approx(sum(gaps) / 2)
    assert figures["importance"] == pytest.approx(3.0)
    assert figures["effective_share"] == pytest.approx(36 / (2 * 20))
    assert figures["gap"] == pytest.approx((math.log(2) + math.log(4)) / 2)
