"""What only a GPU can show; elsewhere skipped, with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, rows, tiny_model

from potstill.core.errors import Interrupted
from potstill.core.types import Example
from potstill.data.batches import pack
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.adapters import add_lora
from potstill.edges.models import device
from potstill.edges.sampling import generate
from potstill.inits.width import Width
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.distillation import Distillation
from potstill.quant.int8 import int8_body
from potstill.teachers.signals import Live
from potstill.train.loop import Optim, fit
from potstill.train.work import CheckpointRules, Work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine shows torch none"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[Any]:
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(24))]
    return list(instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts()))


@pytest.fixture(scope="module")
def store(pairs: list[Any], tmp_path_factory: Any) -> TokenStore:
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, Counts(), "here")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_one_step_agrees_with_the_cpu(family: str, tokenizer: Any, pairs: list[Any]) -> None:
    found = []
    for where in (torch.device("cpu"), torch.device("cuda")):
        model, teacher = (tiny_model(family, len(tokenizer), seed=seed).to(where) for seed in (1, 2))
        loss = Distillation(Live(teacher), ForwardKL(), 0.5, 2.0, len(tokenizer))(model, pack(pairs[:6]).to(where)).total
        loss.backward()
        found.append((loss.item(), [p.grad.cpu() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * a.abs().max().item())


def test_fit_runs_in_bf16_over_float32_weights(tokenizer: Any, store: TokenStore, tmp_path: Path) -> None:
    model = tiny_model("qwen2", len(tokenizer)).to(device())
    work = Work(tmp_path, "here")
    fit(model, store, CrossEntropy(), Optim(lr=5e-3, steps=20, batch_size=8, precision="bf16"), work, seed=0)
    losses = [line["loss"] for line in work.metrics.read()]
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_stopped_run_goes_on_where_it_was(tokenizer: Any, store: TokenStore, tmp_path: Path) -> None:
    optim = Optim(steps=10, batch_size=4, precision="fp32")
    straight = tiny_model("gpt2", len(tokenizer), resid_pdrop=0.1).to(device())
    fit(straight, store, CrossEntropy(), optim, Work(tmp_path / "straight", "straight"), seed=1)
    calls = iter([False] * 5 + [True] + [False] * 99)
    work = Work(
        tmp_path / "broken",
        "broken",
        checkpoint=CheckpointRules(every_steps=4),
        stop_requested=lambda: next(calls),
    )
    with pytest.raises(Interrupted):
        fit(tiny_model("gpt2", len(tokenizer), resid_pdrop=0.1).to(device()), store, CrossEntropy(), optim, work, seed=1)
    resumed = tiny_model("gpt2", len(tokenizer), seed=9, resid_pdrop=0.1).to(device())
    fit(resumed, store, CrossEntropy(), optim, work, seed=1)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # some CUDA sums have no fixed order


def test_sampling_leaves_the_gpus_random_state_alone(tokenizer: Any, pairs: list[Any]) -> None:
    model = tiny_model("qwen2", len(tokenizer)).to(device())
    before = torch.cuda.get_rng_state()
    prompts = [prompt for prompt, _ in pairs[:4]]
    generate(model, tokenizer, prompts, stop_ids=[tokenizer.eos_token_id], max_new_tokens=4, temperature=1.0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_a_cut_and_adapted_student_learns_from_an_eight_bit_teacher(
    family: str, tokenizer: Any, store: TokenStore, tmp_path: Path
) -> None:
    teacher = tiny_model(family, len(tokenizer), seed=2).to(device(), torch.bfloat16).requires_grad_(False)
    student = Width(hidden_size=16, heads=2)(tiny_model(family, len(tokenizer), seed=1).to(device()))
    merge = add_lora(student, r=4, alpha=8.0, dropout=0.1, targets=("all-linear",), seed=0)
    objective = Distillation(int8_body(teacher), ForwardKL(), 0.5, 1.0, len(tokenizer))
    work = Work(tmp_path, "here")
    fit(student, store, objective, Optim(lr=1e-2, steps=20, batch_size=8, precision="bf16"), work, seed=0)
    merge()
    losses = [line["loss"] for line in work.metrics.read()]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in student.parameters()} == {torch.float32}
