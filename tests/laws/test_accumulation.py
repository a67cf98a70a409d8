"""What a step minimises does not depend on how it is cut, and SFT and distillation see the same rows."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_parts import chat_tokenizer, rows, tiny_model
from torch import Tensor

from potstill.core.types import Example
from potstill.data.batches import (
    LEAST_SAVED,
    MOST_WHOLE,
    Batch,
    Order,
    StepRow,
    group_tokens,
    micro_batches,
    pack,
    prompts_of,
    step_batches,
)
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs, weighted_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.divergences.reverse_kl import ReverseKL
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.distillation import Distillation
from potstill.losses.head import CHUNK_BYTES, Loss
from potstill.losses.objective import Objective
from potstill.teachers.signals import Live
from potstill.train.loop import Optim, fit, optimizer_for
from potstill.train.work import Work

PADDED = 9  # rows of the embedding that no token uses


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: Any) -> TokenStore:
    examples = [Example(str(i), row["instruction"], row["response"], row["context"]) for i, row in enumerate(rows(21))]
    pairs, counts = instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts()), Counts()
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, counts, "here")


def model_of(tokenizer: Any, seed: int = 0, **more: Any) -> Any:
    return tiny_model("qwen2", len(tokenizer) + PADDED, seed=seed, **more)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(model: Any, store: TokenStore, objective: Objective, folder: Path, **optim: Any) -> tuple[dict[str, Tensor], Any]:
    """Final weights and the figures of each step."""
    settings = Optim(**({"lr": 1e-2, "epochs": 2, "batch_size": 8, "precision": "fp32"} | optim))
    fit(model, store, objective, settings, Work(folder, "here"), seed=5)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, lines(folder)


def indifferent_to_cutting(store: TokenStore, tokenizer: Any, objective: Objective, folder: Path) -> bool:
    runs = [
        trained(model_of(tokenizer).double(), store, objective, folder / str(size), micro_batch_tokens=size)
        for size in (1, 150, 10_000)
    ]
    (weights, figures), *others = runs
    same = True
    for other_weights, other_figures in others:
        same &= all(torch.allclose(weights[name], other_weights[name], rtol=1e-7, atol=1e-9) for name in weights)
        for a, b in zip(figures, other_figures, strict=True):
            same &= math.isclose(a["loss"], b["loss"], rel_tol=1e-9)
            same &= math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-9)
    return same


@pytest.mark.parametrize("name", ["sft", "kd"])
def test_micro_batches_change_memory_and_not_the_result(name: str, store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    teacher = model_of(tokenizer, seed=9, width=64).double()
    objective = CrossEntropy() if name == "sft" else Distillation(Live(teacher), ForwardKL(), 0.5, 2.0, len(tokenizer))
    assert indifferent_to_cutting(store, tokenizer, objective, tmp_path)


def test_the_law_rejects_means_of_micro_batches(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    class MeanOfMeans(CrossEntropy):
        def __call__(self, model: Any, batch: Batch) -> Loss:
            return Loss(super().__call__(model, batch).total / len(batch.target_N))

    assert not indifferent_to_cutting(store, tokenizer, MeanOfMeans(), tmp_path)


def test_a_step_is_divided_by_its_response_tokens(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """The first step's figures, from transformers' logits and one softmax."""
    model = model_of(tokenizer).double()
    chosen = Order(len(store), 8, 5).step(0)
    losses = []
    for row in chosen:
        prompt, response = (ids.astype("int64").tolist() for ids in store[row])
        logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits_TV, torch.tensor(response), reduction="none"))
    mean = torch.cat(losses).mean()
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    _, figures = trained(model_of(tokenizer).double(), store, CrossEntropy(), tmp_path, steps=1)
    assert figures[0]["loss"] == pytest.approx(mean.item(), rel=1e-10)
    assert figures[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-10)


@pytest.mark.parametrize("name", ["sft", "kd"])
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_products_give_every_weight_its_gradient(name: str, tied: bool, store: TokenStore, tokenizer: Any) -> None:
    """Chunks of three tokens under autocast against one of all in float32, matrix by matrix."""
    batch = pack([store[i] for i in range(6)])
    model = model_of(tokenizer, tie_word_embeddings=tied)
    teacher = model_of(tokenizer, seed=9, width=64)
    objective = CrossEntropy() if name == "sft" else Distillation(Live(teacher), ForwardKL(), 0.5, 1.0, len(tokenizer))
    found = []
    for enabled, chunk in ((False, CHUNK_BYTES), (True, 3 * 4 * (len(tokenizer) + PADDED))):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            patch.setattr("potstill.losses.head.chunk_bytes", lambda _, chunk=chunk: chunk)
            loss = objective(model, batch)
        loss.total.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32
        assert (found[1][name] - exact).norm() < 0.05 * exact.norm(), name


def test_losses_of_two_batches_can_be_summed_before_the_way_back(store: TokenStore, tokenizer: Any) -> None:
    """As in a loop of one's own; the matrix that embedding and head share gathers what both batches say."""
    batches, found = [pack([store[0], store[1]]), pack([store[2]])], []
    for together in (False, True):
        model = model_of(tokenizer).double()
        losses = [CrossEntropy()(model, batch).total for batch in batches]
        for loss in [losses[0] + losses[1]] if together else losses:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def heavy_rows_are_repeated_rows(pairs: list[Any], make: Any, tokenizer: Any, folder: Path, weigh: Any = lambda w: w) -> bool:
    """A row of weight 3 is three of it; one of weight 0.5, beside which all others are doubled, half of one."""
    weights = [1, 3, 0.5, 1, 2]
    weighted = [(*pair, weigh(weight)) for pair, weight in zip(pairs, weights, strict=True)]
    repeated = [pair for pair, weight in zip(pairs, weights, strict=True) for _ in range(int(2 * weight))]
    figures = []
    for name, kept in (("weighted", weighted), ("repeated", repeated)):
        store = TokenStore.write(folder / name, kept, Counts(), "here")
        model = model_of(tokenizer).double()
        run = trained(model, store, make(), folder / f"{name}-run", steps=1, batch_size=len(kept), micro_batch_tokens=100)
        figures.append(run[1][0])
    return all(math.isclose(figures[0][name], figures[1][name], rel_tol=1e-7) for name in ("loss", "grad_norm", "ce"))


@pytest.mark.parametrize("name", ["sft", "kd"])
def test_a_rows_weight_counts_like_repeating_it(name: str, store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    teacher = model_of(tokenizer, seed=9, width=64).double()

    def make() -> Objective:
        return CrossEntropy() if name == "sft" else Distillation(Live(teacher), ForwardKL(), 0.5, 1.0, len(tokenizer))

    pairs = [(a.tolist(), b.tolist()) for a, b in (store[i] for i in range(5))]
    assert heavy_rows_are_repeated_rows(pairs, make, tokenizer, tmp_path)
    assert not heavy_rows_are_repeated_rows(pairs, make, tokenizer, tmp_path / "ignored", weigh=lambda weight: 1.0)


def test_rows_of_no_weight_are_left_out_and_counted(tokenizer: Any) -> None:
    examples = [Example("a", "Say oak.", "oak"), Example("b", "Say peat.", "peat", weight=0.0)]
    counts = Counts()
    assert len(list(weighted_pairs(examples, Renderer(tokenizer, Prompts()), counts))) == 1
    assert counts.dropped == {"weight 0": 1}


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_cross_entropy_beside_a_divergence_is_cross_entropy(T: float, store: TokenStore, tokenizer: Any) -> None:
    """At T = 1 it comes from the divergence's own softmax, though that sees no padded logits."""
    batch = pack([store[i] for i in range(6)])
    teacher, student = (model_of(tokenizer, seed=seed).double() for seed in (9, 1))
    found = []
    for objective in (CrossEntropy(), Distillation(Live(teacher), ForwardKL(), 0.0, T, len(tokenizer))):
        student.zero_grad()
        loss = objective(student, batch)
        loss.total.backward()
        found.append((loss.total.detach(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_distilling_with_ratio_0_is_fine_tuning_bit_for_bit(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    teacher = model_of(tokenizer, seed=9)
    kd = Distillation(Live(teacher), ForwardKL(), 0.0, 2.0, len(tokenizer))
    weights, figures = trained(model_of(tokenizer), store, CrossEntropy(), tmp_path / "sft")
    other, other_figures = trained(model_of(tokenizer), store, kd, tmp_path / "kd")
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert [a["loss"] for a in figures] == [b["loss"] for b in other_figures]


def test_fine_tuning_and_distillation_see_the_same_rows_and_tokens(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    class Seen:
        def __init__(self, inner: Objective) -> None:
            self.inner, self.ids = inner, []

        def __call__(self, model: Any, batch: Batch) -> Loss:
            self.ids.append(batch.ids_T.clone())
            return self.inner(model, batch)

    teacher = model_of(tokenizer, seed=9)
    sft, kd = Seen(CrossEntropy()), Seen(Distillation(Live(teacher), ReverseKL(), 0.9, 1.0, len(tokenizer)))
    optim, totals = Optim(epochs=1.5, batch_size=8, micro_batch_tokens=200), []
    for name, objective in (("sft", sft), ("kd", kd)):
        totals.append(fit(model_of(tokenizer), store, objective, optim, Work(tmp_path / name, name), seed=3))
    assert all(torch.equal(a, b) for a, b in zip(sft.ids, kd.ids, strict=True))
    for key in ("steps", "rows", "response_tokens", "tokens", "epochs"):
        assert getattr(totals[0], key) == getattr(totals[1], key)
    assert totals[0].rows == round(21 * 1.5)
    assert totals[0].epochs == pytest.approx(totals[0].rows / 21)


def taken(order: Any, steps: int, last: int | None) -> list[int]:
    return [row for step in range(steps) for row in order.step(step, last)]


def once_per_epoch(order: Any, rows: int, steps: int, last: int) -> bool:
    seen = taken(order, steps, last)
    whole = all(sorted(seen[n : n + rows]) == list(range(rows)) for n in range(0, last - rows + 1, rows))
    rest = seen[last - last % rows :]
    return len(seen) == last and whole and len(set(rest)) == len(rest)


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 40),
    epochs=st.floats(0.01, 4),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_seen_once_per_epoch(rows: int, batch: int, epochs: float, seed: int) -> None:
    last = max(1, round(rows * epochs))
    steps = Optim(epochs=epochs, batch_size=batch).total_steps(rows)
    order = Order(rows, batch, seed)
    assert steps == math.ceil(last / batch)
    assert once_per_epoch(order, rows, steps, last)
    assert all(order.step(step, last) for step in range(steps)), "no step is empty"
    if steps > 1:  # any step can be asked for by itself, which resuming rests on
        assert Order(rows, batch, seed).step(steps - 1, last) == order.step(steps - 1, last)


def test_the_law_rejects_drawing_with_replacement() -> None:
    class Dice(Order):
        def _epoch(self, epoch: int) -> Any:
            return torch.randint(self.rows, (self.rows,), generator=torch.Generator().manual_seed(epoch)).numpy()

    assert not once_per_epoch(Dice(20, 4, 0), 20, 10, 40)


def test_orders_differ_by_epoch_and_by_seed() -> None:
    first, second = taken(Order(50, 50, 1), 2, None)[:50], taken(Order(50, 50, 1), 2, None)[50:]
    assert first != second
    assert first != taken(Order(50, 50, 2), 1, None)


def test_less_than_a_row_of_epochs_is_still_a_row(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    summary = fit(model_of(tokenizer), store, CrossEntropy(), Optim(epochs=0.001, batch_size=8), Work(tmp_path, "here"), seed=0)
    assert (summary.steps, summary.rows) == (1, 1)


@given(size=st.integers(1, 2000), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_micro_batches_hold_each_row_once_within_their_bound(size: int, seed: int) -> None:
    lengths = torch.randint(2, 90, (25,), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = list(micro_batches(lengths, size))
    assert Counter(i for group in groups for i in group) == Counter(range(25))
    assert all(sum(lengths[i] for i in group) <= size or len(group) == 1 for group in groups)
    assert [lengths[i] for group in groups for i in group] == sorted(lengths)


def by_length(lengths: list[int], most: int) -> list[list[int]]:
    """Where no prompt is shared."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and sum(lengths[j] for j in groups[-1]) + lengths[i] <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@given(size=st.integers(1, 600), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_rows_of_one_prompt_stay_together_and_count_it_once(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = [list(map(int, random.integers(0, 9, random.integers(1, 60)))) for _ in range(6)]
    pairs = [(kinds[random.integers(6)], [1] * int(random.integers(0, 40))) for _ in range(25)]
    lengths, prompts = [len(p) + len(r) for p, r in pairs], prompts_of(pairs)
    groups = list(micro_batches(lengths, size, prompts))
    assert sorted(i for group in groups for i in group) == list(range(25))
    laid = [pack([pairs[i] for i in group], None, [prompts[i] for i in group]) for group in groups]
    for group, batch in zip(groups, laid, strict=True):
        shared = {id(pairs[i][0]): len(pairs[i][0]) for i in group if prompts[i] is not None}
        told = sum(shared.values()) + sum(lengths[i] - (len(pairs[i][0]) if prompts[i] is not None else 0) for i in group)
        assert len(batch.ids_T) == told
        assert len(group) == 1 or (told <= size and sum(batch.lengths) <= MOST_WHOLE * size)
        assert list(batch.lengths) == sorted(batch.lengths)
    for prompt in {*prompts} - {None}:
        rows = [i for i in range(25) if prompts[i] == prompt]
        length = len(pairs[rows[0]][0])
        whole = sum(lengths[i] for i in rows)
        assert (len(rows) - 1) * length >= LEAST_SAVED * whole
        if whole - (len(rows) - 1) * length <= size and whole <= MOST_WHOLE * size:
            assert sum(any(i in rows for i in group) for group in groups) == 1
    assert list(micro_batches(lengths, size)) == list(micro_batches(lengths, size, [None] * 25)) == by_length(lengths, size)


@given(prompt=st.integers(1, 60), response=st.integers(0, 60), rows=st.integers(1, 12), size=st.integers(1, 600))
@settings(max_examples=60, deadline=None)
def test_a_group_is_reckoned_as_it_is_read(prompt: int, response: int, rows: int, size: int) -> None:
    step = [StepRow([7] * prompt, [1] * response, sampled=True) for _ in range(rows)]
    read = sum(len(batch.ids_T) for batch in step_batches(step, size))
    assert group_tokens(prompt, response, rows, size) == read


def test_where_no_prompt_is_shared_nothing_changes() -> None:
    """Nor where a prompt is so short that reading it once saves next to nothing."""
    step = [StepRow([7, i, *range(i)], [1] * (9 - i)) for i in range(6)] + [StepRow([3], [1] * 20) for _ in range(6)]
    for batch in step_batches(step, 60):
        pairs = [(ids[: len(ids) - r], ids[len(ids) - r :]) for ids, r in zip(rows_in(batch), batch.responses, strict=True)]
        assert batch.shared is None
        plain = pack(pairs)
        for name in ("ids_T", "position_T", "place_N", "target_N", "row_N"):
            assert torch.equal(getattr(batch, name), getattr(plain, name))


def rows_in(batch: Batch) -> list[list[int]]:
    return [ids.tolist() for ids in batch.whole_ids().split(batch.lengths)]


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    optim = Optim(lr=1e-3, warmup=0.1)
    rates = [optim.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-3 * (n + 1) / 11 for n in range(10)])
    assert rates[10] == max(rates) == 1e-3
    assert rates[55] == pytest.approx(5e-4)
    assert all(a > b > 0 for a, b in pairwise(rates[10:]))
    assert rates[99] == pytest.approx(1e-3 * 0.5 * (1 - math.cos(math.pi / 90)))
    assert {Optim(lr=1e-3, schedule="constant").lr_at(step, 100) for step in range(100)} == {1e-3}
    assert Optim(lr=1e-3, warmup=0.5).lr_at(0, 1) > 0
    assert Optim(lr=1e-3).lr_at(0, 1) == 1e-3


def test_the_log_keeps_the_schedule(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    optim = {"lr": 1e-3, "warmup": 0.5, "batch_size": 5}
    _, figures = trained(model_of(tokenizer), store, CrossEntropy(), tmp_path, **optim)
    assert [line["lr"] for line in figures] == [Optim(**optim).lr_at(step, 9) for step in range(9)]
    assert [line["epoch"] for line in figures] == pytest.approx([min(5 * (n + 1), 42) / 21 for n in range(9)])


def test_weight_decay_shrinks_matrices_and_spares_vectors(tokenizer: Any) -> None:
    model = model_of(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_for(model, Optim(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        wanted = before[name] * (1 - 0.1 * 0.5) if parameter.ndim >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), wanted)
    assert {p.ndim for p in model.parameters()} == {1, 2}


class Table(torch.nn.Module):
    """The smallest language model: the next token's logits are looked up by the last one."""

    def __init__(self, logits_VV: list[list[float]]) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.base_model = Table.Body(logits_VV)
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        width = len(logits_VV[0])
        self.head = torch.nn.Linear(width, width, bias=False, dtype=torch.float64)
        torch.nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> Any:
        return self.head

    def get_input_embeddings(self) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(weight=self.base_model.logits_VV, padding_idx=None)

    class Body(torch.nn.Module):
        def __init__(self, logits_VV: list[list[float]]) -> None:
            super().__init__()
            self.logits_VV = torch.nn.Parameter(torch.tensor(logits_VV, dtype=torch.float64))

        def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, **packing: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(last_hidden_state=self.logits_VV[input_ids])


def logs(*weights: float) -> list[float]:
    return [math.log(weight) for weight in weights]


FLAT = [0.0, 0.0, 0.0]
TEACHER = [logs(1, 1, 2), FLAT, FLAT]
STUDENT = [logs(2, 1, 1), logs(1, 2, 1), FLAT]
# a prompt of one token 0, then the response 1, 2: predicted from 0 and from 1
BATCH = pack([([0], [1, 2])])


def test_the_loss_by_hand_on_three_tokens() -> None:
    def total(ratio: float, temperature: float, divergence: Any = ForwardKL()) -> float:  # noqa: B008
        return Distillation(Live(Table(TEACHER)), divergence, ratio, temperature, 3)(Table(STUDENT), BATCH).total.item()

    # from 0: p = (1/4, 1/4, 1/2), q = (1/2, 1/4, 1/4), so KL(p‖q) = -1/4·ln 2 + 1/2·ln 2
    # from 1: p = (1/3, 1/3, 1/3), q = (1/4, 1/2, 1/4), so KL(p‖q) = 2/3·ln(4/3) + 1/3·ln(2/3)
    forward = 0.25 * math.log(2) + 2 / 3 * math.log(4 / 3) + math.log(2 / 3) / 3
    assert total(1.0, 1.0) == pytest.approx(forward, rel=1e-12)
    # cross-entropy: q(1 | 0) = 1/4 and q(2 | 1) = 1/4
    assert total(0.0, 1.0) == pytest.approx(2 * math.log(4), rel=1e-12)
    assert total(0.3, 1.0) == pytest.approx(0.7 * 2 * math.log(4) + 0.3 * forward, rel=1e-12)
    # at T = 2 weights become their roots: from 0, p = (1, 1, √2)/(2+√2), q = (√2, 1, 1)/(2+√2);
    # from 1, p is flat and q = (1, √2, 1)/(2+√2)
    root = math.sqrt(2)
    softened = (root - 1) / (2 + root) * math.log(root) + math.log((2 + root) / 3) - math.log(root) / 3
    assert total(1.0, 2.0) == pytest.approx(4 * softened, rel=1e-12)
    # reverse, from 0: 1/2·ln 2 - 1/4·ln 2; from 1: 1/2·ln(3/4) + 1/2·ln(3/2)
    reverse = 0.25 * math.log(2) + 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
    assert total(1.0, 1.0, ReverseKL()) == pytest.approx(reverse, rel=1e-12)


def gradient(objective: Objective, batch: Batch = BATCH) -> Tensor:
    student = Table(STUDENT)
    objective(student, batch).total.backward()
    assert student.base_model.logits_VV.grad is not None
    return student.base_model.logits_VV.grad


def keeps_the_gradients_scale(scale: float) -> bool:
    """Hinton et al., section 2.1: at a high T the gradient tends to (z_q - z_p)/V, logits centred."""
    temperature = 1e4
    found = gradient(Distillation(Live(Table(TEACHER)), ForwardKL(), 1.0, temperature, 3)) * scale
    difference = torch.tensor(STUDENT[0], dtype=torch.float64) - torch.tensor(TEACHER[0], dtype=torch.float64)
    return torch.allclose(found[0], (difference - difference.mean()) / 3, rtol=1e-3, atol=1e-6)


def test_the_square_of_the_temperature_keeps_the_gradients_scale() -> None:
    assert keeps_the_gradients_scale(1.0)
    assert not keeps_the_gradients_scale(1e-8)  # the loss without T²


def test_forward_kl_has_the_gradient_of_the_teachers_cross_entropy() -> None:
    """The paper's eq. (3), -Σ p·log q, differs from the forward KL by the teacher's entropy alone."""
    teacher, student = Table(TEACHER), Table(STUDENT)
    positions = torch.tensor([0, 1])
    p = torch.softmax(teacher.base_model.logits_VV.detach()[positions], -1)
    value = -(p * torch.log_softmax(student.base_model.logits_VV[positions], -1)).sum()
    value.backward()
    objective = Distillation(Live(teacher), ForwardKL(), 1.0, 1.0, 3)
    torch.testing.assert_close(gradient(objective), student.base_model.logits_VV.grad)
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(value.detach(), objective(Table(STUDENT), BATCH).total.detach() + entropy)


def test_the_divergence_sees_no_padded_logits() -> None:
    wide = [[*row, 50.0] for row in TEACHER] + [[0.0] * 4]
    narrow = Distillation(Live(Table(TEACHER)), ForwardKL(), 1.0, 1.0, 3)(Table(STUDENT), BATCH)
    padded = Distillation(Live(Table(wide)), ForwardKL(), 1.0, 1.0, 3)(Table(STUDENT), BATCH)
    assert torch.equal(narrow.total, padded.total)
    moved = replace(BATCH, target_N=torch.tensor([0, 0]))
    assert torch.equal(Distillation(Live(Table(wide)), ForwardKL(), 1.0, 1.0, 3)(Table(STUDENT), moved).total, narrow.total)
