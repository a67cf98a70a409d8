"""The GPU kernel is the plain objective: loss, parts and gradient, for every divergence that it knows.

On a GPU it runs as it is. `TRITON_INTERPRET=1 pytest tests/gpu/test_kernels.py` runs it in Triton's interpreter on any
machine that has the package triton, which says that its arithmetic is right, and nothing of its speed.
"""

import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_parts import chat_tokenizer, rows, tiny_model
from torch import Tensor

from potstill.core.types import Example
from potstill.data.batches import Batch, pack
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.divergences import Divergence
from potstill.losses.distillation import Distillation
from potstill.teachers.signals import Live

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHERE = torch.device("cpu" if INTERPRETED else "cuda")


def why_not() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch shows none; or TRITON_INTERPRET=1, for the interpreter"
    return None if find_spec("triton") else "needs the package triton, which builds of torch for CUDA bring along"


if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy, of lanes that the kernel then masks
]

C, V, VOCAB, BLOCK = 4, 5003, 4555, 2048  # several blocks, the last of them not full
INF = math.inf
KNOWN: list[Any] = [
    "forward_kl",
    "reverse_kl",
    "generalised_jsd",
    {"kind": "generalised_jsd", "beta": 0.1},
    "skew_kl",
    {"kind": "skew_kl", "alpha": 0.0},
    "skew_reverse_kl",
    {"kind": "skew_reverse_kl", "alpha": 0.0},
]
Found = tuple[Tensor, Tensor, Tensor]  # Σ w·CE, Σ w·D, the gradient
Change = Callable[[dict[str, Any]], dict[str, Any]]


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(C, V, generator=draw) + shift for shift in (1.0, -2.0))
    return student.to(WHERE, dtype), teacher.to(WHERE, dtype)


def targets() -> Tensor:
    return torch.tensor([0, 7, 40, 17], device=WHERE)


def weights() -> Tensor:
    return torch.tensor([1.0, 0.25, 3.0, 0.0], device=WHERE)


def defined(student: Tensor, teacher: Tensor, w: Tensor | None, divergence: Any, r: float, T: float, vocab: int) -> Found:
    """As the objective is written down, in float64 and by autograd."""
    z_CV = student.double().requires_grad_()
    w_C = torch.ones(C, device=WHERE).double() if w is None else w.double()
    logp_CV, logq_CV = (F.log_softmax(x[:, :vocab] / T, dim=-1) for x in (teacher.double(), z_CV))
    ce = (w_C * F.cross_entropy(z_CV, targets(), reduction="none")).sum()
    d = (w_C * Divergence.parse(divergence)(logp_CV, logq_CV)).sum()
    (slope_CV,) = torch.autograd.grad((1 - r) * ce + r * T**2 * d, z_CV)
    return ce.detach(), d.detach(), slope_CV


def by_kernel(
    student: Tensor,
    teacher: Tensor,
    w: Tensor | None,
    divergence: Any,
    r: float,
    T: float,
    vocab: int,
    change: Change = lambda words: words,
) -> Found:
    from potstill.losses.kernels import form_of, overwrite_by_gradient

    words = change({"form": form_of(Divergence.parse(divergence)), "ratio": r, "temperature": T, "vocab": vocab})
    slope_CV = student.clone()
    ce, d = overwrite_by_gradient(slope_CV, teacher, targets(), w, block=BLOCK, **words)
    return ce, d, slope_CV


def agree(found: Found, wanted: Found, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    return all(
        bool(a.isfinite().all()) and torch.allclose(a.double(), b, rtol=rtol, atol=max(atol, rtol * b.abs().max().item()))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("divergence", KNOWN, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab", [VOCAB, V])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_is_the_definition(divergence: Any, temperature: float, ratio: float, vocab: int, weighted: bool) -> None:
    words = (*logits(), weights() if weighted else None, divergence, ratio, temperature, vocab)
    assert agree(by_kernel(*words), defined(*words))


@pytest.mark.parametrize("divergence", KNOWN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_get_their_gradient_in_half_precision(divergence: Any, dtype: torch.dtype) -> None:
    words = (*logits(dtype), weights(), divergence, 0.5, 2.0, VOCAB)
    found, wanted = by_kernel(*words), defined(*words)
    assert found[2].dtype == dtype
    assert agree(found[:2], wanted[:2])  # type: ignore[arg-type]
    assert torch.allclose(found[2].double(), wanted[2], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("divergence", KNOWN, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("masked", [([2, 20], []), ([], [2, 20]), ([2, 20], [2, 20]), ([1], [39]), (list(range(16)), [52])])
def test_tokens_without_mass_are_floored_alike(divergence: Any, temperature: float, masked: tuple[list[int], ...]) -> None:
    student, teacher = logits()
    student[:, [v for v in masked[0] if v not in targets()]] = -INF  # a target without mass has an infinite cross-entropy
    teacher[:, masked[1]] = -INF
    words = (student, teacher, None, divergence, 0.5, temperature, VOCAB)
    assert agree(by_kernel(*words), defined(*words))


@pytest.mark.parametrize("divergence", KNOWN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_agree(divergence: Any, dtype: torch.dtype) -> None:
    up, down, flat = torch.full((C, V), -1e4), torch.full((C, V), 1e4), torch.zeros(C, V)
    up[:, 3], down[:, 3] = 1e4, -1e4
    for student in (up, down, flat):
        for teacher in (up, down, flat):
            words = (student.to(WHERE, dtype), teacher.to(WHERE, dtype), None, divergence, 0.5, 1.0, VOCAB)
            # float32 resolves these logarithms to 1e-3; plain PyTorch in float32 is off by as much
            assert agree(by_kernel(*words), defined(*words), 1e-2 if dtype == torch.bfloat16 else 1e-5, atol=3e-5)


def test_logits_may_lie_apart_and_the_teacher_be_wider() -> None:
    student, teacher = logits()
    wide = torch.full((C, V + 9), 50.0, device=WHERE)
    wide[:, :V] = student
    words = (None, "reverse_kl", 0.5, 2.0, VOCAB)
    from potstill.losses.kernels import form_of, overwrite_by_gradient

    more = {"form": form_of(Divergence.parse("reverse_kl")), "ratio": 0.5, "temperature": 2.0, "vocab": VOCAB, "block": BLOCK}
    ce, d = overwrite_by_gradient(wide[:, :V], F.pad(teacher, (0, 30), value=9.0), targets(), None, **more)
    assert agree((ce, d, wide[:, :V]), defined(student, teacher, *words))
    assert (wide[:, V:] == 50).all()


BROKEN: dict[str, Change] = {
    "sees padded logits": lambda words: {**words, "vocab": V},
    "forgets the temperature": lambda words: {**words, "temperature": 1.0},
    "turns the divergence round": lambda words: {**words, "form": mirrored(words["form"])},
}


def mirrored(form: Any) -> Any:
    from potstill.losses.kernels import Form

    return Form(form.of_q, form.of_p, 1 - form.share)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
def test_the_law_rejects_a_kernel_that(name: str, divergence: Any) -> None:
    words = (*logits(), None, divergence, 0.5, 2.0, VOCAB)
    assert not agree(by_kernel(*words, change=BROKEN[name]), defined(*words))


def batch() -> tuple[int, Batch]:
    tokenizer = chat_tokenizer()
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(3))]
    pairs = list(instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts()))
    return len(tokenizer), pack(pairs, [1.0, 0.5, 2.0]).to(WHERE)


@pytest.mark.parametrize("divergence", [*KNOWN[:3], "total_variation"], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_the_same_by_either(divergence: Any, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the objective and the fused head; a divergence without a kernel goes the plain way."""
    vocab, rows_of_it = batch()
    monkeypatch.setattr("potstill.losses.head.chunk_bytes", lambda _: 4 * vocab * 5)  # several chunks
    found = []
    for choice in ("plain", "triton"):
        monkeypatch.setenv("POTSTILL_KERNEL", choice)
        model, teacher = (tiny_model("qwen2", vocab, seed=seed).to(WHERE) for seed in (1, 2))
        objective = Distillation(Live(teacher), Divergence.parse(divergence), 0.5, 2.0, vocab - 5)
        with torch.autocast(WHERE.type, dtype=torch.bfloat16, enabled=autocast):
            loss = objective(model, rows_of_it)
        loss.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.total.detach(), loss.parts["ce"], loss.parts["divergence"], gradient))
    rtol = 1e-2 if autocast else 1e-5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())
