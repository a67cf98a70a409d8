"""Eight-bit weights of a frozen model: how far each may be off, and how far the model is then."""

import copy
from typing import Any

import pytest
import torch
from tiny_parts import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.quant.int8 import Int8Linear, int8_body

IDS_BT = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(0))
FAMILIES = ("qwen2", "llama", "gpt2")


def model_of(family: str) -> Any:
    return tiny_model(family, 97, width=64)


def matrices(model: Any) -> dict[str, Tensor]:
    """Linear weights of the body as [out, in], by name."""
    return {
        name: (layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).detach()
        for name, layer in model.base_model.named_modules()
        if type(layer).__name__ in ("Linear", "Conv1D")
    }


def held(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def within_half_a_step(layer: Int8Linear, weight_OI: Tensor) -> bool:
    step_O1 = (weight_OI.double().abs().amax(1) / 127)[:, None]
    error_OI = (layer.codes_OI.double() * layer.scale_O.double()[:, None] - weight_OI.double()).abs()
    return bool((error_OI <= step_O1 / 2 * (1 + 1e-5)).all())


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    weight_OI = torch.randn(31, 50) * torch.logspace(-6, 3, 31)[:, None]
    layer = Int8Linear(weight_OI, None)
    assert within_half_a_step(layer, weight_OI)
    assert int(layer.codes_OI.abs().amax()) == 127
    layer.codes_OI = layer.codes_OI.roll(1, 0)
    assert not within_half_a_step(layer, weight_OI), "the law rejects rows that changed places"


def test_small_whole_numbers_are_exact() -> None:
    weight_OI = torch.randint(-126, 127, (8, 24)).float()
    weight_OI[:, 0] = 127
    layer, x = Int8Linear(weight_OI, torch.arange(8.0)), torch.randint(-9, 10, (5, 24)).float()
    assert torch.equal(layer(x), F.linear(x, weight_OI, torch.arange(8.0)))


def test_a_row_of_zeros_stays_one() -> None:
    layer = Int8Linear(torch.zeros(2, 3), None)
    assert torch.equal(layer(torch.ones(1, 3)), torch.zeros(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_is_rounded_and_all_else_stays(family: str) -> None:
    model = model_of(family)
    before, embedding, head = matrices(model), model.get_input_embeddings(), model.get_output_embeddings()
    kept = embedding.weight.detach().clone()
    made = int8_body(model)
    layers = {name: layer for name, layer in made.base_model.named_modules() if isinstance(layer, Int8Linear)}
    assert set(layers) == set(before)
    assert matrices(made) == {}
    assert all(within_half_a_step(layer, before[name]) for name, layer in layers.items())
    assert made.get_output_embeddings() is head
    assert type(head) is nn.Linear
    assert torch.equal(made.get_input_embeddings().weight, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_takes_about_a_quarter(family: str) -> None:
    blocks, model = "h" if family == "gpt2" else "layers", tiny_model(family, 97, width=256)
    before = held(getattr(model.base_model, blocks))
    assert held(getattr(int8_body(model).base_model, blocks)) < 0.27 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_distribution_hardly_moves(family: str, dtype: torch.dtype) -> None:
    """Measured: 5e-5 to 1.7e-4 nats per token, where the distributions have an entropy of 4.2."""
    model = model_of(family)
    made = int8_body(copy.deepcopy(model).to(dtype))
    with torch.no_grad():
        p, q = (F.log_softmax(m(IDS_BT).logits.double(), -1) for m in (model, made))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < 5e-4


def test_it_moves_to_another_precision_with_its_codes() -> None:
    made = int8_body(model_of("qwen2")).to(torch.bfloat16)
    assert {b.dtype for name, b in made.named_buffers() if name.endswith("codes_OI")} == {torch.int8}
    assert made(IDS_BT).logits.dtype == torch.bfloat16
