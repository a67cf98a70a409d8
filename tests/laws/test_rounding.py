"""Weights that products in bfloat16 see are right in the mean, and small updates count from the first step on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, rows, tiny_model

from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.losses.cross_entropy import CrossEntropy
from potstill.train import loop
from potstill.train.loop import Optim, fit
from potstill.train.rounding import Rounded, restore, round_by_chance
from potstill.train.work import Work


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> TokenStore:
    examples = [Example(str(i), row["instruction"], row["response"], row["context"]) for i, row in enumerate(rows(24))]
    pairs = instruction_pairs(examples, Renderer(chat_tokenizer(), Prompts()), Counts())
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, Counts(), "here")


def drawn(values: torch.Tensor, times: int) -> torch.Tensor:
    """[times, values]"""
    generator = torch.Generator().manual_seed(0)
    found = values.expand(times, -1).clone()
    round_by_chance(found, torch.randint(1 << 16, (found.numel() // 2 + 1,), dtype=torch.int32, generator=generator))
    return found


def test_each_value_becomes_a_neighbour_and_in_the_mean_itself() -> None:
    values = torch.cat([torch.randn(40), torch.randn(20) * 1e-6, torch.tensor([0.0, -0.0, 1.0, -1.5, 3e38])])
    found = drawn(values, 20_000)
    down = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    up = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert bool(((found == down) | (found == up)).all())
    assert torch.equal(found.bfloat16().float(), found)
    spread = (up - down).abs()
    error = (found.double().mean(0) - values.double()).abs() / spread.double()
    assert float(error.max()) < 5 * 0.5 / 20_000**0.5  # five standard errors
    exact = values == down
    assert int(exact.sum()) == 4
    assert torch.equal(found[:, exact], values[exact].expand(20_000, -1))


def test_any_bits_come_back() -> None:
    """Half of the bits are kept aside; numbers that end before the values do are used again."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (7, 300), dtype=torch.int64, generator=generator).to(torch.int32)
    bits[0, :4] = torch.tensor([0x7FFFFFFF, -1, 0x7F7FFFFF, -(1 << 31)])  # NaN, the largest number, -0
    for count in (300, 7 * 300, 64):
        weight, low = bits.clone().view(torch.float32), torch.empty(7 * 300, dtype=torch.int16)
        numbers = torch.randint(1 << 16, (count,), dtype=torch.int32, generator=generator)
        round_by_chance(weight, numbers, low)
        assert not (weight.view(torch.int32) & 0xFFFF).any()
        restore(weight, numbers, low)
        assert torch.equal(weight.view(torch.int32), bits)


def test_the_model_is_as_before_afterwards() -> None:
    model = tiny_model("qwen2", 300).requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    rounded = Rounded(model, "7")
    seen = []
    for step in (0, 1, 0):
        with rounded.at(step):
            seen.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    pairs = [(a, b, c, p) for a, b, c, p in zip(*seen, before, strict=True) if p.ndim >= 2]
    assert pairs
    for first, second, again, exact in pairs:
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert not torch.equal(first, exact)
    norms = [(a, p) for a, p in zip(seen[0], before, strict=True) if p.ndim < 2]
    assert all(torch.equal(a, p) for a, p in norms), "autocast leaves them alone"


def test_small_updates_of_weights_that_came_in_bfloat16_are_seen(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training loss after steps of which each is a fraction of the weights' last bit; rounded to nearest they see nothing."""

    def last(precision: str) -> float:
        model = tiny_model("qwen2", len(chat_tokenizer()), seed=0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p * 4).bfloat16())
        optim = Optim(lr=3e-5, steps=12, batch_size=24, schedule="constant", precision=precision)  # pyright: ignore[reportArgumentType]
        folder = tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}"
        fit(model.requires_grad_(True), store, CrossEntropy(), optim, Work(folder, "here"), seed=5)
        lines = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return lines[0] - lines[-1]

    exact, seen = last("fp32"), last("bf16")
    monkeypatch.setattr(loop, "Rounded", lambda model, seed: None)
    to_nearest = last("bf16")
    assert abs(seen - exact) < 0.2 * exact
    assert to_nearest < 0.7 * exact
