"""The fused head is the plain computation, in less memory, for every divergence as it stands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_parts import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.core.errors import UserError
from potstill.data.batches import pack
from potstill.divergences import Divergence
from potstill.edges.families import Logits
from potstill.losses.distillation import Distillation
from potstill.losses.head import CHUNK_BYTES, GPU_BYTES, Terms, chunk_bytes, fused_head, logit_chunks
from potstill.teachers.signals import Live

N, D, WIDE, V = 13, 6, 10, 17
KINDS = sorted(Divergence.kinds)
Fused = Callable[..., Any]


def parts(bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    hidden, head = torch.randn(N, D, dtype=dtype, requires_grad=True), nn.Linear(D, V, bias=bias, dtype=dtype)
    return (
        hidden,
        head,
        torch.randn(N, WIDE, dtype=dtype),
        nn.Linear(WIDE, V, bias=bias, dtype=dtype),
        torch.randint(0, V, (N,)),
    )


def terms_of(divergence: Any, target_N: Tensor, temperature: float = 2.0) -> Terms:
    def terms(logits_BV: Tensor, teacher_BV: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        assert teacher_BV is not None
        ce = F.cross_entropy(logits_BV, target_N[tokens], reduction="sum")
        logp_BV, logq_BV = (F.log_softmax(z / temperature, dim=-1) for z in (teacher_BV, logits_BV))
        found = divergence(logp_BV.detach(), logq_BV).sum()
        return 0.3 * ce + 0.7 * found, {"ce": ce.detach(), "divergence": found.detach()}

    return terms


def gradients(total: Tensor, hidden: Tensor, head: nn.Linear) -> list[Tensor]:
    wanted = [hidden, *head.parameters()]
    return list(torch.autograd.grad(total / 3, wanted))


def equals_plain(divergence: Any, fused: Fused = fused_head, bias: bool = False, chunk: int = 5, block: int = 2) -> bool:
    hidden, head, teacher_hidden, teacher_head, target_N = parts(bias)
    terms = terms_of(divergence, target_N)
    plain, shown = terms(head(hidden), teacher_head(teacher_hidden).detach(), slice(0, N))
    loss = fused(hidden, head, terms, teacher_hidden_ND=teacher_hidden, teacher_head=teacher_head, chunk=chunk, block=block)
    same = torch.allclose(loss.total, plain, rtol=1e-10) and all(
        torch.allclose(loss.parts[name], shown[name], rtol=1e-10) for name in shown
    )
    for a, b in zip(gradients(loss.total, hidden, head), gradients(plain, hidden, head), strict=True):
        same = same and torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    return same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (5, 2), (4, 100), (13, 13), (100, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_is_plain(kind: str, chunk: int, block: int, bias: bool) -> None:
    assert equals_plain(Divergence.parse(kind), bias=bias, chunk=chunk, block=block)


def test_the_law_rejects_a_head_that_forgets_the_last_chunk() -> None:
    def forgetful(hidden: Tensor, head: nn.Linear, terms: Terms, **more: Any) -> Any:
        teacher = more.pop("teacher_hidden_ND")
        return fused_head(hidden[: N - N % 5], head, terms, teacher_hidden_ND=teacher[: N - N % 5], **more)

    assert not equals_plain(Divergence.parse("forward_kl"), forgetful)


def test_a_tied_weight_gathers_both_gradients() -> None:
    torch.manual_seed(0)
    embedding, ids, target = nn.Embedding(V, D, dtype=torch.float64), torch.randint(0, V, (N,)), torch.randint(0, V, (N,))
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight

    def gradient(fused: bool) -> Tensor:
        hidden = embedding(ids).tanh()
        if fused:
            total = fused_head(
                hidden, head, lambda z, _, t: (F.cross_entropy(z, target[t], reduction="sum"), {}), chunk=4
            ).total
        else:
            total = F.cross_entropy(head(hidden), target, reduction="sum")
        return torch.autograd.grad(total, embedding.weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_capped_logits_are_capped_in_value_and_gradient(kind: str) -> None:
    """Gemma 2's final softcap, c·tanh(z / c), written out."""
    hidden, head, teacher_hidden, teacher_head, target_N = parts()
    terms = terms_of(Divergence.parse(kind), target_N)
    capped = [c * torch.tanh(z / c) for c, z in ((1.5, head(hidden)), (0.7, teacher_head(teacher_hidden).detach()))]
    plain, _ = terms(capped[0], capped[1], slice(0, N))
    teacher = {"teacher_hidden_ND": teacher_hidden, "teacher_head": teacher_head}
    loss = fused_head(
        hidden, head, terms, **teacher, form=Logits(softcap=1.5), teacher_form=Logits(softcap=0.7), chunk=4, block=3
    )
    torch.testing.assert_close(loss.total, plain, rtol=1e-10, atol=0)
    for a, b in zip(gradients(loss.total, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    uncapped = fused_head(hidden, head, terms, **teacher, teacher_form=Logits(softcap=0.7))
    assert not torch.isclose(uncapped.total, plain, rtol=1e-3)


def test_no_token_at_all_gives_zero_and_no_gradient() -> None:
    hidden, head, *_ = parts()
    loss = fused_head(hidden[:0], head, lambda z, _, t: (z.sum(), {}))
    loss.total.backward()
    assert loss.total == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize("free", [1 << 40, 100 << 20, 0])
def test_chunks_are_cut_by_the_kind_of_device_alone(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("potstill.edges.machine.free_memory", lambda device: free)
    assert chunk_bytes(torch.device("cpu")) == CHUNK_BYTES
    assert chunk_bytes(torch.device("cuda")) == GPU_BYTES


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, head, *_, target_N = parts()
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    loss = fused_head(hidden, head, lambda z, _, t: (F.cross_entropy(z, target_N[t], reduction="sum"), {}), chunk=4)
    torch.testing.assert_close(loss.total, F.cross_entropy(head(hidden), target_N, reduction="sum"))
    assert loss.total.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.total.backward()
    assert (hidden.grad is not None) == (frozen == "head")
    assert (head.weight.grad is not None) == (frozen == "hidden")


class Largest(TorchDispatchMode):
    """The most elements of any tensor made while it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, tuple | list) else [out]:
            if isinstance(found, Tensor):
                self.numel = max(self.numel, found.numel())
        return out


def test_nothing_of_tokens_times_vocabulary_is_ever_made() -> None:
    tokens, vocab = 512, 1000
    hidden, head = torch.randn(tokens, D, requires_grad=True), nn.Linear(D, vocab, bias=False)
    target = torch.randint(0, vocab, (tokens,))
    with Largest() as fused:
        fused_head(
            hidden, head, lambda z, _, t: (F.cross_entropy(z, target[t], reduction="sum"), {}), chunk=16
        ).total.backward()
    with Largest() as plain:
        F.cross_entropy(head(hidden), target, reduction="sum").backward()
    assert fused.numel <= 16 * vocab
    assert plain.numel == tokens * vocab


def test_half_precision_weights_give_float32_logits_and_losses() -> None:
    hidden, head, *_, target_N = parts(dtype=torch.bfloat16)
    seen = []

    def terms(logits_BV: Tensor, _: Tensor | None, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(logits_BV.dtype)
        return F.cross_entropy(logits_BV, target_N[tokens], reduction="sum"), {}

    loss = fused_head(hidden, head, terms, chunk=4)
    loss.total.backward()
    assert set(seen) == {torch.float32}
    assert loss.total.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    plain = F.cross_entropy(head(hidden).float(), target_N, reduction="sum")
    torch.testing.assert_close(loss.total, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_chunks_are_summed_in_the_weights_precision(bias: bool) -> None:
    hidden, head, *_, target_N = parts(bias, torch.float32)
    found = []
    for chunk in (N, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = fused_head(hidden, head, lambda z, _, t: (F.cross_entropy(z, target_N[t], reduction="sum"), {}), chunk=chunk)
        found.append([loss.total, *gradients(loss.total, hidden, head)])
    for whole, chunked in zip(*found, strict=True):
        assert whole.dtype == chunked.dtype == torch.float32
        torch.testing.assert_close(chunked, whole, rtol=1e-2, atol=1e-2)


def test_logits_by_chunk_are_the_logits() -> None:
    hidden, head, *_ = parts(bias=True)
    with torch.no_grad():
        chunks = list(logit_chunks(hidden, head, 4))
        assert [rows for rows, _ in chunks] == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]
        torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), head(hidden))


def test_a_kernel_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("qwen2", 40), pack([([1, 2], [3, 4])])
    objective = Distillation(Live(model), Divergence.parse("forward_kl"), 0.5, 1.0, 40)
    monkeypatch.setenv("POTSTILL_KERNEL", "cuda")
    with pytest.raises(UserError, match="POTSTILL_KERNEL=cuda: must be plain or triton"):
        objective(model, rows)
    monkeypatch.setenv("POTSTILL_KERNEL", "triton")
    monkeypatch.setattr("potstill.losses.distillation.find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package triton is not here"):
        objective(model, rows)
